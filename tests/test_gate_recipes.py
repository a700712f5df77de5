"""What gates are trained on beside the full model's statuses, and for: other runs, hazards, kinds, one shared gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from analysis import gate_recipes
from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.gates.recipes import cost_differences, mean_mixture_cost
from dyvte.errors import ConfigError, ModelError
from dyvte.gates import Gates
from dyvte.gates.counterfactual import OtherRuns, exits_for, rule_of_exit
from dyvte.gates.metrics import at_exit, first_exit, thresholds_by_depth
from dyvte.gates.objectives import GateData, Recipe, exit_distribution, hazard_loss, kind_penalty, label_loss
from dyvte.gates.teacher import Teacher
from dyvte.gates.training import average_gates, gate_probabilities, total_loss, train_gates
from dyvte.gates.validation import cost_at_agreement
from dyvte.runs.config import compose

seeds = st.integers(0, 10_000)


def adam(parameters):  # type: ignore[no-untyped-def]
    return torch.optim.AdamW(parameters, lr=1e-2)


def stable_labels(n: int, num_layers: int, generator: torch.Generator) -> Tensor:
    """[n, L + 1] labels 0 ... 0 1 ... 1."""
    depth = torch.randint(0, num_layers + 1, (n,), generator=generator)
    return torch.arange(num_layers + 1) >= depth[:, None]


# ------------------------------------------------------------------- other runs


@settings(max_examples=20)
@given(seeds, st.integers(2, 7))
def test_a_run_that_lost_the_image_is_labelled_as_that_exit_is(seed: int, num_layers: int) -> None:
    rule = stable_labels(6, num_layers, torch.Generator().manual_seed(seed))
    for left in range(1, num_layers):
        found = rule_of_exit(rule, left)
        for row in range(6):
            for k in range(num_layers + 1):
                wanted = rule[row, k] if k < left or k == num_layers else rule[row, left]
                assert found[row, k] == wanted


@given(st.integers(2, 60))
def test_exits_of_other_runs_lie_inside_the_model(num_layers: int) -> None:
    assert exits_for([], num_layers) == exits_for(["swapped"], num_layers) == []
    assert exits_for(["withheld"], num_layers) == [0]
    partial = exits_for(["partial"], num_layers)
    assert partial == sorted(set(partial))
    assert 1 <= partial[0] <= partial[-1] < num_layers


def numbered_runs(n: int = 5) -> OtherRuns:
    """Three runs whose status says sample and run."""
    status = (10 * torch.arange(n)[:, None] + torch.arange(3))[..., None, None].expand(-1, -1, 2, 1).float()
    labels = torch.zeros(n, 3, 4, dtype=torch.bool)
    labels[:, 1] = True
    counted = torch.tensor([[True, True], [False, True], [False, False]])
    return OtherRuns(status, labels, counted, torch.tensor([0.5, 0.5, 0.0]), torch.arange(n))


def test_a_drawn_run_keeps_its_sample_its_labels_and_its_gates() -> None:
    chosen = torch.tensor([4, 2, 2, 0])
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        chosen_runs = numbered_runs()[torch.tensor([0, 4, 2, 2, 0])][torch.tensor([1, 2, 3, 4])]
        status, labels, counted = chosen_runs.draw(generator)
        run = status[:, 0, 0].long() % 10
        assert torch.equal(status[:, 0, 0].long() // 10, chosen)
        assert torch.equal(labels[:, 0], run == 1)
        assert torch.equal(counted, numbered_runs().counted[run].float())
        seen |= set(run.tolist())
    assert seen == {0, 1}, "a run without a chance is never drawn"


def waiting_data(n: int, seed: int) -> GateData:
    """Entry 0 says the kind of question, entry 1 what was read of the image; without the image that is 0. L = 4."""
    generator = torch.Generator().manual_seed(seed)
    easy = torch.rand(n, generator=generator) < 0.7
    labels = torch.ones(n, 5, dtype=torch.bool)
    labels[:, :3] = easy[:, None]
    status = torch.randn(n, 3, 4, generator=generator) * 0.1
    status[..., 0] += torch.where(easy, 1.0, -1.0)[:, None]
    status[..., 1] += 1
    blind = status.clone()
    blind[..., 1] -= 1
    stay = torch.zeros(n, 1, 5, dtype=torch.bool)
    others = OtherRuns(blind[:, None], stay, torch.ones(1, 3, dtype=torch.bool), torch.ones(1), torch.arange(n))
    return GateData(status, labels, (torch.arange(5) / 4.0).repeat(n, 1), others=others)


def test_gates_wait_for_the_image_only_if_they_were_shown_statuses_without_it() -> None:
    train, held_out = waiting_data(400, 0), waiting_data(200, 1)
    said = {}
    for taught in (True, False):
        torch.manual_seed(0)
        gates = Gates(4, 2, width=8, bias=True)
        data = [each if taught else GateData(each.status, each.labels, each.cost) for each in (train, held_out)]
        train_gates(gates, data[0], data[1], Recipe(epochs=10, batch_size=32), adam)
        blind = held_out.others.status[:, 0]  # type: ignore[union-attr]
        said[taught] = [float(gate_probabilities(gates, each)[:, 0].mean()) for each in (held_out.status, blind)]
    seen, withheld = said[True]
    assert seen > 0.5 > 0.2 > withheld
    assert said[False][1] > 0.4, "the test must show something: untaught gates do not wait"


def test_the_loss_of_other_runs_counts_with_its_weight() -> None:
    data, gates = waiting_data(20, 0), Gates(4, 2, width=3, bias=True)
    blind = GateData(data.others.status[:, 0], data.others.labels[:, 0], data.cost)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    found = total_loss(gates, data, Recipe(counterfactual_weight=0.3), generator)
    wanted = label_loss(gates(data.status), data.labels) + 0.3 * label_loss(gates(blind.status), blind.labels)
    torch.testing.assert_close(found, wanted)


def test_unknown_runs_and_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose from withheld, swapped, partial"):
        Recipe(counterfactual=("blurred",))
    with pytest.raises(ConfigError, match="from 0 to 1"):
        Recipe(distill=1.5)


# --------------------------------------------------------------------- objectives


@given(seeds, st.integers(2, 6))
def test_hazard_loss_is_the_likelihood_of_the_depth(seed: int, num_layers: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = stable_labels(5, num_layers, generator)
    logits = torch.randn(5, num_layers - 1, 2, generator=generator)
    chances = exit_distribution(logits)  # of leaving first at k = 1..L if every gate drew in turn
    total, terms = 0.0, 0
    for row in range(5):
        depth = max(int(labels[row].int().argmax()), 1)
        total -= float(chances[row, depth - 1].log())
        terms += min(depth, num_layers - 1)
    assert float(hazard_loss(logits, labels)) == pytest.approx(total / terms, rel=1e-4)


def test_kind_penalty_is_the_gap_of_every_kind_and_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 3, 2, generator=generator), stable_labels(9, 4, generator)
    kinds = torch.tensor([0, 0, 2, 2, 2, 3, 3, 3, 3])  # a batch may lack a kind
    said, wanted = logits.softmax(-1)[..., 1], 0.0
    for kind in (0, 2, 3):
        rows = kinds == kind
        gaps = (said[rows] - labels[rows, 1:-1].float()).mean(0)
        wanted += float((gaps**2).sum()) * int(rows.sum())
    assert float(kind_penalty(logits, labels, kinds)) == pytest.approx(wanted / (9 * 3), rel=1e-5)


# -------------------------------------------------------------- shared, cumulative


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gates_of_every_kind_come_back_and_agree_one_by_one(shared: bool, cumulative: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    members = [Gates(5, 6, width=4, bias=True, shared=shared, cumulative=cumulative) for _ in range(2)]
    for each in members:
        assert each.inner_bias is not None
        torch.nn.init.normal_(each.inner_bias)
    gates, status = average_gates(members), torch.randn(7, 4, 12)
    gates.save_pretrained(tmp_path)
    loaded = Gates.from_pretrained(tmp_path)
    said = gates(status).softmax(-1)[..., 1]
    assert torch.equal(loaded(status).softmax(-1)[..., 1], said)
    before = None
    for layer in range(4):
        before = loaded.exit_probability(status[:, layer], layer, before)
        torch.testing.assert_close(before, said[:, layer])
    if cumulative:
        assert (said.diff(dim=1) >= 0).all(), "what was found stays found"
    alike = [loaded.exit_probability(status[:, 0], layer) for layer in range(2)]
    assert not torch.equal(*alike), "the layers are told apart"
    assert len(loaded.inner) == (1 if shared else 4)


def test_folders_of_before_there_were_other_kinds_of_gates_load(tmp_path: Path) -> None:
    Gates(5, 6, bias=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["shared"], config["cumulative"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = Gates.from_pretrained(tmp_path)
    assert not loaded.shared
    assert not loaded.cumulative
    with pytest.raises(ModelError, match="need a bias"):
        Gates(5, 6, shared=True)


# ------------------------------------------------------------------------- teacher


def test_a_teacher_finds_what_any_layer_says_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 12, generator=generator)
    targets = torch.stack([features[:, 7] > 0, features[:, 2] + features[:, 9] > 0], dim=1)
    images = [str(each // 2) for each in range(300)]
    teacher, again = (Teacher(features[:300], targets[:300], images) for _ in range(2))
    said = teacher(features[300:])
    assert ((said > 0.5) == targets[300:]).double().mean() > 0.85
    assert torch.equal(said, again(features[300:]))


# ---------------------------------------------------------------------- validation


@settings(max_examples=20)
@given(seeds, st.sampled_from([0.0, 2.0]))
def test_cost_at_agreement_is_the_cheapest_mixture_of_thresholds(seed: int, caution: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(8, 3, generator=generator)
    agree, cost = stable_labels(8, 4, generator), (torch.arange(5) / 4.0).repeat(8, 1)
    risk = torch.tensor([((4 - k) / 4) ** caution for k in (1, 2, 3)], dtype=torch.float64)
    points = [(1.0, 1.0)]
    for threshold in (1 - (1 - probability.double()) / risk).amax(1).tolist():
        exits = first_exit(probability, thresholds_by_depth(threshold, 4, caution))
        points.append((float(at_exit(cost, exits).mean()), float(at_exit(agree, exits).double().mean())))
    found = cost_at_agreement(probability, agree, cost, caution, (0.8, 1.0))
    for wanted in (0.8, 1.0):
        mixed = [one for one, kept in points if kept >= wanted]
        mixed += [
            one + (wanted - kept) / (more - kept) * (other - one)
            for one, kept in points
            for other, more in points
            if kept < wanted < more
        ]
        assert found[f"cost_at_{wanted:g}"] == pytest.approx(min(mixed), abs=1e-6)
    assert found["mean_cost"] == pytest.approx((found["cost_at_0.8"] + found["cost_at_1"]) / 2)


# ------------------------------------------------------------- recipes side by side


@settings(max_examples=10)
@given(seeds, st.integers(2, 6))
def test_differences_are_of_the_same_images_drawn_again(seed: int, images: int) -> None:
    """Against replicates whose questions are written out one by one."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, images, 12)
    image[:images] = np.arange(images)
    costs, kept = rng.random((2, 12, 3)), (rng.random((2, 12, 3)) < 0.7).astype(float)
    kept[:, :, 0] = 1  # one threshold is never reached
    wanted, draws = (0.8, 0.9), 40
    frontiers = {name: (costs[i], kept[i]) for i, name in enumerate("ab")}
    found = cost_differences(frontiers, "a", ImageBootstrap(image, draws, seed), wanted)["b"]

    def difference(rows: np.ndarray) -> float:
        one, other = (mean_mixture_cost(costs[i][rows].mean(0), kept[i][rows].mean(0), wanted) for i in (0, 1))
        return other - one

    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), draws)
    naive = [
        difference(np.concatenate([np.tile(np.flatnonzero(image == i), n) for i, n in enumerate(times)]))
        for times in drawn
    ]
    assert found.mean == pytest.approx(difference(np.arange(12)))
    off = np.abs(np.array(naive) - found.mean)
    assert found.high - found.mean == pytest.approx(np.quantile(off, 0.95) if off.max() > 1e-9 else 0, abs=1e-9)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_intervals_hold_for_all_recipes_at_once() -> None:
    """Of recipes that do not differ but for noise, all together are covered in about 95 of 100 worlds."""
    missed, worlds = 0, 60
    for world in range(worlds):
        rng = np.random.default_rng(world)
        shared = np.repeat(rng.normal(size=40), 3)[:, None]
        recipes = {name: (shared + rng.normal(size=(120, 1)), np.ones((120, 1))) for name in "abcdef"}
        bootstrap = ImageBootstrap(np.repeat(np.arange(40), 3), 200, world)
        found = cost_differences(recipes, "a", bootstrap, [0.9])
        missed += not all(each.low <= 0 <= each.high for each in found.values())
    assert missed <= 9  # a chance of 0.3% if it is 5%


def test_a_small_run_of_the_comparison(tmp_path: Path) -> None:
    small: dict[str, object] = {
        "data.limit": 32,
        "batch_size": 16,
        "validation_share": 0.5,
        "recipe.training.epochs": 2,
        "bootstrap": 20,
    }
    small |= {"labels.dir": tmp_path / "labels", "labels.max_new_tokens": 3, "labels.exits": "[0,2]"}
    small |= {"output_dir": tmp_path / "run", "page": tmp_path / "page.md"}
    cfg = compose("gate_recipes", [f"{key}={value}" for key, value in small.items()])
    OmegaConf.set_struct(cfg, False)
    cfg.options = {name: cfg.options[name] for name in ("as it is", "lens", "no other runs")}
    gate_recipes.main(cfg)
    text = (tmp_path / "page.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert list(rows) == ["option", "as it is", "lens", "no other runs"]
    assert rows["as it is"][2] == ""
    assert [rows[name][-1].strip(" |") for name in ("as it is", "lens")] == ["320", "323"]
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*/summary.json")}
    assert len(written) == 3
    costs = {name: float(row[1]) for name, row in rows.items() if name != "option"}
    difference = float(rows["lens"][2].split(" [")[0])
    assert difference == pytest.approx(costs["lens"] - costs["as it is"], abs=1.6e-3), "rounded"
    gate_recipes.main(cfg)
    assert {file: file.stat().st_mtime_ns for file in written} == written, "what is there is not trained again"
    assert (tmp_path / "page.md").read_text() == text
