"""The figures of the DyVTE paper (arXiv 2411.19628), each drawn from what a finished run has left on disk.

Functions take a `summary.json`, a table or a run folder and return a matplotlib figure; nothing is computed but layout.
The paper's curves are those of `analysis.plots.attention` and `analysis.plots.exits`; what only the paper has is drawn
here.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from dyvte.data import Dataset
from dyvte.errors import DataError, RunFolderError
from dyvte.loading import SHIPPED_MODELS
from dyvte.runs.figures import accuracy_against_flops

from ..statistics.bands import Band
from ..statistics.exits import KlExit
from . import attention as plots
from . import exits as plots_exits
from .attention import (
    BANDS,
    CYCLE,
    ENRICHMENT_NO_SINK,
    SERIES,
    draw_band,
    draw_line,
    layer_axis,
    legend,
    ratio_axis,
    style,
)

Summary = Mapping[str, Any]
INK, PALE = "#1f3a5f", "#dfe3e8"


def read_summary(folder: str | Path) -> dict[str, Any]:
    """What a finished run says: its `summary.json`.

    Raises:
        RunFolderError: there is none.
    """
    file = Path(folder) / "summary.json"
    if not file.is_file():
        raise RunFolderError(f"{folder} has no summary.json: the run is not finished, or it is another folder")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def provenance(summary: Summary) -> str:
    """What numbers are numbers of: model, data and sample size, and what a shipped model is no evidence for."""
    counted = f"{summary['num_samples']:,} samples" + (
        f", {summary['num_failed']:,} left out" if summary["num_failed"] else ""
    )
    text = f"{summary['model']} on {summary['data']}: {counted}, {summary['num_layers']} decoder layers."
    if summary["model"] in SHIPPED_MODELS:
        text += " This is the testbed, a small model made to check the tool on: no evidence about larger models."
    return text


def _bands(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Band]:
    return {name: Band.from_dict(each) for name, each in values.items()}


def _title(summary: Summary) -> str:
    return f"{summary['model']} on {summary['data']}"


def _footnote(group: Summary) -> str:
    return plots.band_note(group["num_samples"], group["num_images"])


def _no_bands(group: Summary) -> str:
    return f"means over n = {group['num_samples']:,} questions on {group['num_images']:,} images"


# --------------------------------------------------------------------------------------------------------------------
# Fig. 1 and 2: three stages
# --------------------------------------------------------------------------------------------------------------------


def three_stages(summary: Summary) -> Figure:
    """Fig. 1: cross-modal, visual and text attention over the layers, and the stages where they were found.

    Args:
        summary: of `analysis.stages`.
    """
    curves = _bands(summary["bands"][summary["endpoint"]])
    return plots.stages(curves, summary["stages"], _title(summary), _footnote(summary))


def attention_scores(summaries: Sequence[Summary]) -> Figure:
    """Fig. 2: mean attention scores of one or more models side by side, and the same relative to even attention.

    Args:
        summaries: of `analysis.stages`, one a model.
    """
    rows = {
        "mean_score": "mean attention score\nper allowed pair",
        "mean_score_no_sink": "the same\nwithout the sink",
        "enrichment_no_sink": ENRICHMENT_NO_SINK,
    }
    with style():
        figure, axes = plt.subplots(
            len(rows),
            len(summaries),
            figsize=(max(3.0 * len(summaries), 5.2), 2.0 * len(rows) + 0.8),
            layout="constrained",
            sharex="col",
            squeeze=False,
        )
        for axis in axes[2, 1:]:  # the other two depend on the number of tokens, so models differ in scale
            axis.sharey(axes[2, 0])
        for column, summary in enumerate(summaries):
            for row, (measure, label) in enumerate(rows.items()):
                axis, bands = axes[row, column], _bands(summary["bands"][measure])
                for name, series in SERIES.items():
                    draw_band(axis, np.arange(summary["num_layers"]), bands[name], series)
                layer_axis(axis, summary["num_layers"], "decoder layer" if row == len(rows) - 1 else "")
                if column == 0:
                    axis.set_ylabel(label)
            name = "\n".join(textwrap.wrap(_title(summary), 28))
            axes[0, column].set_title(f"{name}\n{summary['num_layers']} layers, n = {summary['num_samples']:,}")
        for axis in axes[:2].flat:
            axis.set_ylim(bottom=0)
        for axis in axes[2]:
            axis.axhline(1.0, color="#888888", linewidth=0.8, zorder=0)
            ratio_axis(axis)
        legend(figure, axes[0, 0], BANDS, 3 if len(summaries) > 1 else 1)
        return figure


def stages_by_kind(summary: Summary) -> Figure:
    """The three curves of every question kind (summary of `analysis.stages` on data with kinds).

    Raises:
        DataError: the data have one kind only.
    """
    kinds = summary["kinds"]
    if len(kinds) < 2:
        raise DataError(f"the questions of {summary['data']} are of one kind: there is nothing to compare")
    curves = {kind: _bands(each["bands"][summary["endpoint"]]) for kind, each in kinds.items()}
    counts = {kind: each["num_samples"] for kind, each in kinds.items()}
    return plots.small_multiples(curves, counts, f"{_title(summary)}, by question kind", _footnote(summary))


# --------------------------------------------------------------------------------------------------------------------
# Fig. 3 and 4: visual tokens leave at a chosen layer
# --------------------------------------------------------------------------------------------------------------------


def manual_exit(summary: Summary) -> Figure:
    """Fig. 3: accuracy and agreement against the exit layer, with the decoder's FLOPs (summary of `analysis.exits`)."""
    group = summary["overall"]
    layer = summary["findings"]["contribution_stops"]["exit_layer"]
    curves = _bands(group["bands"])
    return plots_exits.exits(curves, summary["flops_decoder"], layer, _title(summary), _footnote(group))


def manual_exit_by_kind(summary: Summary) -> Figure:
    """Fig. 3 for every question kind (summary of `analysis.exits`)."""
    groups = summary["kinds"]
    curves = {kind: _bands(group["bands"]) for kind, group in groups.items()}
    counts = {kind: group["num_samples"] for kind, group in groups.items()}
    title = f"{_title(summary)}, by question kind"
    return plots_exits.kinds(curves, counts, title, _footnote(summary["overall"]))


def text_entropy(summary: Summary) -> Figure:
    """Fig. 4: entropy of the text's self-attention under every exit (summary of `analysis.exits`)."""
    entropy, group = summary["entropy"]["text_entropy"], summary["overall"]
    matrix, difference = (np.array(entropy[name]["mean"], dtype=np.float64) for name in ("matrix", "difference"))
    return plots_exits.entropy(matrix, difference, _title(summary), _no_bands(group))


def kl_criterion(summary: Summary) -> Figure:
    """KL divergence of every exit from the full model, and where VTW's thresholds lie (summary of `analysis.exits`)."""
    group = summary["overall"]
    thresholds = [KlExit(**each) for each in summary["k_star_details"]]
    forward, reverse = (Band.from_dict(group["bands"][name]) for name in ("kl", "kl_reverse"))
    return plots_exits.kl(forward, reverse, thresholds, _title(summary), _footnote(group))


def exit_depths(summary: Summary) -> Figure:
    """How deep the image is needed, by question kind (summary of `analysis.exits`)."""
    group = summary["overall"]
    groups = {
        name: (np.array(each["exit_depth"]["counts"]), Band.from_dict(each["exit_depth"]))
        for name, each in {**summary["kinds"], "all": group}.items()
    }
    return plots_exits.exit_depth(groups, _title(summary), _no_bands(group))


def answer_tokens(summary: Summary) -> Figure:
    """How long each token of an answer and of a caption needs the image (summary of `analysis.exits`)."""
    return plots_exits.tokens(summary["tokens"], summary["num_layers"], _title(summary))


# --------------------------------------------------------------------------------------------------------------------
# Gates, and Fig. 6: each question leaves at its own layer
# --------------------------------------------------------------------------------------------------------------------


def gate_report(layers: pd.DataFrame, title: str) -> Figure:
    """What the gate after each layer has learnt, on held-out images.

    Args:
        layers: table `layers` of `dyvte.train` (see :func:`dyvte.gates.metrics.layer_report`).
        title: model and data.
    """
    shown = {
        "label_rate": "the label says exit",
        "exit_rate": "the gate says exit",
        "precision": "exits that are right",
        "recall": "right exits that are taken",
    }
    with style():
        figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        for (column, label), series in zip(shown.items(), CYCLE, strict=False):
            draw_line(axis, layers["exit_layer"], layers[column], replace(series, label=label))
        layer_axis(axis, int(layers["exit_layer"].max()) + 2, "exit layer k that a gate decides on")
        axis.set_ylim(-0.03, 1.05)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_ylabel("share of held-out questions")
        axis.set_title(title)
        legend(figure, axis, "each gate on its own, on the held-out questions", columns=2)
        return figure


def exit_layers(summary: Summary) -> Figure:
    """Where the questions of every kind left under a policy (summary of `dyvte.evaluate`)."""
    groups = {
        name: (np.array(each["exit_layers"]), Band(*np.array([each["mean_exit_layer"], np.nan, np.nan])))
        for name, each in {**summary["kinds"], "all": summary}.items()
    }
    title, note = f"{summary['policy']}: {_title(summary)}", f"n = {summary['num_questions']:,} questions"
    return plots_exits.exit_map(groups, "exit layer k that the policy chose", title, note)


def policies(folder: str | Path) -> Figure:
    """Accuracy and agreement of policies against their cost, beside every fixed exit.

    Args:
        folder: `comparison_dir` of one or more runs of `dyvte.evaluate` on the same model and data.

    Raises:
        RunFolderError: no run of it is finished.
    """
    folder = Path(folder)
    finished = sorted(file for file in folder.glob("*/summary.json") if (file.parent / "fixed_exits.parquet").is_file())
    if not finished or not (folder / "comparison.parquet").is_file():
        raise RunFolderError(f"{folder} holds no comparison: run python -m dyvte.evaluate policy=... into it first")
    comparison = pd.read_parquet(folder / "comparison.parquet")
    # Controls stay in the table; in the figure they would cover the policies.
    shown = comparison[~comparison["policy"].str.contains(": ", regex=False)]
    summary = read_summary(finished[0].parent)
    fixed = pd.read_parquet(finished[0].parent / "fixed_exits.parquet")
    note = f"{_title(summary)}; n = {summary['num_questions']:,}; intervals 95%, clustered by image"
    with style():
        return accuracy_against_flops(fixed, shown, summary["oracle"], note)


@dataclass(frozen=True)
class Example:
    """One image and what was asked about it.

    Attributes:
        image: `[height, width, 3]`, 0 to 255.
        questions: columns `question`, `answer`, `full_answer`, `reference`, `exit_layer`.
    """

    image: npt.NDArray[Any]
    questions: pd.DataFrame


def exit_examples_of(samples: pd.DataFrame, dataset: Dataset, images: int, questions: int = 3) -> list[Example]:
    """The first images of the data with the first questions about each: nobody has chosen them.

    Args:
        samples: table `samples` of `dyvte.evaluate`.
        dataset: what it was run on.
        images, questions: how many, at most.
    """
    by_image = samples.groupby("image_id", sort=False)
    found: list[Example] = []
    seen: set[str] = set()
    for sample in dataset.readable():
        if len(found) == images:
            break
        if sample.image is not None and sample.image_id not in seen:
            seen.add(sample.image_id)
            rows = by_image.get_group(sample.image_id).head(questions).reset_index(drop=True)
            found.append(Example(np.asarray(sample.image), rows))
    return found


def exit_examples(examples: Sequence[Example], num_layers: int, title: str) -> Figure:
    """Fig. 6: images, the questions about them, and the layer at which the visual tokens left for each question.

    Args:
        examples: from :func:`exit_examples_of`.
        num_layers: L.
        title: model, data and policy.
    """
    if not examples:
        raise DataError("no example to draw: none of the first samples has an image")
    columns = 2 if len(examples) > 1 else 1
    rows = -(-len(examples) // columns)
    most = max(len(example.questions) for example in examples)
    with style():
        figure, axes = plt.subplots(
            rows,
            2 * columns,
            figsize=(5.6 * columns, 1.95 * rows + 0.8),
            layout="constrained",
            width_ratios=[1, 2.1] * columns,
            squeeze=False,
        )
        for axis in axes.flat:
            axis.set_axis_off()
        for index, example in enumerate(examples):
            row, column = divmod(index, columns)
            left, right = axes[row, 2 * column], axes[row, 2 * column + 1]
            left.imshow(example.image)
            right.set_ylim(most - 0.35, -0.75)
            _draw_questions(right, example.questions, num_layers, last=index + columns >= len(examples))
        handles = [
            Patch(facecolor=INK, label="layers that see the image"),
            Patch(facecolor=PALE, edgecolor="#888888", hatch="////", label="layers that run on the text alone"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle(title)
        return figure


def _draw_questions(axis: plt.Axes, questions: pd.DataFrame, num_layers: int, last: bool) -> None:
    axis.set_axis_on()
    for name in ("left", "bottom"):
        axis.spines[name].set_visible(False)
    axis.set(xlim=(0, num_layers), yticks=[])
    axis.tick_params(bottom=last, labelbottom=last)
    if last:
        axis.set_xlabel("decoder layers")
    for place, row in questions.iterrows():
        layer = int(row["exit_layer"])
        axis.barh(place, layer, height=0.24, color=INK)
        axis.barh(
            place,
            num_layers - layer,
            left=layer,
            height=0.24,
            color=PALE,
            edgecolor="#888888",
            hatch="////",
            linewidth=0,
        )
        axis.text(0, place - 0.24, _words(row), fontsize=8, va="bottom", ha="left", linespacing=1.05)
        axis.text(num_layers * 1.015, place, f"k = {layer}", fontsize=8, va="center", ha="left", clip_on=False)


def _words(row: pd.Series) -> str:
    """Question, answer, and where they differ the full model's and the right answer."""
    question = textwrap.shorten(str(row["question"]), 62, placeholder=" …")
    answer = textwrap.shorten(str(row["answer"]), 24, placeholder=" …")
    notes = []
    if row["answer"] != row["full_answer"]:
        notes.append(f"full model: {textwrap.shorten(str(row['full_answer']), 16, placeholder=' …')}")
    if row["reference"] is not None and not row["correct"]:
        notes.append(f"right: {textwrap.shorten(str(row['reference']), 16, placeholder=' …')}")
    return f"{question}\n→ {answer}" + (f"   ({', '.join(notes)})" if notes else "")
