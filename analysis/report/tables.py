"""The tables of each step's runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .cells import Cell, PageTable, banded_cell, number_cell, policy_label, spaced, words_cell
from .runs import FinishedRun, limits_of, pointer


def tables_of(run: FinishedRun) -> list[PageTable]:
    """The tables of a run; one that the run has no numbers for has no rows."""
    of_step: dict[str, Callable[[FinishedRun], Iterator[PageTable]]] = {
        "stages": _stages,
        "exits": _exits,
        "train": _train,
        "evaluate": _evaluate,
        "tables": _methods,
        "cost": _methods,
    }
    # of the others findings and figures say enough
    return list(of_step[run.step](run)) if run.step in of_step else []


BANDED = "In brackets: 95% intervals, bootstrap over images."


def _stages(run: FinishedRun) -> Iterator[PageTable]:
    endpoint = run.value("/endpoint")
    columns = {
        "question to image": ("plain", pointer("bands", endpoint, "cross")),
        "image to image": ("plain", pointer("bands", endpoint, "visual")),
        "question to text": ("plain", pointer("bands", endpoint, "text")),
        "mass question to image": ("share", "/bands/mass/cross"),
        "text entropy, nats": ("plain", "/entropy/text_entropy"),
    }
    yield PageTable(
        "Layers",
        ["layer", *columns],
        [
            [words_cell(layer), *(banded_cell(run, unit, place, layer) for unit, place in columns.values())]
            for layer in range(run.summary["num_layers"])
        ],
        f"The first three: attention over evenly spread attention, without the sink. {BANDED}",
    )
    yield PageTable(
        "Kinds of questions",
        ["kind", "questions", "images", "stages"],
        [
            [
                words_cell(spaced(kind)),
                number_cell(run, "count", pointer("kinds", kind, "num_samples")),
                number_cell(run, "count", pointer("kinds", kind, "num_images")),
                words_cell(spaced(found["stages"]["verdict"])),
            ]
            for kind, found in (run.value("/kinds") or {}).items()
        ],
    )


EXIT_COLUMNS = ["right, full model", "right, no image", "exit depth", "image stops contributing"]


def exit_cells(run: FinishedRun, place: str, stops: str | None) -> list[Cell]:
    """`EXIT_COLUMNS` of a group of questions, and the verdict on whether the image stops contributing."""
    return [
        banded_cell(run, "share", f"{place}/bands/accuracy", run.summary["num_layers"]),
        banded_cell(run, "share", f"{place}/bands/accuracy", 0),
        banded_cell(run, "layer", f"{place}/exit_depth"),
        words_cell(spaced(stops or "–")),
    ]


def _exits(run: FinishedRun) -> Iterator[PageTable]:
    last = run.summary["num_layers"]
    yield PageTable(
        "Exit layers",
        ["exit layer k", "right answers", "same answer as full model", "KL, nats", "decoder FLOPs", "total FLOPs"],
        [
            [
                words_cell(k),
                banded_cell(run, "share", "/overall/bands/accuracy", k),
                banded_cell(run, "share", "/overall/bands/agreement", k),
                banded_cell(run, "nats", "/overall/bands/kl", k),
                number_cell(run, "count", pointer("flops_decoder", k)),
                number_cell(run, "count", pointer("flops_total", k)),
            ]
            for k in range(last + 1)
        ],
        f"The image leaves before layer k; k = {last} is the unchanged model. {BANDED}",
    )
    yield PageTable(
        "Kinds of questions",
        ["kind", "questions", *EXIT_COLUMNS],
        [
            [
                words_cell(spaced(kind)),
                number_cell(run, "count", pointer("kinds", kind, "num_samples")),
                *exit_cells(run, pointer("kinds", kind), found["stops"]["verdict"]),
            ]
            for kind, found in (run.value("/kinds") or {}).items()
        ],
        f"Exit depth: first layer from which answer and cross-entropy stay. {BANDED}",
    )
    yield PageTable(
        "KL criterion",
        ["η, nats", "K*", "stays below from"],
        [
            [
                number_cell(run, "nats", f"{place}/eta"),
                number_cell(run, "layer", f"{place}/layer", limits_of(f"{place}/interval")),
                number_cell(run, "layer", f"{place}/stays"),
            ]
            for place in (f"/k_star_details/{index}" for index in range(len(run.value("/k_star_details") or [])))
        ],
        f"K*: first exit layer with a divergence of at most η; a dash: none. {BANDED}",
    )


def _train(run: FinishedRun) -> Iterator[PageTable]:
    kinds = run.value("/fixed_exit_by_kind") or {}
    yield PageTable(
        "One fixed exit a kind that reaches the gates' agreement on the held-out questions",
        ["kind", "exit layer"],
        [[words_cell(spaced(kind)), number_cell(run, "layer", pointer("fixed_exit_by_kind", kind))] for kind in kinds],
    )


Columns = dict[str, tuple[str, str, tuple[str, str] | None]]
"""Heading -> unit, key, and what stands behind that key in those of its limits."""
PAIR, QUARTILES, LIMITS = ("_ci/0", "_ci/1"), ("_q25", "_q75"), ("_low", "_high")
POLICY_COLUMNS: Columns = {
    "questions": ("count", "num_questions", None),
    "right answers": ("share", "accuracy", PAIR),
    "accuracy lost": ("points", "accuracy_loss", PAIR),
    "same answer as full model": ("share", "agreement", PAIR),
    "mean exit layer": ("layer", "mean_exit_layer", None),
    "decoder FLOPs (full = 1)": ("ratio", "cost", None),
    "fixed exits with this agreement": ("ratio", "cost_of_fixed_exits", None),
}


def _cells_at(run: FinishedRun, place: str, columns: Columns) -> Iterator[Cell]:
    for unit, key, tails in columns.values():
        at = f"{place}/{key}"
        yield number_cell(run, unit, at, None if tails is None else (at + tails[0], at + tails[1]))


CLUSTERED = "In brackets: 95% intervals, clustered by image."


def policies_table(runs: Sequence[FinishedRun]) -> PageTable:
    """All evaluated policies, one row each."""
    return PageTable(
        "Policies",
        ["policy", *POLICY_COLUMNS, "prefill, ms"],
        [
            [
                words_cell(policy_label(run.value("/policy"))),
                *_cells_at(run, "", POLICY_COLUMNS),
                number_cell(run, "plain", "/prefill_ms"),
            ]
            for run in runs
        ],
        "Fixed exits with this agreement: what the cheapest mixture of them costs that changes no more answers. "
        + CLUSTERED,
    )


def _evaluate(run: FinishedRun) -> Iterator[PageTable]:
    if run.value("/policy") == "none":
        return  # by kind, exits has it
    yield PageTable(
        f"{policy_label(run.value('/policy'))}, by kind of question",
        ["kind", *POLICY_COLUMNS],
        [
            [words_cell(spaced(kind)), *_cells_at(run, pointer("kinds", kind), POLICY_COLUMNS)]
            for kind in run.value("/kinds") or {}
        ],
        CLUSTERED,
    )


MEASURED: Columns = {
    "batch": ("count", "batch_size", None),
    "prefill, ms": ("plain", "prefill_ms", QUARTILES),
    "prefill (full = 1)": ("ratio", "prefill_ratio", QUARTILES),
    "decoding step, ms": ("plain", "decode_ms", QUARTILES),
    "decoding (full = 1)": ("ratio", "decode_ratio", QUARTILES),
    "tokens/s": ("count", "tokens_per_second", None),
    "decoder FLOPs": ("count", "flops_decoder", None),
    "KV cache, bytes": ("count", "kv_cache_bytes", None),
    "peak memory, bytes": ("count", "peak_memory_bytes", None),
}
ANSWERED: Columns = {
    "budget": ("ratio", "budget", None),
    "decoder FLOPs (full = 1)": ("ratio", "cost", None),
    "right answers": ("share", "accuracy", LIMITS),
    "right, image needed": ("share", "accuracy_needs_image", LIMITS),
    "same answer as full model": ("share", "agreement", None),
    "mean exit layer": ("layer", "mean_exit_layer", None),
}


def _methods(run: FinishedRun) -> Iterator[PageTable]:
    """The rows of `analysis.tables` or `analysis.cost`: words first, then the numbers that there are, then settings."""
    rows: Sequence[Mapping[str, Any]] = run.value("/rows") or []
    if not rows:
        return
    measured = "prefill_ms" in rows[0]
    columns = {
        name: column
        for name, column in (MEASURED if measured else ANSWERED).items()
        if any(row.get(column[1]) is not None for row in rows)
    }
    names = [key for key, value in rows[0].items() if isinstance(value, str) and key != "setting"]
    settings = ["setting"] if any(row.get("setting") for row in rows) else []
    table = []
    for index, row in enumerate(rows):
        words = [words_cell(policy_label(row[name]) if name == "method" else row[name]) for name in names]
        cells = _cells_at(run, pointer("rows", index), columns)
        table.append([*words, *cells, *(words_cell(row.get("setting") or "") for _ in settings)])
    note = (
        "Medians of the repeats, in brackets their quartiles; ratios are taken within a repeat." if measured else BANDED
    )
    yield PageTable(spaced(run.value("/experiment") or "cost"), [*map(spaced, names), *columns, *settings], table, note)
