"""Bands cover, splits are those that fit best, and the verdict says what the data hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from analysis.statistics import segments
from analysis.statistics.bands import (
    ImageBootstrap,
    generator,
    mean_band,
    one_sided_band,
    rate_band,
    simultaneous_band,
)
from analysis.statistics.stages import (
    MIN_EFFECT,
    NOT_TESTED,
    StageVerdict,
    recipe_verdict,
    split_band,
    stage_verdict,
    valley_claim,
)
from docs.tooling.stages.simulation import judge, samples, three_stages, unit

DEPTHS = (12, 24, 32)


def levels(num_layers: int, first: int, second: int, values: tuple[float, float, float]) -> np.ndarray:
    layer = np.arange(num_layers)
    return np.where(layer < first, values[0], np.where(layer < second, values[1], values[2]))


@pytest.mark.parametrize("depth", DEPTHS)
def test_clear_stages_are_found_where_they_are(depth: int) -> None:
    first, second = depth // 4, 2 * depth // 3
    rng = np.random.default_rng(depth)
    curve = levels(depth, first, second, (0.7, -0.6, 0.2))
    found = [judge(curve + 0.05 * rng.normal(size=depth), rng) for _ in range(5)]
    assert [each.verdict for each in found] == ["three_stage"] * 5
    for each in found:
        assert each.boundaries == [first, second]
        assert each.boundaries_ci is not None
        assert all(low <= at <= high for at, (low, high) in zip([first, second], each.boundaries_ci, strict=True))
        assert each.contrasts is not None
        assert each.contrasts.fall[1] < each.contrasts.fall[0] < each.contrasts.fall[2]
        assert (each.claims["valley"], each.claims["shape"]) == ("found", "found")
        assert each.claims["visual_peak"] == NOT_TESTED  # it is flat here
        assert each.prevalence is not None
        assert each.prevalence > 0.9
        assert not each.reasons
        assert sum(each.weights[name] for name in segments.THREE_STAGE_FITS) > 0.8


def test_no_boundaries_without_a_finding() -> None:
    cross = np.exp(0.3 * np.random.default_rng(0).normal(size=(200, 12)))
    flat = stage_verdict(cross, np.ones_like(cross), ImageBootstrap(np.arange(200)))
    assert (flat.verdict, flat.boundaries, flat.boundaries_ci) == ("other", None, None)
    assert flat.reasons


def test_effect_below_the_minimum_is_no_finding_however_precise() -> None:
    rng = np.random.default_rng(0)
    curve = levels(24, 6, 15, (0.02, 0.0, 0.02))  # two percent, seen with tiny errors
    cross = np.exp(curve + 0.001 * rng.normal(size=(400, 24)))
    outcome = stage_verdict(cross, np.ones_like(cross), ImageBootstrap(np.arange(400)))
    assert outcome.claims == {"valley": "not_found", "shape": "found", "visual_peak": NOT_TESTED}
    assert outcome.verdict == "other"


def test_a_bend_is_a_valley_and_no_stages() -> None:
    rng = np.random.default_rng(0)
    for curve in (6 * (unit(24) - 0.5) ** 2, np.exp(-8 * unit(24)) + 0.6 * unit(24) ** 2):
        cross, image = samples(curve, rng)
        outcome = stage_verdict(cross, np.ones_like(cross), ImageBootstrap(image, 200))
        assert outcome.claims["valley"] == "found"
        assert outcome.claims["shape"] != "found"
        assert outcome.verdict != "three_stage"
        assert "plain curve" in outcome.reasons[0]


def test_a_valley_may_lie_anywhere() -> None:
    """The fall may come late: the rules allow any split."""
    rng = np.random.default_rng(0)
    found = judge(levels(24, 17, 21, (0.2, -0.8, 0.2)), rng)
    assert found.boundaries == [17, 21]


@pytest.mark.parametrize(("middle", "claim"), [(0.5, "found"), (0.0, NOT_TESTED), (-0.5, NOT_TESTED)])
def test_visual_attention_is_tested_by_itself(middle: float, claim: str) -> None:
    """Its peak is found or not whatever the verdict on cross attention, which does not depend on it."""
    rng = np.random.default_rng(0)
    cross, image = samples(levels(12, 4, 8, (0.7, -0.6, 0.2)), rng)
    visual, _ = samples(levels(12, 4, 8, (0.0, middle, 0.0)), rng)
    outcome = stage_verdict(cross, visual, ImageBootstrap(image, 100))
    assert (outcome.claims["visual_peak"], outcome.boundaries) == (claim, [4, 8])
    assert outcome.contrasts is not None
    assert outcome.contrasts.visual_in is not None
    assert outcome.contrasts.visual_in[0] == pytest.approx(middle, abs=0.15)
    upside_down = stage_verdict(cross, 1 / visual, ImageBootstrap(image, 100))
    assert upside_down.boundaries == outcome.boundaries


def test_too_little_data_is_undetermined() -> None:
    rng = np.random.default_rng(0)
    cross, image = samples(three_stages(24, rng), rng, images=5)
    few_images = stage_verdict(cross, np.ones_like(cross), ImageBootstrap(image))
    assert (few_images.verdict, few_images.boundaries) == ("undetermined", None)
    shallow = np.exp(rng.normal(size=(40, 4)))
    few_layers = stage_verdict(shallow, shallow, ImageBootstrap(np.arange(40)))
    assert few_layers.verdict == "undetermined"
    assert "4 layers" in few_layers.reasons[0]


def test_samples_without_an_image_are_left_out() -> None:
    rng = np.random.default_rng(1)
    cross, image = samples(three_stages(12, rng), rng)
    with_text_only = np.vstack([cross, np.full((3, 12), np.nan)])
    expected = stage_verdict(cross, np.ones_like(cross), ImageBootstrap(image, 50))
    clusters = [*map(str, image), "x", "y", "z"]
    actual = stage_verdict(with_text_only, np.ones_like(with_text_only), ImageBootstrap(clusters, 50))
    assert actual.contrasts == expected.contrasts
    assert actual.settings["num_samples"] == len(cross)


def test_visual_queries_that_see_nothing_but_themselves() -> None:
    """NaN visual -> visual (one visual token) tests nothing; attention that is zero stays finite."""
    rng = np.random.default_rng(2)
    cross, image = samples(three_stages(12, rng), rng)
    cross[:, 6:] = 0.0
    outcome = stage_verdict(cross, np.full_like(cross, np.nan), ImageBootstrap(image, 50))
    assert outcome.verdict == "other"
    assert outcome.claims["visual_peak"] == NOT_TESTED
    assert outcome.contrasts is not None
    assert outcome.contrasts.visual_in is None
    assert np.isfinite(outcome.contrasts.fall).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 12\), \(4, 11\)"):
        stage_verdict(np.ones((4, 12)), np.ones((4, 11)), ImageBootstrap(range(4)))
    with pytest.raises(ValueError, match="3 samples but 2"):
        ImageBootstrap([0, 1]).replicates(np.ones((3, 2)))


def run_with(fall: float, rise: float, boundaries: tuple[int, int] | None, num_layers: int = 24) -> dict:
    """The part of a run's verdict that a recipe is judged by."""
    contrasts = {"split": [4, 16], "fall": [fall] * 3, "rise": [rise] * 3, "visual_in": None, "visual_out": None}
    verdict = StageVerdict("three_stage", [], settings={"num_layers": num_layers}).to_dict()
    return verdict | {"registered": contrasts, "boundaries": boundaries and list(boundaries)}


def test_a_recipe_needs_its_runs_to_agree() -> None:
    rng = np.random.default_rng(0)
    falls, rises = 0.6 + 0.1 * rng.normal(size=(2, 5))
    same = [run_with(fall, rise, (5, 15)) for fall, rise in zip(falls, rises, strict=True)]
    found = recipe_verdict(same)
    assert (found.levels, found.stages, found.num_three_stage) == ("found", "found", 5)
    assert found.p_rise is not None
    assert found.p_rise < 0.01
    one_without = [*same[:4], run_with(0.6, 0.6, None)]
    assert recipe_verdict(one_without).stages == "found"
    assert recipe_verdict([*same[:3], *[run_with(0.6, 0.6, None)] * 2]).stages == "not_found"
    far = [*same[:3], run_with(0.6, 0.6, (9, 15)), run_with(0.6, 0.6, (5, 20))]  # more than 24 / 8 layers off
    assert recipe_verdict(far).num_three_stage == 3
    no_rise = [run_with(fall, 0.05 * (index - 2), (5, 15)) for index, fall in enumerate(falls)]
    assert recipe_verdict(no_rise).levels == "not_found"
    assert recipe_verdict(same[:2]).levels == recipe_verdict(same[:4]).stages == "undetermined"


@given(st.integers(0, 2**31 - 1))
def test_a_valley_needs_fall_and_rise_at_one_split(seed: int) -> None:
    """Claim 1 against its definition, split by split."""
    rng = np.random.default_rng(seed)
    curve = 0.3 * rng.normal(size=10).cumsum()
    band = split_band(curve, curve + 0.05 * rng.normal(size=(60, 10)), 0.95)
    pairs = list(zip(band.low.tolist(), band.high.tolist(), strict=True))
    some = any(min(low) > MIN_EFFECT for low, _ in pairs)
    could = any(min(high) > MIN_EFFECT for _, high in pairs)
    assert valley_claim(band) == ("found" if some else "undetermined" if could else "not_found")


def test_bootstrap_respects_clusters() -> None:
    """Copies of one image's answer add nothing: the interval is that of the images."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=50)
    copied = np.repeat(values, 8)
    alone = mean_band(values, ImageBootstrap(np.arange(50)))
    together = mean_band(copied, ImageBootstrap(np.repeat(np.arange(50), 8)))
    assert together.low == pytest.approx(alone.low)
    assert together.high == pytest.approx(alone.high)
    naive = mean_band(copied, ImageBootstrap(np.arange(400)))
    assert naive.high - naive.low < 0.5 * (together.high - together.low)


def test_bootstrap_band_covers() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(200):
        image_effect = rng.normal(size=60)
        values = np.repeat(image_effect, 3) + rng.normal(size=180)
        band = mean_band(values, ImageBootstrap(np.repeat(np.arange(60), 3), 200, int(rng.integers(2**31))))
        hits += bool(band.low <= 0 <= band.high)
    assert binomtest(hits, 200, 0.93, alternative="less").pvalue > 0.01


def test_simultaneous_band_covers_every_entry_at_once() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(150):
        values = rng.normal(size=(80, 20))
        replicates = ImageBootstrap(np.arange(80), 200, seed).replicates(values)
        band = simultaneous_band(values.mean(0), replicates)
        hits += bool(((band.low <= 0) & (band.high >= 0)).all())
    assert binomtest(hits, 150, 0.92, alternative="less").pvalue > 0.01


def test_one_sided_limits_hold_for_every_entry_at_once() -> None:
    rng = np.random.default_rng(6)
    below = above = 0
    for seed in range(150):
        values = rng.normal(size=(80, 20))
        band = one_sided_band(values.mean(0), ImageBootstrap(np.arange(80), 200, seed).replicates(values))
        below += bool((band.low <= 0).all())
        above += bool((band.high >= 0).all())
    for hits in (below, above):
        assert binomtest(hits, 150, 0.92, alternative="less").pvalue > 0.01
        assert hits < 150  # and are not wider than they have to be


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_bootstrap_is_paired_and_ignores_missing_values(num_samples: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num_samples, width))
    bootstrap = ImageBootstrap(rng.integers(0, 5, num_samples), 20, seed)
    replicates = bootstrap.replicates(values)
    assert replicates.shape == (20, width)
    np.testing.assert_allclose(bootstrap.replicates(values + 1), replicates + 1)
    padded = np.concatenate([values, np.full((num_samples, 1), np.nan)], axis=1)
    again = bootstrap.replicates(padded)
    np.testing.assert_allclose(again[:, :width], replicates)
    assert np.isnan(again[:, width]).all()


@given(st.integers(0, 2**31 - 1), st.sampled_from([8, 12, 24]))
def test_the_best_split_is_the_least_squares_one(seed: int, num_layers: int) -> None:
    """The verdict's split against every split tried in turn."""
    rng = np.random.default_rng(seed)
    curve = rng.normal(size=num_layers)
    cross = np.exp(np.tile(curve, (12, 1)))
    found = stage_verdict(cross, np.ones_like(cross), ImageBootstrap(range(12), 5))
    assert found.contrasts is not None

    def residual(first: int, second: int) -> float:
        return sum(part.var() * len(part) for part in np.split(np.maximum(curve, np.log(0.01)), [first, second]))

    best = min(
        residual(first, second) for first in range(2, num_layers - 3) for second in range(first + 2, num_layers - 1)
    )
    assert residual(*found.contrasts.split) == pytest.approx(best)
    assert list(segments.registered_split(num_layers)) in segments.stage_splits(num_layers).tolist()


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


def test_bic_prefers_the_family_that_made_the_curve() -> None:
    rng = np.random.default_rng(6)
    layer = unit(24)
    made = {
        "constant": np.zeros(24),
        "linear": 2 * layer,
        "parabola": 4 * (layer - 0.5) ** 2,
        "cubic": 20 * (layer - 0.2) * (layer - 0.5) * (layer - 0.9),
        "exponential": 2 * np.exp(-6 * layer),
        "skewed_u": np.exp(-12 * layer) + layer**2,
        "skewed_u_mirrored": np.exp(-12 * (1 - layer)) + (1 - layer) ** 2,
        "three_levels": np.where(layer < 0.3, 1.0, np.where(layer < 0.6, 0.0, 0.7)),
        "three_slopes": np.interp(layer, [0, 0.3, 0.7, 1], [1.0, 0.0, 0.0, 1.0]),
    }
    for name, curve in made.items():
        scores = segments.fit_bic(curve + 0.03 * rng.normal(size=24), sampling_variance=0.03**2)
        weights = segments.posterior_weights(scores)
        assert max(weights, key=weights.__getitem__) == name, name
        assert sum(weights.values()) == pytest.approx(1)


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
