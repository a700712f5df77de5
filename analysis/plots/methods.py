"""The figure of `analysis.tables`: how accurate every method is at a cost."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .style import CYCLE, DASHED

PANELS = {"accuracy": "all questions", "accuracy_needs_image": "questions that need the image"}
LEADING, BEHIND, ALONE = "not told apart from the most accurate", "told apart from it", "not compared"
MARKERS: Mapping[str, Mapping[str, Any]] = {
    LEADING: {"marker": "o", "markerfacecolor": "#1f3a5f"},
    BEHIND: {"marker": "o", "markerfacecolor": "white"},
    ALONE: {"marker": "x"},
}
COLOR = "#1f3a5f"


def draw_methods_at_cost(
    rows: Sequence[Mapping[str, Any]],
    leading: Mapping[tuple[str, float], Mapping[str, bool]],
    labels: Mapping[str, str],
    note: str,
) -> Figure:
    """One line a method and cost, in groups of equal cost: accuracy with its interval, for both sets of questions.

    Args:
        rows: of the comparison: `method`, `budget` (None or NaN: its published setting), `cost`, and each of `PANELS`
            with `_low` and `_high`; shares of 1.
        leading: (panel, budget) -> method -> whether it may be the most accurate; those that do not take part are left
            out.
        labels: method -> its name.
        note: what the numbers are of.
    """
    full = [row for row in rows if row["method"] == "none"]
    groups: dict[float | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != "none":
            groups.setdefault(None if _is_nan(row["budget"]) else float(row["budget"]), []).append(row)
    lines = sum(len(group) + 1 for group in groups.values())
    drawing, axes = plt.subplots(1, 2, figsize=(8.4, 1.3 + 0.185 * lines), sharey=True, layout="constrained")
    place, ticks, names, headings = 0.0, [], [], []
    used = set()
    for budget, group in groups.items():
        headings.append((place, _heading(budget)))
        for row in group:
            place += 1
            ticks.append(place)
            names.append(f"{labels[row['method']]}, {row['cost']:.2f}")
            for axis, panel in zip(axes, PANELS, strict=True):
                ahead = {} if budget is None else leading.get((panel, budget), {})
                kind = {None: ALONE, True: LEADING, False: BEHIND}[ahead.get(row["method"])]
                used.add(kind)
                _point(axis, place, row, panel, MARKERS[kind])
        place += 1.4
    for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
        for row in full:
            axis.axvspan(100 * row[f"{panel}_low"], 100 * row[f"{panel}_high"], color="#999999", alpha=0.2, linewidth=0)
            axis.axvline(100 * row[panel], color="#555555", linewidth=1, linestyle=DASHED)
        axis.set(title=title, xlabel="accuracy (%)", ylim=(place - 0.6, -0.8))
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(ticks, names)
    for place, text in headings:
        axes[0].annotate(
            text,
            (0, place),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            weight="bold",
        )
    handles: list[Any] = [
        Line2D([], [], color=COLOR, markeredgecolor=COLOR, linewidth=1, label=kind, **MARKERS[kind])
        for kind in MARKERS
        if kind in used
    ]
    if full:
        line = Line2D([], [], color="#555555", linewidth=1, linestyle=DASHED)
        band = Patch(color="#999999", alpha=0.2, linewidth=0)
        handles.append((band, line))
    names = [*(each.get_label() for each in handles[: len(handles) - bool(full)]), *(["full model"] if full else [])]
    drawing.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=4,
        title=textwrap.fill(note, 130),
        title_fontsize=8,
    )
    return drawing


def _is_nan(value: float | None) -> bool:
    return value is None or bool(np.isnan(value))


def _heading(budget: float | None) -> str:
    return "method, cost as published" if budget is None else f"method, cost set to {budget:g}"


def _point(axis: Axes, place: float, row: Mapping[str, Any], panel: str, marker: Mapping[str, Any]) -> None:
    mean, low, high = (100 * row[f"{panel}{end}"] for end in ("", "_low", "_high"))
    if np.isfinite(mean):
        error = [[max(mean - low, 0)], [max(high - mean, 0)]]
        axis.errorbar(
            mean,
            place,
            xerr=error,
            color=CYCLE[0].color,
            markeredgecolor=COLOR,
            markersize=5,
            capsize=2,
            elinewidth=0.9,
            linestyle="none",
            **marker,
        )
