"""Figures of `analysis.stages`: attention over the layers (paper, Fig. 1 and 2), and maps over the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dyvte.errors import DataError

from ..statistics.bands import Band
from ..statistics.verdicts import verdict_in_short
from . import style

MEASURE_LABELS = {
    "mass": "attention mass",
    "mean_score": "mean attention score\nper allowed pair",
    "enrichment": "attention, times\neven spread (= 1)",
}
STAGE_NAMES = ("early fusion", "intra-modality\nmodelling", "multimodal\nreasoning")


EVERY_SERIES = {**style.ATTENTION_SERIES, "answer_cross": style.ANSWER_SERIES}


def _draw_series(axis: Axes, curves: Mapping[str, Any], wanted: Mapping[str, style.Series] = EVERY_SERIES) -> None:
    """Those of the wanted series that there are, each `{mean, low, high}` of [L]."""
    for name, series in wanted.items():
        if name in curves:
            whole = Band.from_dict(curves[name])
            known = np.flatnonzero(np.isfinite(whole.mean))  # layers that do not attend have no value
            style.draw_band(axis, whole[known], series, known)


def draw_three_stages(summary: style.Summary) -> Figure:
    """Fig. 1: cross-modal, visual and text attention over the layers, and the stages where they were found."""
    verdict, num_layers = summary["stages"], summary["num_layers"]
    with style.new_figure(figsize=(6.4, 4.1)) as (figure, axis):
        _draw_series(axis, summary["bands"][summary["endpoint"]], style.ATTENTION_SERIES)
        style.layer_axis(axis, num_layers)
        style.ratio_axis(axis)
        axis.set_ylabel(style.ENRICHMENT_NO_SINK)
        boundaries = verdict.get("boundaries")
        title = f"Attention of the question on the image: {style.title_of(summary)}"
        if boundaries:
            edges = [0, *boundaries, num_layers]
            for low, high in verdict["boundaries_ci"]:
                axis.axvspan(low - 0.5 - 0.04, high - 0.5 + 0.04, color="#999999", alpha=0.25, linewidth=0, zorder=0)
            for boundary in boundaries:
                axis.axvline(boundary - 0.5, color="black", linewidth=1, linestyle=style.DASHED)
            for start, stop, name in zip(edges, edges[1:], STAGE_NAMES, strict=False):
                middle = ((start + stop - 1) / 2, 1.0)
                where = ("data", "axes fraction")
                axis.annotate(name, middle, xycoords=where, ha="center", va="bottom", fontsize=8.5)
            axis.set_title(style.wrapped(title, 72), pad=28)
        else:
            axis.set_title(f"{style.wrapped(title, 72)}\n{style.wrapped(verdict_in_short(verdict), 76)}")
        style.add_legend(figure, axis, style.sample_note(summary))
        return figure


def draw_measures(summary: style.Summary) -> Figure:
    """Mass, mean score and enrichment (columns), with and without the attention sink (rows)."""
    with style.new_figure(2, 3, figsize=(9.6, 5.2), sharex=True, sharey="col") as (figure, axes):
        for column, (measure, label) in enumerate(MEASURE_LABELS.items()):
            for row, suffix in enumerate(("", "_no_sink")):
                axis = axes[row, column]
                _draw_series(axis, summary["bands"][measure + suffix])
                style.layer_axis(axis, summary["num_layers"], "decoder layer" if row else "")
                axis.set_ylabel(f"{label}\n{'without the sink' if row else 'with the sink'}")
                axis.tick_params(labelleft=True)
            if measure == "mass":
                axes[0, column].set_ylim(-0.03, 1.03)
            elif measure == "mean_score":
                axes[0, column].set_ylim(bottom=0)
            else:
                for axis in axes[:, column]:
                    style.ratio_axis(axis)
        figure.suptitle(f"Three ways to count attention: {style.title_of(summary)}")
        style.add_legend(figure, axes[0, 0], style.sample_note(summary), 4)
        return figure


def draw_stages_by_kind(summary: style.Summary) -> Figure:
    """The three curves of every question kind, all on the same scale.

    Raises:
        DataError: the data have one kind only.
    """
    kinds = summary["kinds"]
    if len(kinds) < 2:
        raise DataError(f"the questions of {summary['data']} are of one kind: there is nothing to compare")
    columns = min(math.ceil(math.sqrt(len(kinds))), 4)
    sizes = ((2.8, 2.1), 0.6, summary["num_layers"])
    with style.kind_panels(kinds, columns, *sizes, "decoder layer") as (figure, panels):
        for kind, axis in panels.items():
            _draw_series(axis, kinds[kind]["bands"][summary["endpoint"]])
        for axis in panels.values():
            style.ratio_axis(axis)
        figure.supylabel(style.ENRICHMENT_NO_SINK, fontsize=9)
        figure.suptitle(f"{style.title_of(summary)}, by question kind")
        style.add_legend(figure, axis, style.sample_note(summary), 3 if columns > 2 else 1)
        return figure


def draw_attention_scores(summaries: Sequence[style.Summary]) -> Figure:
    """Fig. 2: mean attention scores of one or more models side by side, and the same relative to even attention."""
    rows = {
        "mean_score": MEASURE_LABELS["mean_score"],
        "mean_score_no_sink": "the same\nwithout the sink",
        "enrichment_no_sink": style.ENRICHMENT_NO_SINK,
    }
    size = (max(3.0 * len(summaries), 5.2), 2.0 * len(rows) + 0.8)
    with style.new_figure(len(rows), len(summaries), figsize=size, sharex="col", squeeze=False) as (figure, axes):
        for axis in axes[2, 1:]:  # the other two depend on the number of tokens, so models differ in scale
            axis.sharey(axes[2, 0])
        for column, summary in enumerate(summaries):
            for row, (measure, label) in enumerate(rows.items()):
                axis = axes[row, column]
                _draw_series(axis, summary["bands"][measure], style.ATTENTION_SERIES)
                style.layer_axis(axis, summary["num_layers"], "decoder layer" if row == len(rows) - 1 else "")
                if column == 0:
                    axis.set_ylabel(label)
            name = style.wrapped(f"{summary['model']} on {summary['data']}", 28, 3)
            axes[0, column].set_title(f"{name}\n{summary['num_layers']} layers, n = {summary['num_samples']:,}")
        for axis in axes[:2].flat:
            axis.set_ylim(bottom=0)
        for axis in axes[2]:
            style.ratio_axis(axis)
        style.add_legend(figure, axes[0, 0], style.BANDS_NOTE, 3 if len(summaries) > 2 else 1)
        return figure


def relative_maps(maps: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Attention on each patch `[L, rows, columns]` relative to its even spread over the image (1)."""
    maps = np.asarray(maps, dtype=np.float64)
    total = maps.sum((1, 2), keepdims=True)
    return np.divide(maps, total, out=np.zeros_like(maps), where=total > 0) * maps[0].size


def frame_in_words(record: Mapping[str, Any]) -> str:
    """Which frame of a video a map is of; nothing for an image."""
    return f"frame {record['frame'] + 1} of {record['frames']}" if "frame" in record else ""


def darkest(relative: npt.NDArray[np.float64]) -> float:
    """The relative attention drawn darkest: near the largest, and at least 4, so that nearly even attention is pale."""
    return max(float(np.quantile(relative, 0.995)), 4.0)


def draw_attention_map(record: Mapping[str, Any], image: npt.NDArray[Any]) -> Figure:
    """Where one token looks, layer by layer, laid over the image.

    Args:
        record: an entry of `maps` of the summary: `maps` [L, rows, columns], `mass` [L], `question`, `answer`,
            `reference`, `query`; of an answer's token also `token`, `number` and `sinks` [L, rows, columns]; of a
            video's frame also `frame`, counted from 0, and `frames`.
        image: `[height, width, 3]`, 0 to 255 or 0 to 1, as the model saw it.
    """
    relative = relative_maps(record["maps"])
    num_layers, top = len(relative), darkest(relative)
    columns = min(num_layers + 1, max(5, math.ceil(math.sqrt(1.7 * (num_layers + 1)))))
    rows = math.ceil((num_layers + 1) / columns)
    size = (1.35 * columns + 0.9, 1.55 * rows + 1.1)
    with style.new_figure(rows, columns, figsize=size, squeeze=False) as (figure, axes):
        height, width = image.shape[:2]
        pale = 0.5 * image + 0.5 * image.mean(2, keepdims=True)  # objects as light as what is behind them stay visible
        pale = 0.25 + 0.65 * pale / max(float(pale.max()), 1e-9)  # white stays apart from no attention
        scale = plt.cm.ScalarMappable(plt.Normalize(0, top), "rocket_r")
        for axis in axes.flat:
            axis.set_axis_off()
        axes.flat[0].imshow(image)
        of_frame = frame_in_words(record)
        axes.flat[0].set_title(of_frame or "image", fontsize=8.5)
        for layer in range(num_layers):
            axis = axes.flat[layer + 1]
            axis.imshow(pale, extent=(0, width, height, 0), vmin=0, vmax=1)
            alpha = np.clip(relative[layer] / top, 0, 1) ** 0.75
            shown = {"alpha": alpha, "extent": (0, width, height, 0), "interpolation": "nearest"}
            axis.imshow(relative[layer], "rocket_r", scale.norm, **shown)
            axis.set_title(f"layer {layer}: {record['mass'][layer]:.0%}", fontsize=8.5)
            if "sinks" in record:
                down, across = np.nonzero(np.asarray(record["sinks"][layer]))
                tall, wide = height / relative.shape[1], width / relative.shape[2]
                axis.plot((across + 0.5) * wide, (down + 0.5) * tall, "x", color="#2a9d8f", markersize=6)
        bar = figure.colorbar(scale, ax=axes, shrink=0.75, pad=0.015, aspect=30)
        bar.set_label("attention per patch,\ntimes even spread (= 1)", fontsize=8)
        characters = int(11 * figure.get_figwidth())
        reference = "" if record["reference"] is None else f" (reference: {record['reference']})"
        lines = (record["question"], f"answer: {record['answer']}{reference}")
        figure.suptitle("\n".join(style.wrapped(line, characters) for line in lines), fontsize=9.5)
        whose = {"last": "the prompt's last token", "instruction": "the question (mean over its tokens)"}
        if record["query"] == "answer":
            whose["answer"] = f"the query that predicts the answer's token {record['number'] + 1}, {record['token']!r}"
        note = f"attention of {whose[record['query']]}, mean over heads; percentages: share of it on "
        note += of_frame or "the image"
        if "sinks" in record:
            note += f"; x: attention sink{', left out' if record['sinks_are'] == 'leave_out' else ''}"
        figure.supxlabel(style.wrapped(note, int(14 * figure.get_figwidth())), fontsize=8)
        return figure
