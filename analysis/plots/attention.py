"""Figures in one style, readable in black and white: every series has its own line style and marker.

Functions take plain arrays (what `summary.json` holds) and return a matplotlib figure; nothing is computed here.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from ..statistics.bands import Band

matplotlib.use("agg")


@dataclass(frozen=True)
class Series:
    """How one line is drawn."""

    label: str
    color: str
    linestyle: str | tuple[int, tuple[float, ...]]
    marker: str


# Dark, medium and light: the three stay apart in grey as well.
SERIES = {
    "cross": Series("cross-modal (question → image)", "#1f3a5f", "-", "o"),
    "visual": Series("visual (image → image)", "#c65911", (0, (5, 1.5)), "s"),
    "text": Series("text (question → text)", "#7fa650", (0, (1.5, 1.2)), "^"),
}
ANSWER = Series("answer → image", "#8064a2", (0, (5, 1.5, 1, 1.5)), "D")
CYCLE = [
    Series("", "#1f3a5f", "-", "o"),
    Series("", "#c65911", (0, (5, 1.5)), "s"),
    Series("", "#7fa650", (0, (1.5, 1.2)), "^"),
    Series("", "#8064a2", (0, (5, 1.5, 1, 1.5)), "D"),
    Series("", "#444444", (0, (3, 1, 1, 1, 1, 1)), "v"),
    Series("", "#2a9d8f", (0, (8, 2)), "P"),
    Series("", "#b5838d", (0, (1, 2)), "X"),
]
"""For figures with other series: take them in this order and give each its label."""

MEASURES = {
    "mass": "attention mass",
    "mean_score": "mean attention score\nper allowed pair",
    "enrichment": "enrichment\n(uniform attention = 1)",
}
ENRICHMENT_NO_SINK = "enrichment without the sink\n(uniform attention = 1)"
BANDS = "bands: 95% bootstrap over images"
STAGES = ("early fusion", "intra-modality\nmodelling", "multimodal\nreasoning")


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure; use as `with plots.style():`."""
    settings = {
        "figure.dpi": 100,
        "savefig.dpi": 160,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "pdf.fonttype": 42,
    }
    with sns.axes_style("ticks"), sns.plotting_context("paper"), plt.rc_context(settings):
        yield


def draw_line(axis: Axes, x: npt.ArrayLike, y: npt.ArrayLike, series: Series, markevery: int = 1) -> None:
    """A line; its markers, on every `markevery`-th point, tell it apart in grey."""
    axis.plot(
        x,
        y,
        color=series.color,
        linestyle=series.linestyle,
        marker=series.marker,
        markevery=markevery,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=series.label,
    )


def draw_band(axis: Axes, x: npt.ArrayLike, band: Band, series: Series) -> None:
    """A line with its confidence band and about twelve markers."""
    x = np.asarray(x)
    axis.fill_between(x, band.low, band.high, color=series.color, alpha=0.22, linewidth=0)
    draw_line(axis, x, band.mean, series, max(1, len(x) // 12))


def layer_axis(axis: Axes, num_layers: int, label: str = "decoder layer", ticks: int = 12) -> None:
    """Whole numbers on an x axis that counts layers from 0."""
    axis.set_xlabel(label)
    axis.set_xlim(-0.5, num_layers - 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, min_n_ticks=1))


def ratio_axis(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers, for quantities whose neutral value is 1.

    It never zooms in on less than a fifth around 1, where a flat curve would look like structure.
    """
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    low, high = min(low, 0.8), max(high, 1.25)
    if high / low < 2.2:
        ticks = [each / 10 for each in range(1, 100)]
    else:
        steps = (1, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(low, high)


def kind_panels(
    counts: Mapping[str, int], columns: int, size: tuple[float, float], rest: float, num_ticks: int, xlabel: str
) -> tuple[Figure, dict[str, Axes]]:
    """Empty panels on one scale, one a question kind, with `xlabel` under the last of each column.

    Args:
        counts: kind -> number of questions.
        columns: panels side by side.
        size: width and height of a panel in inches.
        rest: height of title and legend in inches.
        num_ticks: the x axes count from 0 to one less.
        xlabel: what they count.

    Returns:
        The figure, and kind -> panel.
    """
    rows = math.ceil(len(counts) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(size[0] * columns, 5.0), size[1] * rows + rest),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(counts) :]:
        axis.set_visible(False)
    panels = dict(zip(counts, axes.flat, strict=False))
    for index, (kind, axis) in enumerate(panels.items()):
        last_in_column = index + columns >= len(counts)
        axis.set_title(f"{kind.replace('_', ' ')} (n = {counts[kind]:,})")
        layer_axis(axis, num_ticks, xlabel if last_in_column else "", ticks=6)
        axis.tick_params(labelbottom=last_in_column)
    return figure, panels


def legend(figure: Figure, axis: Axes, footnote: str, columns: int = 3) -> None:
    """The legend of `axis` under the figure, headed by sample size and what the bands mean."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        handlelength=3,
        columnspacing=1.2,
        title=footnote,
        title_fontsize=8,
    )


def band_note(num_samples: int, num_images: int, level: float = 0.95) -> str:
    """The sentence that every figure with bands carries."""
    return f"n = {num_samples:,} questions on {num_images:,} images; bands: {level:.0%} bootstrap over images"


# --------------------------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------------------------


def stages(curves: Mapping[str, Band], verdict: Mapping[str, Any], title: str, footnote: str) -> Figure:
    """The three curves of one measure over layers, with the stages where they were found.

    Args:
        curves: series (`cross`, `visual`, `text`) -> enrichment without the sink, `[L]`.
        verdict: `stages` of the summary: `verdict`, `boundaries`, `boundaries_ci`.
        title: model and data.
        footnote: from :func:`band_note`.
    """
    with style():
        figure, axis = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
        num_layers = len(curves["cross"].mean)
        for name, series in SERIES.items():
            draw_band(axis, np.arange(num_layers), curves[name], series)
        axis.axhline(1.0, color="#888888", linewidth=0.8, zorder=0)
        layer_axis(axis, num_layers)
        ratio_axis(axis)
        axis.set_ylabel(ENRICHMENT_NO_SINK)
        boundaries = verdict.get("boundaries")
        if boundaries:
            edges = [0, *boundaries, num_layers]
            for low, high in verdict["boundaries_ci"]:
                axis.axvspan(low - 0.5 - 0.04, high - 0.5 + 0.04, color="#999999", alpha=0.25, linewidth=0, zorder=0)
            for boundary in boundaries:
                axis.axvline(boundary - 0.5, color="black", linewidth=1, linestyle=(0, (4, 2)))
            for start, stop, name in zip(edges, edges[1:], STAGES, strict=False):
                middle = (start + stop - 1) / 2
                axis.annotate(
                    name, (middle, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8.5
                )
            axis.set_title(title, pad=28)
        else:
            axis.set_title(f"{title}\nno three-stage finding (verdict: {verdict['verdict']})")
        legend(figure, axis, footnote)
        return figure


def measures(curves: Mapping[str, Mapping[str, Band]], title: str, footnote: str) -> Figure:
    """Mass, mean score and enrichment (columns), with and without the attention sink (rows).

    Args:
        curves: `mass`, `mean_score`, `enrichment`, each also as `<measure>_no_sink` -> series -> `[L]`; a series
            `answer_cross` is drawn where there is one.
    """
    with style():
        figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.2), layout="constrained", sharex=True, sharey="col")
        for column, (measure, label) in enumerate(MEASURES.items()):
            for row, suffix in enumerate(("", "_no_sink")):
                axis = axes[row, column]
                bands = curves[measure + suffix]
                num_layers = len(bands["cross"].mean)
                for name, series in {**SERIES, "answer_cross": ANSWER}.items():
                    if name in bands:
                        draw_band(axis, np.arange(num_layers), bands[name], series)
                layer_axis(axis, num_layers, "decoder layer" if row else "")
                axis.set_ylabel(f"{label}\n{'without the sink' if row else 'with the sink'}")
                axis.tick_params(labelleft=True)
            if measure == "mass":
                axes[0, column].set_ylim(-0.03, 1.03)
            elif measure == "mean_score":
                axes[0, column].set_ylim(bottom=0)
            else:
                for axis in axes[:, column]:
                    axis.axhline(1.0, color="#888888", linewidth=0.8, zorder=0)
                    ratio_axis(axis)
        figure.suptitle(title)
        legend(figure, axes[0, 0], footnote, 4)
        return figure


def small_multiples(
    curves: Mapping[str, Mapping[str, Band]], counts: Mapping[str, int], title: str, footnote: str
) -> Figure:
    """Enrichment without the sink, one panel a question kind, all on the same scale.

    Args:
        curves: kind -> series -> `[L]`.
        counts: kind -> number of questions.
    """
    with style():
        num_layers = len(next(iter(curves.values()))["cross"].mean)
        columns = min(math.ceil(math.sqrt(len(curves))), 4)
        figure, panels = kind_panels(counts, columns, (2.8, 2.1), 0.6, num_layers, "decoder layer")
        for kind, axis in panels.items():
            for name, series in SERIES.items():
                draw_band(axis, np.arange(num_layers), curves[kind][name], series)
            axis.axhline(1.0, color="#888888", linewidth=0.8, zorder=0)
        for axis in panels.values():
            ratio_axis(axis)
        figure.supylabel(ENRICHMENT_NO_SINK, fontsize=9)
        figure.suptitle(title)
        legend(figure, axis, footnote, 3 if columns > 2 else 1)
        return figure


def relative_maps(maps: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Attention on each patch `[L, rows, columns]` relative to its even spread over the image (1)."""
    maps = np.asarray(maps, dtype=np.float64)
    total = maps.sum((1, 2), keepdims=True)
    return np.divide(maps, total, out=np.zeros_like(maps), where=total > 0) * maps[0].size


def darkest(relative: npt.NDArray[np.float64]) -> float:
    """The relative attention drawn darkest: near the largest, and at least 4, so that nearly even attention is pale."""
    return max(float(np.quantile(relative, 0.995)), 4.0)


def attention_maps(
    image: npt.NDArray[Any], maps: npt.ArrayLike, mass: Sequence[float], caption: str, footnote: str
) -> Figure:
    """Where one token looks, layer by layer, laid over the image.

    Args:
        image: `[height, width, 3]`, 0 to 255 or 0 to 1, as the model saw it.
        maps: `[L, rows, columns]`, attention on each visual token.
        mass: for each layer the sum over all visual tokens, shown as a percentage.
        caption: question and answer.
    """
    relative = relative_maps(maps)
    num_layers, top = len(relative), darkest(relative)
    with style():
        columns = min(num_layers + 1, max(5, math.ceil(math.sqrt(1.7 * (num_layers + 1)))))
        rows = math.ceil((num_layers + 1) / columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(1.35 * columns + 0.7, 1.55 * rows + 0.7), layout="constrained", squeeze=False
        )
        height, width = image.shape[:2]
        grey = image.mean(2, keepdims=True).repeat(3, 2)
        faded = 0.35 + 0.65 * grey / max(float(grey.max()), 1e-9)
        for axis in axes.flat:
            axis.set_axis_off()
        axes.flat[0].imshow(image)
        axes.flat[0].set_title("image", fontsize=8.5)
        for layer in range(num_layers):
            axis = axes.flat[layer + 1]
            axis.imshow(faded, extent=(0, width, height, 0), vmin=0, vmax=1)
            axis.imshow(
                relative[layer],
                extent=(0, width, height, 0),
                cmap="rocket_r",
                alpha=np.clip(relative[layer] / top, 0, 1) ** 0.75,
                vmin=0,
                vmax=top,
                interpolation="nearest",
            )
            axis.set_title(f"layer {layer}: {mass[layer]:.0%}", fontsize=8.5)
        scale = plt.cm.ScalarMappable(plt.Normalize(0, top), "rocket_r")
        bar = figure.colorbar(scale, ax=axes, shrink=0.75, pad=0.015, aspect=30)
        bar.set_label("attention per patch\n(even spread over the image = 1)")
        width_in_characters = int(12 * figure.get_figwidth())
        lines = [textwrap.shorten(line, 2 * width_in_characters, placeholder=" …") for line in caption.splitlines()]
        figure.suptitle("\n".join(textwrap.fill(line, width_in_characters) for line in lines), fontsize=9.5)
        figure.supxlabel(footnote, fontsize=8)
        return figure
