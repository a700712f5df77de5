"""Do gates read the state of the text, or the question? The four registered tests (docs/hypotheses_gates.md).

n questions, G = L - 1 gates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dyvte.gates.metrics import half_width, mixture_cost, mixture_hull, wilson_limits

from ..bands import LEVEL, Array, Clusters, ImageBootstrap

PRICES = np.geomspace(1e-2, 1e4, 120)
"""What a changed answer may cost, in full prefills: each price gives one choice of constants."""
TEXT_WEIGHT = 4.0
"""Questions of its kind that a text's rate of changed answers is shrunk towards, as registered."""


@dataclass(frozen=True)
class Estimate:
    """A number with a two-sided interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """`value`, `low` and `high`."""
        return asdict(self)


def verdict(estimate: Estimate, claim: float, above: bool = True) -> str:
    """`confirmed` if the interval lies on the claimed side of a number, `refuted` on the other, else `undetermined`."""
    low, high = (estimate.low, estimate.high) if above else (-estimate.high, -estimate.low)
    bound = claim if above else -claim
    return "confirmed" if low > bound else "refuted" if high <= bound else "undetermined"


def mean_estimate(values: Array, clusters: Clusters, level: float = LEVEL) -> Estimate:
    """Mean of [n] values; normal interval with the variance between totals of clusters."""
    mean = float(values.mean())
    half = half_width((values - mean) / len(values), clusters, level)
    return Estimate(mean, mean - half, mean + half)


# ---------------------------------------------------------------- 1. within a text


def within_group_auc(
    scores: Array, labels: npt.NDArray[np.bool_], groups: Clusters, clusters: Clusters
) -> tuple[Estimate, int]:
    """How often a positive outranks a negative of the same group at the same gate, and the number of pairs.

    The pooled two-sample U-statistic over all such pairs, ties half. Its interval is normal, from its projection on
    single questions (DeLong et al., Biometrics 44, 1988), summed over the questions of a cluster, since these are
    dependent, and over gates. Where all pairs are won, or none, that projection does not vary, and the limits are
    Wilson's with the clusters counted.

    Args:
        scores: [n, G].
        labels: [n, G].
        groups: length n; pairs are within a group.
    """
    _, group = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    won, pairs = np.zeros(len(scores)), np.zeros(len(scores))  # of every question, over both of its roles
    total = 0.0
    for number in range(int(group.max()) + 1):
        rows = np.flatnonzero(group == number)
        for gate in range(scores.shape[1]):
            label = labels[rows, gate]
            yes, no = rows[label], rows[~label]
            if not len(yes) or not len(no):
                continue
            better = scores[yes, gate][:, None] - scores[no, gate][None, :]
            wins = (better > 0) + 0.5 * (better == 0)
            won[yes] += wins.sum(1)
            won[no] += wins.sum(0)
            pairs[yes] += len(no)
            pairs[no] += len(yes)
            total += wins.sum()
    count = pairs.sum() / 2
    if not count:
        return Estimate(np.nan, np.nan, np.nan), 0
    auc = float(total / count)
    if auc in (0, 1):
        in_pairs = np.asarray(clusters).astype(str)[pairs > 0]
        return Estimate(auc, *(float(each) for each in wilson_limits(auc, len(np.unique(in_pairs))))), int(count)
    half = half_width((won - auc * pairs) / count, clusters, LEVEL)
    return Estimate(auc, auc - half, auc + half), int(count)


# ------------------------------------------------------------------------ 3. dose


def slope_of(values: Array) -> Array:
    """[n] least-squares slope of [n, J] values over j = 0..J-1."""
    doses = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    slope: Array = values @ doses / (doses @ doses)
    return slope


def dose_response(values: Array, clusters: Clusters) -> dict[str, Any]:
    """Mean at every dose, the slope, and the steps between doses with simultaneous (Bonferroni) intervals.

    Args:
        values: [n, J] of every question at dose j = 0..J-1.
    """
    steps = np.diff(values, axis=1)
    simultaneous = 1 - (1 - LEVEL) / steps.shape[1]
    return {
        "means": [mean_estimate(each, clusters) for each in values.T],
        "slope": mean_estimate(slope_of(values), clusters),
        "steps": [mean_estimate(each, clusters, simultaneous) for each in steps.T],
    }


def dose_verdict(response: dict[str, Any]) -> str:
    """Confirmed if the slope is above 0 and no step is clearly below; refuted if the slope is below 0."""
    of_slope = verdict(response["slope"], 0.0)
    falls = any(step.high < 0 for step in response["steps"])
    return "undetermined" if of_slope == "confirmed" and falls else of_slope


# --------------------------------------------------- 4. constants of a kind or a text


def constant_frontier(
    agree: Array, cost: Array, kinds: Clusters, texts: Clusters | None, folds: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """[P, n] exit layer of every question for every price, chosen on the questions of the other folds.

    Args:
        agree: [n, L + 1] whether exit k keeps the answer.
        cost: [n, L + 1].
        texts: length n: one constant a text, its rates shrunk towards its kind's; None: one constant a kind.
        folds: [n] fold of every question; questions about one image share it.
    """
    _, kind = np.unique(np.asarray(kinds).astype(str), return_inverse=True)
    _, text = np.unique(np.asarray(kinds if texts is None else texts).astype(str), return_inverse=True)
    chosen = np.zeros((len(PRICES), len(agree)), dtype=np.int64)
    for fold in np.unique(folds):
        learn, ask = folds != fold, folds == fold
        changed_of_kind = _means(1 - agree[learn], kind[learn], kind.max() + 1)
        cost_of_kind = _means(cost[learn], kind[learn], kind.max() + 1)
        changed, costs = changed_of_kind[kind[ask]], cost_of_kind[kind[ask]]
        if texts is not None:
            number = np.bincount(text[learn], minlength=text.max() + 1)[text[ask], None]
            own = _means(1 - agree[learn], text[learn], text.max() + 1)[text[ask]]
            changed = (number * own + TEXT_WEIGHT * changed) / (number + TEXT_WEIGHT)
        chosen[:, ask] = (costs + PRICES[:, None, None] * changed).argmin(2)
    return chosen


def _means(values: Array, groups: npt.NDArray[np.int64], number: int) -> Array:
    """[number, ...] mean of the rows of each group; 0 for a group without rows."""
    totals = np.zeros((number, values.shape[1]))
    np.add.at(totals, groups, values)
    means: Array = totals / np.maximum(np.bincount(groups, minlength=number), 1)[:, None]
    return means


def compare_with_constants(
    own_agree: Array,
    own_cost: Array,
    agree: Array,
    cost: Array,
    constants: npt.NDArray[np.int64],
    bootstrap: ImageBootstrap,
) -> tuple[float, Estimate]:
    """Cost of constants mixed so that they agree as often as the gates, and the gates' cost over it.

    Args:
        own_agree, own_cost: [n] what the gates' exits come to.
        agree, cost: [n, L + 1] what every exit comes to.
        constants: [P, n] of `constant_frontier`; exit L of every question is added.
        bootstrap: hull and agreement are drawn, the constants stay.
    """
    everyone = np.arange(len(agree))
    last = np.full((1, len(agree)), agree.shape[1] - 1)
    choices = np.unique(np.concatenate([constants, last]), axis=0)
    kept = np.concatenate([own_agree[None], agree[everyone, choices]])  # [1 + P, n], the gates first
    spent = np.concatenate([own_cost[None], cost[everyone, choices]])
    values = np.stack([kept, spent], axis=1).T  # [n, 2, 1 + P]

    def ratio(means: Array) -> tuple[float, float]:
        agreements, costs = means
        price = mixture_cost(costs[1:], agreements[1:], float(agreements[0]))
        return price, float(costs[0] / price)

    price, found = ratio(values.mean(0))
    draws = [ratio(each)[1] for each in bootstrap.replicates(values)]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return price, Estimate(found, float(low), float(high))


def frontier_points(agree: Array, cost: Array, constants: npt.NDArray[np.int64]) -> list[tuple[float, float]]:
    """(cost, agreement) of the corners of the constants' hull, by rising cost."""
    everyone = np.arange(len(agree))
    agreement, costs = agree[everyone, constants].mean(1), cost[everyone, constants].mean(1)
    return [(float(costs[each]), float(agreement[each])) for each in mixture_hull(costs, agreement)]
