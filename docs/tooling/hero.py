"""README.md's pictures: over the decoder's layers, who looks at the image, who needs it, and where it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from analysis.plots.style import CYCLE, figure_style

IMAGE, FREE, WORDS = CYCLE[0].color, "#e9f1e0", "#46691f"
MOST_TICKS = 15


def draw_hero(numbers: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Three panels over one axis of layers, drawn from the numbers that `sources.json` keeps of other pictures.

    Args:
        numbers: of `stages.png` (attention), `exits.png` (answers kept) and `exit_examples.png` (where the image left).
    """
    attention = np.array(numbers["stages.png"]["curves"]["cross"])
    kept = np.array(numbers["exits.png"]["agreement"])
    left = np.array(numbers["exit_examples.png"]["exit_layers"], dtype=float)
    stops = numbers["exits.png"]["findings.contribution_stops.exit_layer"]
    layers = len(attention)
    exits = np.arange(layers + 1)
    with figure_style():
        figure, axes = plt.subplots(3, 1, figsize=(7.2, 5.4), sharex=True, height_ratios=[1, 1.15, 1])
        axes[0].bar(exits[:-1] + 0.5, attention, width=0.8, color=IMAGE)
        axes[0].set_ylabel("times even\nspread")
        axes[1].plot(exits, kept, color=IMAGE, marker="o", markersize=5 if layers <= MOST_TICKS else 3)
        axes[1].set(ylim=(0, 1.08), ylabel="answers")
        axes[2].bar(exits, left / left.sum(), width=0.5, color=IMAGE)
        axes[2].set(xlabel="decoder layer", ylabel="questions", xlim=(-0.45, layers + 0.45))
        every = -(-layers // MOST_TICKS)
        shown = [k for k in exits[:-1] if k % every == 0 and k <= layers - every]
        axes[2].set_xticks([*shown, layers], [*map(str, shown), "never"])
        for axis in axes[1:]:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        titles = (
            "Attention that the question pays the image",
            "Answers that stay the same if the image is taken out before this layer",
            "Where learned gates take it out, question by question",
        )
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
            if stops is not None:
                axis.axvspan(stops, layers + 0.45, color=FREE, zorder=-2, linewidth=0)
                axis.axvline(stops, color=CYCLE[2].color, linewidth=1.6, zorder=-1)
        if stops is not None:
            room_behind = stops < 0.7 * layers
            axes[1].annotate(
                f"{kept[stops:].min():.0%} of the answers hold\nwithout it from layer {stops} on",
                (stops, kept[stops]), (stops + 0.35 if room_behind else stops - 0.35, 0.3 if room_behind else 0.12),
                fontsize=10, fontweight="bold", color=WORDS, ha="left" if room_behind else "right",
                arrowprops={"arrowstyle": "->", "color": WORDS, "relpos": (0 if room_behind else 1, 0.9)},
            )  # fmt: skip
        figure.align_ylabels(axes)
        figure.tight_layout(h_pad=0.8)
    return figure


def hero_caption(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """What the picture shows, in words."""
    kept, exits = numbers["exits.png"]["agreement"], numbers["exits.png"]
    stops, layers = exits["findings.contribution_stops.exit_layer"], len(kept) - 1
    text = f"The small model that ships with the toolkit, {exits['num_questions']} questions about drawn scenes."
    if stops is None:
        return f"{text} No layer was found from which on the image no longer contributes."
    return (
        f"{text} Its decoder carries the image through {layers} layers and attends to it to the end, but "
        f"{min(kept[stops:]):.0%} of the answers need only the first {stops}."
    )
