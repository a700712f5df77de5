"""The stage verdict: do the layers fall into the paper's three stages? `docs/stage_verdict.md` explains it on one page.

Everything here is a pure function of numpy arrays. Layers are not samples: deviations that all samples share at a
layer belong to the one model at hand, no amount of data averages them away, and three segments always fit some curve.
The verdict therefore asks for a signature that was fixed beforehand and compares it with what chance orderings of the
layers produce.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .bands import (
    MIN_CLUSTERS,
    Array,
    Band,
    Clusters,
    cluster_bootstrap,
    cluster_mean,
    count_images,
    generator,
    simultaneous_band,
)
from .segments import THREE_STAGE_FITS, change_points, fit_bic, permutation_p_values, stage_contrasts, stage_splits
from .verdicts import CHECK_ORDER

MIN_LAYERS = 8
"""Below this depth no ordering of the layers is rare enough to be evidence."""
ENRICHMENT_FLOOR = 0.01
"""Enrichment below a hundredth of uniform attention counts as this much (keeps the logarithm finite)."""
Triple = list[float]
"""`[estimate, lower, upper]`."""


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
    fall: Triple | None = None
    rise: Triple | None = None
    share_in: Triple | None = None
    share_out: Triple | None = None
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
    curves = [np.asarray(array, dtype=np.float64) for array in (cross, visual, text)]
    if curves[0].ndim != 2 or len({curve.shape for curve in curves}) > 1:
        raise ValueError(
            f"stage_verdict: shapes {', '.join(str(each.shape) for each in curves)}; need one shape [n, L]"
        )
    usable = np.isfinite(curves[0]).all(1)
    labels = np.asarray(clusters).astype(str)[usable]
    curves = [curve[usable] for curve in curves]
    num_layers, num_clusters = curves[0].shape[1], count_images(labels)
    settings = {"min_effect": min_effect, "min_bic_gain": min_bic_gain, "level": level, "n_boot": n_boot}
    settings |= {"n_perm": n_perm, "seed": seed, "num_samples": len(labels), "num_clusters": num_clusters}
    settings["num_layers"] = num_layers
    too_little = []
    if num_layers < MIN_LAYERS:
        too_little.append(f"{num_layers} layers; fewer than {MIN_LAYERS} cannot tell stages from chance")
    if num_clusters < MIN_CLUSTERS:
        too_little.append(f"{num_clusters} images; fewer than {MIN_CLUSTERS} give no interval")
    if too_little:
        return StageVerdict("undetermined", too_little, None, None, settings=settings)

    means = [cluster_mean(array) for array in curves]
    boots = [cluster_bootstrap(array, labels, n_boot, seed) for array in curves]
    curve, replicates = (np.log(np.maximum(array, ENRICHMENT_FLOOR)) for array in (means[0], boots[0]))
    share, share_replicates = intra_modality_share(*means), intra_modality_share(*boots)
    points = change_points(curve)
    ci, stability = _change_point_stability(curve, replicates, points, level, seed)
    band = simultaneous_band(
        _contrasts(curve[None], share[None])[0], _contrasts(replicates, share_replicates), level=level
    )
    chosen = np.flatnonzero((stage_splits(num_layers) == points).all(1))
    at_points = Band(*(part[chosen] for part in (band.mean, band.low, band.high)))  # [1 or 0, 4]
    triples = np.stack([at_points.mean, at_points.low, at_points.high], axis=-1).reshape(-1, 4, 3)
    fall, rise, share_in, share_out = triples[0].tolist() if len(triples) else [None] * 4
    p_values = permutation_p_values(curve, n_perm, seed)
    bic = fit_bic(curve, float(replicates.var(0, ddof=1).mean()))
    rivals = {name: value for name, value in bic.items() if name not in THREE_STAGE_FITS}
    gain = min(rivals.values()) - min(bic[name] for name in THREE_STAGE_FITS)
    checks = {
        "effect": bool(len(chosen) and (at_points.low[0, :2] > min_effect).all()),
        "share": bool(len(chosen) and (at_points.low[0, 2:] > 0).all()),
        "shape": bool(gain >= min_bic_gain),
        "order": bool(max(p_values.values()) <= 1 - level),
    }
    # Evidence against: no split anywhere in the decoder could hold a relevant fall and a relevant rise, or a smooth
    # or monotone curve describes the layers clearly better than three stages do.
    absent = not bool((band.high[:, :2] > min_effect).all(1).any())
    found, against = all(checks.values()), absent or gain <= -min_bic_gain
    return StageVerdict(
        verdict="three_stage" if found else "other" if against else "undetermined",
        reasons=_reasons(checks, against, absent, p_values, min(rivals, key=rivals.__getitem__), gain),
        boundaries=points if found else None,
        boundaries_ci=ci if found else None,
        change_points=points,
        change_points_ci=ci,
        change_points_stability=stability,
        fall=fall,
        rise=rise,
        share_in=share_in,
        share_out=share_out,
        p_values=p_values,
        bic=bic,
        checks=checks,
        settings=settings,
    )


def _contrasts(logs: Array, shares: Array) -> Array:
    """Fall, rise and the share's two differences for every split: the band holds for the one that the data chose."""
    splits = stage_splits(logs.shape[1])
    fall, rise, _ = stage_contrasts(logs, splits)
    before, after, _ = stage_contrasts(shares, splits)
    return np.stack([fall, rise, -before, -after], axis=-1)  # [B, C, 4]


def _reasons(
    checks: dict[str, bool], against: bool, absent: bool, p_values: dict[str, float], rival: str, gain: float
) -> list[str]:
    """Why it is not `three_stage`, a sentence for each check that fails; what decides comes first."""
    worst = max(p_values, key=p_values.__getitem__)
    what = "steps between layers" if worst == "increments" else "layers"
    effect = "fall and rise at the change points are not both above the minimum effect"
    if absent:
        effect = "no split of the layers holds both a fall and a rise of cross attention above the minimum effect"
    sentences = {
        "effect": effect,
        "order": f"putting the {what} in random order gives as clear a fall and rise in {p_values[worst]:.0%} of "
        f"the tries (p = {p_values[worst]:.3f}), so it may be chance",
        "shape": f"a plain curve ({rival.replace('_', ' ')}) describes the layers as well as three stages do (BIC gain "
        f"of three stages {gain:.1f})",
        "share": "attention within a modality does not peak in the middle stage",
    }
    return [sentences[name] for name in CHECK_ORDER[against] if not checks[name]]


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
    redrawn = generator(seed, "residuals").choice(residuals, size=replicates.shape)
    found = np.array([change_points(replicate) for replicate in replicates])
    spread = np.array([change_points(row) for row in fit + redrawn + (replicates - curve)])
    tail = 100 * (1 - level) / 2
    limits = np.percentile(spread, [tail, 100 - tail], axis=0, method="nearest").astype(int)
    return limits.T.tolist(), [float(value) for value in (found == points).mean(0)]
