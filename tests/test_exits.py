"""`python -m analysis.exits`: a naive script agrees, planted layers are found, random weights give no finding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from counting import costs_of
from hypothesis import given
from hypothesis import strategies as st
from intervals import intervals_of_zero_width
from omegaconf import DictConfig
from planted import planted
from quick_figures import printed
from scipy.special import entr
from scipy.stats import spearmanr
from torch import Tensor, nn

from analysis import exits
from analysis.measuring.exits import Measurement, OtherImages, logit_change, questions_and_captions
from analysis.statistics import exits as exit_statistics
from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.entropy import entropy_change, rank_correlation
from analysis.statistics.exit_summary import after_exit
from dyvte.cost.flops import plan_decoder_flops
from dyvte.data import Dataset, Sample
from dyvte.data.metrics import exact_match
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError, ModelError, UnsupportedError
from dyvte.instrument.sweep import ENTROPIES, exit_sweep
from dyvte.instrument.sweep.criteria import kl_exit_layer
from dyvte.loading import SHIPPED_MODELS, load, wrap
from dyvte.mllm import MLLM
from dyvte.policies.exits.fixed_exit import FixedExit
from dyvte.runs.config import compose
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.tokenizer import build_processor

NUM_LAYERS = 4


def random_model(seed: int = 0, scale: float | None = 1.5, num_layers: int = NUM_LAYERS) -> MLLM:
    """A small random testbed; `scale` draws weights large enough for the image to matter (None: as initialised)."""
    sizes = TestbedSizes(
        patch_size=32,
        vision_layers=1,
        vision_width=32,
        vision_heads=2,
        layers=num_layers,
        width=48,
        heads=2,
        mlp_width=64,
    )
    model = build_model(sizes, seed)
    if scale is not None:
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=scale / parameter.shape[-1] ** 0.5)
    return wrap(model, build_processor(sizes.patch_size))


class Samples(Dataset):
    """Samples in a list."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @property
    def fingerprint(self) -> str:
        return str([(sample.id, sample.answer) for sample in self.samples])


def config(folder: Path, *overrides: str) -> DictConfig:
    settings = ["device=cpu", "captions=0", "max_new_tokens=4", "bootstrap=100", "permutations=99", "batch_size=8"]
    return compose("exits", [f"output_dir={folder}", "model.name=random", *settings, *overrides])


def execute(mllm: MLLM, dataset: Dataset, folder: Path, *overrides: str) -> dict[str, Any]:
    # figures take most of the time of a small run, and counting operations takes the rest
    quick = (
        mock.patch.object(exits, "draw", return_value={}),
        mock.patch("analysis.measuring.exits.PromptCosts", costs_of),
    )
    with quick[0], quick[1]:
        exits.run(config(folder, *overrides), mllm, dataset)
    return json.loads((folder / "summary.json").read_text())


# ---------------------------------------------------------------- a naive script


class Naive:
    """One question and one exit at a time: visual keys are masked from layer k on, and nothing is cached or shared."""

    def __init__(self, mllm: MLLM) -> None:
        self.mllm = mllm
        mllm.model.set_attn_implementation("eager")

    @torch.no_grad()
    def run(self, sample: Sample, exit_layer: int, max_new_tokens: int) -> tuple[list[int], Tensor, np.ndarray]:
        """Greedy answer, next-token logits at the prompt's end, text entropy of each layer (its four variants)."""
        prompt = self.mllm.encode([sample.image], [sample.question])
        visual = prompt["input_ids"][0] == self.mllm.image_token_id
        ids, mask = prompt["input_ids"], prompt["attention_mask"]
        logits, attentions = self.forward(ids, mask, prompt["pixel_values"], visual, exit_layer)
        first, entropies = logits, self.entropies(attentions, visual)
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            answer.append(int(logits.argmax()))
            if answer[-1] in (self.mllm.tokenizer.eos_token_id, self.mllm.image_token_id):
                break
            ids = torch.cat([ids, torch.tensor([[answer[-1]]])], 1)
            mask = torch.ones_like(ids)
            logits, _ = self.forward(ids, mask, prompt["pixel_values"], visual, exit_layer)
        return answer, first, entropies

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor, visual: Tensor, exit_layer: int) -> tuple[Tensor, Any]:
        columns = torch.zeros(ids.shape[1], dtype=torch.bool)
        columns[: len(visual)] = visual

        def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = kwargs["attention_mask"].masked_fill(columns, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": hidden}

        layers = self.mllm.model.model.language_model.layers[exit_layer:]
        hooks = [layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
        output = self.mllm.model(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, output_attentions=True, use_cache=False
        )
        for hook in hooks:
            hook.remove()
        return output.logits[0, -1].double(), output.attentions

    def entropies(self, attentions: Any, visual: Tensor) -> np.ndarray:
        last_visual = int(visual.nonzero().max())
        result = []
        hidden = visual.tolist()
        for attention in attentions:
            values, heads = [], attention[0].double().numpy()
            for first_key in (0, 1):  # with and without the sink, which is the first position
                for query in range(last_visual + 1, len(visual)):
                    keys = [key for key in range(first_key, query + 1) if not hidden[key]]
                    weights = heads[:, query, keys]
                    entropy = float(entr(weights / weights.sum(1, keepdims=True)).sum(1).mean())
                    values.append((first_key, entropy, entropy / np.log(len(keys))))
            table = np.array(values)
            with_sink, without = table[table[:, 0] == 0, 1:].mean(0), table[table[:, 0] == 1, 1:].mean(0)
            result.append([with_sink[0], with_sink[1], without[0], without[1]])
        return np.array(result)


def naive_summary(mllm: MLLM, dataset: Dataset, max_new_tokens: int, flip: bool) -> tuple[dict[str, Any], Samples]:
    """The numbers of `summary.json`, and the data; with `flip`, references that only some exits get right."""
    naive, num_layers = Naive(mllm), mllm.num_layers
    agreement, correct, kl, reverse, flops, entropies, samples = [], [], [], [], [], [], []
    for index, sample in enumerate(dataset):
        runs = [naive.run(sample, k, max_new_tokens) for k in range(num_layers + 1)]
        texts = [mllm.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer, _, _ in runs]
        if flip:
            sample = replace(sample, answer=texts[index % (num_layers + 1)])
        samples.append(sample)
        agreement.append([answer == runs[-1][0] for answer, _, _ in runs])
        correct.append([exact_match(text, sample.answer) for text in texts])
        log_p = [torch.log_softmax(logits, -1) for _, logits, _ in runs]
        kl.append([float((p.exp() * (p - log_p[-1])).sum()) for p in log_p])
        reverse.append([float((log_p[-1].exp() * (log_p[-1] - p)).sum()) for p in log_p])
        entropies.append(np.stack([entropy for _, _, entropy in runs]))
        prompt = mllm.encode([sample.image], [sample.question])["input_ids"][0]
        total, text = len(prompt), int((prompt != mllm.image_token_id).sum())
        flops.append([plan_decoder_flops(mllm, [total] * k + [text] * (num_layers - k)) for k in range(num_layers + 1)])
    names = {"accuracy": correct, "agreement": agreement, "kl": kl, "kl_reverse": reverse, "flops_decoder": flops}
    summary: dict[str, Any] = {name: np.mean(values, axis=0) for name, values in names.items()}
    summary["entropy"] = np.mean(entropies, axis=0)
    return summary, Samples(samples)


@pytest.mark.parametrize(("model", "questions"), [("random", 12), ("llava_shapes", 6)])
def test_a_naive_script_finds_the_same_numbers(model: str, questions: int, tmp_path: Path):
    if model == "random":
        make = random_model
    elif not SHIPPED_MODELS[model].is_dir():
        pytest.skip("the shipped weights are not there yet")
    else:
        make = lambda: load(model, device="cpu")  # noqa: E731
    expected, data = naive_summary(make(), ShapesDataset(limit=questions), max_new_tokens=3, flip=model == "random")
    found = execute(make(), data, tmp_path / "run", "max_new_tokens=3")
    num_layers = found["num_layers"]
    assert found["num_samples"] == questions
    for name in ("agreement", "accuracy"):
        assert found[name] == pytest.approx(expected[name].tolist()), name
    assert len(set(found["accuracy"])) > 2
    for name in ("kl", "kl_reverse"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-6)
    assert found["flops_decoder"] == pytest.approx(expected["flops_decoder"].tolist(), rel=1e-9)
    assert found["flops_total"][-1] > found["flops_decoder"][-1]
    for eta, layer in found["k_star"].items():
        assert layer == next(k for k in range(num_layers + 1) if expected["kl"][k] <= float(eta)), eta
    for index, name in enumerate(ENTROPIES):
        matrix = np.array(found["entropy"][name]["matrix"]["mean"], dtype=float)
        seen = after_exit(num_layers)
        assert np.isnan(matrix[~seen]).all()
        order = {"text_entropy": 0, "text_entropy_normalised": 1, "text_entropy_no_sink": 2}.get(name, 3)
        np.testing.assert_allclose(matrix[seen], expected["entropy"][..., order][seen], atol=2e-5, err_msg=str(index))


# ---------------------------------------------------------------- findings


def decided(mllm: MLLM, dataset: Dataset, max_new_tokens: int = 4, least: float = 1e-4) -> Samples:
    """The questions whose answers no rounding can change: no logit is within `least` of the likeliest token's."""
    samples = list(dataset)
    batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
    output = mllm.model.generate(
        **batch, max_new_tokens=max_new_tokens, output_logits=True, return_dict_in_generate=True
    )
    first, second = torch.stack(output.logits).topk(2).values.unbind(-1)
    return Samples([samples[row] for row in (first - second > least).all(0).nonzero().flatten().tolist()])


@pytest.mark.parametrize("layer", range(1, NUM_LAYERS))
def test_the_planted_layer_is_found(layer: int, tmp_path: Path):
    with planted(random_model(seed=layer), layer) as mllm:
        data = decided(mllm, ShapesDataset(limit=24))
        assert len(data) >= 20
        summary = execute(mllm, data, tmp_path / "run")
    stops = summary["findings"]["contribution_stops"]
    assert (stops["verdict"], stops["exit_layer"], stops["details"]["evidence"]) == ("found", layer, "exact")
    assert summary["k_star"]["0.0001"] == layer
    assert summary["agreement"][layer:] == [1.0] * (NUM_LAYERS + 1 - layer)
    assert max(kind["exit_depth"]["mean"] for kind in summary["kinds"].values()) <= layer
    assert all(kind["stops"]["exit_layer"] == layer for kind in summary["kinds"].values())
    disturbed = summary["findings"]["early_exit_disturbs_text_entropy"]
    if layer < NUM_LAYERS - 1:
        late, early = (disturbed["estimates"][name] for name in ("late_change", "early_change"))
        assert max(map(abs, late)) < 1e-4 < abs(early[0])


def test_tokens_that_tie_are_both_the_full_models_choice(tmp_path: Path):
    mllm = random_model()
    half = len(mllm.lm_head.weight) // 2
    mllm.lm_head.weight.data[half : 2 * half] = mllm.lm_head.weight.data[:half]  # every token has a twin
    # generation prefers the one, as rounding might, and the sweep, which takes the first, the other
    mllm.model.generation_config.sequence_bias = [[[token], 1e-2] for token in range(half, 2 * half)]
    with planted(mllm, 2):
        summary = execute(mllm, ShapesDataset(limit=24), tmp_path / "run")
    assert summary["agreement"][2:] == [1.0] * (NUM_LAYERS - 1)
    assert summary["agreement"][0] < 0.5
    tokens = pd.read_parquet(tmp_path / "run" / "tokens.parquet")
    assert tokens.loc[tokens["exit_layer"] >= 2, "agree"].all()


@pytest.mark.parametrize("layer", [0, NUM_LAYERS])
def test_a_plant_at_either_end_is_no_finding(layer: int, tmp_path: Path):
    with planted(random_model(), layer) as mllm:
        summary = execute(mllm, ShapesDataset(limit=24), tmp_path / "run", "accuracy=false")
    assert summary["accuracy"] == [None] * (NUM_LAYERS + 1)
    assert "found" not in {finding["verdict"] for finding in summary["findings"].values()}


@pytest.mark.parametrize("scale", [None, 0.7, 1.5, 3.0])
@pytest.mark.parametrize("num_layers", [4, 12])
def test_random_weights_give_no_finding(scale: float | None, num_layers: int, tmp_path: Path):
    mllm = random_model(seed=num_layers, scale=scale, num_layers=num_layers)
    summary = execute(mllm, ShapesDataset(limit=40), tmp_path / "run", "max_new_tokens=1", "batch_size=20")
    assert "found" not in {finding["verdict"] for finding in summary["findings"].values()}
    assert "found" not in {kind["stops"]["verdict"] for kind in summary["kinds"].values()}


# A model that needs layers 0..4 of 12: without the image 30% of its answers are right, with it 90%.
RIGHT = np.array([0.3, 0.4, 0.5, 0.65, 0.8] + [0.9] * 8)
CHANGE = np.array([[0.1] * 12 + [0.0]])  # of the logits, by every exit


def questions(rng: np.random.Generator, right: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Correctness `[n, L + 1]` with the given rates (a question that an exit gets right stays right), and images."""
    return (rng.random(num)[:, None] < right).astype(float), np.arange(num) // 3


def stops(correct: np.ndarray, images: np.ndarray, **settings: Any) -> exit_statistics.ExitFinding:
    agree = (correct == correct[:, -1:]).astype(float)
    return exit_statistics.contribution_stops(correct, agree, CHANGE, ImageBootstrap(images, 200), **settings)


def test_the_layer_where_accuracy_settles_is_found():
    found = [stops(*questions(np.random.default_rng(seed), RIGHT, 400)) for seed in range(20)]
    assert {finding.verdict for finding in found} == {"found"}
    assert {finding.exit_layer for finding in found} == {5}
    assert all(finding.estimates["gain"][0] == pytest.approx(0.6, abs=0.1) for finding in found)


def test_a_loss_at_the_limit_is_rarely_taken_for_none():
    right = np.array([0.3] + [0.85] * 11 + [0.9])  # every exit loses the 5 points that must not pass
    found = [stops(*questions(np.random.default_rng(seed), right, 300)).verdict for seed in range(200)]
    assert found.count("found") <= 0.05 * 200 + 2 * (0.05 * 0.95 * 200) ** 0.5


def test_no_gain_through_the_image_is_no_finding():
    right = np.full(13, 0.5)
    correct, images = questions(np.random.default_rng(0), right, 400)
    finding = stops(correct, images)
    assert finding.verdict == "not_found"
    assert "not clearly better with the image" in finding.reasons[0]


def test_without_references_agreement_is_not_evidence():
    correct, images = questions(np.random.default_rng(0), RIGHT, 400)
    agree = (correct == correct[:, -1:]).astype(float)
    unknown, bootstrap = np.full_like(correct, np.nan), ImageBootstrap(images, 100)
    finding = exit_statistics.contribution_stops(unknown, agree, CHANGE, bootstrap)
    assert finding.verdict == "undetermined"
    assert "no references" in finding.reasons[0]
    assert finding.estimates["answers_settle"][0] == 5


def test_no_observed_loss_is_not_certainty():
    correct = np.ones((12, 13))
    _, upper = exit_statistics.one_sided_limits(1 - correct, ImageBootstrap(np.arange(12)), 0.95)
    assert (upper > 0.1).all()  # twelve images cannot exclude a loss of ten percent


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 1))
def test_the_settled_layer_is_the_first_from_which_all_are_within_the_limit(curve: list[float], limit: float):
    expected = next((k for k in range(len(curve)) if all(value <= limit for value in curve[k:])), len(curve))
    assert exit_statistics.settled_layer(np.array(curve), limit) == expected
    assert exit_statistics.settled_layer(np.array([curve, curve]), limit).tolist() == [expected] * 2


def test_k_star_lies_in_its_interval_and_the_interval_shrinks():
    rng = np.random.default_rng(0)
    mean = np.array([2.0, 1.0, 0.3, 0.2, 0.12, 0.1, 0.05, 0.01, 0.0])
    widths = []
    for num in (30, 3000):
        divergence = mean * rng.exponential(1.0, (num, 1))
        for each in exit_statistics.kl_exits(divergence, ImageBootstrap(np.arange(num), 200), [0.11, 1e-3], 2):
            assert each.layer == kl_exit_layer(torch.from_numpy(divergence.mean(0)), each.eta, 2)
            assert each.layer is not None
            low, high = each.interval
            assert low is not None
            assert high is not None
            assert low <= each.layer <= high
            widths.append(high - low)
    assert widths[0] > widths[2]
    (none,) = exit_statistics.kl_exits(np.full((12, 4), 0.5), ImageBootstrap(np.arange(12), 50), [0.1], 0)
    assert (none.layer, none.interval) == (None, [None, None])


def entropies(early: float, late: float, boundary: int, num_layers: int = 8, num: int = 60) -> np.ndarray:
    """E[k, l] of samples whose entropy 2.0 changes by these relative amounts after the exit."""
    noise = np.random.default_rng(0).normal(1, 0.2, (num, 1, 1))
    change = np.where(np.arange(num_layers + 1) < boundary, early, late)
    change[-1] = 0
    entropy = 2.0 + 2.0 * change[None, :, None] * noise * np.ones(num_layers)
    layers = np.arange(num_layers)
    after = (layers >= np.arange(num_layers + 1)[:, None]) | (np.arange(num_layers + 1)[:, None] == num_layers)
    return np.where(after, entropy, np.nan)


FLOOR = 0.1
"""How far another image moves an entropy of 2 nats, in nats; to either side."""


def swapped(num: int = 60, num_layers: int = 8) -> np.ndarray:
    return np.tile(2.0 + FLOOR * np.where(np.arange(num) % 2, 1, -1)[:, None], num_layers)


@pytest.mark.parametrize(
    ("early", "late", "verdict"),
    [
        (0.2, 0.01, "found"),
        (-0.2, -0.01, "found"),  # the direction does not matter, but is told
        (0.02, 0.01, "not_found"),
        (0.2, 0.2, "not_found"),
        (0.2, 0.0505, "undetermined"),
    ],
)
def test_entropy_is_disturbed_early_and_not_late(early: float, late: float, verdict: str):
    images = np.arange(60) // 2
    entropy = entropies(early, late, 3)
    finding = exit_statistics.early_exit_disturbs(entropy, swapped(), 3, ImageBootstrap(images, 200))
    assert finding.verdict == verdict
    assert finding.estimates["early_change"][0] == pytest.approx(2.0 * early, rel=0.15)
    assert finding.estimates["early_floor"][0] == pytest.approx(FLOOR)
    nowhere = exit_statistics.early_exit_disturbs(entropy, swapped(), None, ImageBootstrap(images))
    assert nowhere.verdict == "undetermined"
    nobody = exit_statistics.early_exit_disturbs(entropy, np.full((60, 8), np.nan), 3, ImageBootstrap(images))
    assert nobody.verdict == "undetermined"
    assert "no floor" in nobody.reasons[0]


def test_changes_that_cancel_are_no_change():
    """Absolute values would have called this a disturbance."""
    entropy = entropies(0.0, 0.0, 3)
    entropy[:, 0] += np.where(np.arange(60) % 2, 0.5, -0.5)[:, None]
    change = entropy_change(entropy, swapped(), np.ones((60, 9)), ImageBootstrap(np.arange(60), 50))
    assert np.abs(change["signed"].mean).max() < 1e-9
    np.testing.assert_allclose(change["floor"].mean, FLOOR)
    assert np.isnan(change["answers"].mean).all()  # no answer changed: nothing to correlate with


@given(st.integers(0, 2**31 - 1), st.integers(6, 40))
def test_the_link_to_answers_is_spearmans(seed: int, num: int):
    rng = np.random.default_rng(seed)
    values, changed = rng.normal(size=(num, 3)).round(1), (rng.random((num, 3)) < 0.5).astype(float)
    changed[0], changed[1] = 0, 1
    found = rank_correlation(values, changed, ImageBootstrap(np.arange(num), 20))
    for column in range(3):
        expected = spearmanr(values[:, column], changed[:, column]).statistic
        assert found.mean[column] == pytest.approx(expected, abs=1e-9)


def test_entropy_with_another_image_is_that_of_its_prompt(tmp_path: Path):
    mllm, data = random_model(), ShapesDataset(limit=6)
    execute(mllm, data, tmp_path / "run")
    table = pd.read_parquet(tmp_path / "run" / "entropy_swapped.parquet")
    samples = list(data)
    others = OtherImages(data).of(samples)
    row = next(index for index, image in enumerate(others) if image is not None)
    batch = mllm.encode([others[row]], [samples[row].question])
    sweep = exit_sweep(mllm, batch)
    found = table[table["id"] == samples[row].id].sort_values("layer")["text_entropy"]
    np.testing.assert_allclose(found, sweep.text_entropy[0, -1], atol=2e-5)


def test_exit_depth_by_kind_is_tested_within_images():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(60), 3)
    kinds = np.tile(["a", "b", "c"], 60)
    hard = rng.integers(0, 8, 60)[images]  # images differ far more than kinds do
    p_values = []
    for _ in range(60):
        depth = hard + rng.integers(0, 3, 180)
        finding = exit_statistics.depth_depends_on_kind(depth, kinds, images, True, n_perm=99)
        p_values.append(finding.estimates["p_value"])
    assert np.mean(np.array(p_values) <= 0.05) <= 0.15
    depth = hard + rng.integers(0, 3, 180) + (kinds == "c")
    finding = exit_statistics.depth_depends_on_kind(depth, kinds, images, True, n_perm=499)
    assert finding.verdict == "found"
    assert exit_statistics.depth_depends_on_kind(depth, kinds, images, False).verdict == "undetermined"


# ---------------------------------------------------------------- parts of the measurement


def test_rows_that_leave_together_answer_as_they_do_alone():
    mllm, data = random_model(), ShapesDataset(limit=6)
    samples = list(data)
    layers = [0, 3, 2, 0, 1, NUM_LAYERS]
    batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
    with FixedExit(layers)(mllm) as run:
        together = mllm.generate_ids(batch, max_new_tokens=4)
    assert run.exit_layers.tolist() == layers
    for sample, layer, answer in zip(samples, layers, together, strict=True):
        with FixedExit(layer)(mllm):
            assert mllm.generate_ids(mllm.encode([sample.image], [sample.question]), max_new_tokens=4) == [answer]


def test_a_generated_image_token_is_a_text_token_under_every_exit():
    mllm, samples = random_model(), list(ShapesDataset(limit=6))
    batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
    length, image = batch["input_ids"].shape[1], mllm.image_token_id
    word = mllm.generate_ids(batch, max_new_tokens=1)[0][0]
    for weight in (mllm.lm_head.weight, mllm.model.get_input_embeddings().weight):
        weight.data[image] = weight.data[word]  # to the decoder both are one token
    for layer in range(NUM_LAYERS + 1):
        with FixedExit(layer)(mllm):
            settings = {"max_new_tokens": 4, "do_sample": False}
            of_word, of_image = (
                mllm.model.generate(**batch, **settings, sequence_bias=[[[token], 1e-2]])[:, length:]
                for token in (word, image)
            )
            answers = mllm.generate_ids(batch, max_new_tokens=4, sequence_bias=[[[image], 1e-2]])
        assert torch.equal(of_image.masked_fill(of_image == image, word), of_word)
        ended = [row[: row.index(image) + 1] for row in of_image.tolist() if image in row]
        assert [answer for answer in answers if image in answer] == ended
    assert any(len(answer) < 4 for answer in ended)  # of the full model


def test_the_other_image_shows_another_scene():
    samples = list(ShapesDataset(limit=12))
    data = Samples([replace(samples[0], id="text", image=None, image_id="none"), *samples])
    other = OtherImages(data)
    scene = {sample.image.tobytes(): sample.image_id for sample in samples}
    for batch in (data.samples, samples[:2], samples[:1], samples[-1:]):  # the short ones show a single scene
        for sample, image in zip(batch, other.of(batch), strict=True):
            assert (image is None) == (sample.image is None)
            assert image is None or scene[image.tobytes()] != sample.image_id
    one_scene = Samples(samples[:2])
    assert one_scene[0].image_id == one_scene[1].image_id
    assert OtherImages(one_scene).of(one_scene.samples) == [None, None]


def test_the_change_of_the_logits_is_relative_and_ignores_ruled_out_tokens():
    full = torch.tensor([1.0, -1.0, 1.0, -1.0, -torch.inf])
    changed = full + torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0])
    logits = torch.stack([changed, full])[None] * 3 + 7
    assert logit_change(logits).tolist() == [[pytest.approx(0.5), 0.0]]


def test_captions_text_and_missing_references_are_kept_apart(tmp_path: Path):
    cfg = config(tmp_path / "run", "captions=4", "data.limit=16")
    data = questions_and_captions(cfg)
    samples = list(data)
    samples[3] = replace(samples[3], image=None)
    samples[5] = replace(samples[5], answer=None)
    summary = exits.run(cfg, random_model(), Samples(samples))
    assert summary is not None
    table = pd.read_parquet(tmp_path / "run" / "samples.parquet").set_index("id")
    assert len(table) == 20 == table.index.nunique()
    assert table["part"].value_counts().to_dict() == {"questions": 15, "captions": 4, "text_only": 1}
    assert (summary["num_questions"], summary["num_captions"], summary["num_without_image"]) == (15, 4, 1)
    assert table.loc[samples[3].id, ["exit_depth", "visual_tokens"]].tolist() == [0, 0]
    outcomes = pd.read_parquet(tmp_path / "run" / "exits.parquet")
    assert outcomes.loc[outcomes["id"] == samples[5].id, "correct"].isna().all()
    assert outcomes.loc[outcomes["id"] == samples[4].id, "correct"].notna().all()
    assert outcomes.loc[outcomes["id"] == samples[-1].id, "correct"].isna().all()  # captions have no right answer
    in_part = outcomes.merge(table.reset_index()[["id", "part"]], on="id")
    in_part = in_part[in_part["part"] == "questions"]
    assert summary["agreement"] == pytest.approx(in_part.groupby("exit_layer")["agree"].mean().tolist())
    assert set(summary["tokens"]) == {"questions"}  # four captions are too few for a curve


# ---------------------------------------------------------------- runs


def contents(folder: Path) -> dict[str, bytes]:
    """The tables of a run."""
    kept = [file for file in folder.rglob("*") if file.suffix in (".parquet", ".csv", ".jsonl")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in kept}


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mllm, data = random_model(), ShapesDataset(limit=24)
    execute(mllm, data, tmp_path / "whole")
    calls, measure = [], Measurement.__call__

    def interrupted(self: Measurement, samples: list[Sample]) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(samples)
        return measure(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute(mllm, data, tmp_path / "parts")
    execute(mllm, data, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_nan_logits_stop_the_run_and_lose_nothing(tmp_path: Path):
    mllm, data = random_model(), ShapesDataset(limit=24)
    good = mllm.lm_head.weight.detach().clone()
    shards = tmp_path / "run" / "shards"

    def break_later(*_: Any) -> None:
        if len(list(shards.glob("*"))) == 2:
            mllm.lm_head.weight.data.fill_(float("nan"))

    handle = mllm.lm_head.register_forward_pre_hook(break_later)
    with pytest.raises(ModelError, match=r"NaN among the logits of row \d+ under exit \d+ \(questions .* to .*float32"):
        execute(mllm, data, tmp_path / "run")
    handle.remove()
    assert len(list(shards.glob("*"))) == 2
    mllm.lm_head.weight.data.copy_(good)
    assert execute(mllm, data, tmp_path / "run")["num_samples"] == 24


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kl_start=5", r"kl_start is 5; this model has exit layers 0\.\.4"),
        ("kl_start=-1", r"exit layers 0\.\.4"),
        ("max_new_tokens=0", "answers would be empty"),
        ("captions=-1", "captions is -1"),
        ("etas=[]", "etas"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path: Path, override: str, message: str):
    cfg = config(tmp_path / "run", override)
    with pytest.raises(ConfigError, match=message):
        exits.run(cfg, random_model(), questions_and_captions(cfg))
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_driven_is_refused_before_anything_is_written(tmp_path: Path):
    mllm = random_model()
    mllm.text_config.layer_types = ["hybrid"] * NUM_LAYERS
    with pytest.raises(UnsupportedError, match="hybrid"):
        exits.run(config(tmp_path / "run"), mllm, ShapesDataset(limit=8))
    assert not (tmp_path / "run").exists()


def test_data_without_images_are_refused(tmp_path: Path):
    data = Samples([replace(sample, image=None) for sample in ShapesDataset(limit=8)])
    with pytest.raises(ConfigError, match="no question of data=shapes has an image"):
        execute(random_model(), data, tmp_path / "run")


def test_the_command_writes_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mllm = random_model()
    mllm.model.save_pretrained(tmp_path / "model")
    mllm.processor.save_pretrained(tmp_path / "model")
    with printed():
        exits.main(config(tmp_path / "run", f"model.path={tmp_path / 'model'}", "data.limit=16", "captions=10"))
    assert "K* (first exit with KL at most eta)" in capsys.readouterr().out
    assert intervals_of_zero_width(tmp_path / "run") == []
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("accuracy", "agreement", "kl", "flops_total", "flops_decoder"):
        assert len(summary[name]) == NUM_LAYERS + 1, name
    assert set(summary["k_star"]) == {"0.1", "0.03", "0.01", "0.003", "0.0005", "0.0001"}
    for name in summary["figures"]:
        assert (tmp_path / "run" / "figures" / f"{name}.png").is_file()
        assert (tmp_path / "run" / "figures" / f"{name}.pdf").is_file()
    assert set(summary["figures"]) == {
        "exits", "kinds", "kl", "entropy", "entropy_change", "exit_depth", "tokens"
    }  # fmt: skip
