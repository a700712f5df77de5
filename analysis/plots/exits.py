"""Figures of `analysis.exits`: accuracy and FLOPs (paper, Fig. 3), entropy (Fig. 4), KL (VTW), depths.

As in `analysis.plots.attention`, functions take plain arrays and return a figure; nothing is computed here but layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from ..statistics.bands import Band
from ..statistics.exits import KlExit
from .attention import BANDS, CYCLE, draw_band, draw_line, kind_panels, layer_axis, legend, style

EXIT_LAYER = "exit layer k (visual tokens leave before layer k)"
KL_FLOOR = 1e-7
"""Divergences below this are rounding; drawn here."""


def exits(
    curves: Mapping[str, Band], flops: npt.ArrayLike, exit_layer: int | None, title: str, footnote: str
) -> Figure:
    """Accuracy and agreement against the exit layer, with the decoder's FLOPs on a second axis (paper, Fig. 3).

    Args:
        curves: `agreement` and `accuracy`, `[L + 1]`; accuracy may be NaN.
        flops: `[L + 1]` FLOPs of a prefill.
        exit_layer: of the finding; None where there is none.
    """
    flops = np.asarray(flops, dtype=np.float64)
    with style():
        figure, axis = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
        _draw_quality(axis, curves)
        right = axis.twinx()
        right.spines["right"].set_visible(True)
        costs = replace(CYCLE[4], label="decoder FLOPs of a prefill (right axis)")
        k = np.arange(len(flops))
        right.plot(k, flops, color="#888888", linestyle=costs.linestyle, linewidth=1.2)
        axis.plot([], [], color="#888888", linestyle=costs.linestyle, linewidth=1.2, label=costs.label)
        right.yaxis.set_major_formatter(EngFormatter())
        right.set_ylim(0, flops.max() * 1.05)
        right.set_ylabel("FLOPs")
        axis.set_zorder(right.get_zorder() + 1)
        axis.patch.set_visible(False)
        layer_axis(axis, len(flops), EXIT_LAYER)
        axis.set_ylim(0, 1.05)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_ylabel("share of questions")
        _mark_exit(axis, exit_layer)
        axis.set_title(title)
        legend(figure, axis, footnote, columns=2)
        return figure


def _draw_quality(axis: Axes, curves: Mapping[str, Band]) -> None:
    for series, name, label in (
        (CYCLE[0], "agreement", "same answer as the full model"),
        (CYCLE[1], "accuracy", "right answer"),
    ):
        if np.isfinite(curves[name].mean).any():
            draw_band(axis, np.arange(len(curves[name].mean)), curves[name], replace(series, label=label))


def _mark_exit(axis: Axes, exit_layer: int | None) -> None:
    if exit_layer is not None:
        label = f"visual tokens no longer contribute from k = {exit_layer} on"
        axis.axvline(exit_layer, color="black", linewidth=1, linestyle=(0, (4, 2)), label=label)


def kinds(curves: Mapping[str, Mapping[str, Band]], counts: Mapping[str, int], title: str, footnote: str) -> Figure:
    """Accuracy and agreement against the exit layer, one panel a question kind.

    Args:
        curves: kind -> `agreement`, `accuracy`, each `[L + 1]`.
        counts: kind -> number of questions.
    """
    with style():
        num_exits = len(next(iter(curves.values()))["agreement"].mean)
        figure, panels = kind_panels(counts, min(len(curves), 5), (2.1, 2.0), 0.7, num_exits, "exit layer k")
        for kind, axis in panels.items():
            _draw_quality(axis, curves[kind])
            axis.set_ylim(0, 1.05)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.supylabel("share of questions", fontsize=9)
        figure.suptitle(title)
        legend(figure, axis, footnote, 2)
        return figure


def kl(forward: Band, reverse: Band, thresholds: Sequence[KlExit], title: str, footnote: str) -> Figure:
    """KL divergence from the full model against the exit layer, with the thresholds and their K* (VTW).

    Args:
        forward, reverse: KL(exit || full) and KL(full || exit), `[L + 1]` in nats.
        thresholds: eta and K*.
    """
    with style():
        figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for series, band, label in (
            (CYCLE[0], forward, "KL(exit ‖ full), the criterion"),
            (CYCLE[1], reverse, "KL(full ‖ exit)"),
        ):
            shown = Band(*(np.maximum(part[:-1], KL_FLOOR) for part in (band.mean, band.low, band.high)))
            draw_band(axis, np.arange(len(shown.mean)), shown, replace(series, label=label))
        axis.set_yscale("log")
        num_exits = len(forward.mean)
        layer_axis(axis, num_exits, EXIT_LAYER)
        for each in thresholds:
            axis.axhline(each.eta, color="#888888", linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
            found = "no exit" if each.layer is None else f"K* = {each.layer}"
            axis.annotate(
                f"η = {each.eta:g}: {found}",
                (1.01, each.eta),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                annotation_clip=False,
            )
            if each.layer is not None and each.layer < num_exits - 1:
                height = max(forward.mean[each.layer], KL_FLOOR)
                axis.plot(each.layer, height, marker="o", markersize=9, fillstyle="none", color="black")
        low = min([*(each.eta for each in thresholds if each.eta > 0), *np.maximum(forward.low[:-1], KL_FLOOR)])
        axis.set_ylim(bottom=low / 2)
        axis.set_ylabel("KL divergence of the next token (nats)")
        axis.set_title(f"{title}\n(exit L, the full model, has divergence 0)")
        legend(figure, axis, footnote, columns=2)
        return figure


def entropy(matrix: npt.ArrayLike, difference: npt.ArrayLike, title: str, footnote: str) -> Figure:
    """Text self-attention entropy under every exit: curves of some exits, and the change for all of them (Fig. 4).

    Args:
        matrix: E[k, l], `[L + 1, L]` in nats; row L is the full model.
        difference: E[k, l] - E[L, l], NaN for l < k.
    """
    matrix, difference = np.asarray(matrix), np.asarray(difference)
    num_layers = matrix.shape[1]
    layers = np.arange(num_layers)
    with style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 3.9), layout="constrained", gridspec_kw={"width_ratios": [1.1, 1]}
        )
        shown = np.unique(np.linspace(0, num_layers, min(6, num_layers + 1)).round().astype(int))[:-1]
        for exit_layer, series in zip(shown, CYCLE[1:], strict=False):
            line = replace(series, label=f"exit at k = {exit_layer}")
            draw_line(left, layers[exit_layer:], matrix[exit_layer, exit_layer:], line, max(1, num_layers // 12))
        left.plot(layers, matrix[-1], color=CYCLE[0].color, linewidth=2.2, label="full model", zorder=1)
        layer_axis(left, num_layers)
        left.set_ylabel("entropy of text self-attention (nats)")
        left.set_title("under some exits")
        limit = max(float(np.nanmax(np.abs(difference[:-1]))), 1e-6)
        sns.heatmap(
            difference[:-1],
            ax=right,
            cmap="cividis",  # dark to light, so that signs survive a black-and-white print
            vmin=-limit,
            vmax=limit,
            cbar_kws={"label": "change from the full model (nats)"},
            square=True,
        )
        step = max(1, math.ceil(num_layers / 12))
        ticks = np.arange(0, num_layers, step)
        right.set_xticks(ticks + 0.5, ticks.astype(str), rotation=0)
        right.set_yticks(ticks + 0.5, ticks.astype(str), rotation=0)
        right.patch.set(facecolor="white", hatch="////", edgecolor="#bbbbbb")
        right.set_xlabel("decoder layer")
        right.set_ylabel("exit layer k")
        right.set_title("change under every exit (hatched: before it)")
        figure.suptitle(title)
        legend(figure, left, footnote, columns=6)
        return figure


ExitLayers = tuple[npt.NDArray[np.int64], Band]
"""Number of questions at each exit layer, `[L + 1]`, and the mean exit layer as a band without axes."""


def exit_depth(groups: Mapping[str, ExitLayers], title: str, footnote: str) -> Figure:
    """Distribution of the exit depth, by the paper's label, in every group of questions; see :func:`exit_map`."""
    return exit_map(groups, "exit depth: first exit layer from which answer and cross-entropy stay", title, footnote)


def exit_map(groups: Mapping[str, ExitLayers], xlabel: str, title: str, footnote: str) -> Figure:
    """Share of the questions at each exit layer, one row a group, with the mean and its interval where it is known.

    Args:
        groups: question kinds in any order, and `all`, which comes last; limits of a mean that are NaN are not drawn.
        xlabel: whose exit layers they are.
    """
    names = sorted((name for name in groups if name != "all"), key=lambda name: float(groups[name][1].mean))
    names = [*names, "all"] if len(names) != 1 else ["all"]
    shares = np.stack([groups[name][0] / groups[name][0].sum() for name in names])
    with style():
        figure, axis = plt.subplots(figsize=(6.4, 0.34 * len(names) + 1.9), layout="constrained")
        sns.heatmap(
            shares,
            ax=axis,
            cmap="Greys",
            vmin=0,
            vmax=max(float(shares.max()), 0.01),
            cbar_kws={"label": "share of questions", "format": PercentFormatter(1.0, decimals=0)},
            linewidths=0.5,
            linecolor="white",
        )
        rows = np.arange(len(names)) + 0.5
        mean, low, high = (
            np.array([float(getattr(groups[name][1], part)) for name in names]) for part in ("mean", "low", "high")
        )
        known = np.isfinite(low).any()
        axis.errorbar(
            mean + 0.5,
            rows,
            xerr=np.stack([mean - low, high - mean]) if known else None,
            fmt="D",
            color="#c65911",
            markeredgecolor="white",
            markersize=6,
            capsize=3,
            label="mean and its 95% interval" if known else "mean",
        )
        axis.set_yticks(rows, [f"{name.replace('_', ' ')} ({groups[name][0].sum():,})" for name in names], rotation=0)
        step = max(1, math.ceil(shares.shape[1] / 16))
        ticks = np.arange(0, shares.shape[1], step)
        axis.set_xticks(ticks + 0.5, ticks.astype(str), rotation=0)
        axis.set_xlabel(xlabel)
        axis.set_title(title)
        legend(figure, axis, footnote)
        return figure


def tokens(summary: Mapping[str, Any], num_layers: int, title: str) -> Figure:
    """How long each answer token needs the image: mean first exit from which it is predicted, by its index.

    Args:
        summary: part of the data (`questions`, `captions`) -> `token`, `mean`, `low`, `high`, `num_answers`.
        num_layers: L.
    """
    labels = {"questions": "answers to questions", "captions": "captions"}
    with style():
        figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        for series, (part, label) in zip(CYCLE, labels.items(), strict=False):
            values = summary[part]
            text = f"{label} ({values['num_answers'][0]:,} answers)"
            draw_band(axis, values["token"], Band.from_dict(values), replace(series, label=text))
        axis.set_ylim(0, num_layers)
        axis.set_xlabel("index of the answer token (teacher-forced on the full model's answer)")
        axis.set_ylabel("exit layer from which\nthe token is predicted")
        axis.set_title(title)
        legend(figure, axis, BANDS)
        return figure
