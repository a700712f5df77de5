"""How recipes of gates differ in cost, with intervals: the same questions asked of all, images drawn anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dyvte.gates.metrics import mixture_cost

from ..bands import Band, ImageBootstrap, simultaneous_band

Frontier = tuple[npt.ArrayLike, npt.ArrayLike]
"""Costs and kept answers [n, T] of n questions under T thresholds (`dyvte.gates.validation.threshold_frontier`)."""


def mean_mixture_cost(costs: npt.ArrayLike, agreements: npt.ArrayLike, wanted: Sequence[float]) -> float:
    """Mean over some agreements of what the cheapest mixture of thresholds costs there; both arrays are [T]."""
    return float(np.mean([mixture_cost(costs, agreements, each) for each in wanted]))


def cost_differences(
    frontiers: Mapping[str, Frontier], base: str, bootstrap: ImageBootstrap, wanted: Sequence[float]
) -> dict[str, Band]:
    """Mean cost at equal agreement of every recipe less that of one of them, with intervals that hold all at once.

    Paired: a replicate draws the same images for all recipes, and finds every recipe's mixtures anew. The sup-t bands
    cover all differences together, so that the cheapest recipe may be looked at after the fact.

    Args:
        frontiers: of every recipe, of the same questions in the same order.
        base: the recipe that the others are compared with.
        wanted: agreements that costs are averaged over.

    Example:
        >>> costs, kept = np.array([[1.0, 0.5]] * 4), np.ones((4, 2))
        >>> frontiers = {"a": (costs, kept), "b": (costs / 2, kept)}
        >>> found = cost_differences(frontiers, "a", ImageBootstrap(range(4), 20), [0.99])
        >>> float(found["b"].mean)
        -0.25
    """
    estimates, replicates = {}, {}
    for name, (costs, kept) in frontiers.items():
        values = np.stack([np.asarray(costs, dtype=np.float64), np.asarray(kept, dtype=np.float64)], axis=1)
        estimates[name] = mean_mixture_cost(values[:, 0].mean(0), values[:, 1].mean(0), wanted)
        draws = bootstrap.replicates(values)
        replicates[name] = np.array([mean_mixture_cost(each[0], each[1], wanted) for each in draws])
    others = [name for name in frontiers if name != base]
    if not others:
        return {}
    band = simultaneous_band(
        [estimates[name] - estimates[base] for name in others],
        np.stack([replicates[name] - replicates[base] for name in others], axis=1),
    )
    return {name: band[index] for index, name in enumerate(others)}
