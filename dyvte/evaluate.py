"""`python -m dyvte.evaluate policy=...`: what a policy costs in answers and saves in computation."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dyvte.batch import Batch
from dyvte.calibrate import build_policy, calibrated_policy, calibration_of, open_settings
from dyvte.cost.flops import FlopCount, prefill_flops
from dyvte.cost.measure import measure_generation, peak_memory_bytes
from dyvte.data.base import Dataset, Sample, build_dataset, sample_columns
from dyvte.data.metrics import correctness
from dyvte.gates.controls import control_exits, exits_by_hops
from dyvte.gates.every_exit import PromptCosts
from dyvte.gates.features import QUESTION
from dyvte.gates.labels import LabelSet, LabelSettings, collect_labels, label_fingerprint
from dyvte.gates.metrics import at_exit, cluster_interval, mixture_cost, share_interval
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.policies.unchanged import Unchanged
from dyvte.runs import distributed
from dyvte.runs.config import command, load_model
from dyvte.runs.figures import accuracy_against_flops
from dyvte.runs.fingerprint import json_digest
from dyvte.runs.runner import consecutive_batches, run
from dyvte.runs.store import RunFolder, fingerprint, write_atomic


@command("evaluate")
def main(cfg: DictConfig) -> str | None:
    """Evaluate the policy that `conf/evaluate.yaml` names."""
    summary = evaluate(cfg)
    return policy_in_words(summary) if summary else None


def evaluate(cfg: DictConfig) -> dict[str, Any] | None:
    """Run the policy over the data and compare with the full model and with every fixed exit.

    Gives the summary; None in all processes but the first.
    """
    mllm = load_model(cfg)
    dataset = build_dataset(cfg.data)
    to_calibrate = bool(open_settings(cfg.policy))
    policy = Unchanged() if to_calibrate else build_policy(cfg.policy)
    policy.check(mllm)  # before an hour of labels
    reference = reference_labels(mllm, dataset, cfg)
    settings = {"policy": OmegaConf.to_container(cfg.policy, resolve=True), "max_new_tokens": cfg.max_new_tokens}
    if to_calibrate:  # the setting follows from this, and its file lies in the folder that is yet to be opened
        settings["calibration"] = calibration_of(mllm, cfg)
    else:
        settings["policy_state"] = policy_digest(policy)
    folder = RunFolder.open(cfg.output_dir, fingerprint(mllm, dataset, cfg, **settings), cfg, cfg.overwrite)
    if to_calibrate:
        policy = calibrated_policy(mllm, cfg, folder.path)
    costs = prompt_costs(mllm, policy)
    compute = functools.partial(evaluate_batch, mllm, policy, max_new_tokens=cfg.max_new_tokens, costs=costs)
    run(folder, dataset, consecutive_batches(len(dataset), cfg.batch_size), compute, cfg.policy.name)
    if not distributed.is_main():
        return None
    columns = {"answer": "full_answer", "correct": "full_correct"}
    full_model = reference.samples[["id", *columns]].rename(columns=columns)
    answers = folder.read_table("answers").merge(full_model, on="id", validate="one_to_one")
    answers["agree"] = answers["answer"] == answers["full_answer"]
    folder.write_table("samples", answers)
    write_answer_file(folder.path / "answers.jsonl", answers, cfg.model.name)
    fixed = fixed_exit_table(reference)
    folder.write_table("fixed_exits", fixed)
    if isinstance(policy, DynamicExit):
        folder.write_table("controls", control_table(policy, cfg.policy.gates, answers, reference))
    if (hops := exits_by_hops(answers, reference)) is not None:
        folder.write_table("hops", hops)
    kinds = {str(kind): figures(rows, reference) for kind, rows in answers.fillna({"kind": ""}).groupby("kind")}
    folder.write_table("kinds", pd.DataFrame([{"kind": kind, **_scalars(each)} for kind, each in kinds.items()]))
    summary = folder.write_summary(
        model=cfg.model.name,
        data=cfg.data.name,
        num_layers=mllm.num_layers,
        policy=cfg.policy.name,
        reference=reference.folder.path.name,
        **figures(answers, reference),
        **_timing(folder.read_table("batches")),
        device=str(mllm.device),
        kinds=kinds,
    )
    _print(summary)
    if folder.path.parent == Path(cfg.comparison_dir):
        compare(Path(cfg.comparison_dir), reference, fixed)
    return summary


def reference_labels(mllm: MLLM, dataset: Dataset, cfg: DictConfig, status: tuple[str, ...] = (QUESTION,)) -> LabelSet:
    """The full model's answers and what every fixed exit makes of them, made once for a model and data.

    The set is kept under `cfg.reference_dir`; `status` parts are as of `dyvte.gates.labels.LabelSettings`.
    """
    settings = LabelSettings(cfg.max_new_tokens, status=status, answers=True)
    made_of = json_digest(label_fingerprint(mllm, dataset, cfg, settings))[:12]
    path = Path(cfg.reference_dir) / f"{cfg.model.name}-{cfg.data.name}-{made_of}"
    return collect_labels(mllm, dataset, cfg, path, settings, "full model and every exit")


def policy_digest(policy: Policy) -> str:
    """Digest of the weights that a policy holds (its settings are in the configuration)."""
    digest = hashlib.sha256()
    for value in vars(policy).values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Policy):  # of a composition
                digest.update(policy_digest(part).encode())
            elif is_dataclass(part):  # what was read from a file, as a pruning recipe
                digest.update(repr(part).encode())
        if isinstance(value, torch.nn.Module):
            digest.update(repr(getattr(value, "threshold", None)).encode())
            for name, tensor in value.state_dict().items():
                digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fixed_exit_table(reference: LabelSet) -> pd.DataFrame:
    """One row a fixed exit: decoder FLOPs, accuracy and agreement."""
    flops = reference.flops.double().mean(0)
    return pd.DataFrame(
        {
            "exit_layer": np.arange(reference.num_layers + 1),
            "flops_decoder": flops.numpy(),
            "cost": (flops / flops[-1]).numpy(),
            "accuracy": reference.correct.nanmean(0).numpy(),
            "agreement": reference.agree.double().mean(0).numpy(),
        }
    )


def control_table(policy: DynamicExit, source: str, answers: pd.DataFrame, reference: LabelSet) -> pd.DataFrame:
    """Controls of dynamic exits, one row each in the columns of the comparison; none of them runs the model again."""
    controls = control_exits(policy, source, answers, reference)
    return pd.DataFrame(
        [{"policy": name, **expected_figures(share, answers, reference)} for name, share in controls.items()]
    )


def expected_figures(share: Tensor, answers: pd.DataFrame, reference: LabelSet) -> dict[str, Any]:
    """What questions come to, in the columns of the comparison, if each leaves at every layer with some probability.

    `share` [n, L + 1] are the probabilities; its rows sum to 1.
    """
    rows = reference.rows_of(answers)
    images = answers["image_id"].tolist()

    def expected(values: Tensor) -> Tensor:
        return (share * values[rows].double()).sum(1)

    row: dict[str, Any] = {
        "num_questions": len(answers),
        "mean_exit_layer": float((share * torch.arange(reference.num_layers + 1)).sum(1).mean()),
        "flops_decoder": float(expected(reference.flops).mean()),
        "cost": float(expected(reference.flops).mean() / reference.flops[rows, -1].double().mean()),
    }
    correct = _correctness(expected(reference.correct), reference.correct[rows, -1].double(), images)
    row |= _flat_intervals(correct | _with_interval("agreement", expected(reference.agree), images))
    flops, agree = reference.flops[rows].double().mean(0), reference.agree[rows].double().mean(0)
    row["cost_of_fixed_exits"] = mixture_cost(flops / flops[-1], agree, row["agreement"])
    row["cost_ratio"] = row["cost"] / row["cost_of_fixed_exits"]
    return row


def prompt_costs(mllm: MLLM, policy: Policy) -> PromptCosts:
    """Operations of a prompt's prefill under a policy; they depend on its exit layer too."""

    def count(mllm: MLLM, batch: Batch) -> FlopCount:
        with policy(mllm):
            return prefill_flops(mllm, batch)

    return PromptCosts(mllm, count)


@torch.no_grad()
def evaluate_batch(
    mllm: MLLM, policy: Policy, samples: Sequence[Sample], max_new_tokens: int, costs: PromptCosts
) -> dict[str, pd.DataFrame]:
    """Answers, exit layers and costs of one batch under a policy."""
    batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
    with measure_generation(mllm) as cost, policy(mllm) as under:
        ids = mllm.generate_ids(batch, max_new_tokens=max_new_tokens)
        exit_layers = under.exit_layers.tolist()
    answers = mllm.decode(ids)
    flops = [costs.of(batch, row, sample, exit_layers[row]) for row, sample in enumerate(samples)]
    table = {
        **sample_columns(samples),
        "answer": answers,
        "correct": [correctness(answer, sample.answer) for answer, sample in zip(answers, samples, strict=True)],
        "exit_layer": exit_layers,
        "new_tokens": [len(tokens) for tokens in ids],
        "flops_total": [count.total for count in flops],
        "flops_decoder": [count.decoder for count in flops],
        "kv_cache_bytes": cost.kv_cache_bytes / len(samples),
    }
    batches = {
        "samples": len(samples),
        "prefill_seconds": cost.prefill_seconds,
        "decode_seconds": sum(cost.decode_seconds),
        "decode_steps": len(cost.decode_seconds),
        "peak_memory_bytes": peak_memory_bytes(mllm.device),
    }
    return {"answers": pd.DataFrame(table), "batches": pd.DataFrame([batches])}


def _flat_intervals(found: dict[str, Any]) -> dict[str, Any]:
    """Every `name_ci` as the columns `name_low` and `name_high`."""
    flat = {name: value for name, value in found.items() if not name.endswith("_ci")}
    for name in [name for name in found if name not in flat]:
        flat[f"{name[:-3]}_low"], flat[f"{name[:-3]}_high"] = found[name] or (None, None)
    return flat


def _with_interval(name: str, values: Tensor, images: Sequence[str]) -> dict[str, Any]:
    """A rate as `name` and `name_ci`."""
    mean, low, high = (float(each) for each in share_interval(values, images))
    return {name: mean, f"{name}_ci": (low, high)}


def _correctness(correct: Tensor, full_correct: Tensor, images: Sequence[str]) -> dict[str, Any]:
    """Accuracy, the full model's and the loss, over the questions that have a reference; None where none has one.

    Both are [n] shares of right answers, NaN without a reference.
    """
    known = ~(correct.isnan() | full_correct.isnan())
    found: dict[str, Any] = {"num_references": int(known.sum())}
    if not known.any():
        return found | dict.fromkeys(["accuracy", "accuracy_ci", "full_accuracy", "accuracy_loss", "accuracy_loss_ci"])
    correct, full_correct = correct[known], full_correct[known]
    images = [image for image, there in zip(images, known.tolist(), strict=True) if there]
    loss = cluster_interval(full_correct - correct, images, largest=1.0)
    return found | {
        **_with_interval("accuracy", correct, images),
        "full_accuracy": float(full_correct.mean()),
        "accuracy_loss": loss[0],
        "accuracy_loss_ci": loss[1:],
    }


def figures(answers: pd.DataFrame, reference: LabelSet) -> dict[str, Any]:
    """What some questions' answers and costs come to, beside fixed exits and the oracle on the same questions.

    `cost` is decoder FLOPs over the full model's, `cost_of_fixed_exits` that of the best mixture of fixed exits with
    the same agreement, `oracle` the cheapest exit of every question that keeps its answer. Accuracies are over the
    `num_references` questions that have a reference, and None without any. Intervals are two-sided 95%, clustered by
    image.
    """
    rows = reference.rows_of(answers)
    images = answers["image_id"].tolist()
    agree, full_flops = reference.agree[rows], float(reference.flops[rows, -1].double().mean())
    cost = reference.flops[rows].double() / full_flops
    agreement = _with_interval("agreement", _tensor(answers["agree"]), images)
    correct = _correctness(_tensor(answers["correct"]), _tensor(answers["full_correct"]), images)
    exits = answers["exit_layer"].to_numpy()
    flops = float(answers["flops_decoder"].mean())
    own_cost = flops / full_flops
    fixed_cost = mixture_cost(cost.mean(0), agree.double().mean(0), agreement["agreement"])
    lucky = agree.int().argmax(1)
    return {
        "num_questions": len(answers),
        **correct,
        **agreement,
        "mean_exit_layer": float(exits.mean()),
        "exit_layers": np.bincount(exits, minlength=reference.num_layers + 1).tolist(),
        "flops_total": float(answers["flops_total"].mean()),
        "flops_decoder": flops,
        "cost": own_cost,
        "cost_of_fixed_exits": fixed_cost,
        "cost_ratio": own_cost / fixed_cost,
        "oracle": {
            "flops_decoder": float(at_exit(reference.flops[rows], lucky).double().mean()),
            "cost": float(at_exit(cost, lucky).mean()),
            "mean_exit_layer": float(lucky.double().mean()),
            "accuracy": correct["full_accuracy"],
            "agreement": 1.0,
        },
        "new_tokens": float(answers["new_tokens"].mean()),
        "kv_cache_bytes": float(answers["kv_cache_bytes"].mean()),
    }


def _tensor(column: pd.Series) -> Tensor:
    return torch.tensor(column.to_numpy(dtype=float, copy=True))


def _scalars(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if isinstance(value, (int, float))}


def _timing(batches: pd.DataFrame) -> dict[str, float | None]:
    """Milliseconds a question for the prefill, and a step for decoding; memory."""
    steps = int(batches["decode_steps"].sum())
    return {
        "prefill_ms": 1e3 * float(batches["prefill_seconds"].sum() / batches["samples"].sum()),
        "decode_ms": 1e3 * float(batches["decode_seconds"].sum()) / steps if steps else None,
        "peak_memory_bytes": int(batches["peak_memory_bytes"].max()),
    }


def write_answer_file(path: Path, answers: pd.DataFrame, model: str) -> None:
    """Answers one JSON object a line, in the format of LLaVA's answer files."""
    lines = [
        json.dumps(
            {
                "question_id": row["id"],
                "prompt": row["question"],
                "text": row["answer"],
                "answer_id": hashlib.sha256(f"{row['id']}\t{row['answer']}".encode()).hexdigest()[:16],
                "model_id": model,
                "metadata": {"exit_layer": row["exit_layer"]},
            },
            ensure_ascii=False,
        )
        for row in answers.to_dict("records")
    ]
    write_atomic(path, lambda out: out.writelines(f"{line}\n".encode() for line in lines))


def _print(summary: dict[str, Any]) -> None:
    columns = ["num_questions", "accuracy", "agreement", "mean_exit_layer", "cost", "cost_of_fixed_exits"]
    rows = [("all questions", summary), *((f"kind {kind!r}", each) for kind, each in summary["kinds"].items())]
    table = pd.DataFrame(
        [[each[column] for column in columns] for _, each in rows], [name for name, _ in rows], columns
    )
    print(table.to_string(float_format=lambda value: f"{value:.3f}", na_rep="-"))
    if summary["accuracy_loss_ci"] is None:
        print("accuracy: no question has a reference answer; agreement is with the full model's answers")
        return
    low, high = summary["accuracy_loss_ci"]
    of = f"{summary['num_references']} of {summary['num_questions']} questions with a reference"
    print(f"accuracy loss {summary['accuracy_loss']:.4f}, 95% interval [{low:.4f}, {high:.4f}], over {of}")
    print("accuracy is exact match; a benchmark's official metric is lmms-eval's (docs/how_to_own_data.md)")


def policy_in_words(summary: dict[str, Any]) -> str:
    """What a policy keeps and saves, and whether the best fixed exits would do as well, from a summary."""
    return (
        f"{summary['policy']} keeps {summary['agreement']:.1%} of the full model's answers at {summary['cost']:.0%} of "
        f"its decoder FLOPs; the best fixed exits keep as many at {summary['cost_of_fixed_exits']:.0%}."
    )


COMPARED = (
    *("policy", "num_questions", "accuracy", "full_accuracy", "accuracy_loss", "agreement", "mean_exit_layer"),
    *("flops_total", "flops_decoder", "cost", "cost_of_fixed_exits", "cost_ratio"),
    *("prefill_ms", "decode_ms", "kv_cache_bytes", "peak_memory_bytes"),
)


def compare(path: Path, reference: LabelSet, fixed: pd.DataFrame) -> pd.DataFrame:
    """One table and one plot of the policies evaluated below `path` on the same model and data."""
    rows: list[Any] = []
    oracle: dict[str, float] = {}
    for file in sorted(path.glob("*/summary.json")):
        summary = json.loads(file.read_text())
        if summary.get("reference") != reference.folder.path.name:
            continue
        row = {column: summary[column] for column in COMPARED}
        intervals = {name: summary[name] for name in ("accuracy_ci", "accuracy_loss_ci", "agreement_ci")}
        rows.append(row | _flat_intervals(intervals))
        oracle = summary["oracle"]
        if (controls := file.with_name("controls.parquet")).is_file():
            of_policy = pd.read_parquet(controls)
            rows += of_policy.assign(policy=f"{row['policy']}: " + of_policy["policy"]).to_dict("records")
    table = pd.DataFrame(rows).sort_values("flops_decoder", ignore_index=True)
    measured = table.columns.drop("policy")
    table[measured] = table[measured].apply(pd.to_numeric)  # without any reference, columns of None
    oracle = {key: float("nan") if value is None else value for key, value in oracle.items()}
    folder = RunFolder(path)
    folder.write_table("comparison", table)
    title = f"{len(reference)} questions, {reference.num_layers} layers; intervals 95%, clustered by image"
    folder.save_figure("accuracy_against_flops", accuracy_against_flops(fixed, table, oracle, title))
    print(f"comparison: {path / 'comparison.csv'}")
    return table


if __name__ == "__main__":
    main()
