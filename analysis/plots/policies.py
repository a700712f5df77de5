"""Figures of gates and policies: what gates learnt, policies against fixed exits, single questions (paper, Fig. 6)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dyvte.data import Dataset
from dyvte.errors import DataError, RunFolderError
from dyvte.runs.figures import accuracy_against_flops

from . import style

INK, PALE = "#1f3a5f", "#dfe3e8"
GATE_CURVES = {
    "label_rate": "the label says exit",
    "exit_rate": "the gate says exit",
    "precision": "exits that are right",
    "recall": "right exits that are taken",
}


def draw_gate_curves(layers: pd.DataFrame, title: str) -> Figure:
    """What the gate after each layer has learnt, on held-out images.

    Args:
        layers: table `layers` of `dyvte.train` (see :func:`dyvte.gates.metrics.layer_report`).
    """
    with style.new_figure(figsize=(6.4, 3.8)) as (figure, axis):
        for (column, label), series in zip(GATE_CURVES.items(), style.CYCLE, strict=False):
            style.draw_line(axis, layers["exit_layer"], layers[column], series.named(label))
        style.layer_axis(axis, int(layers["exit_layer"].max()) + 2, "exit layer k that a gate decides on")
        style.share_axis(axis, -0.03)
        axis.set_ylabel("share of held-out questions")
        axis.set_title(style.wrapped(title, 70))
        style.add_legend(figure, axis, "each gate on its own, on the held-out questions", columns=2)
        return figure


def draw_policies_against_fixed_exits(folder: str | Path) -> Figure:
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
    summary = json.loads(finished[0].read_text())
    fixed = pd.read_parquet(finished[0].parent / "fixed_exits.parquet")
    note = f"{style.title_of(summary)}; n = {summary['num_questions']:,}; intervals 95%, clustered by image"
    with style.figure_style():
        return accuracy_against_flops(fixed, shown, summary["oracle"], note)


@dataclass(frozen=True)
class ExitExample:
    """One image and what was asked about it.

    Attributes:
        image: `[height, width, 3]`, 0 to 255.
        questions: columns `question`, `answer`, `full_answer`, `reference`, `exit_layer`.
    """

    image: npt.NDArray[Any]
    questions: pd.DataFrame


def first_exit_examples(samples: pd.DataFrame, dataset: Dataset, images: int, questions: int = 3) -> list[ExitExample]:
    """The first images of the data with the first questions about each: nobody has chosen them.

    Args:
        samples: table `samples` of `dyvte.evaluate`.

    Raises:
        KeyError: an image of the data is not in `samples`.
    """
    by_image = samples.groupby("image_id", sort=False)
    found: dict[str, ExitExample] = {}
    for sample in dataset.readable():
        if len(found) == images:
            break
        if sample.picture is not None and sample.image_id not in found:
            rows = by_image.get_group(sample.image_id).head(questions).reset_index(drop=True)
            found[sample.image_id] = ExitExample(np.asarray(sample.picture), rows)
    return list(found.values())


def draw_exit_examples(examples: Sequence[ExitExample], num_layers: int, title: str) -> Figure:
    """Fig. 6: images, the questions about them, and the layer at which the visual tokens left for each question."""
    if not examples:
        raise DataError("no example to draw: none of the first samples has an image")
    columns = 2 if len(examples) > 1 else 1
    rows = -(-len(examples) // columns)
    most = max(len(example.questions) for example in examples)
    settings = {"width_ratios": [1, 2.1] * columns, "squeeze": False}
    with style.new_figure(rows, 2 * columns, figsize=(5.6 * columns, 1.95 * rows + 0.8), **settings) as (figure, axes):
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
            Patch(facecolor=PALE, edgecolor=style.GREY, hatch="////", label="layers that run on the text alone"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle(style.wrapped(title, 60 * columns))
        return figure


def _draw_questions(axis: Axes, questions: pd.DataFrame, num_layers: int, last: bool) -> None:
    axis.set_axis_on()
    for name in ("left", "bottom"):
        axis.spines[name].set_visible(False)
    axis.set(xlim=(0, num_layers), yticks=[])
    axis.tick_params(bottom=last, labelbottom=last)
    if last:
        axis.set_xlabel("decoder layers")
    for place, (_, row) in enumerate(questions.iterrows()):
        layer, rest = int(row["exit_layer"]), num_layers - int(row["exit_layer"])
        axis.barh(place, layer, height=0.24, color=INK)
        axis.barh(place, rest, left=layer, height=0.24, color=PALE, edgecolor=style.GREY, hatch="////", linewidth=0)
        axis.text(0, place - 0.24, _words(row), fontsize=8, va="bottom", ha="left", linespacing=1.05)
        axis.text(num_layers * 1.015, place, f"k = {layer}", fontsize=8, va="center", ha="left", clip_on=False)


def _words(row: pd.Series) -> str:
    """Question, answer, and where they differ the full model's and the right answer."""

    def short(column: str, width: int) -> str:
        return textwrap.shorten(str(row[column]), width, placeholder=" …")

    notes = []
    if row["answer"] != row["full_answer"]:
        notes.append(f"full model: {short('full_answer', 16)}")
    if row["reference"] is not None and not row["correct"]:
        notes.append(f"right: {short('reference', 16)}")
    return f"{short('question', 62)}\n→ {short('answer', 24)}" + (f"   ({', '.join(notes)})" if notes else "")
