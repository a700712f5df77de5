"""Figures that put several models into one plot, whatever their numbers of layers: depth is a share of the decoder."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..statistics.bands import Band
from . import style


def depth_axis(axis: Axes, label: str) -> None:
    """An x axis that counts depth in percent of the decoder."""
    axis.set_xlim(-0.02, 1.02)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel(label)


def _model_label(model: str, summary: style.Summary) -> str:
    return f"{model} ({summary['num_layers']} layers, n = {summary['num_samples']:,})"


def draw_attention_by_depth(summaries: Mapping[str, style.Summary]) -> Figure:
    """How much the question looks at the image at each depth, one line a model (model -> summary of stages)."""
    with style.new_figure(figsize=(6.4, 3.9)) as (figure, axis):
        for index, (model, summary) in enumerate(summaries.items()):
            band = Band.from_dict(summary["bands"][summary["endpoint"]]["cross"])
            layers = np.arange(len(band.mean))
            series = style.CYCLE[index % len(style.CYCLE)].named(_model_label(model, summary))
            style.draw_band(axis, (layers + 0.5) / len(layers), band, series)
        style.ratio_axis(axis)
        axis.set_ylabel(style.ENRICHMENT_NO_SINK)
        depth_axis(axis, "depth of the layer in the decoder")
        axis.set_title("Attention of the question on the image")
        style.add_legend(figure, axis, style.BANDS_NOTE, columns=2)
        return figure


def draw_exits_by_depth(summaries: Mapping[str, style.Summary]) -> Figure:
    """Agreement and accuracy under exits at each depth, one line a model (model -> summary of exits)."""
    bands = {model: summary["overall"]["bands"] for model, summary in summaries.items()}
    titles = {"agreement": "same answer as the full model", "accuracy": "right answer"}
    known = [
        name for name in titles if any(np.isfinite(Band.from_dict(each[name]).mean).any() for each in bands.values())
    ]
    size = (4.8 * len(known), 4.0)
    with style.new_figure(1, len(known), figsize=size, sharey=True, squeeze=False) as (figure, ((*axes,),)):
        for axis, name in zip(axes, known, strict=True):
            for index, (model, summary) in enumerate(summaries.items()):
                band = Band.from_dict(bands[model][name])
                share = np.arange(len(band.mean)) / summary["num_layers"]
                style.draw_band(
                    axis, share, band, style.CYCLE[index % len(style.CYCLE)].named(_model_label(model, summary))
                )
            style.share_axis(axis)
            depth_axis(axis, "share of the layers that see the image (k / L)")
            axis.set_title(titles[name])
        axes[0].set_ylabel("share of questions")
        style.add_legend(figure, axes[0], style.BANDS_NOTE, columns=2)
        return figure
