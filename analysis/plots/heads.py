"""Figures of `analysis.stages` that tell heads apart, and attention from what it writes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..statistics.bands import Band
from .style import (
    ANSWER_SERIES,
    ATTENTION_SERIES,
    CYCLE,
    Summary,
    add_legend,
    draw_band,
    figure_style,
    layer_axis,
    plain_logarithm,
    sample_note,
    share_axis,
    title_of,
)

CONTRIBUTION_SERIES = {
    "cross": ATTENTION_SERIES["cross"].named("into the question"),
    "visual": ATTENTION_SERIES["visual"].named("into the image"),
    "answer_cross": ANSWER_SERIES.named("into the answer"),
}


def draw_contributions(summary: Summary) -> Figure:
    """Attention on the image beside the image's share of what attention writes, and how much it writes."""
    found = summary["contributions"]["bands"]
    with figure_style():
        figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.9), layout="constrained")
        for axis, bands in zip(
            axes, (summary["bands"]["mass"], found["contribution_share"], found["contribution_norm"]), strict=True
        ):
            for name, series in CONTRIBUTION_SERIES.items():
                if name in bands:
                    band = Band.from_dict(bands[name])
                    draw_band(axis, np.arange(len(band.mean)), band, series)
            layer_axis(axis, summary["num_layers"])
        share_axis(axes[0])
        axes[0].set_ylabel("attention on the image (looking)")
        axes[1].yaxis.set_major_formatter("{x:.0%}")
        axes[1].set_ylabel("image's share of what attention writes")
        plain_logarithm(axes[2])  # the first layer often writes a hundred times what the others do
        axes[2].set_ylabel("what the image writes,\nnorm over that of the residual stream")
        figure.suptitle(f"Looking at the image, and what it writes: {title_of(summary)}")
        add_legend(figure, axes[0], sample_note(summary))
        return figure


def draw_heads(summary: Summary) -> Figure:
    """Which heads look at the image, and how many of a layer's heads look at it and carry the curve."""
    heads = summary["heads"]
    mass = np.array(heads["mass"], dtype=float)
    with figure_style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.1), layout="constrained")
        shown = left.imshow(mass.T, cmap="rocket_r", vmin=0, aspect="auto", interpolation="nearest", origin="lower")
        figure.colorbar(shown, ax=left, format="{x:.0%}").set_label("attention of the question on the image")
        layer_axis(left, summary["num_layers"])
        left.set_ylabel("head")
        left.yaxis.get_major_locator().set_params(integer=True)
        left.set_title("dot: more than even spread, without the sink", fontsize=9)
        layers, numbers = np.nonzero(np.array(heads["enrichment"], dtype=float) > 1)
        left.plot(layers, numbers, ".", color="white", markeredgecolor="black", markeredgewidth=0.5, markersize=5)
        part = f"{heads['carried']:.0%}"
        series = {"looking": CYCLE[0].named("look at the image more than even spread")}
        series |= {"carrying": CYCLE[1].named(f"fewest that carry {part} of the layer's attention on it")}
        for name, line in series.items():
            band = Band.from_dict(heads[name])
            draw_band(right, np.arange(len(band.mean)), band, line)
        layer_axis(right, summary["num_layers"])
        share_axis(right)
        right.set_ylabel("share of the layer's heads")
        figure.suptitle(f"Heads that look at the image: {title_of(summary)}")
        add_legend(figure, right, sample_note(summary), 2)
        return figure
