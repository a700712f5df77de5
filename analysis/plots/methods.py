"""The figure of `analysis.tables`: how accurate every method is at a cost."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .style import CYCLE, DASHED

PANELS = {"accuracy": "all questions", "accuracy_needs_image": "questions that need the image"}
LEADING, BEHIND, ALONE = "not told apart from the most accurate", "told apart from it", "not compared"
COLOR = CYCLE[0].color
MARKERS: Mapping[str, Mapping[str, Any]] = {
    LEADING: {"marker": "o", "markerfacecolor": COLOR},
    BEHIND: {"marker": "o", "markerfacecolor": "white"},
    ALONE: {"marker": "x"},
}


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
    """
    full = [row for row in rows if row["method"] == "none"]
    groups: dict[float | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != "none":
            groups.setdefault(None if pd.isna(row["budget"]) else float(row["budget"]), []).append(row)
    lines = sum(len(group) + 1 for group in groups.values())
    drawing, axes = plt.subplots(1, 2, figsize=(8.4, 1.3 + 0.185 * lines), sharey=True, layout="constrained")
    place, ticks, names, headings = 0.0, [], [], []
    used = set()
    for budget, group in groups.items():
        headings.append((place, f"method, cost {'as published' if budget is None else f'set to {budget:g}'}"))
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
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes[0].annotate(text, (0, place), (-4, 0), ha="right", va="center", weight="bold", **at)
    handles: dict[str, Any] = {
        kind: Line2D([], [], color=COLOR, markeredgecolor=COLOR, linewidth=1, **MARKERS[kind])
        for kind in MARKERS
        if kind in used
    }
    if full:
        line = Line2D([], [], color="#555555", linewidth=1, linestyle=DASHED)
        handles["full model"] = (Patch(color="#999999", alpha=0.2, linewidth=0), line)
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "title_fontsize": 8}
    drawing.legend(list(handles.values()), list(handles), title=textwrap.fill(note, 130), **where)
    return drawing


def _point(axis: Axes, place: float, row: Mapping[str, Any], panel: str, marker: Mapping[str, Any]) -> None:
    mean, low, high = (100 * row[f"{panel}{end}"] for end in ("", "_low", "_high"))
    if np.isfinite(mean):
        error = [[max(mean - low, 0)], [max(high - mean, 0)]]
        lines: dict[str, Any] = {"color": COLOR, "elinewidth": 0.9, "capsize": 2, "linestyle": "none"}
        axis.errorbar(mean, place, xerr=error, markeredgecolor=COLOR, markersize=5, **lines, **marker)
