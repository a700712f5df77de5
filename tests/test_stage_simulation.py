"""The stage claims err as rarely, and find as much, as docs/stage_simulation.md says: a small seeded simulation."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from docs.tooling.stages.simulation import BENDS, NO_VALLEY, WANDERING, Curve, model_rates, recipe_rates, three_stages

DEPTHS = (12, 32)
MODELS, N_BOOT = 40, 100


def rates_over_depths(shape: Curve) -> list[float]:
    """Valley, false valley and three stages, pooled over depths."""
    found = [model_rates(shape, depth, MODELS, n_boot=N_BOOT) for depth in DEPTHS]
    return [
        sum(getattr(each, name) for each in found) / len(found) for name in ("valley", "false_valley", "three_stage")
    ]


def exceeds(rate: float, limit: float) -> bool:
    """Whether so many of the simulated models speak against a limit."""
    total = MODELS * len(DEPTHS)
    return bool(binomtest(round(rate * total), total, limit, alternative="greater").pvalue < 0.01)


@pytest.mark.parametrize("shape", [*NO_VALLEY, *BENDS], ids=lambda shape: shape.__name__)
def test_what_has_no_stages_is_rarely_called_three_stages(shape: Curve) -> None:
    _, false_valley, three = rates_over_depths(shape)
    assert not exceeds(false_valley, 0.01)
    assert not exceeds(three, 0.03)


@pytest.mark.parametrize("shape", WANDERING, ids=lambda shape: shape.__name__)
def test_what_wanders_has_no_false_valley(shape: Curve) -> None:
    """Its stages may be this model's accident; page and rules say how often."""
    _, false_valley, three = rates_over_depths(shape)
    assert not exceeds(false_valley, 0.01)
    assert not exceeds(three, 0.25)


def test_three_stages_are_found() -> None:
    valley, false_valley, three = rates_over_depths(three_stages)
    assert valley >= 0.95
    assert false_valley == 0
    assert three >= 0.75


def test_a_recipe_needs_more_than_accidents() -> None:
    walks = recipe_rates(WANDERING[1], 12, 8, n_boot=N_BOOT)
    assert walks.levels == walks.stages == 0
    assert recipe_rates(three_stages, 30, 4, n_boot=N_BOOT).stages >= 0.5
