"""The sections of a page of several models: shared tables, figures that hold all models, and their own side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from dyvte.runs.store import RunFolder

from ..plots.attention import draw_attention_scores
from ..plots.compare import draw_attention_by_depth, draw_exits_by_depth
from .cells import Cell, PageTable, banded_cell, number_cell, spaced, words_cell
from .figures import PageFigure, course, figures_of, keep_figure
from .findings import first_extreme
from .page import Section
from .runs import FinishedRun
from .tables import BANDED, EXIT_COLUMNS, exit_cells, policies_table

COMPARED_STEPS = ("stages", "exits", "evaluate")
"""Steps whose results are put side by side."""
Owned = Mapping[str, list[FinishedRun]]
"""Model -> its runs."""


def owned_runs(found: Owned) -> dict[str, list[FinishedRun]]:
    """The runs under names that say whose they are."""
    return {model: [replace(run, name=f"{model}/{run.name}") for run in runs] for model, runs in found.items()}


def sections_of_models(found: Owned, folder: RunFolder) -> Iterator[Section]:
    """One a step."""
    runs = {
        step: {model: run for model, own in found.items() for run in own if run.step == step}
        for step in ("stages", "exits")
    }
    drawn = {"stages": _draw_stages, "exits": _draw_exits}
    tabled = {"stages": _stages_table, "exits": _exits_table}
    for step, own in runs.items():
        figures = list(drawn[step](own, folder)) if own else []
        yield Section.of(step, figures, [tabled[step](own)], beside=_beside(own))
    policies = {model: [run for run in own if run.step == "evaluate"] for model, own in found.items()}
    tables = [(model, policies_table(own)) for model, own in policies.items() if own]
    rows = [[words_cell(model), *row] for model, table in tables for row in table.rows]
    shared = [PageTable("Policies", ["model", *table.columns], rows, table.note) for _, table in tables[:1]]
    yield Section.of("evaluate", [], shared)


def _beside(runs: Mapping[str, FinishedRun]) -> list[tuple[str, list[PageFigure]]]:
    """The figures of a step that every model may have: for each its caption and one figure a model."""
    rows: dict[str, list[PageFigure]] = {}
    for model, run in runs.items():
        for figure in figures_of(run):
            rows.setdefault(figure.caption, []).append(replace(figure, caption=model))
    return list(rows.items())


def _draw_stages(runs: Mapping[str, FinishedRun], folder: RunFolder) -> Iterator[PageFigure]:
    curves = {model: run.summary["curves"].get("cross", []) for model, run in runs.items()}
    lines = "; ".join(f"{model}: {course('question to image', curve)}" for model, curve in curves.items())
    yield keep_figure(
        folder,
        "attention_scores",
        draw_attention_scores([run.summary for run in runs.values()]),
        "One column of line plots a model, over its layers: mean attention score per allowed pair, the same without "
        f"the sink, and enrichment over evenly spread attention. Enrichment without the sink, {lines}.",
        "Attention in each model (Fig. 2 of the DyVTE paper). Bands: 95%, bootstrap over images.",
    )
    yield keep_figure(
        folder,
        "attention_by_depth",
        draw_attention_by_depth({model: run.summary for model, run in runs.items()}),
        f"Line plot over relative depth, one line a model: enrichment without the sink. {lines}.",
        "The same attention on the image, with all decoders stretched to one length.",
    )


def _stages_table(runs: Mapping[str, FinishedRun]) -> PageTable:
    rows = []
    for model, run in runs.items():
        place = f"/bands/{run.value('/endpoint')}/cross"
        layers = [first_extreme(run.value(f"{place}/mean") or [], sign) for sign in (1, -1)]
        extremes = [Cell("–") if each is None else banded_cell(run, "plain", place, each) for each in layers]
        starts = run.value("/stages/boundaries")
        rows.append(
            [
                words_cell(model),
                number_cell(run, "count", "/num_layers"),
                number_cell(run, "count", "/num_samples"),
                words_cell(spaced(run.value("/stages/verdict"))),
                words_cell("–" if starts is None else ", ".join(map(str, starts))),
                *extremes,
            ]
        )
    columns = ["model", "layers", "questions", "stages", "begin at", "lowest enrichment", "highest enrichment"]
    note = "Enrichment: attention of the question on the image over evenly spread attention, without the sink."
    return PageTable("Models", columns, rows, note)


def _draw_exits(runs: Mapping[str, FinishedRun], folder: RunFolder) -> Iterator[PageFigure]:
    curves = {model: run.summary["agreement"] for model, run in runs.items()}
    lines = [f"{model}: {course('same answer', curve, 'share', 'exit layer')}" for model, curve in curves.items()]
    yield keep_figure(
        folder,
        "exits_by_depth",
        draw_exits_by_depth({model: run.summary for model, run in runs.items()}),
        "Two line plots over the share of layers that see the image, one line a model: how many answers stay "
        f"the full model's, and how many are right. {'; '.join(lines)}.",
        "What becomes of the answers if the image leaves at this depth of each decoder.",
    )


def _exits_table(runs: Mapping[str, FinishedRun]) -> PageTable:
    rows = [
        [
            words_cell(model),
            number_cell(run, "count", "/num_layers"),
            *exit_cells(run, "/overall", run.value("/findings/contribution_stops/verdict")),
            number_cell(run, "layer", "/findings/contribution_stops/exit_layer"),
        ]
        for model, run in runs.items()
    ]
    return PageTable("Models", ["model", "layers", *EXIT_COLUMNS, "from k"], rows, BANDED)
