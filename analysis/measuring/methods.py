"""Running methods at matched cost, one after the other, on the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from dyvte.batch import Batch
from dyvte.cost.flops import plan_decoder_flops
from dyvte.data.base import Dataset, Sample, build_dataset
from dyvte.data.metrics import exact_match
from dyvte.errors import ConfigError, DataError
from dyvte.gates.module import Gates, load_gates
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.compose import Compose
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.policies.pruning.drop import RandomDrop
from dyvte.policies.pruning.fastv import FastV
from dyvte.policies.pruning.fitprune import FitPrune, Recipe

from .matched import Calibration, deciding_cost, methods

NEEDS_GATES = ("dynamic_exit", "fastv_dynamic_exit")
FROM_REFERENCE = ("none", "fixed_exit", "vtw")
"""Methods whose answers are in the label set of the full model and every exit already."""
CALIBRATION = "calibration"
"""Name of the run, and of its table, that says of every fixed exit what its calibration prompts make of it."""
UNPUBLISHED_BUDGET = 0.5
"""Cost, as a share of the full model's, of methods that have no published setting to fall back on."""


# ------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Job:
    """One method at one budget (None: its published setting), with one seed."""

    method: str
    budget: float | None
    seed: int = 0


def plan(experiment: DictConfig) -> list[Job]:
    """Every run of an experiment, in order; of fixed exits what their layers are chosen by, once."""
    jobs = [Job(CALIBRATION, None)] if {"fixed_exit", "vtw"} & set(experiment.methods) else []
    for budget in experiment.budgets:
        for method in experiment.methods:
            if method not in FROM_REFERENCE:
                seeds = range(experiment.random_seeds if method.startswith("random") else 1)
                jobs += [Job(method, budget, seed) for seed in seeds]
    return jobs


def encoded(mllm: MLLM, dataset: Dataset, batch_size: int) -> Iterator[tuple[list[Sample], Batch]]:
    """The readable questions of a data set, in batches ready for the model.

    Raises:
        DataError: none can be read.
    """
    samples = list(dataset.readable())  # the others are in the failures of the label set
    if not samples:
        raise DataError("no question can be read")
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        yield part, mllm.encode([each.image for each in part], [each.question for each in part])


def gates_of(cfg: DictConfig) -> Gates | None:
    """The gates that the methods of an experiment need; None where none does.

    Raises:
        ConfigError: no method, or an unknown one.
    """
    names = cfg.experiment.methods
    gates = load_gates(cfg.gates) if set(names) & set(NEEDS_GATES) else None
    known = [*FROM_REFERENCE, *methods(gates)]
    if not names:
        raise ConfigError(f"experiment {cfg.experiment.name} names no method; choose experiment.methods from {known}")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"unknown method {unknown[0]!r} in experiment {cfg.experiment.name}; choose from {known}")
    return gates


def load_calibration(mllm: MLLM, cfg: DictConfig) -> Calibration:
    """The prompts of `calibration.data`, which settings are chosen on."""
    dataset = build_dataset(cfg.calibration.data)
    return Calibration(mllm, [batch for _, batch in encoded(mllm, dataset, cfg.batch_size)])


def run_job(
    job: Job,
    calibration: Calibration,
    gates: Gates | None,
    batches: Sequence[tuple[list[Sample], Batch]],
    max_new_tokens: int,
) -> dict[str, pd.DataFrame]:
    """Tables of a run: `answers`, one row a question (none where the budget cannot be met), and `settings`.

    Of `CALIBRATION`: what the layers of fixed exits and VTW, whose answers are there already, are chosen by.
    """
    if job.method == CALIBRATION:
        kl, agreement = calibration.divergence.tolist(), calibration.agreement(max_new_tokens).tolist()
        return {CALIBRATION: pd.DataFrame({"exit_layer": range(len(kl)), "kl": kl, "agreement": agreement})}
    policy = policy_at(job.method, job.budget, calibration, gates)
    if isinstance(policy, RandomDrop):
        policy.seed = job.seed
    label = {"method": job.method, "budget": job.budget, "seed": job.seed}
    if policy is None:
        columns = [*label, "id", "answer", "correct", "flops_decoder", "exit_layer"]
        return {"answers": pd.DataFrame(columns=columns), "settings": pd.DataFrame([{**label, "setting": "cannot"}])}
    rows = [
        row for samples, batch in batches for row in answer(calibration.mllm, policy, samples, batch, max_new_tokens)
    ]
    deciding = deciding_cost(calibration, policy) if job.seed == 0 else 0.0
    return {
        "answers": pd.DataFrame(rows).assign(**label)[[*label, *rows[0]]],
        "settings": pd.DataFrame([{**label, "setting": describe(policy), "deciding": deciding}]),
    }


def policy_at(method: str, budget: float | None, calibration: Calibration, gates: Gates | None) -> Policy | None:
    """A method at a budget, None where it cannot meet it.

    Without a budget: as its paper or its training set it; the others at half of the full model's cost.
    """
    if budget is None:
        if method == "dynamic_exit" and gates is not None:
            return DynamicExit(gates)
        if method == "fastv":
            return FastV()
        if method == "fastv_dynamic_exit" and gates is not None:
            return Compose([FastV(), DynamicExit(gates, min_layer=FastV().layer + 1)])
        budget = UNPUBLISHED_BUDGET
    return methods(gates)[method](calibration, budget)


@dataclass
class SeenPositions(Policy):
    """Changes nothing; notes which positions every layer runs on.

    Attributes:
        masks: [B, N] of every layer, in the last prefill.
    """

    masks: list[torch.Tensor] = field(default_factory=list, repr=False)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Note them."""
        if layer == 0:
            self.masks.clear()
        self.masks.append(prefill.kept.clone())


def answer(
    mllm: MLLM, policy: Policy, samples: Sequence[Sample], batch: Batch, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Answers of one batch and the decoder FLOPs of each prefill, from the positions that every layer ran on."""
    seen = SeenPositions()
    with policy(mllm) as run, seen(mllm):
        answers = mllm.decode(mllm.generate_ids(batch, max_new_tokens=max_new_tokens))
        exits, counts = run.exit_layers.tolist(), torch.stack(seen.masks, dim=1).sum(2).tolist()
    return [
        {
            "id": sample.id,
            "answer": text,
            "correct": float("nan") if sample.answer is None else float(exact_match(text, sample.answer)),
            "flops_decoder": float(plan_decoder_flops(mllm, count)),
            "exit_layer": exit_layer,
        }
        for sample, text, exit_layer, count in zip(samples, answers, exits, counts, strict=True)
    ]


def describe(policy: Policy) -> str:
    """The settings of a policy in a few words."""
    if isinstance(policy, Compose):
        return "; ".join(f"{type(each).__name__} {describe(each)}" for each in policy.policies)
    if isinstance(policy, FitPrune):
        assert isinstance(policy.recipe, Recipe)
        return f"alpha={policy.recipe.alpha:.3g}"
    shown = {}
    for each in fields(policy):
        value = getattr(policy, each.name) if not each.name.startswith("_") else None
        if isinstance(value, (int, float, str)) and each.name != "seed" and value is not False:
            shown[each.name] = f"{value:.3g}" if isinstance(value, float) else value
    return " ".join(f"{name}={value}" for name, value in shown.items())


LABELS = {
    "none": "full model",
    "fixed_exit": "fixed exit",
    "vtw": "VTW",
    "fastv": "FastV",
    "pyramid_drop": "PyramidDrop",
    "tome": "ToMe",
    "fitprune": "FitPrune",
    "divprune": "DivPrune",
    "uniform": "uniform",
    "random": "random",
    "random_stratified": "stratified random",
    "dynamic_exit": "dynamic exit",
    "fastv_dynamic_exit": "FastV + dynamic exit",
}
