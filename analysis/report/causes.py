"""What runs of knock-outs, of the stage table and of the lens found. Every number is a place in their summaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cells import RunFinding, band_effect
from .runs import FinishedRun, pointer


def first_extreme(values: Sequence[float | None], sign: int) -> int | None:
    """Where the smallest (`sign` 1) or largest (-1) known value stands first; None where none is known.

    Example:
        >>> first_extreme([2.0, None, 1.0, 1.0], 1)
        2
    """
    known = [index for index, value in enumerate(values) if value is not None]
    return min(known, key=lambda index: sign * float(values[index] or 0.0)) if known else None


def knockout_findings(run: FinishedRun) -> Iterator[RunFinding]:
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


def stage_table_findings(run: FinishedRun) -> Iterator[RunFinding]:
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


def lens_findings(run: FinishedRun) -> Iterator[RunFinding]:
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
