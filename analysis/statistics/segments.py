"""Curves over layers cut into three segments, and compared with fits of curve families (`docs/stage_rules.md`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from .bands import Array

MIN_STAGE_LAYERS = 2
"""A single layer is not a stage."""


def registered_split(num_layers: int) -> tuple[int, int]:
    """(L/6, 2L/3), rounded to the nearest layer, the first at least 2: the split that is fixed before looking.

    From 6 layers on each stage has the layers that a stage needs.

    Example:
        >>> registered_split(12), registered_split(30)
        ((2, 8), (5, 20))
    """
    return max(MIN_STAGE_LAYERS, round(num_layers / 6)), round(2 * num_layers / 3)


@lru_cache(maxsize=64)
def stage_splits(num_layers: int) -> npt.NDArray[np.int64]:
    """All splits `(b1, b2)` into `[0, b1) [b1, b2) [b2, L)` with at least `MIN_STAGE_LAYERS` layers each: `[C, 2]`."""
    borders = range(MIN_STAGE_LAYERS, num_layers - MIN_STAGE_LAYERS + 1)
    splits = [pair for pair in combinations(borders, 2) if pair[1] - pair[0] >= MIN_STAGE_LAYERS]
    return np.array(splits, dtype=np.int64).reshape(-1, 2)


def stage_contrasts(curves: Array, splits: npt.NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """`[B, C]` fall, rise and residual of the three-level fit for every curve `[B, L]` and split `[C, 2]`.

    `fall = mean(stage 1) - mean(stage 2)`, `rise = mean(stage 3) - mean(stage 2)`, and the residual sum of squares.
    """
    num_layers = curves.shape[1]
    centred = curves - curves.mean(1, keepdims=True)  # keeps the sum-of-squares difference accurate
    prefix = np.concatenate([np.zeros((len(curves), 1)), centred.cumsum(1)], axis=1)
    first, second = splits.T
    sizes = (first, second - first, num_layers - second)
    sums = (prefix[:, first], prefix[:, second] - prefix[:, first], prefix[:, -1:] - prefix[:, second])
    means = [of_stage / size for of_stage, size in zip(sums, sizes, strict=True)]
    explained = sum(size * mean**2 for size, mean in zip(sizes, means, strict=True))
    residual = np.maximum((centred**2).sum(1)[:, None] - explained, 0.0)
    return means[0] - means[1], means[2] - means[1], residual


@lru_cache(maxsize=64)
def _bases(num_layers: int) -> dict[str, tuple[Array, int]]:
    """Orthonormal bases `[candidates, L, coefficients]` of the curve families, with their number of parameters."""
    layer = np.linspace(0.0, 1.0, num_layers)
    one = np.ones(num_layers)

    def orthonormal(designs: list[list[Array]]) -> Array:
        return np.stack([np.linalg.qr(np.stack(columns, axis=1))[0] for columns in designs])

    def level_from(at: int) -> Array:
        return (np.arange(num_layers) >= at) * one

    def slope_from(at: int) -> Array:
        return np.maximum(layer - layer[at], 0)

    def skewed_u(depth: Array, rate: float, power: float) -> tuple[Array, Array]:
        return np.exp(-rate * depth), depth**power

    rates = np.geomspace(1.0, 4.0 * num_layers, RATES)  # from nearly linear to gone after a quarter of a layer
    knots = [pair for pair in combinations(range(1, num_layers - 1), 2) if pair[1] - pair[0] >= MIN_STAGE_LAYERS]
    steps = range(MIN_STAGE_LAYERS, num_layers - MIN_STAGE_LAYERS + 1)
    skews = list(product(rates, POWERS))
    return {
        "constant": (orthonormal([[one]]), 1),
        "linear": (orthonormal([[one, layer]]), 2),
        "parabola": (orthonormal([[one, layer, layer**2]]), 3),
        "cubic": (orthonormal([[one, layer, layer**2, layer**3]]), 4),
        "exponential": (orthonormal([[one, np.exp(-rate * layer)] for rate in rates]), 3),
        "exponential_rise": (orthonormal([[one, np.exp(-rate * (1 - layer))] for rate in rates]), 3),
        "skewed_u": (orthonormal([[one, *skewed_u(layer, *each)] for each in skews]), 5),
        "skewed_u_mirrored": (orthonormal([[one, *skewed_u(1 - layer, *each)] for each in skews]), 5),
        "step": (orthonormal([[one, level_from(at)] for at in steps]), 3),
        "three_levels": (orthonormal([[one, *map(level_from, split)] for split in stage_splits(num_layers)]), 5),
        "three_slopes": (orthonormal([[one, layer, *map(slope_from, pair)] for pair in knots]), 6),
    }


RATES = 40
"""Decay rates that are tried for an exponential."""
POWERS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Exponents that are tried for the slow side of a skewed U."""
THREE_STAGE_FITS = ("three_levels", "three_slopes")


def fit_bic(curve: Array, sampling_variance: float = 0.0) -> dict[str, float]:
    """Bayesian information criterion of each curve family fitted to `curve [L]` (lower is better).

    Smooth: constant, linear, parabola, cubic, exponential, skewed U (exponential plus power), the last two from either
    end. Monotone: step, isotonic (either direction). Three stages: three levels, or three connected line segments.
    Change points, rates and powers count as parameters; an isotonic fit counts its levels. The noise variance is not
    allowed below `sampling_variance`, so no family profits from fitting differences that are sampling error.
    """
    num_layers = len(curve)

    def bic(residual: float, parameters: int) -> float:
        variance = max(residual / num_layers, sampling_variance, 1e-12)
        return float(num_layers * np.log(variance) + parameters * np.log(num_layers))

    centred = curve - curve.mean()
    total = float(centred @ centred)
    scores = {}
    for name, (bases, parameters) in _bases(num_layers).items():
        explained = ((centred @ bases) ** 2).sum(1).max()
        scores[name] = bic(max(total - float(explained), 0.0), parameters)
    for name, increasing in (("isotonic_rise", True), ("isotonic_fall", False)):
        fit = isotonic_regression(centred, increasing=increasing).x
        levels = 1 + int(np.sum(np.abs(np.diff(fit)) > 1e-12))
        scores[name] = bic(float(((centred - fit) ** 2).sum()), levels)
    return scores


def posterior_weights(bic: Mapping[str, float]) -> dict[str, float]:
    """Approximate posterior probability of each family with equal priors: exp(-BIC/2) over its sum.

    Example:
        >>> posterior_weights({"a": 10.0, "b": 10.0})
        {'a': 0.5, 'b': 0.5}
    """
    least = min(bic.values())
    weights = {name: float(np.exp((least - value) / 2)) for name, value in bic.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
