"""Figures of `analysis.exits`: accuracy and FLOPs (paper, Fig. 3), entropy (Fig. 4), KL (VTW), depths."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from ..statistics.bands import Band
from . import style

EXIT_LAYER = "exit layer k (visual tokens leave before layer k)"
KL_FLOOR = 1e-7
"""Divergences below this are rounding; drawn here."""


def _means_note(group: style.Summary) -> str:
    return f"means over n = {style.size_in_words(group)}"


QUALITY_LABELS = {"agreement": "same answer as the full model", "accuracy": "right answer"}
"""Band of a group -> what it is the share of."""


def known_quality(group: style.Summary) -> dict[str, Band]:
    """Those of `QUALITY_LABELS` that have values: data without references have no accuracy."""
    bands = {name: Band.from_dict(group["bands"][name]) for name in QUALITY_LABELS}
    return {name: band for name, band in bands.items() if np.isfinite(band.mean).any()}


def _draw_quality(axis: Axes, group: style.Summary) -> None:
    for series, (name, band) in zip(style.CYCLE, known_quality(group).items(), strict=False):
        style.draw_band(axis, band, series.named(QUALITY_LABELS[name]))
    style.share_axis(axis)


def draw_exit_curves(summary: style.Summary) -> Figure:
    """Fig. 3: accuracy and agreement against the exit layer, with the decoder's FLOPs on a second axis."""
    flops = np.asarray(summary["flops_decoder"], dtype=np.float64)
    with style.new_figure(figsize=(6.4, 3.9)) as (figure, axis):
        _draw_quality(axis, summary["overall"])
        right = axis.twinx()
        right.spines["right"].set_visible(True)
        line = {"color": style.GREY, "linestyle": style.CYCLE[4].linestyle, "linewidth": 1.2}
        right.plot(np.arange(len(flops)), flops, **line)
        axis.plot([], [], label="decoder FLOPs of a prefill (right axis)", **line)
        right.yaxis.set_major_formatter(EngFormatter())
        right.set_ylim(0, flops.max() * 1.05)
        right.set_ylabel("FLOPs")
        axis.set_zorder(right.get_zorder() + 1)
        axis.patch.set_visible(False)
        style.layer_axis(axis, len(flops), EXIT_LAYER)
        axis.set_ylabel("share of questions")
        exit_layer = summary["findings"]["contribution_stops"]["exit_layer"]
        if exit_layer is not None:
            label = f"visual tokens no longer contribute from k = {exit_layer} on"
            axis.axvline(exit_layer, color="black", linewidth=1, linestyle=style.DASHED, label=label)
        axis.set_title(style.title_of(summary))
        style.add_legend(figure, axis, style.sample_note(summary["overall"]), columns=2)
        return figure


def draw_exit_curves_by_kind(summary: style.Summary) -> Figure:
    """Fig. 3 for every question kind: accuracy and agreement against the exit layer."""
    groups = summary["kinds"]
    sizes = (min(len(groups), 5), (2.1, 2.0), 0.7, summary["num_layers"] + 1)
    with style.kind_panels(groups, *sizes, "exit layer k") as (figure, panels):
        for kind, axis in panels.items():
            _draw_quality(axis, groups[kind])
        figure.supylabel("share of questions", fontsize=9)
        figure.suptitle(f"{style.title_of(summary)}, by question kind")
        style.add_legend(figure, axis, style.sample_note(summary["overall"]), 2)
        return figure


def draw_kl(summary: style.Summary) -> Figure:
    """KL divergence of every exit from the full model, with the thresholds and their K* (VTW)."""
    thresholds = summary["k_star_details"]
    divergence, reverse = (Band.from_dict(summary["overall"]["bands"][name]) for name in ("kl", "kl_reverse"))
    with style.new_figure(figsize=(6.4, 4.2)) as (figure, axis):
        lines = {"KL(exit ‖ full), the criterion": divergence, "KL(full ‖ exit)": reverse}
        for series, (label, band) in zip(style.CYCLE, lines.items(), strict=False):
            shown = Band(*(np.maximum(part[:-1], KL_FLOOR) for part in (band.mean, band.low, band.high)))
            style.draw_band(axis, shown, series.named(label))
        style.plain_logarithm(axis)
        num_exits = len(divergence.mean)
        style.layer_axis(axis, num_exits, EXIT_LAYER)
        for each in thresholds:
            eta, layer = each["eta"], each["layer"]
            axis.axhline(eta, color=style.GREY, linewidth=0.8, linestyle=style.DASHED, zorder=0)
            found = f"η = {eta:g}: {'no exit' if layer is None else f'K* = {layer}'}"
            where = ("axes fraction", "data")
            axis.annotate(found, (1.01, eta), xycoords=where, va="center", fontsize=8, annotation_clip=False)
            if layer is not None and layer < num_exits - 1:
                height = max(divergence.mean[layer], KL_FLOOR)
                axis.plot(layer, height, marker="o", markersize=9, fillstyle="none", color="black")
        lowest = np.maximum(np.fmin(divergence.low, divergence.mean)[:-1], KL_FLOOR).min()
        axis.set_ylim(bottom=min([each["eta"] for each in thresholds if each["eta"] > 0] + [lowest]) / 2)
        axis.set_ylabel("KL divergence of the next token (nats)")
        axis.set_title(f"{style.title_of(summary)}\n(exit L, the full model, has divergence 0)")
        style.add_legend(figure, axis, style.sample_note(summary["overall"]), columns=2)
        return figure


def draw_text_entropy(summary: style.Summary) -> Figure:
    """Fig. 4: entropy of the text's self-attention under some exits, and its change under all of them."""
    entropy = summary["entropy"]["text_entropy"]
    matrix, difference = (np.array(entropy[name]["mean"], dtype=np.float64) for name in ("matrix", "difference"))
    num_layers = matrix.shape[1]
    layers = np.arange(num_layers)
    with style.new_figure(1, 2, figsize=(9.6, 3.9), width_ratios=[1.1, 1]) as (figure, (left, right)):
        shown = np.unique(np.linspace(0, num_layers, min(6, num_layers + 1)).round().astype(int))[:-1]
        for k, series in zip(shown, style.CYCLE[1:], strict=False):
            line = series.named(f"exit at k = {k}")
            style.draw_line(left, layers[k:], matrix[k, k:], line, max(1, num_layers // 12))
        left.plot(layers, matrix[-1], color=style.CYCLE[0].color, linewidth=2.2, label="full model", zorder=1)
        style.layer_axis(left, num_layers)
        left.set_ylabel("entropy of text self-attention (nats)")
        left.set_title("under some exits")
        limit = max(float(np.nanmax(np.abs(difference[:-1]))), 1e-6)
        # dark to light, so that signs survive a black-and-white print
        colours = {"cmap": "cividis", "vmin": -limit, "vmax": limit}
        label = {"label": "change from the full model (nats)"}
        sns.heatmap(difference[:-1], ax=right, square=True, cbar_kws=label, **colours)
        ticks = style.cell_ticks(right, num_layers)
        right.set_yticks(ticks + 0.5, ticks.astype(str), rotation=0)
        right.patch.set(facecolor="white", hatch="////", edgecolor="#bbbbbb")
        right.set(xlabel="decoder layer", ylabel="exit layer k")
        right.set_title("change under every exit (hatched: before it)")
        figure.suptitle(style.title_of(summary))
        style.add_legend(figure, left, _means_note(summary["overall"]), columns=6)
        return figure


def draw_entropy_change(summary: style.Summary) -> Figure:
    """Direction and size of the entropy's change under every exit beside another image's, and its link to answers."""
    change = summary["entropy_change"]
    floor = np.array(change["floor"]["mean"], dtype=np.float64)
    with style.new_figure(1, 2, figsize=(9.6, 3.9)) as (figure, (left, right)):
        span = {"color": style.GREY, "alpha": 0.25, "linewidth": 0}
        left.fill_between(np.arange(len(floor)), -floor, floor, label="another image", **span)
        style.draw_band(left, change["signed"], style.CYCLE[0].named("exit at k"))
        left.set_ylabel("change of text entropy\nin the layers after k (nats)")
        style.draw_band(right, change["answers"], style.CYCLE[1].named("Spearman's correlation"))
        right.set_ylim(-1.05, 1.05)
        right.set_ylabel("rank correlation: change of\nentropy and changed answer")
        for axis in (left, right):
            axis.axhline(0, color=style.GREY, linewidth=0.8, zorder=0)
            style.layer_axis(axis, len(floor), "exit layer k")
        figure.suptitle(f"What exits do to the text's entropy: {style.title_of(summary)}")
        style.add_legend(figure, left, style.sample_note(summary["overall"]))
        return figure


ExitLayers = tuple[npt.NDArray[np.int64], Band]
"""Number of questions at each exit layer, `[L + 1]`, and the mean exit layer as a band without axes."""


def draw_exit_depths(summary: style.Summary) -> Figure:
    """How deep the image is needed by the paper's label, by question kind."""
    depths = {name: each["exit_depth"] for name, each in {**summary["kinds"], "all": summary["overall"]}.items()}
    groups = {name: (np.array(each["counts"]), Band.from_dict(each)) for name, each in depths.items()}
    label = "exit depth: first exit layer from which\nanswer and cross-entropy stay"
    return draw_exit_layer_map(groups, label, style.title_of(summary), _means_note(summary["overall"]))


def draw_policy_exit_layers(summary: style.Summary) -> Figure:
    """Where the questions of every kind left under a policy (summary of `dyvte.evaluate`)."""
    groups = {
        name: (np.array(each["exit_layers"]), Band(*np.array([each["mean_exit_layer"], np.nan, np.nan])))
        for name, each in {**summary["kinds"], "all": summary}.items()
    }
    title, note = f"{summary['policy']}: {style.title_of(summary)}", f"n = {summary['num_questions']:,} questions"
    return draw_exit_layer_map(groups, "exit layer k that the policy chose", title, note)


def draw_exit_layer_map(groups: Mapping[str, ExitLayers], xlabel: str, title: str, footnote: str) -> Figure:
    """Share of the questions at each exit layer, one row a group, with the mean and its interval where it is known.

    Args:
        groups: question kinds in any order, and `all`, which comes last; limits of a mean that are NaN are not drawn.
    """
    names = sorted((name for name in groups if name != "all"), key=lambda name: float(groups[name][1].mean))
    names = [*names, "all"] if len(names) != 1 else ["all"]
    shares = np.stack([groups[name][0] / groups[name][0].sum() for name in names])
    rows = np.arange(len(names)) + 0.5
    labels = [style.wrapped(f"{name.replace('_', ' ')} ({groups[name][0].sum():,})", 28) for name in names]
    lines = [line for label in labels for line in label.split("\n")]
    with style.new_figure(figsize=(5.4 + 0.07 * max(map(len, lines)), 0.34 * len(lines) + 2.1)) as (figure, axis):
        colours = {"cmap": "Greys", "vmin": 0, "vmax": max(float(shares.max()), 0.01)}
        bar = {"label": "share of questions", "format": PercentFormatter(1.0, decimals=0)}
        sns.heatmap(shares, ax=axis, cbar_kws=bar, linewidths=0.5, linecolor="white", **colours)
        mean, low, high = np.array([list(groups[name][1].to_dict().values()) for name in names]).T
        known = np.isfinite(low).any()
        error, label = (np.stack([mean - low, high - mean]), "mean and its 95% interval") if known else (None, "mean")
        look = {"fmt": "D", "color": style.CYCLE[1].color, "markeredgecolor": "white", "markersize": 6, "capsize": 3}
        axis.errorbar(mean + 0.5, rows, xerr=error, label=label, **look)
        axis.set_yticks(rows, labels, rotation=0)
        style.cell_ticks(axis, shares.shape[1], most=16)
        axis.set_xlabel(xlabel)
        figure.suptitle(style.wrapped(title, 70))
        style.add_legend(figure, axis, footnote)
        return figure


def draw_token_depths(summary: style.Summary) -> Figure:
    """How long each token of an answer and of a caption needs the image: first exit from which it is predicted."""
    labels = {"questions": "answers to questions", "captions": "captions"}
    with style.new_figure(figsize=(6.4, 3.6)) as (figure, axis):
        for series, (part, label) in zip(style.CYCLE, labels.items(), strict=False):
            values = summary["tokens"][part]
            text = f"{label} ({values['num_answers'][0]:,} answers)"
            style.draw_band(axis, values, series.named(text), values["token"])
        axis.set_ylim(0, summary["num_layers"])
        axis.set_xlabel("index of the answer token (teacher-forced on the full model's answer)")
        axis.set_ylabel("exit layer from which\nthe token is predicted")
        axis.set_title(style.title_of(summary))
        style.add_legend(figure, axis, style.BANDS_NOTE)
        return figure
