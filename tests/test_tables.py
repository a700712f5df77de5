"""Settings at matched cost, and the tables made of them."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, processor_for, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

import dyvte
from analysis.cost import Stopwatch, constant, measure, summarize
from analysis.measuring.methods import (
    CALIBRATION,
    Job,
    budgeted_methods,
    deciding_cost,
    describe,
    exit_agreement,
    plan,
    run_job,
    visual_share,
)
from analysis.plots.methods import draw_methods_at_cost
from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.methods import Outcome, accuracy_of, compare_methods, exit_mixture, sentence
from analysis.statistics.needs_image import in_words, known_hops, needs_image
from analysis.statistics.pairwise import Contest, pairs_of, seeded_replicates, standings
from analysis.statistics.published import beside, published_page, published_pruning
from analysis.tables import tables
from docs.tooling import comparison
from dyvte.batch import Batch
from dyvte.cost.flops import plan_decoder_flops, prefill_flops
from dyvte.cost.measure import PeakMemory
from dyvte.cost.spent import SeenPositions
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError
from dyvte.gates.metrics import best_mixture, mixture_cost
from dyvte.gates.module import Gates
from dyvte.instrument.vision_tower import ImageMemory
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.exits.vtw import kl_layers, mean_divergence
from dyvte.policies.method import Calibration, largest_within
from dyvte.policies.registry import labels, methods
from dyvte.runs.config import compose
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.tokenizer import build_processor

LAYERS = 6


@cache
def model() -> MLLM:
    return FAMILIES["llava"](0, num_layers=LAYERS)


def prompts(seed: int = 1, rows: int = 4) -> Batch:
    return random_batch(model(), torch.Generator().manual_seed(seed), (1,) * rows, question_length=6)


def gates() -> Gates:
    torch.manual_seed(0)
    return Gates(LAYERS, model().hidden_size)


def can_be_matched(method: type[Policy]) -> bool:
    """Whether a method has a setting for every budget that is not too small."""
    return method.at_cost(Calibration(model(), [prompts()], gates()), 0.9) is not None


@pytest.mark.parametrize(("budget", "expected"), [(0.5, 0.5), (2.0, 1.0), (-0.1, None), (0.0, 0.0)])
def test_the_largest_setting_within_a_budget(budget: float, expected: float | None) -> None:
    found = largest_within(lambda x: x, budget)
    assert found == expected if expected is None else found == pytest.approx(expected)


MATCHED = [name for name in budgeted_methods() if name not in ("none", "fixed_exit")]
"""All of them, see `test_all_methods_are_those_that_meet_budgets`."""
COARSE = {
    "vtw", "fitprune", "dynamic_exit", "fastv_dynamic_exit", "lens_exit", "todre_exit", "visipruner"
}  # fmt: skip
"""Methods that take all of a row's tokens at once, or as many as a recipe says."""
CANNOT_REACH = {("visipruner", 0.7), ("visipruner", 0.6)}
"""The layers before it looks see all tokens: with six layers that leaves too little to save."""


@pytest.mark.parametrize("name", MATCHED)
@torch.no_grad()
def test_every_method_meets_the_budget_as_counted_while_it_runs(name: str) -> None:
    mllm, batch = model(), prompts()
    calibration = Calibration(mllm, [batch], gates())
    full = prefill_flops(mllm, batch).decoder
    for budget in (0.9, 0.7):
        policy = methods()[name].at_cost(calibration, budget)
        if (name, budget) in CANNOT_REACH:
            assert policy is None
            continue
        assert policy is not None
        with policy(mllm):
            counted = prefill_flops(mllm, batch).decoder / full
        # 16 visual tokens, 4 rows and 6 layers do not allow any finer.
        tolerance = 0.2 if name in COARSE else 0.06
        above = 0.08 if name == "visipruner" else 0.04  # reading values costs most where a model is this narrow
        assert budget - tolerance <= counted <= budget + above


@pytest.mark.parametrize("name", MATCHED)
@torch.no_grad()
def test_every_method_meets_a_share_of_tokens(name: str) -> None:
    mllm, batch = model(), prompts()
    calibration = Calibration(mllm, [batch], gates(), counted="tokens")
    for budget in (0.8, 0.6):
        policy = methods()[name].at_cost(calibration, budget)
        if (name, budget) in CANNOT_REACH:
            assert policy is None
            continue
        assert policy is not None
        watched = SeenPositions()
        with policy(mllm), watched(mllm):
            mllm.model(**batch, logits_to_keep=1)
        seen = float(visual_share(watched, batch).mean())
        coarse = name in ("vtw", "yopo", "aim", "fitprune", "dynamic_exit", "fastv_dynamic_exit")
        assert budget - (0.25 if coarse else 0.08) <= seen <= budget + (0.1 if coarse else 0.04)


def test_a_budget_below_the_text_alone_is_met_by_none() -> None:
    calibration = Calibration(model(), [prompts()], gates())
    assert {name: methods()[name].at_cost(calibration, 0.05) for name in MATCHED} == dict.fromkeys(MATCHED)


@torch.no_grad()
def test_planned_lengths_cost_what_the_counter_counts() -> None:
    mllm, batch, seen = model(), prompts(), SeenPositions()
    with dyvte.FastV(layer=2, keep=0.5)(mllm), seen(mllm):
        counted = prefill_flops(mllm, batch).decoder
        counts = torch.stack(seen.masks, dim=1).sum(2).tolist()
    assert sum(plan_decoder_flops(mllm, row) for row in counts) == counted


def test_settings_in_a_few_words() -> None:
    assert describe(dyvte.FastV(2, 0.5)) == "layer=2 keep=0.5"
    both = dyvte.Compose([dyvte.FastV(2, 0.25), dyvte.FixedExit(4)])
    assert describe(both) == "FastV layer=2 keep=0.25; FixedExit layer=4"


def test_methods_with_seeds_run_once_a_seed() -> None:
    experiment = OmegaConf.create(
        {"budgets": [0.5, None], "methods": ["none", "vtw", "fastv", "random"], "random_seeds": 3}
    )
    jobs = plan(experiment)
    assert len(jobs) == 1 + 2 * (1 + 3)
    assert [job.seed for job in jobs if job.method == "random" and job.budget == 0.5] == [0, 1, 2]
    assert [job.budget for job in jobs if job.method == CALIBRATION] == [None]  # of fixed exits the answers are there
    assert not [job for job in jobs if job.method in ("none", "vtw")]


@torch.no_grad()
def test_what_deciding_costs_is_counted_apart() -> None:
    mllm, batch = model(), prompts()
    calibration = Calibration(mllm, [batch])
    assert deciding_cost(calibration, dyvte.FixedExit(2)) == deciding_cost(calibration, dyvte.UniformDrop(0.5)) == 0
    full = prefill_flops(mllm, batch)
    gate = Gates(LAYERS, mllm.hidden_size)
    with dyvte.DynamicExit(gate)(mllm):
        count = prefill_flops(mllm, batch)
    expected = (count.total - count.decoder - (full.total - full.decoder)) / full.decoder
    assert expected > 0
    assert deciding_cost(calibration, dyvte.DynamicExit(gate)) == pytest.approx(expected)


def reference() -> Any:
    flops = torch.tensor([[2.0, 4.0, 8.0], [4.0, 8.0, 16.0]])
    correct = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    cost = flops.double() / 12
    return SimpleNamespace(flops=flops, cost=cost, correct=correct, agree=correct.bool(), num_layers=2)


def test_a_fixed_exit_mixes_the_best_two_layers_to_meet_the_budget() -> None:
    """Costs are 0.25, 0.5 and 1 of the full model's; which layers are mixed is up to the calibration prompts."""
    found = exit_mixture(reference(), "fixed_exit", 0.75, np.array([0.0, 0.7, 1.0]))
    assert found is not None
    assert found.cost.mean() == pytest.approx(0.75)
    assert found.correct[:, 0].tolist() == [1.0, 0.5]
    assert found.exit_layer.tolist() == [1.5, 1.5]
    assert found.setting == "layer=1 or 2 (50%)"
    apart = exit_mixture(reference(), "fixed_exit", 0.75, np.array([0.5, 0.6, 1.0]))  # layer 1 is below the line
    assert apart is not None
    assert apart.cost.mean() == pytest.approx(0.75)
    assert apart.correct[:, 0].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert apart.setting == "layer=0 or 2 (67%)"
    full = exit_mixture(reference(), "none", None, None)
    assert full is not None
    assert full.correct[:, 0].tolist() == [1.0, 1.0]
    assert exit_mixture(reference(), "fixed_exit", 0.2, np.array([0.0, 0.7, 1.0])) is None


@settings(max_examples=100)
@given(st.integers(0, 100_000), st.integers(1, 8), st.booleans())
def test_the_mixture_of_fixed_exits_is_the_best_of_all_pairs(seed: int, layers: int, coarse: bool) -> None:
    """On the prompts that it is chosen on, at the same cost, and whatever the order and ties of costs and agreement."""
    rng = np.random.default_rng(seed)
    cost, agreement = rng.random(layers + 1), rng.random(layers + 1)
    if coarse:
        cost, agreement = np.ceil(4 * cost) / 4, np.ceil(4 * agreement) / 4
    budget = float(rng.choice([*cost, rng.random()]))
    pairs = []
    for i, j in itertools.product(range(layers + 1), repeat=2):
        if cost[i] <= budget <= cost[j]:
            share = (budget - cost[i]) / (cost[j] - cost[i]) if cost[j] > cost[i] else 1.0
            pairs.append((1 - share) * agreement[i] + share * agreement[j])
    found = best_mixture(cost, agreement, budget)
    if budget < cost.min():
        assert found is None
        return
    assert found is not None
    i, j, share = found
    reached, spent = ((1 - share) * each[i] + share * each[j] for each in (agreement, cost))
    assert spent == pytest.approx(min(budget, cost.max()))
    if pairs:
        assert reached == pytest.approx(max(pairs))
    # what the other reading of the hull says: so much agreement costs no less, unless a cheaper exit has it
    assert mixture_cost(cost, agreement, float(reached)) <= spent + 1e-9


@torch.no_grad()
def test_calibration_says_how_often_every_exit_keeps_the_answer() -> None:
    mllm, batches = model(), [prompts(rows=3), prompts(seed=2, rows=2)]
    kept = np.zeros(LAYERS + 1)
    for batch in batches:
        full = mllm.generate_ids(batch, max_new_tokens=2)
        for k in range(LAYERS + 1):
            with dyvte.FixedExit(k)(mllm):
                kept[k] += sum(a == b for a, b in zip(mllm.generate_ids(batch, max_new_tokens=2), full, strict=True))
    calibration = Calibration(mllm, batches)
    assert exit_agreement(calibration, 2).tolist() == pytest.approx(kept / 5)
    table = run_job(Job(CALIBRATION, None), calibration, [], 2, ImageMemory(0))[CALIBRATION]
    assert table["agreement"].tolist() == pytest.approx(kept / 5)
    assert table["kl"].tolist() == pytest.approx(mean_divergence(mllm, batches).tolist())


def test_the_data_say_which_questions_need_the_image() -> None:
    otherwise = np.array([True, False, True])
    found, said_by = needs_image([known_hops({"hops": hops}) for hops in (0, 1, 3)], otherwise)
    assert (found.tolist(), said_by) == ([False, True, True], "hops")
    for metadata in ({}, {"hops": None}, {"hops": "two"}, {"hops": True}, {"hops": -1}, {"hops": 1.5}):
        found, said_by = needs_image([0, 1, known_hops(metadata)], otherwise)
        assert (found.tolist(), said_by) == (otherwise.tolist(), "answers"), metadata
    assert needs_image([], np.zeros(0, dtype=bool))[1] == "answers"
    assert in_words("hops") != in_words("answers")


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_interval_of_a_method_knows_of_its_seeds(rate: float) -> None:
    rng = np.random.default_rng(0)
    images = [index // 2 for index in range(200)]
    alike = np.repeat((rng.random((200, 1)) < rate).astype(float), 4, axis=1)
    spread = (rng.random((200, 4)) < np.clip([[rate - 0.3, rate - 0.1, rate + 0.1, rate + 0.3]], 0, 1)).astype(float)
    one, four = accuracy_of(alike[:, :1], images), accuracy_of(alike, images)
    assert four == pytest.approx(one)  # seeds that agree are worth one
    assert one["accuracy_low"] < one["accuracy_high"]
    assert one["accuracy_questions"] == 200
    wide = accuracy_of(spread, images)
    assert wide["accuracy_high"] - wide["accuracy_low"] > 2 * 1.96 * spread.mean(0).std(ddof=1) / 2 * 0.8
    assert accuracy_of(np.full((3, 1), np.nan), [0, 1, 2])["accuracy_questions"] == 0


def test_vtw_chooses_layers_with_less_divergence_than_all_before_them() -> None:
    assert kl_layers([3.0, 4.0, 2.0, 2.0, 2.5, 1.0, 0.0]) == [0, 2, 5, 6]


# ------------------------------------------------------------------------ who is ahead


def outcome(method: str, correct: np.ndarray, cost: float = 0.5) -> Outcome:
    same = np.full(len(correct), cost)
    return Outcome(method, 0.5, "", correct.reshape(len(correct), -1), same, same, same, same)


def settings_of_comparison(tolerance: float = 0.02) -> Any:
    experiment = {"budgets": [None, 0.5], "tolerance": tolerance, "counted": "flops", "equivalence": 0.02}
    return OmegaConf.create({"experiment": experiment, "bootstrap": 300, "seed": 0})


def test_a_lead_counts_only_beyond_the_band() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.6).astype(float)
    close = base.copy()
    close[:2] = 1 - close[:2]
    worse = base * (rng.random(400) < 0.7)
    images = [index // 2 for index in range(400)]
    found = [outcome("fastv", base), outcome("tome", close), outcome("random", np.stack([worse, worse], 1))]
    found.append(outcome("vtw", np.ones(400), cost=0.45))  # best, but at another cost
    needs = np.arange(400) < 200
    verdicts = compare_methods(
        found, {"accuracy": np.ones(400, dtype=bool), "accuracy_needs_image": needs}, images, settings_of_comparison()
    )
    assert [each["on"] for each in verdicts] == ["accuracy", "accuracy_needs_image"]
    verdict = verdicts[0]
    assert verdict["ahead"] in ("fastv", "tome")
    assert verdict["not_told_apart"] == [{"fastv": "tome", "tome": "fastv"}[verdict["ahead"]]]
    assert verdict["not_matched"] == {"vtw": pytest.approx(0.45)}
    assert verdict["comparisons"] == 2 * 3
    assert verdict["lead"]["random"][1] > 0
    text = sentence(verdict, 0.02)
    assert "**not told apart** from" in text
    assert verdict["equivalent"] == ([] if verdict["lead"][verdict["not_told_apart"][0]][2] > 0.02 else ["tome"])
    assert "half-widths up to" in text
    assert "Behind it: random." in text
    assert "not met: VTW (0.45)" in text
    assert "spent by" not in text
    (alone,) = compare_methods(found[::2], {"accuracy": np.ones(400, dtype=bool)}, images, settings_of_comparison())
    assert "is ahead** of all others, of random by" in sentence(alone, 0.02)
    assert "spent by FastV (0.60)" in sentence({**alone, "costs": {"fastv": 0.6, "random": 0.5}}, 0.02)


def test_the_band_covers_all_differences_together() -> None:
    """Of methods that are equally good, in 60 worlds, few are told apart; with intervals of their own, many are."""
    false, alone = 0, 0
    for world in range(60):
        rng = np.random.default_rng(world)
        easy = rng.random((120, 1)) < 0.5
        right = [(easy ^ (rng.random((120, 1)) < 0.15)).astype(float) for _ in range(8)]
        bootstrap = ImageBootstrap([index // 3 for index in range(120)], 200, world)
        (found,) = standings([Contest("abcdefgh", right)], bootstrap)
        false += bool((np.abs(found.lead) > found.margin).any())
        drawn = np.stack([seeded_replicates(each, bootstrap) for each in right], 1)
        error = (drawn[:, :, None] - drawn[:, None]).std(0)
        alone += bool((np.abs(found.lead) > 1.96 * error + 1e-9).any())
    assert false <= 8  # 5% of 60 are 3
    assert alone >= 20


def test_seeds_are_drawn_again_too() -> None:
    rng = np.random.default_rng(0)
    seeds = (rng.random((200, 4)) < [[0.2, 0.4, 0.6, 0.8]]).astype(float)
    bootstrap = ImageBootstrap(range(200), 500)
    fixed = seeded_replicates(seeds.mean(1, keepdims=True), bootstrap)
    both = seeded_replicates(seeds, bootstrap)
    assert both.mean() == pytest.approx(fixed.mean(), abs=0.02)
    assert both.std() > 2 * fixed.std()


def test_methods_that_answer_alike_do_not_break_the_band() -> None:
    right = np.tile([[1.0], [0.0]], (50, 1))
    almost = right.copy()
    almost[0] = 0
    contests = [Contest(["a", "b", "c"], [right, right, almost])]
    (found,) = standings(contests, ImageBootstrap(range(100), 200))
    assert pairs_of(contests) == 3
    assert found.best == 0
    assert found.tied == [1, 2]
    assert standings([], ImageBootstrap(range(100), 200)) == []


def rows_of_a_comparison() -> list[dict[str, Any]]:
    row = {"cost": 0.5, "cost_needs_image": 0.5, "seeds": 1, "worst_seed": None, "best_seed": None}
    for name in ("accuracy", "accuracy_needs_image"):
        row |= {name: 0.6, f"{name}_low": 0.5, f"{name}_high": 0.7}
    seeds = {"seeds": 10, "worst_seed": 0.5, "best_seed": 0.625}
    return [
        row | {"method": "none", "budget": None, "cost": 1.0},
        row | {"method": "fastv", "budget": 0.5, "deciding": 0.012},
        row | {"method": "vtw", "budget": 0.5, "cost": 0.45},
        row | {"method": "random", "budget": 0.5, "accuracy": 0.4} | seeds,
        row | {"method": "dynamic_exit", "budget": None, "cost": 0.7},
    ]


def test_the_figure_tells_apart_without_colour() -> None:
    leading = {(panel, 0.5): {"fastv": True, "random": False} for panel in ("accuracy", "accuracy_needs_image")}
    drawing = draw_methods_at_cost(rows_of_a_comparison(), leading, labels(), "made up")
    names = [text.get_text() for text in drawing.axes[0].get_yticklabels()]
    assert names == ["FastV, 0.50", "VTW, 0.45", "random, 0.50", "dynamic exit, 0.70"]
    points = [line for line in drawing.axes[0].lines if line.get_marker() in ("o", "x") and len(line.get_xdata()) == 1]
    looks = [(line.get_marker(), line.get_markerfacecolor() == "white") for line in points]
    assert looks == [("o", False), ("x", False), ("o", True), ("x", False)]


def test_the_page_shows_who_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = {
        "on": "accuracy",
        "budget": 0.5,
        "ahead": "fastv",
        "accuracy": 0.6,
        "not_told_apart": [],
        "lead": {"random": [0.2, 0.1, 0.3]},
        "comparisons": 1,
        "costs": {"fastv": 0.5, "random": 0.5},
        "not_matched": {"vtw": 0.45},
    }
    counts = {"num_samples": 20, "num_images": 9, "needs_image": 8, "needs_image_by": "hops", "tolerance": 0.02}
    about = {"experiment": "all_methods", "counted": "flops", "model": "m", "data": "d"}
    summary = {**about, **counts, "rows": rows_of_a_comparison(), "verdicts": [verdict]}
    monkeypatch.chdir(tmp_path)
    comparison.PAGE.parent.mkdir()
    comparison.PAGE.write_text("before\n<!-- comparison -->\nold\n<!-- /comparison -->\nafter\n")
    comparison.publish({"all_methods": comparison.record(summary)})
    text = comparison.PAGE.read_text()
    assert "| FastV | **60.0 [50.0, 70.0]** | 60.0 [50.0, 70.0] | 0.012 |" in text
    assert "the same decoder FLOPs of the prefill" in text
    assert "8 of which need the image: they ask for something in it" in text
    assert "| VTW | 60.0 [50.0, 70.0] (at 0.45) |" in text
    assert "| dynamic exit | – | – |" in text
    order = [text.index(f"| {name} |") for name in ("FastV", "random", "dynamic exit")]
    assert order == sorted(order), "the most accurate first, those without a setting last"
    assert "FastV (60.0%) is ahead** of all others, of random by 20.0 points [10.0, 30.0]" in text
    assert "mean of 10 draws, which are up to 12.5 points apart" in text
    kept = json.loads(comparison.RECORD.read_text())
    section = comparison.comparison_section(kept["all_methods"])
    assert text == f"before\n<!-- comparison -->\n{section}\n<!-- /comparison -->\nafter\n"


def test_equivalence_is_a_whole_interval_within_the_bound() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(4000) < 0.6).astype(float)
    close = np.where(np.arange(4000) < 4, 1 - base, base)
    images = list(range(4000))
    cfg = settings_of_comparison()
    (verdict,) = compare_methods(
        [outcome("fastv", base), outcome("tome", close)], {"accuracy": np.ones(4000, dtype=bool)}, images, cfg
    )
    (other,) = verdict["lead"]
    assert verdict["equivalent"] == [other]
    cfg.experiment.equivalence = verdict["half_width"] / 2
    (verdict,) = compare_methods(
        [outcome("fastv", base), outcome("tome", close)], {"accuracy": np.ones(4000, dtype=bool)}, images, cfg
    )
    assert verdict["equivalent"] == []


@pytest.mark.parametrize("tokens", [192, 128, 64])
def test_published_numbers_stand_beside_a_run(tokens: int) -> None:
    cfg = compose("tables", [f"experiment=llava15_{tokens}tokens", "experiment.benchmark=GQA"])
    assert cfg.experiment.budgets == [pytest.approx(tokens / 576, abs=1e-4)]
    assert cfg.experiment.counted == "tokens"
    table = published_pruning(tokens)
    assert set(table["tokens"]) == {tokens, 576}
    assert table["source"].notna().all()
    assert not table.duplicated(["method", "tokens", "source"]).any()
    page = "\n".join(published_page(cfg.experiment))
    assert f"at {tokens} of 576" in page
    assert "[1] " in page
    assert beside(cfg.experiment, "no such method") == "–"
    own = table[table["method"] == "FastV"]["GQA"].dropna()
    assert beside(cfg.experiment, "FastV").startswith(f"{own.min():g}")
    assert beside(cfg.experiment, "full model") != "–"
    with pytest.raises(ConfigError, match="papers print"):
        published_pruning(7)
    cfg.experiment.benchmark = "nothing"
    with pytest.raises(ConfigError, match="benchmark is one of"):
        beside(cfg.experiment, "FastV")


@pytest.fixture
def llava_run(tmp_path: Path) -> list[str]:
    """Settings of a run as of LLaVA-1.5's: a small random model in the Hub's layout, questions in LLaVA's JSON."""
    model().model.save_pretrained(tmp_path / "model")
    processor_for("llava").save_pretrained(tmp_path / "model")
    rng, records = np.random.default_rng(0), []
    for number in range(8):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        turns = [("human", "<image>\nwhat color is the circle ?"), ("gpt", "red" if number % 2 else "blue")]
        talk = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    (tmp_path / "questions.json").write_text(json.dumps(records))
    settings = [
        "model=llava7b",
        f"model.path={tmp_path}/model",
        "model.dtype=float32",
        "device=cpu",
        "max_new_tokens=1",
    ]
    for name in ("data", "calibration.data"):
        settings += [
            f"{'data' if name == 'data' else f'data@{name}'}=llava_json",
            f"{name}.file={tmp_path}/questions.json",
        ]
        settings += [f"{name}.image_folder={tmp_path}"]
    return [*settings, "bootstrap=20", f"reference_dir={tmp_path}/reference", f"output_dir={tmp_path}/run"]


def test_what_papers_print_stands_beside_a_real_run(llava_run: list[str], tmp_path: Path) -> None:
    """`experiment=llava15_64tokens` on a model: methods at 64 of 576 tokens, each with its published numbers."""
    asked = ["none", "fastv", "visionzip", "random"]
    cfg = compose(
        "tables",
        [
            *llava_run,
            "experiment=llava15_64tokens",
            "experiment.benchmark=GQA",
            f"experiment.methods={asked}",
            "experiment.random_seeds=1",
        ],
    )
    found = tables(cfg)
    assert found is not None
    spent = {row["method"]: row["tokens"] for row in found["rows"]}
    assert set(spent) == {"none", "visionzip", "random"}, "FastV's first layers alone see more than a ninth"
    assert spent["none"] == 1
    assert all(spent[name] == pytest.approx(64 / 576, abs=1 / 16) for name in ("visionzip", "random"))
    page = (tmp_path / "run" / "table.md").read_text().splitlines()
    head = next(line for line in page if "published, GQA" in line)
    column = [cell.strip() for cell in head.split("|")].index("published, GQA")
    printed = pd.read_csv(Path(__file__).parents[1] / "conf" / "published" / "llava15_7b.csv")
    of_run = page[page.index(head) + 2 :][: len(found["rows"])]
    shown = {cells[2].strip(): cells[column].strip() for cells in (line.split("|") for line in of_run)}
    for label, tokens in (("full model", 576), ("VisionZip", 64)):
        numbers = printed[(printed["method"] == label) & (printed["tokens"] == tokens)]["GQA"].dropna()
        assert shown[label] == f"{numbers.min():g} to {numbers.max():g} ({len(numbers)} sources)"
    assert shown[labels()["random"]] == "–"
    below = page[page.index(head) + 2 + len(found["rows"]) :]
    rows = [line for line in below if line.startswith("| FastV | 64 |")]
    assert len(rows) == len(printed[(printed["method"] == "FastV") & (printed["tokens"] == 64)])
    assert rows[0].rstrip(" |").endswith("]"), "with its source"


def test_published_methods_have_the_names_of_the_tables() -> None:
    names = set(published_pruning(192)["method"]) | set(published_pruning(64)["method"])
    assert {"full model", "FastV", "PyramidDrop", "SparseVLM", "DART", "VisionZip", "PruMerge"} <= names & set(
        labels().values()
    )


def test_all_methods_are_those_that_meet_budgets() -> None:
    found = budgeted_methods()
    assert found[0] == "none"
    assert {"himap", "fastv", "dynamic_exit", "visionzip"} <= set(found)
    assert not {"average_pool", "skip_attention"} & set(found)
    can = {name for name, method in methods().items() if name not in ("none", "fixed_exit") and can_be_matched(method)}
    assert can == set(MATCHED)


def test_the_comparison_that_ships_is_of_todays_settings() -> None:
    shipped = json.loads((Path(__file__).parents[1] / comparison.RECORD).read_text())
    assert set(shipped) <= set(comparison.FORMS.values())
    for name, kept in shipped.items():
        experiment = compose("tables", [f"experiment={name}"]).experiment
        assert kept["counted"] == experiment.counted
        assert {row["method"] for row in kept["rows"]} <= set(budgeted_methods())
        assert {row["budget"] for row in kept["rows"]} == {None, *experiment.budgets}
        assert any(verdict["on"] == "accuracy_needs_image" for verdict in kept["verdicts"])


@pytest.mark.parametrize("name", ["matched", *(f"table{number}" for number in range(1, 7))])
def test_experiments_name_methods_that_exist(name: str) -> None:
    experiment = compose("tables", [f"experiment={name}"]).experiment
    assert set(experiment.methods) <= set(methods())
    assert experiment.title
    for each in experiment.published:
        assert set(each) == {"method", "task", "quantity", "value"}
    assert bool(experiment.published) == bool(experiment.source)


# ------------------------------------------------------------------------------- gates


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random testbed on disk, its weights large enough for the image to matter."""
    sizes = TestbedSizes(
        patch_size=32, vision_layers=1, vision_width=32, vision_heads=2, layers=4, width=48, heads=2, mlp_width=64
    )
    random = build_model(sizes, 0)
    for parameter in random.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    folder = tmp_path_factory.mktemp("model")
    random.save_pretrained(folder)
    build_processor(sizes.patch_size).save_pretrained(folder)
    return folder


def gate_settings(model_folder: Path, folder: Path, name: str) -> list[str]:
    model = ["model=hf", f"model.path={model_folder}", "device=cpu", "data.limit=12", "batch_size=12"]
    training = [
        "gate_training.data.limit=48",
        f"gate_training.labels_dir={folder}/labels-{name}",
        "validation_share=0.5",
    ]
    training += ["recipe.training.epochs=1", "recipe.training.members=1", "max_new_tokens=2", "bootstrap=20"]
    folders = [f"reference_dir={folder}/reference", f"output_dir={folder}/{name}", f"experiment={name}"]
    return [*model, *training, *folders]


def test_tables_of_gates(model_folder: Path, tmp_path: Path) -> None:
    settings = gate_settings(model_folder, tmp_path, "table3")
    statuses = "experiment.statuses=[[text_mean,text_last],[image_last]]"
    found = tables(compose("tables", [*settings, statuses]))
    assert found is not None
    assert [row["gates"] for row in found["rows"]] == ["full model", "text mean + text last", "image last"]
    assert found["rows"][0]["agreement"] == found["rows"][0]["cost"] == 1
    assert found["rows"][0]["mean_exit_layer"] == 4
    assert "| image last |" in (tmp_path / "table3" / "table.md").read_text()

    torch.manual_seed(1)
    ready = Gates(4, 48)
    ready.save_pretrained(tmp_path / "ready")
    other = [f"experiment.other_gates=[{tmp_path}/ready]", "data.kinds=[attribute,two_hop]"]
    settings = gate_settings(model_folder, tmp_path, "table6")
    found = tables(compose("tables", [*settings, *other, "gate_training.data.kinds=[attribute,two_hop]"]))
    assert found is not None
    alone = [f"text mean + text last, trained on {kind} alone" for kind in ("attribute", "two_hop")]
    assert [row["gates"] for row in found["rows"]] == [
        "full model",
        "text mean + text last",
        *alone,
        f"gates of {tmp_path}/ready",
    ]
    assert "GQA" in (tmp_path / "table6" / "table.md").read_text()

    # the exits are those that the policy takes
    mllm = dyvte.load(model_folder, device="cpu")
    exits = []
    for sample in ShapesDataset("test", 12, kinds=["attribute", "two_hop"]):
        with dyvte.DynamicExit(ready)(mllm) as run:
            mllm.generate(mllm.encode([sample.image], [sample.question]), max_new_tokens=1)
            exits.append(int(run.exit_layers[0]))
    table = pd.read_parquet(tmp_path / "table6" / "exits.parquet")
    assert table[table["gates"].str.endswith("/ready")]["exit_layer"].tolist() == exits


# -------------------------------------------------------------------------------- cost


def test_policies_take_turns_and_ratios_are_paired() -> None:
    mllm, batch = model(), prompts(rows=2)
    policies = {"none": dyvte.Unchanged(), "fixed_exit": dyvte.FixedExit(1), "himap": dyvte.HiMAP()}
    repeats = measure(mllm, batch, policies, repeats=3, new_tokens=3, seed=0)
    assert len(repeats) == 3 * 3
    assert (repeats[["prefill_seconds", "decode_seconds"]] > 0).all().all()
    constants = pd.DataFrame([{"method": name, **constant(mllm, batch, policy)} for name, policy in policies.items()])
    assert constants["flops_decoder"][1] < constants["flops_decoder"][0]
    assert constants["kv_cache_bytes"][1] < constants["kv_cache_bytes"][0]
    table = summarize(repeats.assign(batch_size=2), constants.assign(batch_size=2), new_tokens=3).set_index("method")
    shares = table[["vision_share", "prefill_share", "decode_share"]]
    assert (shares > 0).all().all()
    deciding = table["flops_deciding"].to_dict()
    assert deciding["none"] == deciding["fixed_exit"] == 0 < deciding["himap"]
    assert table.loc["himap", "deciding_ms"] > table.loc["none", "deciding_ms"]
    assert (repeats["deciding_seconds"] < repeats["prefill_seconds"]).all()
    slow = repeats.assign(vision_seconds=1.0, prefill_seconds=3.0, decode_seconds=0.5, batch_size=2)
    known = summarize(slow, constants.assign(batch_size=2), new_tokens=3).set_index("method").loc["fixed_exit"]
    assert known[["vision_share", "prefill_share", "decode_share"]].tolist() == [0.25, 0.5, 0.25]
    assert table.loc["none", "prefill_ratio"] == 1
    pairs = repeats.pivot(index="repeat", columns="method", values="prefill_seconds")
    expected = (pairs["fixed_exit"] / pairs["none"]).median()
    assert table.loc["fixed_exit", "prefill_ratio"] == pytest.approx(expected)


@torch.no_grad()
def test_peak_memory_is_what_the_block_takes_at_most() -> None:
    held = torch.zeros(1000, 1000)
    with PeakMemory(torch.device("cpu")) as memory:
        first = held + 1
        second = first + 1
        del first
        third = second + 1
        del second, third
    assert memory.bytes == pytest.approx(2 * held.nbytes, rel=0.01)
    mllm, batch = model(), prompts(rows=4)
    full, pruned = (
        constant(mllm, batch, policy)["peak_memory_bytes"] for policy in (dyvte.Unchanged(), dyvte.UniformDrop(0.1))
    )
    assert full >= pruned > 0


def test_the_stopwatch_adds_up() -> None:
    clock = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
    assert len(clock.seconds()) == 2
    assert sum(clock.seconds()) == pytest.approx(clock.marks[-1] - clock.marks[0])
