"""How good gates are, as pure functions: per layer as classifiers, and together as the first one to fire."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.stats import beta, norm
from torch import Tensor


def first_exit(exit_probability: Tensor, thresholds: Sequence[float], min_layer: int = 1) -> Tensor:
    """Exit layer k of every sample, as `DynamicExit` chooses it: the first gate above its threshold, else L.

    Args:
        exit_probability: [n, L - 1], gate i decides on k = i + 1.
        thresholds: one a gate.
        min_layer: no exit below this k.

    Returns:
        [n] in 1..L.
    """
    fires = exit_probability > torch.tensor(thresholds, dtype=exit_probability.dtype)
    fires[:, : min_layer - 1] = False
    always = torch.ones_like(fires[:, :1])
    return 1 + torch.cat([fires, always], dim=1).int().argmax(1)


def at_exit(table: Tensor, exit_layers: Tensor) -> Tensor:
    """[n] entries of a table [n, L + 1] over exit layers at each sample's own exit layer [n]."""
    return table.gather(1, exit_layers[:, None])[:, 0]


def layer_report(exit_probability: Tensor, labels: Tensor, thresholds: Sequence[float], bins: int = 10) -> pd.DataFrame:
    """Every gate as a classifier of "exit".

    Args:
        exit_probability: [n, L - 1].
        labels: [n, L - 1] boolean.
        thresholds: one a gate.
        bins: equal bins of probability for the calibration error.

    Returns:
        One row a gate: `exit_layer`, `label_rate` and `exit_rate` (share of exits among labels and decisions),
        `precision` and `recall` of exit (NaN without a decision or label for it), `calibration_error` (mean absolute
        difference between probability and frequency, weighted by bin size) and `cross_entropy` in nats.
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


def upper_limit(failures: Tensor, clusters: Sequence[Any], level: float = 0.95) -> float:
    """One-sided upper confidence limit of a failure rate when samples come in clusters.

    Exact binomial (Clopper-Pearson) limit with the sample size divided by the design effect, the factor by which
    clusters inflate the variance of the mean (Korn & Graubard, Survey Methodology 24, 1998); never below 1 here.

    Args:
        failures: [n] boolean.
        clusters: length n, equal for samples of one cluster (image).
        level: confidence.
    """
    values = failures.double().numpy()
    rate, effective = float(values.mean()), _effective_number(values, clusters)
    failed = rate * effective
    return 1.0 if failed >= effective else float(beta.ppf(level, failed + 1, effective - failed))


def questions_for(bound: float, level: float = 0.95) -> int:
    """The fewest independent samples that can show a failure rate of at most `bound`: all of them must succeed.

    Example:
        >>> questions_for(0.01)
        299
    """
    return math.ceil(math.log(1 - level) / math.log(1 - bound))


def _effective_number(values: npt.NDArray[np.float64], clusters: Sequence[Any] | npt.NDArray[Any]) -> float:
    """Number of [n] values from 0 to 1 over the design effect of their clusters (1 where it cannot be estimated)."""
    n, rate = len(values), float(values.mean())
    _, index = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    num_clusters = int(index.max()) + 1
    design = 1.0
    if 0 < rate < 1 and num_clusters > 1:
        residuals = np.bincount(index, weights=values - rate)
        variance = num_clusters / (num_clusters - 1) * float(residuals @ residuals) / n**2
        design = max(1.0, variance / (rate * (1 - rate) / (n - 1)))
    return n / design


def share_interval(values: Tensor, clusters: Sequence[Any], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of [n] values from 0 to 1 with Wilson's two-sided interval, samples of one cluster (image) being dependent.

    The sample size is divided by the design effect of the clusters; where the mean is 0 or 1, which shows nothing of
    it, the clusters themselves are counted. Never of zero width, never outside of 0 and 1.

    Example:
        >>> [round(each, 2) for each in share_interval(torch.ones(7), range(7))]
        [1.0, 0.65, 1.0]
    """
    numbers = values.double().numpy()
    mean = float(numbers.mean())
    num_clusters = len(np.unique(np.asarray(clusters).astype(str)))
    n = _effective_number(numbers, clusters) if 0 < mean < 1 and num_clusters > 1 else float(num_clusters)
    z2 = float(norm.ppf(0.5 + level / 2)) ** 2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * mean * (1 - mean) / n + z2**2 / (4 * n**2)) / (1 + z2 / n)
    return mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def thresholds_by_depth(threshold: float, num_layers: int, caution: float) -> list[float]:
    """One threshold for each of the L - 1 gates: `1 - (1 - threshold) ((L - k) / L) ** caution` for exit layer k.

    A late exit saves little, so it is worth little risk: the risk that a gate may take shrinks with the layers that its
    exit would save. With `caution` 0 all gates share one threshold.
    """
    return [1 - (1 - threshold) * ((num_layers - k) / num_layers) ** caution for k in range(1, num_layers)]


def choose_threshold(
    exit_probability: Tensor,
    agree: Tensor,
    clusters: Sequence[Any],
    bound: float,
    level: float = 0.95,
    caution: float = 0.0,
    grid: int = 1000,
) -> tuple[float, float]:
    """The smallest threshold whose upper confidence limit on disagreement is at most `bound`, on validation data.

    Thresholds are tried from the strictest down until the first that fails, so the statement holds for the chosen one
    although many were looked at (fixed-sequence testing). A threshold of 1 never exits.

    Args:
        exit_probability: [n, L - 1].
        agree: [n, L + 1] whether exit k gives the full model's answer.
        clusters: length n, the image of each sample.
        bound: largest acceptable upper limit on the share of samples whose answer changes.
        level: confidence of the limit.
        caution: how the gates' thresholds follow from the one chosen, see `thresholds_by_depth`.
        grid: number of thresholds tried, spread evenly over the samples' most certain gates.

    Returns:
        The threshold and the upper limit that it reaches.
    """
    num_layers = exit_probability.shape[1] + 1
    risk = 1 - torch.tensor(thresholds_by_depth(0.0, num_layers, caution), dtype=torch.float64)
    most_certain = (1 - (1 - exit_probability.double()) / risk).amax(1).sort(descending=True).values
    candidates = most_certain[torch.linspace(0, len(most_certain) - 1, grid).long()].unique().flip(0).tolist()
    chosen, reached = 1.0, 0.0
    for candidate in candidates:
        exits = first_exit(exit_probability, thresholds_by_depth(candidate, num_layers, caution))
        limit = upper_limit(~at_exit(agree, exits).bool(), clusters, level)
        if limit > bound:
            break
        chosen, reached = candidate, limit
    return chosen, reached


def mixture_cost(cost: Tensor, agreement: Tensor, wanted: float) -> float:
    """Cheapest mean cost at which fixed exits, mixed at random over questions, reach an agreement.

    The lower convex hull of the points (agreement[k], cost[k]), read at `wanted`.

    Args:
        cost: [L + 1] mean cost of every exit layer.
        agreement: [L + 1] agreement of every exit layer.
        wanted: agreement to reach; at most that of the full model.
    """
    best = float("inf")
    for i in range(len(cost)):
        if agreement[i] >= wanted:
            best = min(best, float(cost[i]))
        for j in range(len(cost)):
            if agreement[i] < wanted <= agreement[j]:
                share = (wanted - float(agreement[i])) / float(agreement[j] - agreement[i])
                best = min(best, float(cost[i]) + share * float(cost[j] - cost[i]))
    return best


def exit_by_kind(agree: Tensor, cost: Tensor, kinds: Sequence[str], wanted: float) -> dict[str, int]:
    """The fixed exit of every kind of question that together reach an agreement at the least mean cost.

    Kinds trade against each other at one price of a changed answer; the smallest price that reaches `wanted` is taken.

    Args:
        agree: [n, L + 1].
        cost: [n, L + 1].
        kinds: length n.
        wanted: agreement over all samples.

    Returns:
        kind -> exit layer k.
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
    values: Tensor, clusters: Sequence[Any], level: float = 0.95, largest: float = 0.0
) -> tuple[float, float, float]:
    """Mean of [n] values with a two-sided confidence interval, samples of one cluster (image) being dependent.

    The interval is normal, with the variance between cluster totals. Values that are all 0 show no variance: with
    `largest`, the largest absolute value that a sample could have had, the interval then reaches as far as Wilson's
    does from a rate of 0.
    """
    numbers = values.double().numpy()
    mean = float(numbers.mean())
    half = _half_width((numbers - mean) / len(numbers), clusters, level)
    if largest:  # one cluster says nothing about others
        least = largest * share_interval(torch.zeros(len(numbers)), clusters, level)[2]
        half = largest if math.isnan(half) else max(half, least)
    return mean, mean - half, mean + half


def difference_interval(
    values: Tensor,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    clusters: Sequence[Any] | npt.NDArray[Any],
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of [n] values over `first` less that over `second`, with a two-sided interval.

    Both groups may hold samples of one cluster (image), which makes their means dependent: the interval is normal, with
    the variance between cluster totals of what each sample adds to the difference.

    Args:
        values: [n].
        first, second: [n] boolean, the samples of each group; no sample is in both.
        clusters: length n.
        level: confidence.
    """
    numbers, one, other = values.double().numpy(), np.asarray(first), np.asarray(second)
    means = numbers[one].mean(), numbers[other].mean()
    influence = np.zeros(len(numbers))
    influence[one] = (numbers[one] - means[0]) / one.sum()
    influence[other] = -(numbers[other] - means[1]) / other.sum()
    either = one | other
    half = _half_width(influence[either], np.asarray(clusters)[either], level)
    step = float(means[0] - means[1])
    return step, step - half, step + half


def _half_width(influence: npt.NDArray[np.float64], clusters: Sequence[Any] | npt.NDArray[Any], level: float) -> float:
    """Half width of the normal interval of an estimate from what each sample adds to its error; NaN for one cluster."""
    _, index = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    num_clusters = int(index.max()) + 1
    if num_clusters < 2:
        return float("nan")
    totals = np.bincount(index, weights=influence)
    return float(norm.ppf(0.5 + level / 2) * np.sqrt(num_clusters / (num_clusters - 1) * (totals @ totals)))
