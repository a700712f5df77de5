"""Risk control: thresholds whose share of changed answers is under a bound, however questions about one image fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from docs.tooling.gates.risk import DESIGNS, SHAPES, Design, bound_missed, refuted
from dyvte.gates.metrics import at_exit, first_exit, thresholds_by_depth
from dyvte.gates.risk import (
    RISKS,
    STAKES,
    choose_threshold,
    images_needed,
    number_images,
    risk_p_value,
    too_few_images,
    upper_limit,
)

LEVEL = 0.95


# ------------------------------------------------------------------------- the p-value


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 5), st.floats(0.01, 0.9))
def test_p_value_is_one_over_what_the_bets_made(seed: int, num_images: int, most: int, bound: float) -> None:
    rng = np.random.default_rng(seed)
    asked = rng.integers(1, most + 1, num_images)
    failed = rng.binomial(asked, bound / 2)
    wealth = 0.0
    for stake, share in STAKES.items():
        for fails, questions in zip(failed.tolist(), asked.tolist(), strict=True):
            share *= 1 + stake * (bound * questions - fails) / (max(asked) * (1 - bound))
        wealth += max(share, 0.0)
    assert risk_p_value(failed, asked, bound) == pytest.approx(min(1.0, 1 / wealth) if wealth else 1.0, rel=1e-6)
    together = risk_p_value(np.stack([failed, asked]), asked, bound)
    assert together.shape == (2,)
    assert together[0] == pytest.approx(float(risk_p_value(failed, asked, bound)))
    assert together[1] == 1.0, "where all fails nothing is refuted"


@given(st.integers(0, 10_000))
def test_a_bet_on_a_risk_at_the_bound_gains_nothing_on_average(seed: int) -> None:
    """Exactly, over all that can happen on one image whose risk is the bound: this is why p-values are right."""
    rng = np.random.default_rng(seed)
    asked = int(rng.integers(1, 6))
    chance = rng.dirichlet(np.ones(asked + 1))  # of 0, 1, ... questions that fail, hanging together as they like
    bound = float(chance @ np.arange(asked + 1)) / asked
    for stake in STAKES:
        after = 1 + stake * (bound - np.arange(asked + 1) / asked) / (1 - bound)
        assert (after > -1e-12).all()
        assert chance @ after == pytest.approx(1.0)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_p_value_falls_with_the_bound_and_the_limit_is_where_it_crosses(seed: int, num_images: int) -> None:
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(num_images), rng.integers(1, 4, num_images))
    failures = rng.random(len(images)) < rng.random()
    number, asked = number_images(images)
    failed = np.bincount(number, weights=failures)
    p_values = [float(risk_p_value(failed, asked, bound)) for bound in np.linspace(0.01, 0.99, 25)]
    assert (np.diff(p_values) <= 1e-12).all()
    limit = upper_limit(failures, images, LEVEL)
    assert failures.mean() <= limit <= 1
    if limit < 1:
        assert risk_p_value(failed, asked, limit) <= 1 - LEVEL
        assert risk_p_value(failed, asked, limit - 1e-6) > 1 - LEVEL or failures.mean() >= limit - 1e-6
    order = rng.permutation(len(images))
    assert upper_limit(failures[order], images[order], LEVEL) == pytest.approx(limit), "order plays no part"


def test_questions_on_one_image_count_for_less_than_questions_on_many() -> None:
    failures = np.zeros(300, dtype=bool)
    alone, together = (upper_limit(failures, np.arange(300) // each) for each in (1, 10))
    assert together > 5 * alone
    assert upper_limit(torch.ones(20, dtype=torch.bool), range(20)) == pytest.approx(1.0)


# ------------------------------------------------------------------------- simulation


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_a_risk_at_the_bound_is_refuted_in_one_of_twenty_at_most(design: Design) -> None:
    """The page's first table, smaller: every way to fail, at and above the bound."""
    rng = np.random.default_rng(0)
    draws = 400
    for shape in SHAPES:
        for bound in (0.01, 0.05, 0.2):
            (share,) = refuted(shape, design, bound, bound, draws, rng)
            spare = 3 * math.sqrt((1 - LEVEL) * LEVEL / draws)
            assert share <= 1 - LEVEL + spare, (shape.__name__, bound)
    assert refuted(SHAPES[0], design, 0.0, 0.1, 2, rng) == [1.0], (
        "no failure on any of the images refutes a risk of 0.1"
    )


def test_chosen_thresholds_keep_the_bound() -> None:
    """The page's second table, smaller: gates of known risk, and thresholds chosen on their questions."""
    rng = np.random.default_rng(0)
    draws = 12
    for design in DESIGNS[1:]:
        missed = bound_missed(SHAPES[1], design, 0.1, draws, rng)
        assert missed.share <= 1 - LEVEL + 3 * math.sqrt((1 - LEVEL) * LEVEL / draws)
        assert 0 < missed.mean_risk < 0.1, "thresholds of 1 would keep any bound"


# -------------------------------------------------------------------------- thresholds


def drawn_gates(num_questions: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(num_questions, 4, generator=generator)
    right = torch.rand(num_questions, 4, generator=generator) < probability.sqrt()
    return probability, torch.cat([right[:, :1], right, torch.ones(num_questions, 1, dtype=torch.bool)], dim=1)


@pytest.mark.parametrize("caution", [0.0, 2.0])
def test_threshold_is_the_last_before_the_first_refused(caution: float) -> None:
    probability, agree = drawn_gates()
    images = [each // 2 for each in range(600)]
    chosen = choose_threshold(probability, agree, images, bound=0.1, caution=caution)

    def limit(threshold: float) -> float:
        exits = first_exit(probability, thresholds_by_depth(threshold, 5, caution))
        return upper_limit(~at_exit(agree, exits), images)

    tried = (1 - RISKS).tolist()
    place = tried.index(chosen.threshold)
    assert chosen.upper_limit == pytest.approx(limit(chosen.threshold))
    assert all(limit(each) <= 0.1 for each in tried[: place + 1 : 20])
    assert limit(tried[place + 1]) > 0.1
    assert chosen.images_needed is not None
    assert chosen.images_needed > 300


def test_late_exits_are_worth_less_risk() -> None:
    assert thresholds_by_depth(0.9, 5, 0.0) == pytest.approx([0.9] * 4)
    assert thresholds_by_depth(0.9, 5, 1.0) == pytest.approx([0.92, 0.94, 0.96, 0.98])


def test_every_kind_keeps_a_bound_of_its_own() -> None:
    """A kind that fails in silence under the bound of all questions does not where kinds have one."""
    probability, agree = drawn_gates(4000)
    kinds = ["rare" if each % 20 == 0 else "common" for each in range(4000)]
    rare = torch.tensor([kind == "rare" for kind in kinds])
    agree[rare, :-1] &= (torch.rand(200, 1, generator=torch.Generator().manual_seed(1)) < 0.3).expand(-1, 5)
    agree[~rare] = True
    together = choose_threshold(probability, agree, range(4000), 0.1)
    apart = choose_threshold(probability, agree, range(4000), 0.1, kinds=kinds, kind_bound=0.1)

    def lost(threshold: float) -> float:
        exits = first_exit(probability, [threshold] * 4)
        return float((~at_exit(agree, exits))[rare].double().mean())

    assert lost(together.threshold) > 0.5
    assert lost(apart.threshold) < 0.1
    assert apart.threshold > together.threshold


def test_threshold_is_strict_where_nothing_keeps_the_bound() -> None:
    probability, agree = torch.rand(30, 4), torch.zeros(30, 6, dtype=torch.bool)
    agree[:, -1] = True
    chosen = choose_threshold(probability, agree, list(range(30)), bound=0.01)
    assert chosen.threshold == 1.0
    assert (first_exit(probability, [chosen.threshold] * 4) == 5).all()


@pytest.mark.parametrize("per_image", [1, 3])
@pytest.mark.parametrize("bound", [0.01, 0.05, 0.3])
def test_too_little_data_says_how_much_would_do(bound: float, per_image: int) -> None:
    few = np.arange(4 * per_image) // per_image
    lacking = too_few_images(few, bound)
    assert lacking is not None
    assert (lacking.kind, lacking.bound, lacking.present) == (None, bound, 4)
    for number, enough in ((lacking.needed, True), (lacking.needed - 1, False)):
        images = np.arange(number * per_image) // per_image
        assert (too_few_images(images, bound) is None) == enough
        assert (upper_limit(np.zeros(len(images)), images) <= bound) == enough
    assert too_few_images(few, lacking.reachable + 1e-9) is None
    kinds = ["a"] * (len(few) - per_image) + ["b"] * per_image
    of_kind = too_few_images(few, 0.9, kinds=kinds, kind_bound=bound)
    assert of_kind is not None
    assert (of_kind.kind, of_kind.present) == ("a", 3)


def test_what_fails_too_often_cannot_be_shown_with_any_number() -> None:
    assert images_needed([True, False, False, False], range(4), 0.2) is None
    needed = images_needed([True] + [False] * 99, range(100), 0.05)
    assert needed is not None
    repeated = np.array(([True] + [False] * 99) * math.ceil(needed / 100))
    assert upper_limit(repeated, range(len(repeated))) <= 0.05
