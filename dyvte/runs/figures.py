"""Figures of the commands in this package: policies against fixed exits, and where one question exited."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

_MARKERS = "sDv^P*X<>"
_PLAIN = {"text.parse_math": False}
"""Text from data is shown as it is: a `$` is a dollar."""
_INK, _ACCENT, _SOFT = "#1f3a5f", "#c65911", "#7fa650"
_EDGE: dict[str, Any] = {"mec": "black", "mew": 0.5}
_NUMBER: dict[str, Any] = {"fontsize": 7, "color": _INK}


@plt.rc_context(_PLAIN)
def accuracy_against_flops(
    fixed: pd.DataFrame, policies: pd.DataFrame, oracle: dict[str, float], subtitle: str
) -> Figure:
    """Accuracy and agreement against the prefill's decoder FLOPs.

    `fixed` has a row a fixed exit, `policies` a row a policy with the limits of both, as `agreement_low`; `oracle` is
    the cheapest exit that keeps each answer.
    """
    full = float(fixed["flops_decoder"].iloc[-1])
    rows = -(-(len(policies) + 2) // 3)  # of the legend
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8 + 0.2 * rows), sharex=True, layout="constrained")
    for axis, column in zip(axes, ("accuracy", "agreement"), strict=True):
        axis.plot(
            fixed["flops_decoder"] / full, fixed[column], "-o", color=_INK, ms=3.5, lw=1.2, label="fixed exit, every k"
        )
        for _, row in fixed.iloc[:: max(1, len(fixed) // 8)].iterrows():
            place = row["flops_decoder"] / full, row[column]
            axis.annotate(f"{int(row['exit_layer'])}", place, (3, -9), textcoords="offset points", **_NUMBER)
        axis.plot(oracle["flops_decoder"] / full, oracle[column], "*", color=_SOFT, ms=12, label="oracle", **_EDGE)
        for index, (_, row) in enumerate(policies.iterrows()):
            low, high = row[column] - row[f"{column}_low"], row[f"{column}_high"] - row[column]
            axis.errorbar(
                row["flops_decoder"] / full,
                row[column],
                yerr=np.maximum([[low], [high]], 0),
                lw=1,
                fmt=_MARKERS[index % len(_MARKERS)],
                ms=6,
                color=_ACCENT,
                ecolor="black",
                **_EDGE,
                capsize=2,
                label=textwrap.shorten(str(row["policy"]), 42, placeholder=" …"),
            )
        axis.set_xlabel("decoder FLOPs of the prefill\n(full model = 1)")
        axis.set_ylabel("accuracy" if column == "accuracy" else "same answer as the full model")
        axis.grid(alpha=0.25)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.suptitle("\n".join(textwrap.wrap(subtitle, 110)), fontsize=9)
    return figure


@plt.rc_context(_PLAIN)
def exit_of_one_question(
    image: Any,
    question: str,
    answer: str,
    probability: Mapping[int, float],
    thresholds: Sequence[float],
    exit_layer: int,
) -> Figure:
    """The image beside the exit probability of every gate that was asked.

    `probability` is by exit layer k, `thresholds` are one a gate, `exit_layer` is the number of layers where none
    fired.
    """
    num_layers = len(thresholds) + 1
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=[1, 1.7])
    left.imshow(image)
    left.set_axis_off()
    lines = ["\n".join(textwrap.wrap(each, 44, max_lines=3, placeholder=" …")) for each in (question, answer)]
    left.set_title("\n".join(lines), fontsize=9)
    asked = list(probability)
    right.bar(asked, list(probability.values()), width=0.7, color=[_ACCENT if k == exit_layer else _INK for k in asked])
    right.step(np.arange(1, num_layers), thresholds, where="mid", color="black", lw=1, ls="--", label="threshold")
    right.axvspan(exit_layer + 0.5, num_layers + 0.5, color="0.9", zorder=0)
    if exit_layer < num_layers:
        right.text(
            (exit_layer + num_layers + 1) / 2, 0.03, "text only", ha="center", va="bottom", color="0.4", fontsize=9
        )
    right.set(xlabel="after decoder layers", ylabel="exit probability", ylim=(0, 1.15), xlim=(0.5, num_layers + 0.5))
    right.set_xticks(range(1, num_layers + 1, max(1, num_layers // 12)))
    right.set_yticks(np.linspace(0, 1, 6))
    kept = f"visual tokens leave after {exit_layer} of {num_layers} layers"
    right.set_title(kept if exit_layer < num_layers else "visual tokens stay to the end", fontsize=9)
    right.legend(frameon=False, fontsize=8, loc="upper right")
    return figure
