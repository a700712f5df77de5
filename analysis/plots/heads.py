"""Figures of `analysis.stages` that tell heads, frames of a video, and attention and what it writes apart."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from . import style

CONTRIBUTION_SERIES = {
    "cross": style.ATTENTION_SERIES["cross"].named("into the question"),
    "visual": style.ATTENTION_SERIES["visual"].named("into the image"),
    "answer_cross": style.ANSWER_SERIES.named("into the answer"),
}


def draw_contributions(summary: style.Summary) -> Figure:
    """Attention on the image beside the image's share of what attention writes, and how much it writes."""
    found = summary["contributions"]["bands"]
    with style.new_figure(1, 3, figsize=(9.8, 3.9)) as (figure, axes):
        shown = (summary["bands"]["mass"], found["contribution_share"], found["contribution_norm"])
        for axis, bands in zip(axes, shown, strict=True):
            for name, series in CONTRIBUTION_SERIES.items():
                if name in bands:
                    style.draw_band(axis, bands[name], series)
            style.layer_axis(axis, summary["num_layers"])
        style.share_axis(axes[0])
        axes[0].set_ylabel("attention on the image (looking)")
        axes[1].yaxis.set_major_formatter("{x:.0%}")
        axes[1].set_ylabel("image's share of what attention writes")
        style.plain_logarithm(axes[2])  # the first layer often writes a hundred times what the others do
        axes[2].set_ylabel("what the image writes,\nnorm over that of the residual stream")
        figure.suptitle(f"Looking at the image, and what it writes: {style.title_of(summary)}")
        style.add_legend(figure, axes[0], style.sample_note(summary))
        return figure


def draw_heads(summary: style.Summary) -> Figure:
    """Which heads look at the image, and how many of a layer's heads look at it and carry the curve."""
    heads = summary["heads"]
    mass = np.array(heads["mass"], dtype=float)
    with style.new_figure(1, 2, figsize=(9.6, 4.1)) as (figure, (left, right)):
        shown = left.imshow(mass.T, cmap="rocket_r", vmin=0, aspect="auto", interpolation="nearest", origin="lower")
        figure.colorbar(shown, ax=left, format="{x:.0%}").set_label("attention of the question on the image")
        style.layer_axis(left, summary["num_layers"])
        left.set_ylabel("head")
        left.yaxis.get_major_locator().set_params(integer=True)
        left.set_title("dot: more than even spread, without the sink", fontsize=9)
        layers, numbers = np.nonzero(np.array(heads["enrichment"], dtype=float) > 1)
        left.plot(layers, numbers, ".", color="white", markeredgecolor="black", markeredgewidth=0.5, markersize=5)
        part = f"{heads['carried']:.0%}"
        series = {"looking": style.CYCLE[0].named("look at the image more than even spread")}
        series |= {"carrying": style.CYCLE[1].named(f"fewest that carry {part} of the layer's attention on it")}
        for name, line in series.items():
            style.draw_band(right, heads[name], line)
        style.layer_axis(right, summary["num_layers"])
        style.share_axis(right)
        right.set_ylabel("share of the layer's heads")
        figure.suptitle(f"Heads that look at the image: {style.title_of(summary)}")
        style.add_legend(figure, right, style.sample_note(summary), 2)
        return figure


MOST_NUMBERS = 240
"""Cells, at most, that have their number written in them."""


def draw_frames(summary: style.Summary) -> Figure:
    """The share of each frame in each layer, relative to an even share (1)."""
    found = summary["frames"]
    relative = np.array(found["share"]["mean"], dtype=float) * found["frames"]  # [L, F]
    layers, frames = relative.shape
    top = max(float(np.nanmax(relative)), 2.0)
    size = (max(5.4, 0.36 * layers + 1.8), max(2.4, 0.36 * frames + 1.7))
    with style.new_figure(figsize=size) as (figure, axis):
        shown = axis.imshow(relative.T, cmap="rocket_r", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        if layers * frames <= MOST_NUMBERS:
            for (layer, frame), value in np.ndenumerate(relative):
                if np.isfinite(value):
                    colour = "white" if value > top / 2 else "black"
                    axis.text(layer, frame, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=7)
        style.layer_axis(axis, layers)
        axis.set_ylabel("frame (1 = first)")
        axis.set_yticks(range(frames), [str(frame + 1) for frame in range(frames)])
        figure.colorbar(shown, ax=axis).set_label("share of the frame,\ntimes an even share (= 1)", fontsize=8)
        note = f"attention of the prompt's last token on the video, n = {found['num_videos']:,} videos"
        if found["left_out"]:
            note += f"; left out, of another length: {found['left_out']:,}"
        axis.set_title(style.wrapped(f"Which frame is looked at: {style.title_of(summary)}", 60))
        figure.supxlabel(style.wrapped(note, int(14 * size[0])), fontsize=8)
        return figure
