"""Statistics behind the figures: bootstrap clustered by image, simultaneous bands, and the stage verdict.

Everything here is a pure function of numpy arrays. Two facts shape the code:

* Questions about one image are not independent, so every interval resamples *images* (clusters), not questions.
* Layers are not samples. Deviations that all samples share at a layer belong to the one model at hand, no amount
  of data averages them away, and three segments always fit some curve. The stage verdict therefore asks for a
  signature that was fixed beforehand and compares it with what chance orderings of the layers produce.

`docs/stage_verdict.md` explains the verdict on one page.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import ruptures
from scipy.optimize import isotonic_regression

from .bands import (
    MIN_CLUSTERS,
    Array,
    Clusters,
    cluster_bootstrap,
    cluster_mean,
    count_images,
    simultaneous_band,
)

MIN_STAGE_LAYERS = 2
"""A single layer is not a stage."""
MIN_LAYERS = 8
"""Below this depth no ordering of the layers is rare enough to be evidence."""
ENRICHMENT_FLOOR = 0.01
"""Enrichment below a hundredth of uniform attention counts as this much (keeps the logarithm finite)."""


# --------------------------------------------------------------------------------------------------------------------
# Segments of a curve over layers
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# The stage verdict
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageVerdict:
    """Outcome of :func:`stage_verdict`; every field is plain data that goes to `summary.json` as it is.

    `fall`, `rise`, `share_in`, `share_out` are `[estimate, lower, upper]` at the detected change points, with the
    limits of a band that is simultaneous over every possible pair of boundaries. Fall and rise are in log
    enrichment (0.69 = a factor of two), the share is a fraction.
    """

    verdict: str
    reasons: list[str]
    boundaries: list[int] | None
    boundaries_ci: list[list[int]] | None
    change_points: list[int] | None = None
    change_points_ci: list[list[int]] | None = None
    change_points_stability: list[float] | None = None
    fall: list[float] | None = None
    rise: list[float] | None = None
    share_in: list[float] | None = None
    share_out: list[float] | None = None
    p_values: dict[str, float] = field(default_factory=dict)
    bic: dict[str, float] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return asdict(self)


def intra_modality_share(cross: Array, visual: Array, text: Array) -> Array:
    """Share of attention, relative to uniform attention, that stays within a modality; any common shape.

    `intra / (intra + cross)` with `intra` the mean of the visual -> visual and text -> text enrichment. A curve
    that is NaN (no second visual token to attend to, say) leaves the mean.
    """
    intra = cluster_mean(np.stack([visual, text]))
    return np.asarray(intra / np.maximum(intra + cross, ENRICHMENT_FLOOR))


def stage_verdict(
    cross: npt.ArrayLike,
    visual: npt.ArrayLike,
    text: npt.ArrayLike,
    clusters: Clusters,
    *,
    min_effect: float = float(np.log(1.1)),
    min_bic_gain: float = 4.0,
    level: float = 0.95,
    n_boot: int = 1000,
    n_perm: int = 1999,
    seed: int = 0,
) -> StageVerdict:
    """Decide whether the layers show the paper's three stages (arXiv 2411.19628, section 3).

    The endpoint is fixed: the mean cross enrichment without the attention sink, on a log scale. `three_stage`
    needs all of the following; anything else is `other` (the data speak against the signature) or
    `undetermined` (they cannot tell).

    1. `effect`: at the change points, cross attention falls and rises again, each by more than `min_effect` at
       the lower limit of a simultaneous band from a bootstrap clustered by image.
    2. `share`: the intra-modality share is higher in the middle stage than before and after (lower limits > 0).
    3. `shape`: a three-stage fit beats every smooth and every monotone fit by `min_bic_gain` in BIC.
    4. `order`: the signature is rarer than `1 - level` when the increments between layers, or the layers, are
       put in random order.

    Args:
        cross, visual, text: `[n, L]`, enrichment without the sink per sample and layer, averaged over heads:
            instruction -> visual, visual -> visual, instruction -> text. Samples with NaN in `cross` (no image)
            are left out.
        clusters: length n, the image of each sample.
        min_effect: smallest change of level that counts, in log enrichment (default: a tenth).

    Raises:
        ValueError: the arrays do not have one shape `[n, L]`.
    """
    cross, visual, text = (np.asarray(array, dtype=np.float64) for array in (cross, visual, text))
    if cross.ndim != 2 or cross.shape != visual.shape or cross.shape != text.shape:
        raise ValueError(f"stage_verdict: shapes {cross.shape}, {visual.shape}, {text.shape}; need one shape [n, L]")
    usable = np.isfinite(cross).all(1)
    labels = np.asarray(clusters).astype(str)[usable]
    cross, visual, text = cross[usable], visual[usable], text[usable]
    num_layers, num_clusters = cross.shape[1], count_images(labels)
    settings = {
        "min_effect": min_effect,
        "min_bic_gain": min_bic_gain,
        "level": level,
        "n_boot": n_boot,
        "n_perm": n_perm,
        "seed": seed,
        "num_samples": len(cross),
        "num_clusters": num_clusters,
        "num_layers": num_layers,
    }
    if num_layers < MIN_LAYERS:
        why = f"{num_layers} layers; fewer than {MIN_LAYERS} cannot tell stages from chance"
        return StageVerdict("undetermined", [why], None, None, settings=settings)
    if num_clusters < MIN_CLUSTERS:
        why = f"{num_clusters} images; fewer than {MIN_CLUSTERS} give no interval"
        return StageVerdict("undetermined", [why], None, None, settings=settings)

    means = [cluster_mean(array) for array in (cross, visual, text)]
    boots = [cluster_bootstrap(array, labels, n_boot, seed) for array in (cross, visual, text)]
    curve, replicates = (np.log(np.maximum(array, ENRICHMENT_FLOOR)) for array in (means[0], boots[0]))
    share, share_replicates = intra_modality_share(*means), intra_modality_share(*boots)

    # Contrasts of stage means for every split at once: the band holds for the split that the data chose.
    splits = stage_splits(num_layers)

    def contrasts(logs: Array, shares: Array) -> Array:
        fall, rise, _ = stage_contrasts(logs, splits)
        before, after, _ = stage_contrasts(shares, splits)
        return np.stack([fall, rise, -before, -after], axis=-1)  # [B, C, 4]

    band = simultaneous_band(
        contrasts(curve[None], share[None])[0], contrasts(replicates, share_replicates), level=level
    )
    points = change_points(curve)
    ci, stability = _change_point_stability(curve, replicates, points, level, seed)
    chosen = np.flatnonzero((splits == points).all(1))
    p_values = permutation_p_values(curve, n_perm, seed)
    bic = fit_bic(curve, float(replicates.var(0, ddof=1).mean()))
    gain = min(v for k, v in bic.items() if k not in THREE_STAGE_FITS) - min(bic[k] for k in THREE_STAGE_FITS)

    triples: list[list[float] | None] = [None] * 4
    if len(chosen):
        at = chosen[0]
        triples = [[float(band.mean[at, i]), float(band.low[at, i]), float(band.high[at, i])] for i in range(4)]
    alpha = 1 - level
    checks = {
        "effect": bool(len(chosen) and (band.low[chosen[0], :2] > min_effect).all()),
        "share": bool(len(chosen) and (band.low[chosen[0], 2:] > 0).all()),
        "shape": bool(gain >= min_bic_gain),
        "order": bool(max(p_values.values()) <= alpha),
    }
    # Evidence against: no split anywhere in the decoder could hold a relevant fall and a relevant rise ...
    absent = not bool((band.high[:, :2] > min_effect).all(1).any())
    # ... or a smooth or monotone curve describes the layers clearly better than three stages do.
    simpler = gain <= -min_bic_gain
    reasons = []
    if absent:
        reasons.append(
            "no split of the layers holds both a fall and a rise of cross attention above the minimum effect"
        )
    elif not checks["effect"]:
        reasons.append("fall and rise at the change points are not both above the minimum effect")
    if not checks["share"]:
        reasons.append("the intra-modality share does not peak in the middle stage")
    if not checks["shape"]:
        best = min((k for k in bic if k not in THREE_STAGE_FITS), key=lambda k: bic[k])
        reasons.append(f"the {best.replace('_', ' ')} fit is as good or better (BIC gain of three stages {gain:.1f})")
    if not checks["order"]:
        worst = max(p_values, key=lambda k: p_values[k])
        reasons.append(f"a random order of the {worst} gives the signature as clearly (p = {p_values[worst]:.3f})")
    found = all(checks.values())
    return StageVerdict(
        verdict="three_stage" if found else "other" if absent or simpler else "undetermined",
        reasons=reasons,
        boundaries=points if found else None,
        boundaries_ci=ci if found else None,
        change_points=points,
        change_points_ci=ci,
        change_points_stability=stability,
        fall=triples[0],
        rise=triples[1],
        share_in=triples[2],
        share_out=triples[3],
        p_values=p_values,
        bic=bic,
        checks=checks,
        settings=settings,
    )


def _change_point_stability(
    curve: Array, replicates: Array, points: list[int], level: float, seed: int
) -> tuple[list[list[int]], list[float]]:
    """Interval of each change point, and the share of bootstrap replicates that find the very same layer.

    The stability uses the bootstrap over images alone. The interval also redraws the layers' residuals from the
    three-level fit, since deviations that all images share are invisible to a bootstrap over images.
    """
    edges = [0, *points, len(curve)]
    fit = np.concatenate([np.full(stop - start, curve[start:stop].mean()) for start, stop in pairwise(edges)])
    residuals = (curve - fit) * np.sqrt(len(curve) / (len(curve) - 3))
    redrawn = np.random.default_rng(seed).choice(residuals, size=replicates.shape)
    found = np.array([change_points(replicate) for replicate in replicates])
    spread = np.array([change_points(row) for row in fit + redrawn + (replicates - curve)])
    tail = 100 * (1 - level) / 2
    limits = np.percentile(spread, [tail, 100 - tail], axis=0, method="nearest").astype(int)
    stability = (found == points).mean(0)
    return limits.T.tolist(), [float(value) for value in stability]
