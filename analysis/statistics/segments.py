"""Curves over layers cut into segments: change points, contrasts, permutation tests, and fits of curve families."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt
import ruptures
from scipy.optimize import isotonic_regression

from .bands import Array

MIN_STAGE_LAYERS = 2
"""A single layer is not a stage."""


def change_points(curve: npt.ArrayLike, n_points: int = 2, min_size: int = MIN_STAGE_LAYERS) -> list[int]:
    """Layers at which a new segment starts: the least-squares optimal split of `curve [L]` or `[L, channels]`.

    Exact dynamic programming from `ruptures` (linear kernel, which is the squared-error cost).
    """
    signal = np.asarray(curve, dtype=np.float64).reshape(len(np.asarray(curve)), -1)
    algorithm = ruptures.KernelCPD(kernel="linear", min_size=min_size).fit(signal)
    return [int(point) for point in algorithm.predict(n_bkps=n_points)[:-1]]


@lru_cache(maxsize=64)
def stage_splits(num_layers: int) -> npt.NDArray[np.int64]:
    """All splits `(b1, b2)` that could be the three stages: `[0, b1) [b1, b2) [b2, L)`, shape `[C, 2]`.

    Every stage has at least `MIN_STAGE_LAYERS` layers and the first one ends in the first half of the decoder,
    because the claim is that cross attention falls "after the first layers".
    """
    splits = [
        (first, second)
        for first in range(MIN_STAGE_LAYERS, num_layers // 2 + 1)
        for second in range(first + MIN_STAGE_LAYERS, num_layers - MIN_STAGE_LAYERS + 1)
    ]
    return np.array(splits, dtype=np.int64).reshape(-1, 2)


def stage_contrasts(curves: Array, splits: npt.NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Fall, rise and residual of the three-level fit for every curve and split.

    Args:
        curves: `[B, L]`.
        splits: `[C, 2]` from :func:`stage_splits`.

    Returns:
        `fall = mean(stage 1) - mean(stage 2)`, `rise = mean(stage 3) - mean(stage 2)` and the residual sum of
        squares, each `[B, C]`.
    """
    num_layers = curves.shape[1]
    centred = curves - curves.mean(1, keepdims=True)  # keeps the sum-of-squares difference accurate
    prefix = np.concatenate([np.zeros((len(curves), 1)), centred.cumsum(1)], axis=1)
    first, second = splits.T
    sizes = (first, second - first, num_layers - second)
    means = (
        prefix[:, first] / sizes[0],
        (prefix[:, second] - prefix[:, first]) / sizes[1],
        (prefix[:, -1:] - prefix[:, second]) / sizes[2],
    )
    explained = sum(size * mean**2 for size, mean in zip(sizes, means, strict=True))
    residual = np.maximum((centred**2).sum(1)[:, None] - explained, 0.0)
    return means[0] - means[1], means[2] - means[1], residual


def signature_statistic(curves: Array) -> Array:
    """How clearly each curve falls and rises again: `[B, L] -> [B]`.

    The larger over all splits of the smaller of the two t-like ratios of fall and rise. Dividing by the residual
    within the stages is what gives power against random walks, whose "stages" wander.
    """
    num_layers = curves.shape[1]
    splits = stage_splits(num_layers)
    fall, rise, residual = stage_contrasts(curves, splits)
    first, second = splits.T
    middle = 1.0 / (second - first)
    spread = np.sqrt(residual / (num_layers - 3)) + 1e-9
    ratio = np.minimum(fall / np.sqrt(1.0 / first + middle), rise / np.sqrt(1.0 / (num_layers - second) + middle))
    return np.asarray((ratio / spread).max(1))


def permutation_p_values(curve: Array, n_perm: int = 1999, seed: int = 0) -> dict[str, float]:
    """One-sided p-values of :func:`signature_statistic` under two nulls about the order of the layers.

    `increments`: the steps from layer to layer come in random order (the curve is a random walk or drifts).
    `levels`: the layers themselves come in random order (the curve is noise around a constant, as under random
    weights). Both are Monte Carlo permutation tests, exact at their level when their null holds.
    """
    rng = np.random.default_rng(seed)
    observed = signature_statistic(curve[None])[0]
    steps = rng.permuted(np.tile(np.diff(curve), (n_perm, 1)), axis=1)
    walks = np.concatenate([np.zeros((n_perm, 1)), steps.cumsum(1)], axis=1)
    shuffles = rng.permuted(np.tile(curve, (n_perm, 1)), axis=1)

    def p_value(null: Array) -> float:
        return float((1 + np.sum(signature_statistic(null) >= observed - 1e-12)) / (n_perm + 1))

    return {"increments": p_value(walks), "levels": p_value(shuffles)}


@lru_cache(maxsize=64)
def _bases(num_layers: int) -> dict[str, tuple[Array, int]]:
    """Orthonormal bases `[candidates, L, coefficients]` of the curve families, with their number of parameters."""
    layer = np.linspace(0.0, 1.0, num_layers)
    one = np.ones(num_layers)

    def orthonormal(designs: list[list[Array]]) -> Array:
        return np.stack([np.linalg.qr(np.stack(columns, axis=1))[0] for columns in designs])

    rates = np.geomspace(1.0, 4.0 * num_layers, 40)  # from nearly linear to gone after a quarter of a layer
    knots = list(combinations(range(1, num_layers - 1), 2))
    steps = range(MIN_STAGE_LAYERS, num_layers - MIN_STAGE_LAYERS + 1)
    return {
        "constant": (orthonormal([[one]]), 1),
        "linear": (orthonormal([[one, layer]]), 2),
        "quadratic": (orthonormal([[one, layer, layer**2]]), 3),
        "exponential": (orthonormal([[one, np.exp(-rate * layer)] for rate in rates]), 3),
        "exponential_rise": (orthonormal([[one, np.exp(-rate * (1 - layer))] for rate in rates]), 3),
        "step": (orthonormal([[one, (np.arange(num_layers) >= at) * one] for at in steps]), 3),
        "three_levels": (
            orthonormal(
                [
                    [one, (np.arange(num_layers) >= first) * one, (np.arange(num_layers) >= second) * one]
                    for first, second in combinations(steps, 2)
                    if second - first >= MIN_STAGE_LAYERS
                ]
            ),
            5,
        ),
        "three_slopes": (
            orthonormal(
                [
                    [one, layer, np.maximum(layer - layer[first], 0), np.maximum(layer - layer[second], 0)]
                    for first, second in knots
                    if second - first >= MIN_STAGE_LAYERS
                ]
            ),
            6,
        ),
    }


THREE_STAGE_FITS = ("three_levels", "three_slopes")


def fit_bic(curve: Array, sampling_variance: float = 0.0) -> dict[str, float]:
    """Bayesian information criterion of each curve family fitted to `curve [L]` (lower is better).

    Smooth: constant, linear, quadratic, exponential. Monotone: step, isotonic (either direction). Three stages:
    three levels, or three connected line segments. Change points count as parameters; an isotonic fit counts its
    levels. The noise variance is not allowed below `sampling_variance`, so no family profits from fitting
    differences that are sampling error.
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
