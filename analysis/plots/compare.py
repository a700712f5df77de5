"""Figures that put several models into one plot, whatever their numbers of layers: depth is a share of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from . import style
from .exits import QUALITY_LABELS, known_quality


def depth_axis(axis: Axes, label: str) -> None:
    """An x axis that counts depth in percent of the decoder."""
    axis.set_xlim(-0.02, 1.02)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel(label)


def _model_series(summaries: Mapping[str, style.Summary]) -> Iterator[tuple[style.Summary, style.Series]]:
    """The summary of each model, with the look of its lines."""
    for (model, summary), series in zip(summaries.items(), cycle(style.CYCLE), strict=False):
        name = f"{model} ({summary['num_layers']} layers, n = {summary['num_samples']:,})"
        yield summary, series.named(name)


def draw_attention_by_depth(summaries: Mapping[str, style.Summary]) -> Figure:
    """How much the question looks at the image at each depth, one line a model (model -> summary of stages)."""
    with style.new_figure(figsize=(6.4, 3.9)) as (figure, axis):
        for summary, series in _model_series(summaries):
            depth = (np.arange(summary["num_layers"]) + 0.5) / summary["num_layers"]
            style.draw_band(axis, summary["bands"][summary["endpoint"]]["cross"], series, depth)
        style.ratio_axis(axis)
        axis.set_ylabel(style.ENRICHMENT_NO_SINK)
        depth_axis(axis, "depth of the layer in the decoder")
        axis.set_title("Attention of the question on the image")
        style.add_legend(figure, axis, style.BANDS_NOTE, columns=2)
        return figure


def draw_exits_by_depth(summaries: Mapping[str, style.Summary]) -> Figure:
    """Agreement and accuracy under exits at each depth, one line a model (model -> summary of exits)."""
    known = list(dict.fromkeys(name for each in summaries.values() for name in known_quality(each["overall"])))
    size = (4.8 * len(known), 4.0)
    with style.new_figure(1, len(known), figsize=size, sharey=True, squeeze=False) as (figure, ((*axes,),)):
        for axis, name in zip(axes, known, strict=True):
            for summary, series in _model_series(summaries):
                share = np.arange(summary["num_layers"] + 1) / summary["num_layers"]
                style.draw_band(axis, summary["overall"]["bands"][name], series, share)
            style.share_axis(axis)
            depth_axis(axis, "share of the layers that see the image (k / L)")
            axis.set_title(QUALITY_LABELS[name])
        axes[0].set_ylabel("share of questions")
        style.add_legend(figure, axes[0], style.BANDS_NOTE, columns=2)
        return figure
