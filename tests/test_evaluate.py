"""`dyvte.train`, `dyvte.evaluate` and `dyvte.generate`: what they write is what a plain loop finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from forked import as_torchrun, start_forked
from intervals import intervals_of_zero_width
from omegaconf import DictConfig
from PIL import Image
from torch import nn

import dyvte.gates.labels
from dyvte.calibrate import build_policy
from dyvte.cost.exit_flops import exit_flops
from dyvte.data.metrics import exact_match
from dyvte.data.shapes import ShapesDataset
from dyvte.errors import ConfigError, DataError, ModelError, RunFolderError
from dyvte.evaluate import _print, evaluate, evaluate_batch, figures, prompt_costs
from dyvte.gates import Gates
from dyvte.gates.every_exit import PromptCosts
from dyvte.gates.labels import LabelSet, LabelSettings, label_batch
from dyvte.generate import generate
from dyvte.instrument.sweep import exit_sweep, greedy_answer_ids
from dyvte.loading import load
from dyvte.mllm import MLLM
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.policies.exits.fixed_exit import FixedExit
from dyvte.policies.exits.vtw import VTW
from dyvte.policies.pruning.fitprune import FitPrune, Recipe
from dyvte.policies.unchanged import Unchanged
from dyvte.runs.config import HYDRA_VERSION, compose, config_folder
from dyvte.runs.store import RunFolder
from dyvte.testbed.model import TestbedSizes, build_model
from dyvte.testbed.tokenizer import build_processor
from dyvte.train import train

LAYERS, TOKENS = 4, 3


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random testbed on disk, its weights large enough for the image to matter."""
    sizes = TestbedSizes(
        patch_size=32, vision_layers=1, vision_width=32, vision_heads=2, layers=LAYERS, width=48, heads=2, mlp_width=64
    )
    model = build_model(sizes, 0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    build_processor(sizes.patch_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mllm(model_folder: Path) -> MLLM:
    return load(model_folder, device="cpu")


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of one training run."""
    folder = tmp_path_factory.mktemp("train")
    train(train_config(folder, model_folder))
    return folder


def train_config(folder: Path, model: Path, *overrides: str) -> DictConfig:
    settings = [
        "model=hf",
        f"model.path={model}",
        "device=cpu",
        "data.limit=48",
        "batch_size=8",
        f"labels.max_new_tokens={TOKENS}",
        f"labels.dir={folder}/labels",
        f"output_dir={folder}/run",
        "recipe.training.epochs=4",
        "recipe.training.members=2",
        "recipe.bound=0.95",  # what so few questions can show
    ]
    return compose("train", [*settings, *overrides])


def evaluate_config(folder: Path, model: Path, *overrides: str) -> DictConfig:
    settings = [
        "model=hf",
        f"model.path={model}",
        "device=cpu",
        "data.limit=18",
        "batch_size=8",
        f"max_new_tokens={TOKENS}",
        f"comparison_dir={folder}",
        f"reference_dir={folder}/.reference",
    ]
    return compose("evaluate", [*settings, *overrides])


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ----------------------------------------------------------------------- labels


def test_labels_are_what_a_loop_over_exits_finds(mllm: MLLM, trained: Path) -> None:
    labels = LabelSet(RunFolder(trained / "labels"))
    dataset = ShapesDataset("train", 48)
    for row in (0, 7, 20):
        sample = dataset[row]
        batch = mllm.encode([sample.image], [sample.question])
        full = mllm.generate_ids(batch, max_new_tokens=TOKENS)
        assert labels.samples["id"][row] == sample.id
        assert labels.samples["answer"][row] == mllm.decode(full)[0]
        for k in range(LAYERS + 1):
            with FixedExit(k)(mllm):
                assert bool(labels.agree[row, k]) == (mllm.generate_ids(batch, max_new_tokens=TOKENS) == full)
        sweep = exit_sweep(mllm, batch, greedy_answer_ids(mllm, batch, TOKENS))
        torch.testing.assert_close(labels.nll[row], sweep.nll[0], atol=1e-4, rtol=1e-4)
        status = labels.status(["text_mean", "text_last"])[row]
        torch.testing.assert_close(status, sweep.text_status[0, :-1], atol=1e-4, rtol=1e-4)
        assert labels.flops[row].tolist() == [count.decoder for count in exit_flops(mllm, batch)]


def test_no_rate_has_an_interval_without_width(trained: Path, evaluated: Path) -> None:
    assert intervals_of_zero_width(trained) + intervals_of_zero_width(evaluated) == []


def test_label_rules_nest(trained: Path) -> None:
    labels = LabelSet(RunFolder(trained / "labels"))
    agree, stable, paper = (labels.labels(rule) for rule in ("agree", "stable", "paper"))
    assert (stable <= agree).all()
    assert (paper <= agree).all()
    assert (labels.labels("paper", ratio=1.0, eps=0.0) <= paper).all()
    assert stable[:, -1].all()
    assert not stable.all()
    for row in range(len(labels)):
        assert stable[row].tolist() == [bool(agree[row, k:].all()) for k in range(LAYERS + 1)]
    with pytest.raises(ConfigError, match="truth_agree"):
        labels.labels("release")
    with pytest.raises(ConfigError, match="choose from stable, agree, paper, release"):
        labels.labels("best")


def test_question_status_does_not_see_the_image(trained: Path) -> None:
    labels = LabelSet(RunFolder(trained / "labels"))
    words = labels.samples["question"].to_numpy()
    (status,) = {tuple(each.shape) for each in labels.status(["question"]).unsqueeze(0)}
    assert status == (len(labels), LAYERS - 1, 48)
    told = labels.status(["question"])[:, 0]
    same = [(i, j) for i in range(len(words)) for j in range(i) if words[i] == words[j]]
    assert same, "the data should repeat a question about another image"
    for i, j in same:
        torch.testing.assert_close(told[i], told[j], atol=1e-4, rtol=1e-4)


def test_interrupted_labels_go_on_where_they_were(model_folder: Path, trained: Path, tmp_path: Path) -> None:
    once = dyvte.gates.labels.label_batch
    calls = 0

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return once(*args, **kwargs)

    cfg = train_config(tmp_path, model_folder)
    with mock.patch.object(dyvte.gates.labels, "label_batch", dies), pytest.raises(KeyboardInterrupt):
        train(cfg)
    assert not (tmp_path / "run").exists()
    train(cfg)
    uninterrupted = everything_in(trained / "labels" / "shards")
    resumed = everything_in(tmp_path / "labels" / "shards")
    assert calls == 3
    for name, content in uninterrupted.items():
        if not name.endswith("shard.json"):  # which holds the time that the batch took
            assert resumed[name] == content, name
    assert everything_in(trained / "run" / "gates") == everything_in(tmp_path / "run" / "gates")


def test_labels_of_another_model_are_refused(trained: Path, tmp_path: Path) -> None:
    other = build_model(
        TestbedSizes(patch_size=32, vision_layers=1, vision_width=32, vision_heads=2, layers=LAYERS, width=48, heads=2,
                     mlp_width=64), seed=1
    )  # fmt: skip
    other.save_pretrained(tmp_path)
    build_processor(32).save_pretrained(tmp_path)
    with pytest.raises(RunFolderError, match=r"model\.weights was"):
        train(train_config(trained, tmp_path))


def test_answers_with_a_tie_are_the_full_models_under_exit_l(model_folder: Path) -> None:
    mllm = load(model_folder, device="cpu")
    half = len(mllm.lm_head.weight) // 2
    mllm.lm_head.weight.data[half : 2 * half] = mllm.lm_head.weight.data[:half]  # every token has a twin
    # generation prefers the one, as rounding might, and the sweep, which takes the first, the other
    mllm.model.generation_config.sequence_bias = [[[token], 1e-2] for token in range(half, 2 * half)]
    samples = list(ShapesDataset("test", 8))
    exits = label_batch(mllm, samples, LabelSettings(TOKENS, status=("text_last",)), PromptCosts(mllm))["exits"]
    agreement = pd.DataFrame(exits).groupby("exit_layer")["agree"].mean()
    assert agreement[LAYERS] == 1 > agreement[0]


# ---------------------------------------------------------------------- training


def test_training_writes_gates_report_and_log(mllm: MLLM, trained: Path) -> None:
    run = trained / "run"
    gates = Gates.from_pretrained(run / "gates")
    gates.check(mllm)
    summary = json.loads((run / "summary.json").read_text())
    assert sum(summary[f"{part}_questions"] for part in ("train", "stopping", "validation")) == 48
    assert 0 < summary["cost"] <= 1  # below the oracle's, which keeps every answer: the bound is loose
    assert 0 < summary["cost_of_oracle"] <= 1
    report = pd.read_csv(run / "layers.csv")
    assert list(report["exit_layer"]) == list(range(1, LAYERS))
    assert {"precision", "recall", "exit_rate", "calibration_error"} <= set(report)
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert Gates.from_pretrained(run / "gates" / "question_only").status == ("question",)
    assert str(summary["train_questions"]) in (run / "gates" / "README.md").read_text()


def test_the_split_keeps_images_together(trained: Path, model_folder: Path) -> None:
    from dyvte.train import split_labels

    labels = LabelSet(RunFolder(trained / "labels"))
    split = split_labels(labels, train_config(trained, model_folder))
    assert not set(split.column("image_id", split.train)) & set(split.column("image_id", split.validation))
    fewer = split_labels(labels, train_config(trained, model_folder, "train_samples=5"))
    assert torch.equal(fewer.validation, split.validation)
    assert torch.equal(fewer.train, split.train[:5])


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_published_recipes_train(recipe: str, model_folder: Path, tmp_path: Path) -> None:
    gates = train(train_config(tmp_path, model_folder, f"recipe={recipe}", "labels.ground_truth=true", "data.limit=16"))
    assert gates is not None
    assert set(gates.thresholds()) == {0.5}
    assert gates.inner_bias is None
    assert not gates.shift.any()


def test_too_few_questions_are_refused_with_what_would_do(model_folder: Path, trained: Path, tmp_path: Path) -> None:
    """Gates that could never exit are not trained, let alone saved."""
    refused = train_config(tmp_path, model_folder, f"labels.dir={trained}/labels", "recipe.bound=0.01")
    with pytest.raises(
        DataError, match=r"gates not trained: \d+ validation images cannot .* \d+ can, about \d+ questions"
    ):
        train(refused)
    assert not (tmp_path / "run" / "gates").exists()
    settings = [f"labels.dir={trained}/labels", "recipe.bound=0.01", "recipe.threshold=0.9"]
    chosen = train_config(tmp_path / "chosen", model_folder, *settings)
    assert train(chosen) is not None


def test_two_processes_give_what_one_gives(model_folder: Path, trained: Path, tmp_path: Path) -> None:
    settings = [
        "model=hf", f"model.path={model_folder}", "device=cpu", "data.limit=48", "batch_size=8",
        f"labels.max_new_tokens={TOKENS}", f"labels.dir={tmp_path}/labels", f"output_dir={tmp_path}/run",
        "recipe.training.epochs=1", "recipe.bound=0.95",
    ]  # fmt: skip
    started = [start_forked("dyvte.train", settings, tmp_path, place) for place in as_torchrun(2)]
    first, second = (finish() for finish in started)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-2000:] + second.stderr[-2000:]
    assert "24 of 24 samples" in first.stderr, "the first process should have half of the questions"
    one, two = LabelSet(RunFolder(trained / "labels")), LabelSet(RunFolder(tmp_path / "labels"))
    pd.testing.assert_frame_equal(one.samples, two.samples)
    assert torch.equal(one.agree, two.agree)
    torch.testing.assert_close(one.nll, two.nll, atol=1e-5, rtol=1e-5)
    parts = ["text_mean", "text_last", "image_mean", "image_last"]
    torch.testing.assert_close(one.status(parts), two.status(parts), atol=1e-5, rtol=1e-5)
    assert (tmp_path / "run" / "gates" / "model.safetensors").is_file()


# -------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def evaluated(model_folder: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Comparison folder of three policies."""
    folder = tmp_path_factory.mktemp("evaluate")
    evaluate(evaluate_config(folder, model_folder))
    evaluate(evaluate_config(folder, model_folder, "policy=fixed_exit", "policy.layer=2"))
    gates = f"policy.gates={trained}/run/gates"
    evaluate(evaluate_config(folder, model_folder, "policy=dynamic_exit", gates, "policy.threshold=0.6"))
    return folder


def summary_of(folder: Path, policy: str) -> dict[str, Any]:
    return json.loads((folder / policy / "summary.json").read_text())


def test_evaluation_agrees_with_a_plain_loop(mllm: MLLM, trained: Path, evaluated: Path) -> None:
    summary, table = summary_of(evaluated, "dynamic_exit"), pd.read_parquet(evaluated / "dynamic_exit/samples.parquet")
    policy = DynamicExit(str(trained / "run" / "gates"), threshold=0.6)
    correct, agree, exits, flops = [], [], [], []
    for sample in ShapesDataset("test", 18):
        batch = mllm.encode([sample.image], [sample.question])
        (full,) = mllm.generate(batch, max_new_tokens=TOKENS)
        with policy(mllm) as active:
            (answer,) = mllm.generate(batch, max_new_tokens=TOKENS)
        correct.append(exact_match(str(answer), str(sample.answer)))
        agree.append(answer == full)
        exits.append(int(active.exit_layers[0]))
        flops.append(exit_flops(mllm, batch)[exits[-1]].decoder)
    assert table["exit_layer"].tolist() == exits
    assert len(set(exits)) > 1
    assert table["agree"].tolist() == agree
    assert table["flops_decoder"].tolist() == flops
    assert summary["accuracy"] == pytest.approx(np.mean(correct))
    assert summary["agreement"] == pytest.approx(np.mean(agree))
    assert summary["mean_exit_layer"] == pytest.approx(np.mean(exits))
    assert summary["flops_total"] > summary["flops_decoder"] == pytest.approx(np.mean(flops))
    assert summary["exit_layers"] == np.bincount(exits, minlength=LAYERS + 1).tolist()
    per_kind = [(each["num_questions"], each["agreement"]) for each in summary["kinds"].values()]
    assert sum(number * value for number, value in per_kind) == pytest.approx(sum(agree))


def test_no_image_is_prepared_twice_for_the_answers_of_all_exits(model_folder: Path) -> None:
    mllm, samples = load(model_folder, device="cpu"), list(ShapesDataset("test", 8))
    settings, costs = LabelSettings(TOKENS, ("text_last",), answers=True), PromptCosts(mllm)
    first = pd.DataFrame(label_batch(mllm, samples, settings, costs)["exits"])
    assert not first["agree"].all()  # some exit has an answer of its own, which is generated
    with mock.patch.object(mllm, "encode", wraps=mllm.encode) as encode:
        label_batch(mllm, samples, settings, costs)
    assert encode.call_count == 1


def test_an_answer_ends_at_a_generated_image_under_every_exit(model_folder: Path) -> None:
    mllm, samples = load(model_folder, device="cpu"), list(ShapesDataset("test", 8))
    batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
    word = mllm.generate_ids(batch, max_new_tokens=1)[0][0]
    mllm.lm_head.weight.data[mllm.image_token_id] = 2 * mllm.lm_head.weight.data[word]
    answer_ids = mllm.generate_ids(batch, max_new_tokens=TOKENS)
    assert any(ids[-1] == mllm.image_token_id and len(ids) < TOKENS for ids in answer_ids)
    exits = pd.DataFrame(
        label_batch(mllm, samples, LabelSettings(TOKENS, ("text_last",), answers=True), PromptCosts(mllm))["exits"]
    )
    for layer in range(LAYERS + 1):
        policy = Unchanged() if layer == LAYERS else FixedExit(layer)
        answers = evaluate_batch(mllm, policy, samples, TOKENS, prompt_costs(mllm, policy))["answers"]["answer"]
        assert answers.tolist() == exits.loc[exits["exit_layer"] == layer, "answer"].tolist(), layer


def test_the_unchanged_model_agrees_with_itself(evaluated: Path) -> None:
    summary = summary_of(evaluated, "none")
    assert (summary["agreement"], summary["accuracy_loss"], summary["cost"]) == (1, 0, 1)
    assert summary["mean_exit_layer"] == LAYERS
    assert summary["prefill_ms"] > 0


@pytest.mark.parametrize("references", ["none", "some", "all"])
@pytest.mark.parametrize("kind", ["all", "", None, "count"])
def test_missing_references_and_odd_kinds_change_nothing_else(
    references: str, kind: str | None, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = LabelSet(RunFolder(trained / "labels"))
    n, full = len(labels), labels.num_layers
    odd = np.arange(n) % 2 == 0
    correct = {"none": np.full(n, np.nan), "some": np.where(odd, 1.0, np.nan), "all": np.ones(n)}[references]
    answers = pd.DataFrame(
        {
            **{"id": labels.samples["id"], "image_id": labels.samples["image_id"], "kind": kind},
            **{"correct": correct, "full_correct": correct, "agree": True, "exit_layer": full},
            **{"flops_total": 2.0, "flops_decoder": labels.flops[:, -1].double().numpy(), "new_tokens": 1.0},
            "kv_cache_bytes": 1.0,
        }
    )
    found = figures(answers, labels)
    known = {"none": 0, "some": int(odd.sum()), "all": n}[references]
    assert (found["num_questions"], found["num_references"]) == (n, known)
    assert (found["agreement"], found["cost"]) == (1, pytest.approx(1))
    assert found["agreement_ci"][0] < 1
    if known:
        assert (found["accuracy"], found["full_accuracy"], found["accuracy_loss"]) == (1, 1, 0)
        assert found["accuracy_ci"][0] < 1
        assert found["accuracy_loss_ci"][0] < 0 < found["accuracy_loss_ci"][1]
    else:
        assert found["accuracy"] is found["accuracy_ci"] is found["full_accuracy"] is None
    _print({**found, "kinds": {str(kind): found}})
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("all questions")
    assert printed[2].startswith(f"kind {str(kind)!r}")


@pytest.mark.parametrize("answered", [0, 3])
def test_a_whole_evaluation_without_references_or_with_some(
    answered: int, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From LLaVA's own evaluation file, which holds no answers, to the comparison of two policies."""
    lines = []
    for index, sample in enumerate(ShapesDataset("test", 6)):
        sample.image.save(tmp_path / f"{index}.png")
        line = {"question_id": index, "image": f"{index}.png", "text": sample.question}
        lines.append(json.dumps(line | ({"answer": sample.answer} if index < answered else {})))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    data = ["data=llava_json", f"data.file={tmp_path}/questions.jsonl", f"data.image_folder={tmp_path}", "data.limit=6"]
    for policy in ([], ["policy=fixed_exit", "policy.layer=2"]):
        summary = evaluate(evaluate_config(tmp_path / "runs", model_folder, *data, *policy))
        assert summary is not None
        assert (summary["num_samples"], summary["num_references"]) == (6, answered)
        assert (summary["accuracy"] is None) == (answered == 0)
        assert 0 <= summary["agreement"] <= 1
    text = (tmp_path / "runs" / "fixed_exit_2" / "summary.json").read_text()
    assert "NaN" not in text
    assert len(pd.read_csv(tmp_path / "runs" / "comparison.csv")) >= 2
    printed = capsys.readouterr().out
    assert ("no question has a reference" in printed) == (answered == 0)


def test_a_fixed_exit_is_a_point_of_the_fixed_exits(evaluated: Path) -> None:
    summary = summary_of(evaluated, "fixed_exit_2")
    row = pd.read_csv(evaluated / "fixed_exit_2" / "fixed_exits.csv").iloc[2]
    for column in ("accuracy", "agreement", "cost", "flops_decoder"):
        assert summary[column] == pytest.approx(row[column], rel=1e-6), column
    assert summary["kv_cache_bytes"] < summary_of(evaluated, "none")["kv_cache_bytes"]
    assert summary["cost_of_fixed_exits"] <= summary["cost"] + 1e-9


def test_comparison_holds_every_policy_and_its_controls(evaluated: Path) -> None:
    table = pd.read_csv(evaluated / "comparison.csv").set_index("policy")
    controls = ["permuted", "permuted within kind", "fixed exit", "fixed exit by kind", "question only"]
    assert set(table.index) == {"none", "fixed_exit_2", "dynamic_exit", *(f"dynamic_exit: {name}" for name in controls)}
    assert table.loc["dynamic_exit: permuted", "cost"] == pytest.approx(table.loc["dynamic_exit", "cost"], rel=0.02)
    assert (evaluated / "figures" / "accuracy_against_flops.png").is_file()
    hops = pd.read_csv(evaluated / "dynamic_exit" / "hops.csv")
    assert set(hops["hops"]) == {0, 1, 2, 3}


def test_answer_file_has_the_format_of_llava(evaluated: Path) -> None:
    lines = [json.loads(line) for line in (evaluated / "none" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    assert set(lines[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


def test_wrong_gates_are_refused_before_the_work(model_folder: Path, tmp_path: Path) -> None:
    Gates(LAYERS + 1, 48).save_pretrained(tmp_path / "gates")
    with pytest.raises(ModelError, match="these gates are for a model of 5 layers"):
        evaluate(evaluate_config(tmp_path, model_folder, "policy=dynamic_exit", f"policy.gates={tmp_path}/gates"))
    assert not (tmp_path / ".reference").exists()


# ------------------------------------------------------------------- calibration


@pytest.mark.parametrize(("policy", "setting"), [("vtw", "layer"), ("fitprune", "recipe")])
def test_an_open_setting_is_calibrated_kept_and_reused(
    policy: str, setting: str, mllm: MLLM, model_folder: Path, evaluated: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    of_policy = {"vtw": ["eta=0.2", "start=0"], "fitprune": ["budget=0.9"]}
    calibrate = [f"policy.calibrate.{each}" for each in of_policy[policy]]
    chosen = [f"policy={policy}", f"reference_dir={evaluated}/.reference", "calibration.data.limit=5", *calibrate]
    evaluate(evaluate_config(tmp_path, model_folder, *chosen))
    assert f"{policy} calibrated on 5 prompts of shapes_validation: {setting}" in capsys.readouterr().out
    file = tmp_path / policy / "calibration.json"
    found = json.loads(file.read_text())["found"][setting]
    samples = list(ShapesDataset("validation", 5))
    batch = mllm.encode([each.image for each in samples], [each.question for each in samples])
    if policy == "vtw":
        assert found == VTW.calibrate(mllm, [batch], 0.2, 0).layer
        assert 0 < found < LAYERS
        assert summary_of(tmp_path, policy)["mean_exit_layer"] == found
    else:
        assert Recipe(**found) == FitPrune.fit(mllm, [batch], 0.9).recipe == Recipe.load(file)
        assert summary_of(tmp_path, policy)["cost"] < 0.95

    with mock.patch.object(VTW, "calibrate", side_effect=AssertionError), mock.patch.object(FitPrune, "fit"):
        evaluate(evaluate_config(tmp_path, model_folder, *chosen))
    assert f"calibrated before, on 5 prompts: {setting}" in capsys.readouterr().out
    with pytest.raises(RunFolderError, match=r"calibration\.data\.limit was 5, is 4"):
        evaluate(evaluate_config(tmp_path, model_folder, *chosen, "calibration.data.limit=4"))

    common = ["model=hf", f"model.path={model_folder}", "device=cpu", f"policy={policy}", "batch_size=8", *calibrate]
    own = [f"output_dir={tmp_path}/generate", f"max_new_tokens={TOKENS}", "calibration.data.limit=5"]
    summary = generate(compose("generate", [*common, *own]))
    assert json.loads((tmp_path / "generate" / "calibration.json").read_text())["found"][setting] == found
    assert summary["exit_layer"] == (found if policy == "vtw" else LAYERS)
    generate(compose("generate", [*common, *own, "calibration.data.limit=6"]))
    assert "calibrated on 6 prompts" in capsys.readouterr().out


def test_a_setting_that_is_given_is_not_calibrated(model_folder: Path, evaluated: Path, tmp_path: Path) -> None:
    chosen = ["policy=vtw", "policy.layer=2", f"reference_dir={evaluated}/.reference"]
    evaluate(evaluate_config(tmp_path, model_folder, *chosen))
    assert summary_of(tmp_path, "vtw_2")["mean_exit_layer"] == 2
    assert not (tmp_path / "vtw_2" / "calibration.json").exists()
    with pytest.raises(ConfigError, match=r"policy vtw needs policy\.layer="):
        build_policy(compose("evaluate", ["policy=vtw"]).policy)


# ---------------------------------------------------------------------- generate


def test_generate_answers_one_question_and_draws_its_exit(
    mllm: MLLM, model_folder: Path, trained: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (96, 96), "red").save(tmp_path / "red.png")
    common = ["model=hf", f"model.path={model_folder}", "device=cpu", f"policy.gates={trained}/run/gates"]
    image = f"image={tmp_path}/red.png"
    own = [image, "question=what color ?", f"output_dir={tmp_path}/out", f"max_new_tokens={TOKENS}"]
    cfg = compose("generate", [*common, *own])
    summary = generate(cfg)
    batch = mllm.encode([Image.new("RGB", (96, 96), "red")], ["what color ?"])
    with DynamicExit(str(trained / "run" / "gates"))(mllm) as active:
        assert [summary["answer"]] == mllm.generate(batch, max_new_tokens=TOKENS)
    assert summary["exit_layer"] == int(active.exit_layers[0])
    assert (tmp_path / "out" / "figures" / "exit.png").is_file()
    for wrong, message in (
        (["image=nowhere.png", "question=x"], "not found"),
        ([image], "no question"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(compose("generate", [*common, *wrong]))


# ------------------------------------------------------------------------- Slurm


def test_a_slurm_sweep_composes() -> Iterator[None] | None:
    with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(config_folder())):
        cfg = hydra.compose("train", ["hydra/launcher=slurm", "ablation=status"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith("SlurmLauncher")
    assert cfg.hydra.launcher.gpus_per_node == 1
    assert "image_last" in cfg.hydra.sweeper.params["recipe.status"]
