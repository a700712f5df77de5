"""Figures of `analysis.knockout` and `analysis.stage_table`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..statistics.stage_table import USE_POINTS
from ..statistics.stages import MIN_EFFECT
from ..statistics.verdicts import verdict_word
from . import style

SIMULTANEOUS = "bands: 95% over images, for all lines and windows at once"
LABELS = {
    "agreement_points": "change of agreement with the full model\n(percentage points)",
    "nats": "change of log p(answer) (nats)",
    "first_token_percent": "change of p(first token) (%)",
}
REPLACED = {
    "mean": "replaced by their mean",
    "swap": "those of another image",
    "random": "as many random keys",
    "mass": "text keys of as much attention",
}
CONTROLS = ("random", "mass")
OFF_THE_IMAGE = "instruction->visual"
OF_THE_IMAGE = {"objects": "patches of the answer's objects", "other patches": "as many other patches"}


def cut_label(name: str) -> str:
    """`question->visual (swap)` as the field writes it: queries on the left, where they look on the right."""
    path, _, what = name.partition(" (")
    queries, keys = path.replace("visual", "image").split("->")
    label = f"{queries} \N{LEFTWARDS ARROW} {keys}"
    return f"{label}, {(REPLACED | OF_THE_IMAGE)[what.rstrip(')')]}" if what else label


def _draw_cut(axis: Axes, summary: style.Summary, effect: Mapping[str, Any], series: style.Series) -> None:
    """A line over the middles of the windows in which a path is cut."""
    style.draw_band(axis, effect, series, [(start + stop - 1) / 2 for start, stop in summary["windows"]])


def _draw_lines(axis: Axes, summary: style.Summary, group: style.Summary, names: Sequence[str], measure: str) -> None:
    for series, name in zip(style.CYCLE, names, strict=False):
        _draw_cut(axis, summary, group["effects"][name][measure], series.named(cut_label(name)))
    axis.axhline(0, color=style.GREY, linewidth=0.8, zorder=0)


def _draw_cuts(summary: style.Summary, names: Sequence[str], title: str) -> Figure:
    """What the cuts change that there are, in answers and in the probability of their first token."""
    names = [name for name in names if name in summary["overall"]["effects"]]
    with style.new_figure(1, 2, figsize=(9.6, 4.2)) as (figure, axes):
        for axis, measure in zip(axes, ("agreement_points", "first_token_percent"), strict=True):
            _draw_lines(axis, summary, summary["overall"], names, measure)
            style.layer_axis(axis, summary["num_layers"], f"middle of the {summary['width']} layers in which it is cut")
            axis.set_ylabel(LABELS[measure])
        figure.suptitle(f"{title}\n{style.title_of(summary)}")
        style.add_legend(figure, axes[0], style.sample_note(summary["overall"], SIMULTANEOUS))
        return figure


def draw_knockouts(summary: style.Summary) -> Figure:
    """One line a path over the windows of layers in which it is cut."""
    names = [name for name in summary["overall"]["effects"] if " (" not in name]
    return _draw_cuts(summary, names, "What an answer loses when a path through attention is cut")


def draw_replacements(summary: style.Summary) -> Figure:
    """The image cut off, replaced by its mean, swapped, and as many random keys cut."""
    names = [OFF_THE_IMAGE, *(f"{OFF_THE_IMAGE} ({what})" for what in REPLACED)]
    return _draw_cuts(summary, names, "Cutting the image off, and putting another in its place")


def draw_objects(summary: style.Summary) -> Figure:
    """The whole image cut off, the patches of the answer's objects alone, and as many other patches of the image."""
    names = [OFF_THE_IMAGE, *(f"{OFF_THE_IMAGE} ({what})" for what in OF_THE_IMAGE)]
    return _draw_cuts(summary, names, "Cutting off the objects that the answer rests on, and as many other patches")


def draw_controls(summary: style.Summary) -> Figure:
    """Each path beside as many random keys and text keys of as much attention, one panel a path."""
    effects = summary["overall"]["effects"]
    names = [name for name in effects if any(f"{name} ({what})" in effects for what in CONTROLS)]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    size = (3.2 * columns, 2.4 * rows + 1)
    with style.new_figure(rows, columns, figsize=size, squeeze=False, sharey=True) as (figure, axes):
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        for axis, name in zip(axes.flat, names, strict=False):
            lines = {name: "the path"} | {f"{name} ({what})": REPLACED[what] for what in CONTROLS}
            for series, (key, label) in zip(style.CYCLE, lines.items(), strict=False):
                if key in effects:
                    _draw_cut(axis, summary, effects[key]["agreement_points"], series.named(label))
            axis.set_title(cut_label(name), fontsize=9)
            style.layer_axis(axis, summary["num_layers"], ticks=6)
        for axis in axes[:, 0]:
            axis.set_ylabel(LABELS["agreement_points"], fontsize=8)
        figure.suptitle(style.title_of(summary))
        fullest = max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
        style.add_legend(figure, fullest, style.sample_note(summary["overall"], SIMULTANEOUS))
        return figure


def draw_knockouts_by_kind(summary: style.Summary) -> Figure:
    """The image cut off from the question and from the last token, one panel a question kind."""
    names = [name for name in ("question->visual", "last->visual") if name in summary["overall"]["effects"]]
    names = names or [next(iter(summary["overall"]["effects"]))]
    kinds = summary["kinds"]
    sizes = (min(3, len(kinds)), (3.0, 1.9), 1.3, summary["num_layers"])
    with style.kind_panels(kinds, *sizes, "middle of the window") as (figure, panels):
        for kind, axis in panels.items():
            _draw_lines(axis, summary, kinds[kind], names, "agreement_points")
            axis.set_ylim(-105, 5)
        figure.supylabel(LABELS["agreement_points"], fontsize=9)
        figure.suptitle(style.title_of(summary))
        style.add_legend(figure, next(iter(panels.values())), f"windows of {summary['width']} layers; {SIMULTANEOUS}")
        return figure


MOST_NUMBERED = 14
"""Layers, at most, of a map whose cells have their numbers written in them."""
VERDICT_COLORS = {"confirmed": style.CYCLE[2].color, "refuted": style.CYCLE[1].color}
"""Of a stage; what is undetermined or not tested is grey."""


def draw_stage_table(summary: style.Summary) -> Figure:
    """Both kinds of evidence for each stage, one row of panels a split: every number with its limits and the margin."""
    sides = (
        ("attention", "change of enrichment (log)", MIN_EFFECT),
        ("cause", "answers changed (percentage points)", USE_POINTS),
    )
    splits = summary["evidence"]
    with style.new_figure(len(splits), 2, figsize=(11.0, 3.6 * len(splits) + 0.6), squeeze=False) as (figure, axes):
        for row, evidence in zip(axes, splits, strict=True):
            for axis, (side, unit, margin) in zip(row, sides, strict=True):
                _draw_evidence(axis, evidence[side], margin)
                axis.set_title(f"by {side}, split ({evidence['split'][0]}, {evidence['split'][1]})")
                axis.set_xlabel(unit)
        counts = " and ".join(f"{style.size_in_words(summary[side])} ({side})" for side, *_ in sides)
        figure.suptitle(f"The three stages by attention and by cause: {style.title_of(summary)}")
        note = f"bars: one-sided limits as docs/stage_rules.md sets them; dashed: the margin; n = {counts}"
        figure.supxlabel(style.wrapped(note, 150), fontsize=8)
        return figure


def _draw_evidence(axis: Axes, stages: Sequence[Mapping[str, Any]], margin: float) -> None:
    """Numbers of the three stages from top to bottom, each stage headed by its verdict."""
    labels: list[tuple[float, str]] = []
    place = 0.0
    for number, stage in enumerate(stages, start=1):
        color = VERDICT_COLORS.get(stage["verdict"], style.GREY)
        heading = f"{number} {stage['stage']}: {verdict_word(stage['verdict'])}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the margins' lines do not cross the words
        look: dict[str, Any] = {"color": color, "fontweight": "bold", "va": "center", "bbox": box}
        axis.text(0.01, place, heading, transform=axis.get_yaxis_transform(), **look)
        for name, (mean, low, high) in stage["numbers"].items():
            place += 1
            labels.append((place, name.replace("_", " ")))
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=2.5)
        place += 1.4
    axis.axvline(0, color=style.GREY, linewidth=0.8, zorder=0)
    axis.axvline(margin, color=style.GREY, linewidth=0.8, linestyle=style.DASHED, zorder=0)
    axis.set_yticks([each for each, _ in labels], [name for _, name in labels])
    axis.set_ylim(place - 0.9, -0.7)


def draw_entry_exit(summary: style.Summary) -> Figure:
    """Agreement when the instruction sees the image from layer `entry` up to layer `exit` only.

    The top row is the exit sweep, the right column is late entry, and the stair is the diagonal of single layers.
    """
    layers = summary["num_layers"]
    matrix = np.full((layers, layers), np.nan)
    agreement = 100 + np.array(summary["overall"]["entry_exit"]["agreement_points"]["mean"], dtype=np.float64)
    for (start, stop), value in zip(summary["entry_exit_windows"], agreement, strict=True):
        matrix[start, stop - 1] = value
    with style.new_figure(figsize=(6.2, 5.2)) as (figure, axis):
        numbers = {"annot": layers <= MOST_NUMBERED, "fmt": ".0f", "annot_kws": {"fontsize": 7}}
        scale = {"vmin": 0, "vmax": 100, "cbar_kws": {"label": "same answer as the full model (%)"}}
        sns.heatmap(matrix, ax=axis, cmap="cividis", square=True, **numbers, **scale)
        stair = np.arange(layers + 1)
        axis.step(stair, stair, where="post", color="#c65911", linewidth=1.8)
        ticks = style.cell_ticks(axis, layers)
        axis.set_xticklabels(ticks + 1)
        axis.set_yticks(ticks + 0.5, ticks.astype(str), rotation=0)
        axis.set(xlabel="exit: first layer that no longer sees it", ylabel="entry: first layer that sees the image")
        words = "stair: one layer only\ntop row: exits\nright column: late entry"
        axis.text(0.03, 0.05, words, transform=axis.transAxes, fontsize=8.5)
        group = summary["overall"]
        axis.set_title(
            f"{style.title_of(summary)}\nthe image is open to the instruction in [entry, exit) only; "
            f"n = {group['num_samples']:,} on {group['num_images']:,} images"
        )
        return figure
