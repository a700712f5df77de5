"""Settings at matched cost, and the tables made of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, random_batch
from omegaconf import OmegaConf

import dyvte
from analysis.cost import Stopwatch, constant, measure, summarize
from analysis.matched import Calibration, largest_within, methods
from analysis.tables import Outcome, SeenPositions, _from_reference, _sentence, _verdicts, describe, plan, tables
from dyvte.config import compose
from dyvte.data.shapes import ShapesDataset
from dyvte.flops import plan_decoder_flops, prefill_flops
from dyvte.gates.module import Gates
from dyvte.measure import PeakMemory
from dyvte.mllm import MLLM, Batch
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


@pytest.mark.parametrize(("budget", "expected"), [(0.5, 0.5), (2.0, 1.0), (-0.1, None), (0.0, 0.0)])
def test_the_largest_setting_within_a_budget(budget: float, expected: float | None) -> None:
    found = largest_within(lambda x: x, budget)
    assert found == expected if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize("name", list(methods(gates())))
@torch.no_grad()
def test_every_method_meets_the_budget_as_counted_while_it_runs(name: str) -> None:
    mllm, batch = model(), prompts()
    calibration = Calibration(mllm, [batch])
    full = prefill_flops(mllm, batch).decoder
    for budget in (0.9, 0.7):
        policy = methods(gates())[name](calibration, budget)
        assert policy is not None
        with policy(mllm):
            counted = prefill_flops(mllm, batch).decoder / full
        # 16 visual tokens, 4 rows and 6 layers do not allow any finer.
        tolerance = 0.2 if name in ("vtw", "fitprune", "dynamic_exit", "fastv_dynamic_exit") else 0.06
        assert budget - tolerance <= counted <= budget + 0.04


def test_a_budget_below_the_text_alone_is_met_by_none() -> None:
    calibration = Calibration(model(), [prompts()])
    assert {name: make(calibration, 0.05) for name, make in methods(gates()).items()} == dict.fromkeys(methods(gates()))


@torch.no_grad()
def test_planned_lengths_cost_what_the_counter_counts() -> None:
    mllm, batch, seen = model(), prompts(), SeenPositions()
    with dyvte.FastV(layer=2, keep=0.5)(mllm), seen(mllm):
        counted = prefill_flops(mllm, batch).decoder
        counts = torch.stack(seen.masks, dim=1).sum(2).tolist()
    assert sum(plan_decoder_flops(mllm.text_config, row) for row in counts) == counted


def test_settings_in_a_few_words() -> None:
    assert describe(dyvte.FastV(2, 0.5)) == "layer=2 keep=0.5"
    both = dyvte.Compose([dyvte.FastV(2, 0.25), dyvte.FixedExit(4)])
    assert describe(both) == "FastV layer=2 keep=0.25; FixedExit layer=4"


def test_methods_with_seeds_run_once_a_seed() -> None:
    experiment = OmegaConf.create({"budgets": [0.5, None], "methods": ["fastv", "random"], "random_seeds": 3})
    jobs = plan(experiment)
    assert len(jobs) == 2 * (1 + 3)
    assert [job.seed for job in jobs if job.method == "random" and job.budget == 0.5] == [0, 1, 2]


def reference() -> Any:
    flops = torch.tensor([[2.0, 4.0, 8.0], [4.0, 8.0, 16.0]])
    correct = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    return SimpleNamespace(flops=flops, correct=correct, agree=correct.bool())


def test_a_fixed_exit_mixes_two_layers_to_meet_the_budget() -> None:
    found = _from_reference(reference(), "fixed_exit", 0.75)  # costs 0.25, 0.5 and 1
    assert found is not None
    assert found.cost.mean() == pytest.approx(0.75)
    assert found.correct.tolist() == [1.0, 0.5]
    assert found.exit_layer.tolist() == [1.5, 1.5]
    full = _from_reference(reference(), "none", 1.0)
    assert full is not None
    assert full.correct.tolist() == [1.0, 1.0]
    assert _from_reference(reference(), "fixed_exit", 0.2) is None


def outcome(method: str, correct: np.ndarray) -> Outcome:
    same = np.ones(len(correct))
    return Outcome(method, 0.5, "", correct, same, same, same, 1, None)


def test_a_lead_counts_only_if_its_interval_leaves_zero_out() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.6).astype(float)
    close = base.copy()
    close[:2] = 1 - close[:2]
    worse = base * (rng.random(400) < 0.7)
    cfg = OmegaConf.create({"experiment": {"budgets": [0.5]}, "bootstrap": 300, "seed": 0})
    images = list(range(400))
    found = [outcome("fastv", base), outcome("tome", close), outcome("random", worse)]
    (verdict,) = _verdicts(found, "accuracy", np.ones(400, dtype=bool), images, cfg)
    assert verdict["ahead"] in ("fastv", "tome")
    assert verdict["not_told_apart"] == [{"fastv": "tome", "tome": "fastv"}[verdict["ahead"]]]
    assert "not told apart from it" in _sentence(verdict)


@pytest.mark.parametrize("name", ["matched", *(f"table{number}" for number in range(1, 7))])
def test_experiments_name_methods_that_exist(name: str) -> None:
    experiment = compose("tables", [f"experiment={name}"]).experiment
    assert set(experiment.methods) <= {"none", "fixed_exit", *methods(gates())}
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
    policies = {"none": None, "fixed_exit": dyvte.FixedExit(1)}
    repeats = measure(mllm, batch, policies, repeats=3, new_tokens=3, seed=0)
    assert len(repeats) == 2 * 3
    assert (repeats[["prefill_seconds", "decode_seconds"]] > 0).all().all()
    constants = pd.DataFrame([{"method": name, **constant(mllm, batch, policy)} for name, policy in policies.items()])
    assert constants["flops_decoder"][1] < constants["flops_decoder"][0]
    assert constants["kv_cache_bytes"][1] < constants["kv_cache_bytes"][0]
    table = summarize(repeats.assign(batch_size=2), constants.assign(batch_size=2)).set_index("method")
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
    full, pruned = (constant(mllm, batch, policy)["peak_memory_bytes"] for policy in (None, dyvte.UniformDrop(0.1)))
    assert full >= pruned > 0


def test_the_stopwatch_adds_up() -> None:
    clock = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
    assert len(clock.seconds()) == 2
    assert sum(clock.seconds()) == pytest.approx(clock.marks[-1] - clock.marks[0])
