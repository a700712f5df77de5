"""What the runs of a model found: verdicts, and effect sizes with their intervals.

Every number is a place in a run's `summary.json`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from .cells import BAND, Cell, RunFinding, band_effect, effect, policy_label
from .runs import FinishedRun, known_values, limits_of, pointer

TOGETHER = "95% for all differences of the table together, paired bootstrap over images"
CLUSTERED = "95%, clustered by image"
ONE_SIDED = "two one-sided 95% limits, bootstrap over images"
SIMULTANEOUS = "95%, simultaneous over all splits"
QUARTILES = "quartiles of the repeats"
DEPTH = "first layer from which answer and cross-entropy stay"


def findings_of(runs: Sequence[FinishedRun]) -> list[RunFinding]:
    """Of all runs, in their order."""
    of_step: dict[str, Callable[[FinishedRun], Iterator[RunFinding]]] = {
        "stages": _stages,
        "exits": _exits,
        "knockout": _knockout,
        "stage_table": _stage_table,
        "lens": _lens,
        "train": _train,
        "evaluate": _evaluate,
        "tables": _tables,
        "cost": _tables,  # experiments that measure time are asked for with either command
    }
    found = [finding for run in runs for finding in of_step[run.step](run)]
    # Without the effects that a run could not estimate.
    return [replace(each, effects=[row for row in each.effects if row[1].order is not None]) for each in found]


def _triple(run: FinishedRun, label: str, unit: str, place: str, interval: str) -> list[Cell]:
    """An effect that is stored as `[estimate, lower, upper]`."""
    return effect(run, label, unit, f"{place}/0", (f"{place}/1", f"{place}/2"), interval)


def _stages(run: FinishedRun) -> Iterator[RunFinding]:
    effects = [
        _triple(run, label, "log", f"/stages/contrasts/{key}", SIMULTANEOUS)
        for label, key in (
            ("fall of attention on the image into the middle stage (0.69 = halved)", "fall"),
            ("its rise out of the middle stage (0.69 = doubled)", "rise"),
            ("image to image attention, middle stage less the stage before (0.69 = doubled)", "visual_in"),
            ("image to image attention, middle stage less the stage after (0.69 = doubled)", "visual_out"),
        )
    ]
    for index, name in enumerate(("second", "third")):
        place, limits = f"/stages/boundaries/{index}", limits_of(f"/stages/boundaries_ci/{index}")
        effects.append(effect(run, f"first layer of the {name} stage", "layer", place, limits, "95%, bootstrap"))
    yield RunFinding(
        run,
        "Attention, where the model looks, runs in three stages: early fusion, intra-modality modelling, multimodal "
        "reasoning",
        "/stages/verdict",
        run.value("/stages/reasons") or (),
        effects,
        pointer("curves", "cross"),
    )
    place = pointer("bands", run.value("/endpoint"), "cross")
    least, most = (first_extreme(run.value(f"{place}/mean") or [], sign) for sign in (1, -1))
    if least is not None:
        yield RunFinding(
            run,
            "Attention of the question on the image, relative to evenly spread attention, without the sink",
            effects=[
                band_effect(run, f"where it is lowest, layer {least}", "plain", place, least),
                band_effect(run, f"where it is highest, layer {most}", "plain", place, most),
            ],
            curve=f"{place}/mean",
        )


ESTIMATES = {
    "gain": ("accuracy gained by showing the image", "points", ONE_SIDED),
    "accuracy_settles": ("exit layer from which accuracy stays (estimate)", "layer", BAND),
    "answers_settle": ("exit layer from which answers stay (estimate)", "layer", BAND),
    "early_change": ("change of the text entropy by early exits", "nats", ONE_SIDED),
    "early_floor": ("how far another image moves it in the same layers", "nats", ONE_SIDED),
    "late_change": ("change of the text entropy by late exits", "nats", ONE_SIDED),
    "late_floor": ("how far another image moves it in the same layers", "nats", ONE_SIDED),
}


CURVES = {"contribution_stops": "/agreement"}
"""Finding of exits -> the curve over exit layers that it is about."""


def _exits(run: FinishedRun) -> Iterator[RunFinding]:
    for name, finding in (run.value("/findings") or {}).items():
        place = pointer("findings", name)
        effects = [effect(run, "exit layer of the finding", "layer", f"{place}/exit_layer")]
        for key, value in finding["estimates"].items():
            label, unit, interval = ESTIMATES.get(key, (key.replace("_", " "), "plain", ""))
            if isinstance(value, list):
                effects.append(_triple(run, label, unit, f"{place}/estimates/{key}", interval))
            elif not isinstance(value, dict) and key != "exit_layer":
                effects.append(effect(run, label, unit, f"{place}/estimates/{key}"))
        statement = finding["statement"]
        yield RunFinding(
            run, statement[0].upper() + statement[1:], f"{place}/verdict", finding["reasons"], effects, CURVES.get(name)
        )
    last = run.summary["num_layers"]
    bands = "/overall/bands"
    yield RunFinding(
        run,
        "Answers with and without the image",
        effects=[
            band_effect(run, "right answers of the full model", "share", f"{bands}/accuracy", last),
            band_effect(run, "right answers if the decoder sees no image", "share", f"{bands}/accuracy", 0),
            band_effect(run, "answers that stay the same without the image", "share", f"{bands}/agreement", 0),
            band_effect(run, f"mean exit depth ({DEPTH})", "layer", "/overall/exit_depth"),
        ],
        curve="/accuracy",
    )
    effects = []
    for index, each in enumerate(run.value("/k_star_details") or []):
        place = f"/k_star_details/{index}"
        label = f"K* at η = {each['eta']:g} nats"
        effects.append(effect(run, label, "layer", f"{place}/layer", limits_of(f"{place}/interval"), BAND))
    criterion = "KL criterion: first exit layer whose divergence from the full model is at most η"
    yield RunFinding(run, criterion, effects=effects, curve="/kl")


def first_extreme(values: Sequence[float | None], sign: int) -> int | None:
    """Where the smallest (`sign` 1) or largest (-1) known value stands first; None where none is known.

    Example:
        >>> first_extreme([2.0, None, 1.0, 1.0], 1)
        2
    """
    known = known_values(values)
    return min(known, key=lambda each: sign * each[1])[0] if known else None


def _knockout(run: FinishedRun) -> Iterator[RunFinding]:
    """For each path that was cut, the window that changes most answers."""
    for name in run.value("/overall/effects") or {}:
        place = pointer("overall", "effects", name)
        worst = first_extreme(run.value(f"{place}/agreement_points/mean") or [], 1)
        if worst is None:
            continue
        start, stop = run.value("/windows")[worst]
        yield RunFinding(
            run,
            f"Cutting {name.replace('->', ' → ')} matters most in layers {start} to {stop - 1}",
            effects=[
                band_effect(run, "change in answers, percentage points", "plain", f"{place}/agreement_points", worst),
                band_effect(run, "change of the answer's log probability, nats", "plain", f"{place}/nats", worst),
            ],
            curve=f"{place}/agreement_points/mean",
        )


def _stage_table(run: FinishedRun) -> Iterator[RunFinding]:
    """Each stage by attention and by cause."""
    for index, row in enumerate(run.value("/rows") or []):
        where = f"layers {row['first_layer']} to {row['last_layer']}"
        for key, by in (("attention", "by attention"), ("cause", "by cause")):
            yield RunFinding(
                run,
                f"Stage {row['stage']}, {where}, {by}",
                pointer("rows", index, f"by_{key}"),
                [each for each in (row[f"{key}_numbers"], row["note"]) if each],
            )


def _lens(run: FinishedRun) -> Iterator[RunFinding]:
    """From which layer on the answer is read at the prompt's end, and what patches say of their objects."""
    for name in run.value("/answer") or {}:
        place = pointer("answer", name, "is_answer")
        shares = run.value(f"{place}/mean") or []
        last = first_extreme(shares, -1)
        if last is not None:
            yield RunFinding(
                run,
                f"The answer at the prompt's end, read by the {name} lens",
                effects=[band_effect(run, f"is the likeliest token after layer {last}", "share", place, last)],
                curve=f"{place}/mean",
            )
    for attribute in run.value("/patches") or {}:
        place = pointer("patches", attribute)
        best = first_extreme(run.value(f"{place}/share/mean") or [], -1)
        if best is not None:
            yield RunFinding(
                run,
                f"Patches of an object name its {attribute} most often after layer {best}",
                effects=[
                    band_effect(run, "patches that do", "share", f"{place}/share", best),
                    band_effect(run, "by chance", "share", f"{place}/control", best),
                ],
                curve=f"{place}/share/mean",
            )


def _costs(run: FinishedRun) -> list[list[Cell]]:
    """What gates cost, trained or in use."""
    return [
        effect(run, "mean exit layer", "layer", "/mean_exit_layer"),
        effect(run, "decoder FLOPs of the prefill (full model = 1)", "ratio", "/cost"),
        effect(run, "the same of fixed exits with the same agreement", "ratio", "/cost_of_fixed_exits"),
    ]


def _train(run: FinishedRun) -> Iterator[RunFinding]:
    yield RunFinding(
        run,
        f"Gates trained by recipe {run.value('/recipe')}, on {run.value('/validation_questions')} held-out questions",
        effects=[
            effect(run, "same answer as the full model", "share", "/agreement"),
            effect(run, "changed answers, upper 95% limit", "share", "/disagreement_upper_limit"),
            *_costs(run),
            effect(run, "the same if every exit were chosen with hindsight", "ratio", "/cost_of_oracle"),
        ],
    )


def _evaluate(run: FinishedRun) -> Iterator[RunFinding]:
    if run.value("/policy") == "none":
        return  # the full model: the table of policies has its accuracy

    def with_interval(label: str, unit: str, key: str) -> list[Cell]:
        return effect(run, label, unit, f"/{key}", limits_of(f"/{key}_ci"), CLUSTERED)

    yield RunFinding(
        run,
        f"Policy {policy_label(run.value('/policy'))}",
        effects=[
            with_interval("right answers", "share", "accuracy"),
            with_interval("accuracy lost against the full model", "points", "accuracy_loss"),
            with_interval("same answer as the full model", "share", "agreement"),
            *_costs(run),
        ],
    )


def _tables(run: FinishedRun) -> Iterator[RunFinding]:
    for index, verdict in enumerate(run.value("/verdicts") or []):
        where = "all questions" if verdict["on"] == "accuracy" else "questions that need the image"
        place = pointer("verdicts", index, "lead")
        tied = ", ".join(map(policy_label, verdict["not_told_apart"]))
        text = f"no clear winner; not told apart from {tied}" if tied else "ahead of all others"
        yield RunFinding(
            run,
            f"Most accurate at {verdict['budget']:g} of the FLOPs, {where}: {policy_label(verdict['ahead'])}",
            reasons=[text],
            effects=[
                _triple(run, f"its lead over {policy_label(other)}", "points", f"{place}{pointer(other)}", TOGETHER)
                for other in verdict["lead"]
            ],
        )
    effects = []
    for index, row in enumerate(run.value("/rows") or []):
        if "prefill_ratio" in row and row["method"] != "none":
            place = pointer("rows", index, "prefill_ratio")
            label = f"{policy_label(row['method'])}, batch {row['batch_size']}"
            effects.append(effect(run, label, "ratio", place, (f"{place}_q25", f"{place}_q75"), QUARTILES))
    if effects:
        machine = f"on {run.value('/device')} with {run.value('/threads')} threads"
        yield RunFinding(run, f"Time of the prefill (full model = 1), {machine}", effects=effects)
