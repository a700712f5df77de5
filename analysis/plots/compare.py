"""Figures that put several models into one plot, whatever their numbers of layers: depth is a share of the decoder.

Functions take what `summary.json` holds and return a matplotlib figure; nothing is computed but layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..statistics.bands import Band
from .attention import BANDS, CYCLE, ENRICHMENT_NO_SINK, Series, draw_band, legend, ratio_axis, style
from .paper import Summary


def attention_by_depth(summaries: Mapping[str, Summary]) -> Figure:
    """How much the question looks at the image at each depth, one line a model.

    Args:
        summaries: model -> summary of `analysis.stages`.
    """
    with style():
        figure, axis = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
        for (model, summary), series in zip(summaries.items(), _series(summaries), strict=True):
            band = Band.from_dict(summary["bands"][summary["endpoint"]]["cross"])
            layers = np.arange(len(band.mean))
            draw_band(axis, (layers + 0.5) / len(layers), band, replace(series, label=_label(model, summary)))
        axis.axhline(1.0, color="#888888", linewidth=0.8, zorder=0)
        ratio_axis(axis)
        axis.set_ylabel(ENRICHMENT_NO_SINK)
        _depth_axis(axis, "depth of the layer in the decoder")
        axis.set_title("Attention of the question on the image")
        legend(figure, axis, BANDS, columns=2)
        return figure


def exits_by_depth(summaries: Mapping[str, Summary]) -> Figure:
    """Agreement with the full model, and accuracy, under exits at each depth, one line a model.

    Args:
        summaries: model -> summary of `analysis.exits`.
    """
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained", sharey=True)
        for axis, name, title in (
            (axes[0], "agreement", "same answer as the full model"),
            (axes[1], "accuracy", "right answer"),
        ):
            for (model, summary), series in zip(summaries.items(), _series(summaries), strict=True):
                band = Band.from_dict(summary["overall"]["bands"][name])
                share = np.arange(len(band.mean)) / summary["num_layers"]
                draw_band(axis, share, band, replace(series, label=_label(model, summary)))
            axis.set_ylim(0, 1.05)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            _depth_axis(axis, "share of the layers that see the image (k / L)")
            axis.set_title(title)
        axes[0].set_ylabel("share of questions")
        legend(figure, axes[0], BANDS, columns=2)
        return figure


def _series(summaries: Mapping[str, Summary]) -> list[Series]:
    return [CYCLE[index % len(CYCLE)] for index in range(len(summaries))]


def _label(model: str, summary: Summary) -> str:
    return f"{model} ({summary['num_layers']} layers, n = {summary['num_samples']:,})"


def _depth_axis(axis: Axes, label: str) -> None:
    axis.set_xlim(-0.02, 1.02)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel(label)
