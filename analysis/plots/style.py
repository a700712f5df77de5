"""One style for every figure, readable in black and white: each series has its own line style and marker.

Text from data is never read as markup (a `$` is a dollar), and scripts that the first font lacks are drawn with
whatever font is installed for them.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter
from PIL import Image

from ..statistics.bands import Band

matplotlib.use("agg")
logging.getLogger("fontTools").setLevel(logging.WARNING)  # Hydra shows INFO, and a PDF makes a hundred such lines

Summary = Mapping[str, Any]
"""A `summary.json`."""
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Unifont")
DASHED = (0, (4, 2))
GREY = "#888888"


@dataclass(frozen=True)
class Series:
    """How one line is drawn."""

    label: str
    color: str
    linestyle: str | tuple[int, tuple[float, ...]]
    marker: str

    def named(self, label: str) -> Series:
        """The same line under another name."""
        return replace(self, label=label)


# Dark, medium and light: the first three stay apart in grey as well.
CYCLE = [
    Series("", "#1f3a5f", "-", "o"),
    Series("", "#c65911", (0, (5, 1.5)), "s"),
    Series("", "#7fa650", (0, (1.5, 1.2)), "^"),
    Series("", "#8064a2", (0, (5, 1.5, 1, 1.5)), "D"),
    Series("", "#444444", (0, (3, 1, 1, 1, 1, 1)), "v"),
    Series("", "#2a9d8f", (0, (8, 2)), "P"),
    Series("", "#b5838d", (0, (1, 2)), "X"),
]
"""Take them in this order and give each its label."""
ATTENTION_SERIES = {
    "cross": CYCLE[0].named("cross-modal (question → image)"),
    "visual": CYCLE[1].named("visual (image → image)"),
    "text": CYCLE[2].named("text (question → text)"),
}
ANSWER_SERIES = CYCLE[3].named("answer → image")
ENRICHMENT_NO_SINK = "attention without the sink,\ntimes even spread (= 1)"
BANDS_NOTE = "bands: 95% bootstrap over images"


@contextmanager
def figure_style() -> Iterator[None]:
    """The look of every figure, for a `with` statement around everything that draws."""
    installed = set(fontManager.get_font_names())
    settings = {
        "figure.dpi": 100,
        "savefig.dpi": 160,
        "font.family": [font for font in FONTS if font in installed],
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
        "text.parse_math": False,
    }
    with sns.axes_style("ticks"), sns.plotting_context("paper"), plt.rc_context(settings):
        yield


@contextmanager
def new_figure(*grid: int, **settings: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes (`plt.subplots`), in the look of every figure while the block draws."""
    with figure_style():
        yield plt.subplots(*grid, layout="constrained", **settings)


def png_of(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG, whatever backend is in use; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    """The content of a file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def data_address(picture: Image.Image, **settings: Any) -> str:
    """A picture as an address that holds it as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png", **settings)
    return data_url(buffer.getvalue())


def wrapped(text: str, width: int, lines: int = 2) -> str:
    """`text` in lines of at most `width` characters, cut short after so many lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def title_of(summary: Summary) -> str:
    """Model and data."""
    return wrapped(f"{summary['model']} on {summary['data']}", 70)


def size_in_words(group: Summary, counted: str = "num_samples") -> str:
    """Questions and images of a group, for the line under its figure."""
    return f"{group[counted]:,} questions on {group['num_images']:,} images"


def sample_note(group: Summary, bands: str = BANDS_NOTE) -> str:
    """The sentence that every figure with bands carries."""
    return f"n = {size_in_words(group)}; {bands}"


def draw_line(axis: Axes, x: npt.ArrayLike, y: npt.ArrayLike, series: Series, markevery: int = 1) -> None:
    """A line; its markers, on every `markevery`-th point, tell it apart in grey."""
    look: dict[str, Any] = {"color": series.color, "linestyle": series.linestyle, "marker": series.marker}
    axis.plot(x, y, label=series.label, markevery=markevery, markeredgecolor="white", markeredgewidth=0.5, **look)


def draw_band(axis: Axes, band: Band | Mapping[str, Any], series: Series, x: npt.ArrayLike | None = None) -> None:
    """A line with its confidence band and about twelve markers.

    Args:
        band: [n], or what a summary stores of one.
        x: [n]; counts from 0 by default.
    """
    band = band if isinstance(band, Band) else Band.from_dict(band)
    x = np.arange(len(band.mean)) if x is None else np.asarray(x)
    axis.fill_between(x, band.low, band.high, color=series.color, alpha=0.22, linewidth=0)
    draw_line(axis, x, band.mean, series, max(1, len(x) // 12))


def layer_axis(axis: Axes, num_layers: int, label: str = "decoder layer", ticks: int = 12) -> None:
    """Whole numbers on an x axis that counts layers from 0."""
    axis.set_xlabel(label)
    axis.set_xlim(-0.5, num_layers - 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, min_n_ticks=1))


def share_axis(axis: Axes, low: float = 0.0) -> None:
    """A y axis of shares, in percent."""
    axis.set_ylim(low, 1.05)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def plain_logarithm(axis: Axes) -> None:
    """A logarithmic y axis whose numbers are no markup."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def ratio_axis(axis: Axes) -> None:
    """A logarithmic y axis with a line at 1, the neutral value.

    It never zooms in on less than a fifth around 1, where a flat curve would look like structure.
    """
    axis.axhline(1.0, color=GREY, linewidth=0.8, zorder=0)
    plain_logarithm(axis)
    low, high = axis.get_ylim()
    low, high = min(low, 0.8), max(high, 1.25)
    if high / low < 2.2:
        ticks = [each / 10 for each in range(1, 100)]
    else:
        steps = (1, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low, high)


def cell_ticks(axis: Axes, cells: int, most: int = 12) -> npt.NDArray[np.int64]:
    """Mark the columns of a heat map by their numbers, of many only some; returns those that are marked."""
    ticks = np.arange(0, cells, max(1, math.ceil(cells / most)))
    axis.set_xticks(ticks + 0.5, ticks.astype(str), rotation=0)
    return ticks


@contextmanager
def kind_panels(
    kinds: Mapping[str, Summary], columns: int, size: tuple[float, float], rest: float, num_ticks: int, xlabel: str
) -> Iterator[tuple[Figure, dict[str, Axes]]]:
    """Empty panels on one scale, one a question kind, with `xlabel` under the last of each column; as `new_figure`.

    Args:
        kinds: kind -> what a summary says of it.
        size, rest: width and height of a panel, and height of title and legend, in inches.
        num_ticks: the x axes count from 0 to one less.

    Yields:
        The figure, and kind -> panel.
    """
    rows = math.ceil(len(kinds) / columns)
    whole = (max(size[0] * columns, 5.0), size[1] * rows + rest)
    with new_figure(rows, columns, figsize=whole, sharex=True, sharey=True, squeeze=False) as (figure, axes):
        for axis in axes.flat[len(kinds) :]:
            axis.set_visible(False)
        panels = dict(zip(kinds, axes.flat, strict=False))
        for index, (kind, axis) in enumerate(panels.items()):
            last_in_column = index + columns >= len(kinds)
            name = f"{kind.replace('_', ' ')} (n = {kinds[kind]['num_samples']:,})"
            axis.set_title(wrapped(name, int(10 * size[0]), lines=3), fontsize=9)
            layer_axis(axis, num_ticks, xlabel if last_in_column else "", ticks=6)
            axis.tick_params(labelbottom=last_in_column)
        yield figure, panels


def add_legend(figure: Figure, axis: Axes, footnote: str, columns: int = 3) -> None:
    """The legend of `axis` under the figure, headed by sample size and what the bands mean."""
    handles, labels = axis.get_legend_handles_labels()
    labels = [wrapped(label, 60) for label in labels]
    widest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    # characters of the small font, and the line of each entry
    fitting = int(12 * figure.get_figwidth()) // (widest + 8)
    title = wrapped(footnote, int(15 * figure.get_figwidth()), lines=3)
    layout = {"loc": "outside lower center", "ncols": max(1, min(columns, fitting)), "handlelength": 3}
    figure.legend(handles, labels, columnspacing=1.2, title=title, title_fontsize=8, **layout)
