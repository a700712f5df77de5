"""The stage finding by attention: valley, stages or a bend, and the recipe over runs (`docs/stage_rules.md`).

Layers are not samples: deviations that all questions share at a layer belong to the one model at hand, and no amount of
data averages them away. A claim about one model therefore has images as its units; a claim about a way of training has
independently seeded runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from .bands import LEVEL, MIN_CLUSTERS, Array, Band, ImageBootstrap, cluster_mean, generator, one_sided_band
from .segments import THREE_STAGE_FITS, fit_bic, posterior_weights, registered_split, stage_contrasts, stage_splits

MIN_LAYERS = 8
"""Below this depth three stages of two layers leave next to nothing that could be told from a bend."""
ENDPOINT_FLOOR = 0.01
"""Enrichment (or mass) below a hundredth counts as this much; keeps the logarithm finite."""
MIN_EFFECT = float(np.log(1.1))
"""Smallest change of level that counts, in log enrichment: a tenth."""
MIN_BIC_GAIN = 4.0
FOUND, NOT_FOUND, UNDETERMINED = "found", "not_found", "undetermined"
NOT_TESTED = "not_tested_by_attention"
Triple = list[float]
"""`[estimate, lower, upper]`, each limit one-sided and simultaneous over fall and rise of every split."""


@dataclass(frozen=True)
class SplitContrasts:
    """What attention does at one split `(b1, b2)`, in log enrichment (0.69 = a factor of two).

    Attributes:
        fall, rise: of cross attention into [b1, b2) and out of it.
        visual_in, visual_out: visual -> visual, the middle less before, and less after; None where it is not defined.
    """

    split: list[int]
    fall: Triple
    rise: Triple
    visual_in: Triple | None
    visual_out: Triple | None


@dataclass(frozen=True)
class StageVerdict:
    """Outcome of :func:`stage_verdict`; every field is plain data that goes to `summary.json` as it is.

    Attributes:
        verdict: `three_stage`, `other` or `undetermined`.
        reasons: why it is not `three_stage`, what decides first.
        boundaries: first layers of stages 2 and 3, None without `three_stage`; `boundaries_ci` their 95% intervals.
        claims: `valley` and `shape` -> found, not_found or undetermined; `visual_peak` -> found or
            not_tested_by_attention, at `contrasts`.
        contrasts: at the split that fits best, with the least squared residual around its three means.
        registered: the same at the split that is fixed beforehand.
        prevalence: share of questions whose own curve falls and rises by more than the minimum effect at `contrasts`.
        bic: of every curve family; `bic_gain` of three stages over the best rival, `rival`; `weights` exp(-BIC/2).
    """

    verdict: str
    reasons: list[str]
    boundaries: list[int] | None = None
    boundaries_ci: list[list[int]] | None = None
    claims: dict[str, str] = field(default_factory=dict)
    contrasts: SplitContrasts | None = None
    registered: SplitContrasts | None = None
    prevalence: float | None = None
    bic: dict[str, float] = field(default_factory=dict)
    bic_gain: float | None = None
    rival: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return asdict(self)


def log_endpoint(values: npt.ArrayLike) -> Array:
    """Logarithm of enrichment or mass, not below that of `ENDPOINT_FLOOR`."""
    return np.asarray(np.log(np.maximum(values, ENDPOINT_FLOOR)))


def split_band(curve: Array, replicates: Array, level: float) -> Band:
    """`[C, 2]` fall and rise of `curve [L]`, on the scale of levels, at every split: simultaneous one-sided limits."""
    splits = stage_splits(len(curve))
    estimate = np.stack(stage_contrasts(curve[None], splits)[:2], axis=-1)[0]
    return one_sided_band(estimate, np.stack(stage_contrasts(replicates, splits)[:2], axis=-1), level)


def valley_claim(band: Band) -> str:
    """Claim 1 from the limits of fall and rise `[C, 2]` at every split."""
    if (band.low > MIN_EFFECT).all(1).any():
        return FOUND
    return UNDETERMINED if (band.high > MIN_EFFECT).all(1).any() else NOT_FOUND


def shape_claim(bic: dict[str, float]) -> tuple[str, float, str]:
    """Claim 2 from the BIC of every family: the claim, the gain of three stages over the best rival, and that rival."""
    rivals = {name: value for name, value in bic.items() if name not in THREE_STAGE_FITS}
    rival = min(rivals, key=rivals.__getitem__)
    gain = rivals[rival] - min(bic[name] for name in THREE_STAGE_FITS)
    return FOUND if gain >= MIN_BIC_GAIN else NOT_FOUND if gain <= -MIN_BIC_GAIN else UNDETERMINED, gain, rival


def _in_all_layers(found: StageVerdict, layers: list[int]) -> StageVerdict:
    """A verdict on some layers of a model, with the numbers that these have there."""

    def number(places: list[int]) -> list[int]:
        return [layers[min(place, len(layers) - 1)] for place in places]

    return replace(
        found,
        boundaries=found.boundaries and number(found.boundaries),
        boundaries_ci=found.boundaries_ci and [number(each) for each in found.boundaries_ci],
        contrasts=found.contrasts and replace(found.contrasts, split=number(found.contrasts.split)),
        registered=found.registered and replace(found.registered, split=number(found.registered.split)),
    )


def stage_verdict(
    cross: npt.ArrayLike, visual: npt.ArrayLike, bootstrap: ImageBootstrap, level: float = LEVEL
) -> StageVerdict:
    """Decide whether the layers of one model show three stages of attention (arXiv 2411.19628, section 3).

    `three_stage` needs both claims, a valley at some split and three stages rather than a bend; `other` is where one of
    them is not found. Visual -> visual attention is tested by itself and does not enter.

    Args:
        cross, visual: `[n, L]`, enrichment without the sink (or mass) per sample and layer, averaged over heads:
            instruction -> visual, visual -> visual. Samples with NaN in `cross` (no image) are left out. A layer that
            is NaN in every sample does not attend: stages are looked for among the others, and numbered as layers of
            the model.
        level: of each one-sided limit.

    Example:
        >>> noise = np.random.default_rng(0).lognormal(0, 0.1, (60, 15))
        >>> cross = np.repeat([1.0, 0.3, 0.8], 5) * noise
        >>> found = stage_verdict(cross, np.ones_like(cross), ImageBootstrap(range(60)))
        >>> found.verdict, found.boundaries, found.claims["visual_peak"]
        ('three_stage', [5, 10], 'not_tested_by_attention')
    """
    cross, visual = (np.asarray(array, dtype=np.float64) for array in (cross, visual))
    if cross.ndim != 2 or cross.shape != visual.shape:
        raise ValueError(f"stage_verdict: shapes {cross.shape}, {visual.shape}; need one shape [n, L]")
    attending = np.flatnonzero(np.isfinite(cross).any(0))
    if 0 < len(attending) < cross.shape[1]:
        found = stage_verdict(cross[:, attending], visual[:, attending], bootstrap, level)
        return _in_all_layers(found, attending.tolist())
    usable = np.isfinite(cross).all(1)
    cross, visual, bootstrap = cross[usable], visual[usable], bootstrap[usable]
    num_layers, num_clusters = cross.shape[1], bootstrap.num_images
    settings = {"min_effect": MIN_EFFECT, "min_bic_gain": MIN_BIC_GAIN, "level": level}
    settings |= {"n_boot": bootstrap.draws, "seed": bootstrap.seed}
    settings |= {"num_samples": len(cross), "num_clusters": num_clusters, "num_layers": num_layers}
    too_little = []
    if num_layers < MIN_LAYERS:
        too_little.append(f"{num_layers} layers; fewer than {MIN_LAYERS} cannot tell stages from a bend")
    if num_clusters < MIN_CLUSTERS:
        too_little.append(f"{num_clusters} images; fewer than {MIN_CLUSTERS} give no interval")
    if too_little:
        return StageVerdict(UNDETERMINED, too_little, settings=settings)

    curve, replicates = map(log_endpoint, bootstrap.mean(cross))
    band = split_band(curve, replicates, level)
    visual_band = None
    if np.isfinite(cluster_mean(visual)).all():
        visual_curve, visual_draws = map(log_endpoint, bootstrap.mean(visual))
        known = np.isfinite(visual_draws).all(1)
        visual_band = split_band(-visual_curve, -visual_draws[known], level)  # a peak is a valley upside down
    valley = valley_claim(band)
    sampling_variance = float(replicates.var(0, ddof=1).mean())
    bic = fit_bic(curve, sampling_variance)
    shape, gain, rival = shape_claim(bic)
    best = int(_best_split(curve[None])[0])
    splits = stage_splits(num_layers)
    registered = int(np.flatnonzero((splits == registered_split(num_layers)).all(1))[0])
    contrasts, at_registered = (_contrasts_at(place, splits, band, visual_band) for place in (best, registered))
    fall, rise, _ = stage_contrasts(log_endpoint(cross), splits[[best]])
    at_best = bool((band.low[best] > MIN_EFFECT).all())
    three = shape == FOUND and at_best
    peak = all(part is not None and part[1] > MIN_EFFECT for part in (contrasts.visual_in, contrasts.visual_out))
    return StageVerdict(
        verdict="three_stage" if three else "other" if NOT_FOUND in (valley, shape) else UNDETERMINED,
        reasons=_reasons(valley, shape, at_best, rival, gain),
        boundaries=contrasts.split if three else None,
        boundaries_ci=_boundary_intervals(curve, replicates, splits[best], bootstrap.seed) if three else None,
        claims={"valley": valley, "shape": shape, "visual_peak": FOUND if peak else NOT_TESTED},
        contrasts=contrasts,
        registered=at_registered,
        prevalence=float(((fall > MIN_EFFECT) & (rise > MIN_EFFECT)).mean()),
        bic=bic,
        bic_gain=gain,
        rival=rival,
        weights=posterior_weights(bic),
        settings=settings,
    )


def _best_split(curves: Array) -> npt.NDArray[np.int64]:
    """For every curve `[B, L]` the row of the split whose three means leave the least squared residual (exact)."""
    return np.asarray(stage_contrasts(curves, stage_splits(curves.shape[1]))[2].argmin(1))


def _contrasts_at(place: int, splits: npt.NDArray[np.int64], band: Band, visual_band: Band | None) -> SplitContrasts:
    def triples(of: Band) -> list[Triple]:
        return np.stack([of.mean[place], of.low[place], of.high[place]], axis=-1).tolist()

    visual = [None, None] if visual_band is None else triples(visual_band)
    return SplitContrasts(splits[place].tolist(), *triples(band), *visual)


def _boundary_intervals(curve: Array, replicates: Array, split: npt.NDArray[np.int64], seed: int) -> list[list[int]]:
    """95% interval of each boundary: images drawn anew, and the layers' residuals from the three-level fit as well.

    Deviations that all images share are invisible to a bootstrap over images.
    """
    num_layers = len(curve)
    stage = np.searchsorted(split, np.arange(num_layers), side="right")
    fit = np.array([curve[stage == each].mean() for each in range(3)])[stage]
    residuals = (curve - fit) * np.sqrt(num_layers / (num_layers - 3))
    redrawn = fit + generator(seed, "residuals").choice(residuals, size=replicates.shape) + (replicates - curve)
    found = stage_splits(num_layers)[_best_split(redrawn)]
    return np.percentile(found, [2.5, 97.5], axis=0, method="nearest").astype(int).T.tolist()


def _reasons(valley: str, shape: str, at_best: bool, rival: str, gain: float) -> list[str]:
    """Why it is not `three_stage`, a sentence for each claim that is not found; those against three stages first."""
    clear = "fall and rise of cross attention are not both clearly above the minimum effect"
    sentences = {
        "valley": "no split of the layers holds both a fall and a rise of cross attention above the minimum effect"
        if valley == NOT_FOUND
        else f"{clear} at {'the split that fits best' if valley == FOUND else 'any split'}",
        "shape": f"a plain curve ({rival.replace('_', ' ')}) describes the layers as well as three stages do (BIC gain "
        f"of three stages {gain:.1f})",
    }
    open_claims = ([] if at_best else ["valley"]) + ([] if shape == FOUND else ["shape"])
    claims = {"valley": valley, "shape": shape}
    return [sentences[name] for name in sorted(open_claims, key=lambda name: claims[name] != NOT_FOUND)]


MIN_RUNS, MIN_RUNS_FOR_STAGES = 3, 5
T_TEST_ERROR = 0.05
SHARE_OF_RUNS = 0.8
BOUNDARY_SPREAD = 1 / 8
"""Share of the layers by which a run's boundary may be off the median of the runs."""


@dataclass(frozen=True)
class RecipeVerdict:
    """Claim 3, about a way of training; each part found, not_found or undetermined.

    Attributes:
        levels: (a) at the registered split; `p_fall`, `p_rise` of the one-sided t-tests over runs.
        stages: (b) `num_three_stage` of the runs show three stages with boundaries close to the median.
    """

    num_runs: int
    levels: str
    p_fall: float | None
    p_rise: float | None
    stages: str
    num_three_stage: int


def recipe_verdict(runs: Sequence[Mapping[str, Any]]) -> RecipeVerdict:
    """Claim 3 from independently seeded runs of one depth.

    Args:
        runs: `StageVerdict.to_dict()` of each (`stages` of its summary). The seeds must be of everything that was
            trained, the vision tower included.
    """
    known = [each for each in runs if each["registered"] is not None]
    p_fall = p_rise = None
    levels = UNDETERMINED
    if len(known) >= MIN_RUNS:
        changes = [[each["registered"][name][0] for each in known] for name in ("fall", "rise")]
        p_fall, p_rise = stats.ttest_1samp(changes, MIN_EFFECT, axis=1, alternative="greater").pvalue.tolist()
        levels = FOUND if max(p_fall, p_rise) <= T_TEST_ERROR else NOT_FOUND
    found = [each for each in known if each["boundaries"] is not None]
    agreeing = 0
    if found:
        boundaries = np.array([each["boundaries"] for each in found], dtype=float)
        reach = BOUNDARY_SPREAD * found[0]["settings"]["num_layers"]
        agreeing = int((np.abs(boundaries - np.median(boundaries, axis=0)) <= reach).all(1).sum())
    enough = len(known) >= MIN_RUNS_FOR_STAGES
    stages = UNDETERMINED if not enough else FOUND if agreeing >= SHARE_OF_RUNS * len(known) else NOT_FOUND
    return RecipeVerdict(len(known), levels, p_fall, p_rise, stages, agreeing)
