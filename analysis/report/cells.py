"""Cells, tables and findings of a report: each number says which place of which `summary.json` it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dyvte.policies.registry import labels

from .runs import FinishedRun, Limits, band_places

BAND = "95%, bootstrap over images"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        order: what its column is sorted by; None sorts last.
        run, key: the run, and the place in its summary, that `order` is from; empty for words.
        limits: places of the lower and the upper limit, each with its value; empty where there are none.
    """

    text: str
    order: float | str | None = None
    run: str = ""
    key: str = ""
    limits: tuple[tuple[str, float | None], ...] = ()


@dataclass(frozen=True)
class PageTable:
    """A table, with a note on how to read it."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True)
class RunFinding:
    """What one run says about one question.

    Attributes:
        title: the question, or what was measured.
        verdict: JSON pointer of the verdict, None where there is nothing to decide.
        effects: the numbers behind it, a row each: what it is, the estimate with its limits, and what those are.
        curve: JSON pointer of the curve that it is about, None without.
    """

    run: FinishedRun
    title: str
    verdict: str | None = None
    reasons: Sequence[str] = ()
    effects: Sequence[list[Cell]] = ()
    curve: str | None = None


def number_cell(run: FinishedRun, unit: str, place: str, limits: Limits | None = None) -> Cell:
    """A number of a summary, with its limits in brackets where there are some.

    Args:
        unit: how it is `written`.
        place, limits: JSON pointers.
    """
    value, text = run.value(place), written(run.value(place), unit)
    ends = () if limits is None or value is None else tuple((each, run.value(each)) for each in limits)
    if all(end is None for _, end in ends):
        return Cell(text, value, run.name, place)
    return Cell(f"{text} {interval_text(ends[0][1], ends[1][1], unit)}", value, run.name, place, ends)


def banded_cell(run: FinishedRun, unit: str, place: str, index: int | None = None) -> Cell:
    """A number that is stored as `{mean, low, high}`, of numbers or lists."""
    return number_cell(run, unit, *band_places(place, index))


def words_cell(text: Any) -> Cell:
    """A cell that is no number of a summary; a dash for None."""
    if text is None:
        return Cell("–")
    return Cell(str(text), text if isinstance(text, (int, float)) else str(text))


def spaced(name: Any) -> str:
    """A name from a summary for readers."""
    return str(name).replace("_", " ")


def policy_label(policy: Any) -> str:
    """Name of a policy as the tables write it."""
    return labels().get(str(policy), spaced(policy))


def written(value: Any, unit: str) -> str:
    """A number as the page shows it; a dash where there is none."""
    if value is None or value == "":
        return "–"
    if isinstance(value, str):
        return value
    text = {
        "share": lambda: f"{100 * value:.1f}%",
        "points": lambda: f"{100 * value:+.1f} points",
        "layer": lambda: f"{value:g}" if float(value).is_integer() else f"{value:.1f}",
        "log": lambda: f"{value:+.2f}",
        "ratio": lambda: f"{value:.3f}",
        "count": lambda: f"{value:,.0f}",
        "nats": lambda: f"{value:.2g}",
        "plain": lambda: f"{value:.3g}",
    }[unit]()
    return text.replace("-", "−") if text[0] == "-" else text


def interval_text(low: Any, high: Any, unit: str) -> str:
    """Limits in brackets; a limit that is not reached is a dash."""
    short = "share" if unit == "points" else unit
    low, high = (written(each, short).removesuffix("%") for each in (low, high))
    return f"[{low}, {high}]"


def effect(
    run: FinishedRun, label: str, unit: str, place: str, limits: Limits | None = None, interval: str = ""
) -> list[Cell]:
    """A row of effects: `interval` says what kind of limits these are."""
    cell = number_cell(run, unit, place, limits)
    return [words_cell(label), cell, words_cell(interval if cell.limits else "")]


def band_effect(run: FinishedRun, label: str, unit: str, place: str, index: int | None = None) -> list[Cell]:
    """An effect that is stored as `{mean, low, high}`, of numbers or lists."""
    return effect(run, label, unit, *band_places(place, index), BAND)
