"""Gates: on disk, as classifiers, their training objectives, and the choice of a threshold."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import linprog
from torch import Tensor
from torch.nn.functional import cross_entropy

from dyvte import exit_sweep
from dyvte.errors import ConfigError, ModelError
from dyvte.gates import Gates
from dyvte.gates.features import assemble
from dyvte.gates.lens import lens_features
from dyvte.gates.metrics import (
    at_exit,
    cluster_interval,
    difference_interval,
    exit_by_kind,
    first_exit,
    layer_report,
    mixture_cost,
    share_interval,
    wilson_limits,
)
from dyvte.gates.module import load_gates
from dyvte.gates.objectives import GateData, Recipe, exit_distribution, label_loss, stopping_loss
from dyvte.gates.training import average_gates, evaluate_loss, gate_probabilities, train_gates
from dyvte.train import outline

ADAM = functools.partial(torch.optim.AdamW, lr=3e-3)


def random_gates(num_layers: int = 5, hidden_size: int = 6, seed: int = 0) -> Gates:
    torch.manual_seed(seed)
    gates = Gates(num_layers, hidden_size, bias=True, threshold=[0.1 * each for each in range(1, num_layers)])
    torch.nn.init.normal_(gates.inner_bias)
    gates.shift.normal_()
    gates.scale.uniform_(0.5, 2)
    return gates


# ----------------------------------------------------------------------- on disk


def test_gates_come_back_as_they_were_saved(tmp_path: Path) -> None:
    gates = random_gates()
    gates.facts = {"model": "m", "validation": {"agreement": 0.99}}
    gates.save_pretrained(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = Gates.from_pretrained(tmp_path)
    status = torch.randn(3, 4, 12)
    assert torch.equal(gates(status), loaded(status))
    assert loaded.config() == gates.config()
    assert "0.99" in (tmp_path / "README.md").read_text()
    loaded.facts["validation"] = {"agreement": 0.75}
    loaded.save_pretrained(tmp_path)
    assert "0.75" in (tmp_path / "README.md").read_text(), "the card must follow the gates"


def test_missing_or_broken_gates_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder") as missing:
        load_gates(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no gates in"):
        load_gates(tmp_path)
    gates = random_gates()
    gates.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"width": 3', '"width": 4'))
    with pytest.raises(ModelError, match="disagree") as broken:
        load_gates(tmp_path)
    assert "\n" not in str(missing.value) + str(broken.value)


def test_gates_of_another_depth_or_width_are_refused() -> None:
    mllm = FAMILIES["llava"](num_layers=2)
    Gates(2, mllm.hidden_size).check(mllm)
    for wrong in (Gates(3, mllm.hidden_size), Gates(2, mllm.hidden_size // 2)):
        with pytest.raises(ModelError, match=f"this one has 2 of width {mllm.hidden_size}"):
            wrong.check(mllm)


def test_one_gate_agrees_with_all_gates_together() -> None:
    gates, status = random_gates(), torch.randn(7, 4, 12)
    together = gates(status).softmax(-1)[..., 1]
    for layer in range(4):
        torch.testing.assert_close(gates.exit_probability(status[:, layer], layer), together[:, layer])


@torch.no_grad()
def test_change_and_lens_are_what_the_states_say() -> None:
    base = {"text_last": torch.randn(3, 4, 6), "lens": torch.randn(3, 4, 3)}
    found = assemble(["lens", "text_last_change"], base)
    assert torch.equal(found[..., :3], base["lens"])
    assert torch.equal(found[:, 0, 3:], torch.zeros(3, 6))
    assert torch.equal(found[:, 2, 3:], base["text_last"][:, 2] - base["text_last"][:, 1])
    gates = Gates(5, 6, ["lens", "text_last_change"])
    assert gates(found).shape == (3, 4, 2)

    mllm = FAMILIES["llava"](num_layers=2)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 1), "left")
    status = exit_sweep(mllm, batch)
    logits = status.logits[:, -1].double()
    probability = logits.softmax(-1)
    best = probability.topk(2).values
    wanted = [-(probability * logits.log_softmax(-1)).sum(-1) / math.log(logits.shape[-1]), best[:, 0]]
    last = status.text_status[:, -1, mllm.hidden_size :]  # of the last layer the lens reads the model's own prediction
    torch.testing.assert_close(
        lens_features(mllm, last).double(),
        torch.stack([*wanted, (best[:, 0] / best[:, 1]).log()], -1),
        atol=1e-4,
        rtol=1e-4,
    )


def test_thresholds_are_one_number_or_one_a_gate() -> None:
    gates = random_gates()
    assert gates.thresholds(0.25) == [0.25] * 4
    assert gates.thresholds() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="one a gate, got 2"):
        gates.thresholds([0.1, 0.2])


# -------------------------------------------------------------------- objectives


def test_exit_distribution_is_that_of_gates_drawing_in_turn() -> None:
    logits = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0))
    leave = logits.softmax(-1)[..., 1]
    expected = torch.zeros(6, 5)
    left = torch.ones(6)
    for gate in range(4):
        expected[:, gate] = left * leave[:, gate]
        left = left * (1 - leave[:, gate])
    expected[:, 4] = left
    torch.testing.assert_close(exit_distribution(logits), expected)


def test_stopping_loss_of_certain_gates_is_the_price_of_their_exit() -> None:
    exits = torch.tensor([1, 2, 4])  # of L = 4
    logits = torch.zeros(3, 3, 2)
    logits[..., 0] = 50.0
    for row, k in enumerate(exits.tolist()):
        if k < 4:
            logits[row, k - 1] = torch.tensor([0.0, 50.0])
    labels = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    cost = torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0]).repeat(3, 1)
    wanted = torch.tensor([0.3 + 10.0, 0.5, 1.0]).mean()
    torch.testing.assert_close(stopping_loss(logits, labels, cost, 10.0), wanted)


def test_label_loss_is_weighted_cross_entropy_over_the_gates_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 2, generator=generator)
    labels = torch.rand(5, 5, generator=generator) > 0.5
    target = labels[:, 1:-1].long()
    torch.testing.assert_close(
        label_loss(logits, labels, exit_weight=3.0),
        cross_entropy(logits.flatten(0, 1), target.flatten(), weight=torch.tensor([1.0, 3.0])),
    )
    mask = torch.zeros(5, 3)
    mask[:, 1] = 1
    torch.testing.assert_close(label_loss(logits, labels, mask=mask), cross_entropy(logits[:, 1], target[:, 1]))


def planted_data(n: int, seed: int) -> GateData:
    """Statuses whose first entry tells from which exit on the answer is right; L = 5."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.randint(1, 6, (n,), generator=generator)
    status = torch.randn(n, 4, 12, generator=generator)
    status[..., 0] = depth[:, None] - torch.arange(1, 5) - 0.5
    labels = torch.arange(6) >= depth[:, None]
    return GateData(status, labels, (torch.arange(6) / 5.0).repeat(n, 1))


def test_training_finds_a_planted_rule() -> None:
    train, validation = planted_data(600, 0), planted_data(300, 1)
    torch.manual_seed(0)
    gates = Gates(5, 6, width=16, bias=True)
    recipe = Recipe(epochs=30, patience=5, batch_size=32)
    result = train_gates(gates, train, validation, recipe, ADAM)
    exits = first_exit(gate_probabilities(gates, validation.status), [0.5] * 4)
    wanted = validation.labels.int().argmax(1)
    assert at_exit(validation.labels, exits).double().mean() > 0.9
    assert (exits - wanted).abs().double().mean() < 0.2
    assert evaluate_loss(gates, validation, recipe) == pytest.approx(result["validation_loss"], rel=1e-5)
    assert result["best_epoch"] <= result["epochs"] <= 30


def test_stopping_objective_beats_every_fixed_exit() -> None:
    train, validation = planted_data(600, 0), planted_data(300, 1)
    torch.manual_seed(0)
    gates = Gates(5, 6, width=16, bias=True)
    recipe = Recipe(objective="stopping", epochs=30, patience=5, batch_size=32, disagreement_price=5.0)
    result = train_gates(gates, train, validation, recipe, ADAM)
    fixed = (validation.cost + 5.0 * ~validation.labels).mean(0).min()
    assert result["validation_loss"] < 0.95 * fixed


def test_training_repeats_itself() -> None:
    train, validation = planted_data(200, 0), planted_data(100, 1)

    def run(seed: int) -> Tensor:
        torch.manual_seed(0)
        gates = Gates(5, 6)
        train_gates(gates, train, validation, Recipe(epochs=3, layers_per_sample=1), ADAM, seed)
        return gates.inner.detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_one_random_layer_a_sample_leaves_the_others_alone() -> None:
    gates, data = Gates(5, 6), planted_data(1, 0)
    before = gates.inner.detach().clone()
    recipe = Recipe(epochs=1, patience=0, layers_per_sample=1, standardize=False, schedule="constant")
    train_gates(gates, data, data, recipe, functools.partial(torch.optim.SGD, lr=1.0))
    changed = [bool((gates.inner[gate] != before[gate]).any()) for gate in range(4)]
    assert sum(changed) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_averaged_gates_give_the_mean_logits(bias: bool) -> None:
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(Gates(5, 6, width=4 + seed, bias=bias))
        if members[-1].inner_bias is not None:
            torch.nn.init.normal_(members[-1].inner_bias)
        members[-1].shift.fill_(0.3)
        members[-1].scale.fill_(2.0)
    status = torch.randn(7, 4, 12)
    mean = torch.stack([each(status) for each in members]).mean(0)
    torch.testing.assert_close(average_gates(members)(status), mean, atol=5e-3, rtol=5e-3)  # rounded to half precision


def test_averaged_gates_are_stored_in_half_precision_and_come_back_the_same(tmp_path: Path) -> None:
    merged = average_gates([random_gates(hidden_size=32, seed=each) for each in range(3)])
    merged.save_pretrained(tmp_path)
    sizes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert sizes["inner"] == sizes["outer"] == torch.float16
    assert sizes["scale"] == torch.float32, "what does not fit into half precision must stay as it is"
    loaded, status = Gates.from_pretrained(tmp_path), torch.randn(3, 4, 64)
    assert loaded.inner.dtype == torch.float32
    assert torch.equal(merged(status), loaded(status))


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose from labels, stopping, hazard"):
        Recipe(objective="luck")


# ------------------------------------------------------------------------ metrics


@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0, 1))
def test_first_exit_is_the_first_gate_above_its_threshold(seed: int, min_layer: int, threshold: float) -> None:
    probability = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
    thresholds = [threshold, 0.5, 1 - threshold, 0.9]
    for row, found in zip(probability, first_exit(probability, thresholds, min_layer).tolist(), strict=True):
        fired = [k for k in range(1, 5) if k >= min_layer and float(row[k - 1]) > np.float32(thresholds[k - 1])]
        assert found == min([*fired, 5])


def test_layer_report_counts_decisions() -> None:
    probability = torch.tensor([[0.95], [0.85], [0.25], [0.15]])
    labels = torch.tensor([[True], [False], [True], [False]])
    row = layer_report(probability, labels, [0.5]).iloc[0]
    assert (row.precision, row.recall, row.exit_rate, row.label_rate) == (0.5, 0.5, 0.5, 0.5)
    # each in its own bin: |0.95 - 1|, |0.85 - 0|, |0.25 - 1|, |0.15 - 0|
    assert row.calibration_error == pytest.approx((0.05 + 0.85 + 0.75 + 0.15) / 4)
    assert np.isnan(layer_report(probability, labels, [0.99]).iloc[0].precision)


def test_a_difference_of_means_on_shared_images_is_paired() -> None:
    """What an image adds to both means leaves their difference: the interval is that of the difference by image."""
    rng = np.random.default_rng(1)
    image, own = 5 * rng.normal(size=200), rng.normal(size=(2, 200))
    values = torch.from_numpy(np.concatenate([image + own[0], image + own[1] + 0.5]))
    second = np.arange(400) >= 200
    step, low, high = difference_interval(values, second, ~second, np.tile(np.arange(200), 2))
    mean, expected_low, expected_high = cluster_interval(torch.from_numpy(own[1] + 0.5 - own[0]), np.arange(200))
    assert (step, low, high) == pytest.approx((mean, expected_low, expected_high))
    apart = difference_interval(values, second, ~second, np.arange(400))  # images of their own: as of two samples
    halves = [np.ptp(cluster_interval(values[each], np.arange(200))[1:]) / 2 for each in (second, ~second)]
    assert (apart[2] - apart[1]) / 2 == pytest.approx(np.hypot(*halves), rel=1e-2)


@pytest.mark.parametrize("num_images", [1, 2, 40])
def test_exit_depths_that_do_not_vary_have_an_interval(num_images: int) -> None:
    """Every question at the same depth: as far as Wilson allows others to differ; none for one image."""
    layers, per_image = 8, 3
    depth, images = torch.full((num_images * per_image,), 5.0), np.repeat(np.arange(num_images), per_image)
    reach = layers * wilson_limits(0.0, num_images)[1]
    mean, low, high = cluster_interval(depth, images, span=layers)
    first = np.arange(len(depth)) % per_image == 0
    step = difference_interval(depth + torch.from_numpy(first), first, ~first, images, span=layers)
    assert (mean, step[0]) == (5.0, 1.0)
    if num_images == 1:
        assert np.isnan([low, high, *step[1:]]).all()
    else:
        assert (low, high) == pytest.approx((5 - reach, 5 + reach))
        assert step[1:] == pytest.approx((1 - 2 * reach, 1 + 2 * reach))


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize(("num_images", "per_image"), [(1, 1), (1, 8), (7, 1), (20, 3), (200, 2)])
def test_an_interval_of_a_rate_has_a_width_and_covers_it(rate: float, num_images: int, per_image: int) -> None:
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(num_images), per_image)
    covered = 0
    for _ in range(200):
        values = torch.from_numpy(rng.random(len(images)) < rate).double()
        mean, low, high = share_interval(values, images)
        assert 0 <= low <= mean <= high <= 1
        assert high > low
        covered += low <= rate <= high
        mean, low, high = cluster_interval(values - values, images, largest=1.0)
        assert low < 0 == mean < high
    # with a handful of draws Wilson's interval covers a rate of 0.02 in 87% only: one success of seven excludes it
    assert covered >= {1: 1, 7: 160}.get(num_images, 180)


def test_cluster_interval_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        values = torch.from_numpy(rng.normal(size=(60, 1)) + rng.normal(size=(60, 3))).flatten()
        _, low, high = cluster_interval(values, np.repeat(np.arange(60), 3))
        missed += not low <= 0 <= high
    assert 0.02 <= missed / 400 <= 0.09


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_mixture_cost_is_the_best_mixture(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost, agreement = np.sort(rng.random(6)), rng.random(6)
    agreement[-1] = 1.0
    wanted = float(rng.random())
    best = linprog(cost, A_ub=-agreement[None], b_ub=[-wanted], A_eq=np.ones((1, 6)), b_eq=[1.0])
    found = mixture_cost(torch.from_numpy(cost), torch.from_numpy(agreement), wanted)
    assert found == pytest.approx(best.fun, abs=1e-9)


def test_exit_by_kind_spends_where_it_helps() -> None:
    cost = torch.tensor([0.1, 0.4, 1.0]).repeat(8, 1)
    agree = torch.tensor([[1, 1, 1]] * 4 + [[0, 0, 1]] * 2 + [[0, 1, 1]] * 2).bool()
    kinds = ["easy"] * 4 + ["hard"] * 2 + ["middle"] * 2
    assert exit_by_kind(agree, cost, kinds, wanted=1.0) == {"easy": 0, "middle": 1, "hard": 2}
    assert exit_by_kind(agree, cost, kinds, wanted=0.75) == {"easy": 0, "middle": 1, "hard": 0}


def test_outline_of_training_is_read_by_people() -> None:
    validation = dict.fromkeys(("train_questions", "validation_questions", "validation_images"), 1234)
    shares = ("validation_loss", "threshold", "agreement", "disagreement_upper_limit", "mean_exit_layer", "cost")
    validation |= dict.fromkeys((*shares, "cost_of_fixed_exits", "cost_of_oracle"), 0.123456789012) | {"epochs": 25}
    several, one = (outline(validation, members) for members in (5, 1))
    assert "25 epochs of 5 gates a layer together" in several
    assert "25 epochs;" in one
    assert "0.12345" not in several + one
