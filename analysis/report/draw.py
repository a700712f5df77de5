"""The figures that a report draws itself, from the tables of runs of gates and policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from dyvte.data import build_dataset
from dyvte.errors import DyvteError, RunFolderError
from dyvte.runs.store import RunFolder

from ..plots.exits import draw_policy_exit_layers
from ..plots.policies import (
    draw_exit_examples,
    draw_gate_curves,
    draw_policies_against_fixed_exits,
    first_exit_examples,
)
from ..plots.style import figure_style
from .cells import policy_label, written
from .figures import PageFigure, describe_figure
from .runs import FinishedRun

Drawn = tuple[str, Figure, str, str]
"""Name, figure, alternative text, caption."""


def keep_figure(folder: RunFolder, name: str, figure: Figure, alt: str, caption: str) -> PageFigure:
    """Save a figure that was drawn for the page beside it, and put it into the page."""
    with figure_style():
        path = folder.save_figure(name, figure)
    return PageFigure.of(path, alt, caption)


def figures_of_step(step: str, runs: Sequence[FinishedRun], folder: RunFolder) -> list[PageFigure]:
    """What is drawn of the runs of a step; nothing for steps that leave figures themselves."""
    drawn = {"train": _draw_gates, "evaluate": _draw_policies}
    return [keep_figure(folder, *each) for each in drawn[step](runs)] if step in drawn else []


def _draw_gates(runs: Sequence[FinishedRun]) -> Iterator[Drawn]:
    for run in runs:
        title = f"{run.value('/model')}, gates trained on {run.value('/data')}"
        figure = draw_gate_curves(RunFolder(run.path).read_table("layers"), title)
        yield f"gates_{run.path.name}", figure, *describe_figure(run, "gates")


def _draw_policies(runs: Sequence[FinishedRun]) -> Iterator[Drawn]:
    """Accuracy against cost, then for each policy with gates where questions left, with some of them."""
    for folder in dict.fromkeys(run.path.parent for run in runs):
        try:
            figure = draw_policies_against_fixed_exits(folder)
        except RunFolderError:  # these runs are not compared there
            continue
        points = [
            f"{policy_label(run.value('/policy'))} {written(run.value('/accuracy'), 'share')} right and "
            f"{written(run.value('/agreement'), 'share')} unchanged at {written(run.value('/cost'), 'ratio')}"
            for run in runs
            if run.path.parent == folder
        ]
        yield (
            "policies",
            figure,
            "Two plots of accuracy, and of agreement with the full model, against decoder FLOPs (full model = 1): a "
            f"curve of fixed exits, and one point a policy: {'; '.join(points)}.",
            "Each policy beside every fixed exit (numbered) and the cheapest exit chosen with hindsight (star).",
        )
    for run in runs:
        if sum(1 for each in run.value("/exit_layers") or [] if each) > 1:
            figure = draw_policy_exit_layers(run.summary)
            yield f"exit_layers_{run.path.name}", figure, *describe_figure(run, "exit_layers")
            yield from _draw_examples(run)


def _draw_examples(run: FinishedRun) -> Iterator[Drawn]:
    samples = RunFolder(run.path).read_table("samples")
    try:
        dataset = build_dataset(OmegaConf.create(run.config["data"]), stored=True)
        examples = first_exit_examples(samples, dataset, images=4)
    except (DyvteError, KeyError):  # the data have moved since; the tables stay
        return
    if not examples:
        return
    title = f"{run.value('/model')} on {run.value('/data')}: {policy_label(run.value('/policy'))}"
    lines = [
        f"“{row['question']}” answered “{row['answer']}”, image left after {row['exit_layer']} layers"
        for example in examples
        for row in example.questions.to_dict("records")
    ]
    yield (
        f"examples_{run.path.name}",
        draw_exit_examples(examples, run.summary["num_layers"], title),
        f"Images with questions and how many layers saw the image: {'; '.join(lines)}.",
        "The first images of the data: dark, layers that see the image; light, layers that run on the text alone.",
    )
