"""How good gates are, as pure functions: per layer as classifiers, and together as the first one to fire."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor

Array = npt.NDArray[np.float64]


def first_exit(exit_probability: Tensor, thresholds: Sequence[float], min_layer: int = 1) -> Tensor:
    """[n] exit layers k as `DynamicExit` chooses them: that of the first gate above its threshold, else L.

    `exit_probability` is [n, L - 1], gate i decides on k = i + 1; no exit is below `min_layer`.
    """
    fires = exit_probability > torch.tensor(thresholds, dtype=exit_probability.dtype)
    fires[:, : min_layer - 1] = False
    always = torch.ones_like(fires[:, :1])
    return 1 + torch.cat([fires, always], dim=1).int().argmax(1)


def at_exit(table: Tensor, exit_layers: Tensor) -> Tensor:
    """[n] entries of a table [n, L + 1] over exit layers at each sample's own exit layer [n]."""
    return table.gather(1, exit_layers[:, None])[:, 0]


def layer_report(exit_probability: Tensor, labels: Tensor, thresholds: Sequence[float], bins: int = 10) -> pd.DataFrame:
    """Every gate as a classifier of "exit", from its probabilities and boolean labels, both [n, L - 1].

    Returns:
        One row a gate: `exit_layer`, `label_rate` and `exit_rate` (share of exits among labels and decisions),
        `precision` and `recall` of exit (NaN without a decision or label for it), `calibration_error` (mean absolute
        difference between probability and frequency over equal `bins`, weighted by their size) and `cross_entropy` in
        nats.
    """
    rows = []
    for gate in range(exit_probability.shape[1]):
        probability, label = exit_probability[:, gate].double(), labels[:, gate].double()
        decided = (probability > thresholds[gate]).double()
        hits = float((decided * label).sum())
        number = (probability * bins).long().clamp(max=bins - 1)
        gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, number, probability - label)
        clamped = probability.clamp(1e-7, 1 - 1e-7)
        entropy = -(label * clamped.log() + (1 - label) * (1 - clamped).log()).mean()
        rows.append(
            {
                "exit_layer": gate + 1,
                "label_rate": float(label.mean()),
                "exit_rate": float(decided.mean()),
                "precision": hits / float(decided.sum()) if decided.any() else float("nan"),
                "recall": hits / float(label.sum()) if label.any() else float("nan"),
                "calibration_error": float(gaps.abs().sum()) / len(label),
                "cross_entropy": float(entropy),
            }
        )
    return pd.DataFrame(rows)


def wilson_limits(rate: npt.ArrayLike, draws: npt.ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
    """Limits of Wilson's two-sided interval around rates of so many independent draws; arrays of any shape.

    Never of zero width, never outside of 0 and 1. NaN without a draw.

    Example:
        >>> [round(float(each), 2) for each in wilson_limits(1.0, 7)]
        [0.65, 1.0]
    """
    rate, n = np.asarray(rate, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    n = np.where(n > 0, n, np.nan)
    z2 = float(norm.ppf(0.5 + level / 2)) ** 2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * rate * (1 - rate) / n + z2**2 / (4 * n**2)) / (1 + z2 / n)
    return np.maximum(0.0, np.minimum(rate, centre - half)), np.minimum(1.0, np.maximum(rate, centre + half))


def _effective_number(
    values: npt.NDArray[np.float64], clusters: Sequence[Any] | npt.NDArray[Any], added_variance: npt.ArrayLike = 0.0
) -> tuple[Array, Array, Array]:
    """Mean of [n, m] values from 0 to 1 without the NaN among them, their number over the design effect, and clusters.

    The design effect is the factor by which clusters, and `added_variance` of the mean, inflate what independent draws
    would vary by; 1 where it cannot be estimated. All three arrays are [m].
    """
    _, index = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    finite = np.isfinite(values)
    count = finite.sum(0)
    rate = np.divide(np.where(finite, values, 0).sum(0), count, out=np.full(len(count), np.nan), where=count > 0)
    residuals = np.zeros((int(index.max()) + 1, values.shape[1]))
    seen = np.zeros(residuals.shape, dtype=bool)
    np.add.at(residuals, index, np.where(finite, values - rate, 0))
    np.logical_or.at(seen, index, finite)
    num_clusters = seen.sum(0)
    known = (rate > 0) & (rate < 1) & (num_clusters > 1)
    variance = (residuals**2).sum(0) * num_clusters / np.maximum(num_clusters - 1, 1) / np.maximum(count, 1) ** 2
    alone = rate * (1 - rate) / np.maximum(count - 1, 1)
    design = np.divide(variance + added_variance, alone, out=np.ones(len(count)), where=known)
    return rate, count / np.maximum(design, 1), num_clusters


def share_interval(
    values: npt.ArrayLike | Tensor,
    clusters: Sequence[Any] | npt.NDArray[Any],
    level: float = 0.95,
    added_variance: npt.ArrayLike = 0.0,
) -> tuple[Array, Array, Array]:
    """Mean over samples of `values [n, ...]` from 0 to 1 with Wilson's two-sided interval, by cluster (image).

    The one interval of a rate in this project. The number of samples is divided by the design effect of the clusters;
    where the mean is 0 or 1, which shows nothing of it, the clusters themselves are counted. Never of zero width, never
    outside of 0 and 1.

    Args:
        values: NaN is left out of the mean that it belongs to.
        clusters: length n.
        level: confidence.
        added_variance: variance of the mean that samples and clusters do not show, as between a method's random seeds.

    Returns:
        Mean, lower and upper limit, each [...]; NaN where there is no value.

    Example:
        >>> [round(float(each), 2) for each in share_interval([1.0] * 7, range(7))]
        [1.0, 0.65, 1.0]
    """
    numbers = np.asarray(values, dtype=np.float64)
    flat = numbers.reshape(len(numbers), -1)
    mean, effective, num_clusters = _effective_number(flat, clusters, np.ravel(added_variance))
    inside = (mean > 0) & (mean < 1) & (num_clusters > 1)
    low, high = wilson_limits(mean, np.where(inside, effective, num_clusters), level)
    shape = numbers.shape[1:]
    return mean.reshape(shape)[()], low.reshape(shape)[()], high.reshape(shape)[()]


def thresholds_by_depth(threshold: float, num_layers: int, caution: float) -> list[float]:
    """Thresholds of the L - 1 gates: `1 - (1 - threshold) ((L - k) / L) ** caution` for exit layer k.

    A late exit saves little, so it is worth little risk. With `caution` 0 all gates share one threshold.
    """
    return [1 - (1 - threshold) * ((num_layers - k) / num_layers) ** caution for k in range(1, num_layers)]


def mixture_hull(cost: npt.ArrayLike | Tensor, value: npt.ArrayLike | Tensor) -> list[int]:
    """The fixed exits whose mixtures no other mixture beats: the upper concave hull of the points (cost, value).

    Mixed at random over questions, two exits have every cost and value on the line between theirs. What the best two of
    all have at a cost is the hull there, and its corners, by rising cost, are what is returned.
    """
    costs, values = (np.asarray(each, dtype=np.float64) for each in (cost, value))
    hull: list[int] = []
    for k in np.lexsort((-values, costs)).tolist():
        if hull and costs[k] == costs[hull[-1]]:
            continue
        while len(hull) > 1:
            i, j = hull[-2:]
            if (values[j] - values[i]) * (costs[k] - costs[i]) > (values[k] - values[i]) * (costs[j] - costs[i]):
                break
            hull.pop()
        hull.append(k)
    return hull


def best_mixture(
    cost: npt.ArrayLike | Tensor, value: npt.ArrayLike | Tensor, budget: float
) -> tuple[int, int, float] | None:
    """The two fixed exits whose mixture has the largest value (see `mixture_hull`) at a mean cost of `budget`.

    Returns:
        The cheaper exit, the dearer one, and the share of questions that take the dearer one (1 if they are the same
        exit); the dearest exit where the budget is beyond it, None where the cheapest costs more.

    Example:
        >>> best_mixture([0.25, 0.5, 0.75, 1.0], [0.3, 0.8, 0.8, 1.0], 0.75)
        (1, 3, 0.5)
    """
    costs, hull = np.asarray(cost, dtype=np.float64), mixture_hull(cost, value)
    if budget < costs[hull[0]]:
        return None
    place = int(np.searchsorted(costs[hull], budget))
    if place == len(hull) or costs[hull[place]] == budget:
        only = hull[min(place, len(hull) - 1)]
        return only, only, 1.0
    below, above = hull[place - 1], hull[place]
    return below, above, float((budget - costs[below]) / (costs[above] - costs[below]))


def mixture_cost(cost: npt.ArrayLike | Tensor, agreement: npt.ArrayLike | Tensor, wanted: float) -> float:
    """Cheapest mean cost at which mixtures of fixed exits reach an agreement (see `mixture_hull`), else infinity."""
    costs, reached = (np.asarray(each, dtype=np.float64) for each in (cost, agreement))
    if wanted > reached.max() + 1e-9:  # a mean of shares may lack rounding alone
        return math.inf
    hull = mixture_hull(costs, reached)
    rising = hull[: int(reached[hull].argmax()) + 1]
    return float(np.interp(wanted, reached[rising], costs[rising]))


def exit_by_kind(agree: Tensor, cost: Tensor, kinds: Sequence[str], wanted: float) -> dict[str, int]:
    """The fixed exit of every kind of question that together reach an agreement at the least mean cost.

    Kinds trade against each other at one price of a changed answer; the smallest price that reaches `wanted` is taken.
    `agree` and `cost` are [n, L + 1].
    """
    names = np.asarray(kinds)
    groups = {str(kind): torch.from_numpy(np.flatnonzero(names == kind)) for kind in np.unique(names)}
    costs = {kind: cost[rows].mean(0) for kind, rows in groups.items()}
    changed = {kind: 1 - agree[rows].double().mean(0) for kind, rows in groups.items()}
    chosen: dict[str, int] = {}
    for price in np.geomspace(1e-2, 1e5, 200):
        chosen = {kind: int((costs[kind] + price * changed[kind]).argmin()) for kind in groups}
        lost = sum(float(changed[kind][k]) * len(groups[kind]) for kind, k in chosen.items()) / len(names)
        if 1 - lost >= wanted:
            break
    return chosen


def cluster_interval(
    values: Tensor, clusters: Sequence[Any], largest: float = 0.0, span: float = 0.0
) -> tuple[float, float, float]:
    """Mean of [n] values with a two-sided 95% interval, samples of one cluster (image) being dependent.

    The interval is normal, with the variance between cluster totals. Values that are all 0 show no variance: with
    `largest`, the largest absolute value that a sample could have had, the interval then reaches as far as Wilson's
    does from a rate of 0. With `span`, the largest distance between two samples, so it does where all values are equal.
    """
    numbers = values.double().numpy()
    mean = float(numbers.mean())
    half = half_width((numbers - mean) / len(numbers), clusters)
    if largest:  # one cluster says nothing about others
        least = largest * float(share_interval(np.zeros(len(numbers)), clusters)[2])
        half = largest if math.isnan(half) else max(half, least)
    if half == 0:
        half = span * _unseen(clusters)
    return mean, mean - half, mean + half


def _unseen(clusters: Sequence[Any] | npt.NDArray[Any]) -> float:
    """The largest share of clusters that may differ where all of these agree: Wilson's limit from a rate of 0."""
    return float(wilson_limits(0.0, len(np.unique(np.asarray(clusters).astype(str))))[1])


def difference_interval(
    values: Tensor,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    clusters: Sequence[Any] | npt.NDArray[Any],
    span: float = 0.0,
) -> tuple[float, float, float]:
    """Mean of [n] values over `first` less that over `second`, disjoint boolean groups, with a two-sided 95% interval.

    Both groups may hold samples of one cluster (image), which makes their means dependent: the interval is normal, with
    the variance between cluster totals of what each sample adds to the difference. `span` is as for `cluster_interval`,
    where all values of either group are equal.
    """
    numbers, one, other = values.double().numpy(), np.asarray(first), np.asarray(second)
    means = numbers[one].mean(), numbers[other].mean()
    influence = np.zeros(len(numbers))
    influence[one] = (numbers[one] - means[0]) / one.sum()
    influence[other] = -(numbers[other] - means[1]) / other.sum()
    either = one | other
    half = half_width(influence[either], np.asarray(clusters)[either])
    if half == 0:
        half = span * sum(_unseen(np.asarray(clusters)[each]) for each in (one, other))
    step = float(means[0] - means[1])
    return step, step - half, step + half


def half_width(
    influence: npt.NDArray[np.float64], clusters: Sequence[Any] | npt.NDArray[Any], level: float = 0.95
) -> float:
    """Half width of the normal interval of an estimate from what each sample adds to its error; NaN for one cluster."""
    _, index = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    num_clusters = int(index.max()) + 1
    if num_clusters < 2:
        return float("nan")
    totals = np.bincount(index, weights=influence)
    return float(norm.ppf(0.5 + level / 2) * np.sqrt(num_clusters / (num_clusters - 1) * (totals @ totals)))
