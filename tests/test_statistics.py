"""The stage verdict does not cry wolf, finds real stages, and its intervals cover."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from analysis.statistics import segments
from analysis.statistics.bands import cluster_bootstrap, generator, mean_band, rate_band, simultaneous_band
from analysis.statistics.stages import StageVerdict, stage_verdict

DEPTHS = (12, 24, 32)
Curve = Callable[[int, np.random.Generator], np.ndarray]


def unit(num_layers: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, num_layers)


def constant(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    return np.zeros(num_layers)


def linear(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1.5, 1.5) * unit(num_layers)


def exponential(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice([-1, 1]) * rng.uniform(0.5, 2.0) * np.exp(-rng.uniform(2, 12) * unit(num_layers))


def random_walk(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.25, num_layers).cumsum()


def heavy_tailed_walk(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    return (0.1 * rng.standard_t(3, num_layers)).cumsum()


def drifting_walk(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.normal(0, 0.2, num_layers) - 0.05).cumsum()


def two_stage(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    """Two levels, or a slope that ends in a plateau."""
    size = rng.choice([-1, 1]) * rng.uniform(0.4, 1.5)
    if rng.random() < 0.5:
        return np.where(np.arange(num_layers) < rng.integers(2, num_layers - 1), 0.0, size)
    return size * np.minimum(unit(num_layers) / rng.uniform(0.2, 0.8), 1.0)


def parabola(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    """Falls and rises, but smoothly: no stages."""
    return rng.uniform(2, 8) * (unit(num_layers) - rng.uniform(0.4, 0.6)) ** 2


def three_stage(num_layers: int, rng: np.random.Generator) -> np.ndarray:
    """High, low, high again, each change spread over about a twelfth of the depth."""
    layer = unit(num_layers)

    def step(at: float) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(4 * 12 * (layer - at), -50, 50)))

    fall, rise = rng.uniform(0.4, 1.2), rng.uniform(0.3, 0.8)
    return fall * (1 - step(rng.uniform(0.12, 0.3))) + rise * step(rng.uniform(0.5, 0.75))


NULLS: list[Curve] = [
    constant, linear, exponential, random_walk, heavy_tailed_walk, drifting_walk, two_stage, parabola,
]  # fmt: skip


def samples(curve: np.ndarray, rng: np.random.Generator, images: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Enrichment of two questions an image around a log curve, with errors at every level that real data has.

    Deviations that all samples share at a layer are part of the one model, not of the sampling.
    """
    image = np.repeat(np.arange(images), 2)
    shared = rng.choice([0.03, 0.06, 0.12]) * rng.normal(size=curve.shape)
    of_image = 0.3 * rng.normal(size=(images, 1)) + 0.15 * rng.normal(size=(images, len(curve)))
    own = 0.3 * rng.normal(size=(2 * images, len(curve)))
    return np.exp(curve + shared + of_image[image] + own), image


def verdict(curve: Curve, num_layers: int, seed: int, n_boot: int = 100, n_perm: int = 99) -> StageVerdict:
    rng = np.random.default_rng([seed, num_layers])
    cross, image = samples(curve(num_layers, rng), rng)
    # Worst case: visual and text attention say nothing, so the intra-modality share mirrors cross attention.
    flat = np.exp(0.1 * rng.normal(size=cross.shape))
    return stage_verdict(cross, np.ones_like(cross), flat, image, n_boot=n_boot, n_perm=n_perm, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("curve", NULLS, ids=lambda curve: curve.__name__)
def test_false_three_stage_at_most_five_percent(curve: Curve) -> None:
    per_depth = 200
    found = {
        depth: sum(verdict(curve, depth, seed).verdict == "three_stage" for seed in range(per_depth))
        for depth in DEPTHS
    }
    total = per_depth * len(DEPTHS)
    upper = binomtest(sum(found.values()), total).proportion_ci(0.90, method="exact").high
    print(f"\nfalse three_stage on {curve.__name__}: {found} of {per_depth} each, one-sided 95% limit {upper:.3f}")
    assert upper <= 0.05
    assert all(count / per_depth <= 0.05 for count in found.values())


@pytest.mark.slow
def test_power_on_three_stages() -> None:
    repeats = 100
    for depth in DEPTHS:
        verdicts = [verdict(three_stage, depth, seed) for seed in range(repeats)]
        power = np.mean([each.verdict == "three_stage" for each in verdicts])
        print(f"\npower at {depth} layers: {power:.2f} of {repeats}")
        assert power >= 0.5
        assert not any(each.verdict == "other" for each in verdicts if each.checks["effect"])


@pytest.mark.parametrize("depth", DEPTHS)
def test_clear_stages_are_found_where_they_are(depth: int) -> None:
    first, second = depth // 4, 2 * depth // 3

    def curve(num_layers: int, rng: np.random.Generator) -> np.ndarray:
        layer = np.arange(num_layers)
        return np.where(layer < first, 0.7, np.where(layer < second, -0.6, 0.2))

    found = [verdict(curve, depth, seed, n_boot=200, n_perm=999) for seed in range(10)]
    assert all(each.change_points == [first, second] for each in found)
    clear = [each for each in found if each.verdict == "three_stage"]
    assert len(clear) >= 5
    for each in clear:
        assert each.boundaries == [first, second]
        assert each.boundaries_ci is not None
        assert all(low <= at <= high for at, (low, high) in zip([first, second], each.boundaries_ci, strict=True))
        assert each.fall is not None
        assert each.fall[1] < each.fall[0] < each.fall[2]
        assert all(each.checks.values())
        assert not each.reasons


def test_no_boundaries_without_a_finding() -> None:
    cross = np.exp(0.3 * np.random.default_rng(0).normal(size=(200, 12)))
    flat = stage_verdict(cross, np.ones_like(cross), np.ones_like(cross), np.arange(200))
    assert (flat.verdict, flat.boundaries, flat.boundaries_ci) == ("other", None, None)
    assert flat.reasons


def test_effect_below_the_minimum_is_no_finding_however_precise() -> None:
    rng = np.random.default_rng(0)
    layer = np.arange(24)
    curve = np.where(layer < 6, 0.02, np.where(layer < 15, 0.0, 0.02))  # two percent, seen with tiny errors
    cross = np.exp(curve + 0.001 * rng.normal(size=(400, 24)))
    outcome = stage_verdict(cross, np.ones_like(cross), np.ones_like(cross), np.arange(400))
    assert outcome.p_values["increments"] < 0.05
    assert outcome.verdict == "other"


def test_fall_late_in_the_decoder_is_not_the_signature() -> None:
    def curve(num_layers: int, rng: np.random.Generator) -> np.ndarray:
        layer = np.arange(num_layers)
        return np.where((layer >= 17) & (layer < 21), -0.8, 0.2)

    assert all(verdict(curve, 24, seed).verdict != "three_stage" for seed in range(20))


def test_too_little_data_is_undetermined() -> None:
    rng = np.random.default_rng(0)
    curve = three_stage(24, rng)
    cross, image = samples(curve, rng, images=5)
    few_images = stage_verdict(cross, np.ones_like(cross), np.ones_like(cross), image)
    assert (few_images.verdict, few_images.boundaries) == ("undetermined", None)
    shallow = np.exp(rng.normal(size=(40, 4)))
    few_layers = stage_verdict(shallow, shallow, shallow, np.arange(40))
    assert few_layers.verdict == "undetermined"
    assert "4 layers" in few_layers.reasons[0]


def test_samples_without_an_image_are_left_out() -> None:
    rng = np.random.default_rng(1)
    cross, image = samples(three_stage(12, rng), rng)
    ones = np.ones_like(cross)
    with_text_only = np.vstack([cross, np.full((3, 12), np.nan)])
    more = np.ones_like(with_text_only)
    clusters = [*map(str, image), "x", "y", "z"]
    expected = stage_verdict(cross, ones, ones, image, n_boot=50, n_perm=50)
    actual = stage_verdict(with_text_only, more, more, clusters, n_boot=50, n_perm=50)
    assert actual.fall == pytest.approx(expected.fall)
    assert actual.settings["num_samples"] == len(cross)


def test_visual_queries_that_see_nothing_but_themselves() -> None:
    """NaN visual -> visual (one visual token) leaves the share to text; attention that is zero stays finite."""
    rng = np.random.default_rng(2)
    cross, image = samples(three_stage(12, rng), rng)
    cross[:, 6:] = 0.0
    outcome = stage_verdict(cross, np.full_like(cross, np.nan), np.ones_like(cross), image, n_boot=50)
    assert outcome.verdict == "other"
    assert outcome.fall is not None
    assert np.isfinite(outcome.fall).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 12\), \(4, 11\)"):
        stage_verdict(np.ones((4, 12)), np.ones((4, 11)), np.ones((4, 12)), range(4))
    with pytest.raises(ValueError, match="3 samples but 2"):
        cluster_bootstrap(np.ones((3, 2)), [0, 1])


def test_bootstrap_respects_clusters() -> None:
    """Copies of one image's answer add nothing: the interval is that of the images."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=50)
    copied = np.repeat(values, 8)
    alone = mean_band(values, np.arange(50))
    together = mean_band(copied, np.repeat(np.arange(50), 8))
    assert together.low == pytest.approx(alone.low)
    assert together.high == pytest.approx(alone.high)
    naive = mean_band(copied, np.arange(400))
    assert naive.high - naive.low < 0.5 * (together.high - together.low)


def test_bootstrap_band_covers() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(200):
        image_effect = rng.normal(size=60)
        values = np.repeat(image_effect, 3) + rng.normal(size=180)
        band = mean_band(values, np.repeat(np.arange(60), 3), n_boot=200, seed=int(rng.integers(2**31)))
        hits += bool(band.low <= 0 <= band.high)
    assert binomtest(hits, 200, 0.93, alternative="less").pvalue > 0.01


def test_simultaneous_band_covers_every_entry_at_once() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(150):
        values = rng.normal(size=(80, 20))
        replicates = cluster_bootstrap(values, np.arange(80), 200, seed)
        band = simultaneous_band(values.mean(0), replicates)
        hits += bool(((band.low <= 0) & (band.high >= 0)).all())
    assert binomtest(hits, 150, 0.92, alternative="less").pvalue > 0.01


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_bootstrap_is_paired_and_ignores_missing_values(num_samples: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num_samples, width))
    clusters = rng.integers(0, 5, num_samples)
    replicates = cluster_bootstrap(values, clusters, 20, seed)
    assert replicates.shape == (20, width)
    np.testing.assert_allclose(cluster_bootstrap(values + 1, clusters, 20, seed), replicates + 1)
    padded = np.concatenate([values, np.full((num_samples, 1), np.nan)], axis=1)
    again = cluster_bootstrap(padded, clusters, 20, seed)
    np.testing.assert_allclose(again[:, :width], replicates)
    assert np.isnan(again[:, width]).all()


@given(st.integers(0, 2**31 - 1), st.sampled_from([8, 12, 24]))
def test_change_points_are_the_least_squares_split(seed: int, num_layers: int) -> None:
    """ruptures against every split tried in turn."""
    curve = np.random.default_rng(seed).normal(size=num_layers)

    def residual(first: int, second: int) -> float:
        return sum(part.var() * len(part) for part in np.split(curve, [first, second]))

    best = min(
        residual(first, second) for first in range(2, num_layers - 3) for second in range(first + 2, num_layers - 1)
    )
    points = segments.change_points(curve)
    assert residual(*points) == pytest.approx(best)


@given(st.integers(0, 2**31 - 1), st.sampled_from([8, 12, 32]))
def test_stage_contrasts_equal_plain_means(seed: int, num_layers: int) -> None:
    curves = 5 + np.random.default_rng(seed).normal(size=(3, num_layers))
    splits = segments.stage_splits(num_layers)
    fall, rise, residual = segments.stage_contrasts(curves, splits)
    row, column = 1, len(splits) // 2
    parts = np.split(curves[row], splits[column])
    assert fall[row, column] == pytest.approx(parts[0].mean() - parts[1].mean())
    assert rise[row, column] == pytest.approx(parts[2].mean() - parts[1].mean())
    assert residual[row, column] == pytest.approx(sum(((part - part.mean()) ** 2).sum() for part in parts))


def test_permutation_test_is_exact_for_random_walks() -> None:
    p_values = [
        segments.permutation_p_values(np.random.default_rng(seed).normal(size=16).cumsum(), 99, seed)["increments"]
        for seed in range(400)
    ]
    for alpha in (0.05, 0.2, 0.5):
        assert binomtest(int(np.sum(np.array(p_values) <= alpha)), 400, alpha).pvalue > 0.01


def test_bic_prefers_the_family_that_made_the_curve() -> None:
    rng = np.random.default_rng(6)
    layer = unit(24)
    made = {
        "constant": np.zeros(24),
        "linear": 2 * layer,
        "quadratic": 4 * (layer - 0.5) ** 2,
        "exponential": 2 * np.exp(-6 * layer),
        "three_levels": np.where(layer < 0.3, 1.0, np.where(layer < 0.6, 0.0, 0.7)),
        "three_slopes": np.interp(layer, [0, 0.3, 0.7, 1], [1.0, 0.0, 0.0, 1.0]),
    }
    for name, curve in made.items():
        scores = segments.fit_bic(curve + 0.03 * rng.normal(size=24), sampling_variance=0.03**2)
        assert min(scores, key=scores.__getitem__) == name, name


@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([0.0, 1.0]))
def test_a_rate_of_none_or_all_has_an_interval(images: int, per_image: int, rate: float) -> None:
    """Wilson's, for as many draws as there are images: what more questions an image add cannot be seen there."""
    clusters = np.repeat(np.arange(images), per_image)
    band = rate_band(np.full(len(clusters), rate), clusters)
    expected = binomtest(int(rate) * images, images).proportion_ci(0.95, method="wilson")
    assert (band.low, band.high) == pytest.approx((expected.low, expected.high))


def test_what_is_drawn_beside_the_images_is_independent_of_them() -> None:
    draws = [np.random.default_rng(7).random(2000), *(generator(7, purpose).random(2000) for purpose in ("a", "b"))]
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.1
    assert (generator(7, "a").random(5) == draws[1][:5]).all()
