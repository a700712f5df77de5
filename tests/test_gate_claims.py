"""The four tests of what gates read: their statistics against naive ones, and the page."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intervals import intervals_of_zero_width

from analysis import gate_claims
from analysis.measuring.runs import shipped_files
from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.gates.claims import (
    Estimate,
    compare_with_constants,
    constant_frontier,
    dose_response,
    dose_verdict,
    slope_of,
    verdict,
    within_group_auc,
)
from dyvte.data.shapes import RecurringShapesDataset
from dyvte.runs.config import compose

ROOT = Path(__file__).parents[1]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 12), gates=st.integers(1, 3), seed=st.integers(0, 999))
def test_auc_within_groups_counts_every_pair_once(n: int, gates: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 4, (n, gates)) / 4, rng.random((n, gates)) < 0.5
    groups = rng.integers(0, 2, n)
    wins = [
        float(scores[a, g] > scores[b, g]) + 0.5 * float(scores[a, g] == scores[b, g])
        for a, b in itertools.permutations(range(n), 2)
        for g in range(gates)
        if groups[a] == groups[b] and labels[a, g] and not labels[b, g]
    ]
    found, pairs = within_group_auc(scores, labels, groups.tolist(), list(range(n)))
    assert pairs == len(wins)
    assert found.value == pytest.approx(np.mean(wins)) if wins else np.isnan(found.value)


def test_auc_covers_the_truth_when_images_are_shared() -> None:
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        image = np.repeat(np.arange(60), 3)
        labels = rng.random((180, 1)) < 0.5
        shared = np.repeat(rng.normal(size=60), 3)[:, None]  # questions about an image are alike
        found, _ = within_group_auc(shared + rng.normal(size=(180, 1)), labels, np.tile([0, 1, 2], 60).tolist(), image)
        missed += not found.low <= 0.5 <= found.high
    assert missed <= 20


def test_auc_does_not_reward_knowing_the_text() -> None:
    groups = np.repeat([0, 1], 200)
    labels = np.random.default_rng(0).random((400, 1)) < np.where(groups, 0.9, 0.1)[:, None]
    assert within_group_auc(groups[:, None].astype(float), labels, groups.tolist(), list(range(400)))[0].value == 0.5


def test_slope_is_that_of_a_line_and_one_falling_step_undoes_the_verdict() -> None:
    noise = 1e-3 * np.random.default_rng(0).normal(size=(50, 6))
    rising = np.arange(6) * 0.25 + noise
    assert slope_of(rising) == pytest.approx(np.polyfit(np.arange(6), rising.T, 1)[0])
    assert dose_verdict(dose_response(rising, list(range(50)))) == "confirmed"
    assert dose_verdict(dose_response(-rising, list(range(50)))) == "refuted"
    rising[:, 3] -= 0.5
    assert dose_verdict(dose_response(rising, list(range(50)))) == "undetermined"


def test_verdicts_need_the_whole_interval() -> None:
    assert verdict(Estimate(0.6, 0.51, 0.7), 0.5) == "confirmed"
    assert verdict(Estimate(0.6, 0.49, 0.7), 0.5) == "undetermined"
    assert verdict(Estimate(0.4, 0.3, 0.5), 0.5) == "refuted"
    assert verdict(Estimate(-1.0, -2.0, -0.1), 0.0, above=False) == "confirmed"
    assert verdict(Estimate(1.0, 0.1, 2.0), 0.0, above=False) == "refuted"


def planted_exits(n: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Texts 0 and 1 of one kind, each with its own depth of 4 exits, but for noise; agreement, cost, texts, images."""
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 2, n)
    depth = np.where(texts == 0, 1, 3)
    agree = (np.arange(5) >= depth[:, None]).astype(float)
    return agree, np.tile(np.arange(5) / 4, (n, 1)), texts, np.arange(n) // 2


def test_constants_of_texts_find_what_constants_of_kinds_cannot() -> None:
    agree, cost, texts, images = planted_exits()
    folds, kinds = images % 5, np.zeros(len(texts)).tolist()
    own_agree, own_cost = np.ones(len(texts)), cost[:, 1] + (texts == 1) * 0.5  # gates that know the text
    bootstrap = ImageBootstrap(images, 50)
    compare = lambda groups: compare_with_constants(  # noqa: E731
        own_agree, own_cost, agree, cost, constant_frontier(agree, cost, kinds, groups, folds), bootstrap
    )
    cost_of_kind, over_kind = compare(None)
    cost_of_text, over_text = compare(texts.tolist())
    assert cost_of_kind == pytest.approx(0.75)
    assert cost_of_text == pytest.approx(own_cost.mean())
    assert over_text.value == pytest.approx(1.0)
    assert over_kind.high < 1


def test_constants_are_chosen_on_other_images() -> None:
    agree, cost, texts, images = planted_exits()
    folds = images % 5
    chosen = constant_frontier(agree, cost, texts.tolist(), None, folds)
    agree[folds == 0] = 0  # what happens in a fold changes nothing for its own questions
    again = constant_frontier(agree, cost, texts.tolist(), None, folds)
    assert np.array_equal(chosen[:, folds == 0], again[:, folds == 0])
    assert not np.array_equal(chosen[:, folds == 1], again[:, folds == 1])


def test_recurring_questions_are_of_texts_that_recur_and_of_images_of_their_own_pool() -> None:
    data = RecurringShapesDataset(limit=18, pool=600, per_text=3, seed=1)
    kinds = [record.kind for record in data.records]
    assert sorted(kinds.count(kind) for kind in set(kinds)) == [2] * 6 + [3] * 2
    texts = [record.question for record in data.records]
    assert max(map(texts.count, texts)) <= 3
    assert len({sample.id for sample in data}) == 18


# --------------------------------------------------------------------------- the page


def test_the_page_is_of_what_ships_and_says_what_was_found() -> None:
    found = json.loads((ROOT / "docs" / "gate_claims.json").read_text())
    repair = "out of date: python -m analysis.gate_claims page=docs/gate_claims.md"
    assert {name: found[name] for name in ("weights", "gates")} == shipped_files(), repair
    assert (ROOT / "docs" / "gate_claims.md").read_text() == gate_claims.page(found), repair


def test_a_small_run_end_to_end(tmp_path: Path) -> None:
    small = {"data.limit": 24, "data.pool": 200, "labels_dir": tmp_path / "labels", "output_dir": tmp_path / "run"}
    small |= {"page": tmp_path / "page.md", "bootstrap": 20, "batch_size": 24}
    small["bound_labels"] = small["labels_dir"]  # made first, read afterwards
    gate_claims.main(compose("gate_claims", [f"{key}={value}" for key, value in small.items()]))
    found = json.loads((tmp_path / "page.json").read_text())
    assert (tmp_path / "page.md").read_text() == gate_claims.page(found)
    assert intervals_of_zero_width(tmp_path) == []
    assert set(found["tests"]) == {"llava_shapes"}
    costs, agreements = zip(*found["bound"]["frontier"], strict=True)
    assert list(costs) == sorted(costs)
    assert all(0 <= each <= 1 for each in agreements)
    doses = found["tests"]["llava_shapes"]["dose"]["means"]
    assert len(doses) == found["layers"]
    assert all(0 <= each["value"] <= 1 for each in doses)
