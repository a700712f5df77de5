"""Running methods at matched cost, one after the other, on the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from dyvte.batch import Batch
from dyvte.cost.flops import plan_decoder_flops, prefill_flops
from dyvte.cost.spent import SeenPositions
from dyvte.data.base import Dataset, Sample, build_dataset
from dyvte.data.metrics import exact_match
from dyvte.errors import ConfigError, DataError
from dyvte.gates.module import Gates, load_gates
from dyvte.instrument.sweep import exit_sweep, greedy_answer_ids
from dyvte.instrument.vision_tower import ImageMemory, remember_images
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.compose import Compose
from dyvte.policies.exits.fixed_exit import FixedExit
from dyvte.policies.exits.vtw import mean_divergence
from dyvte.policies.method import Calibration, Counted
from dyvte.policies.pruning.drop import RandomDrop
from dyvte.policies.pruning.fitprune import FitPrune, Recipe
from dyvte.policies.registry import methods
from dyvte.policies.unchanged import Unchanged

CALIBRATION = "calibration"
"""Name of the run, and of its table, that says of every fixed exit what its calibration prompts make of it."""
ALL = "all"
UNPUBLISHED_BUDGET = 0.5
"""Cost, as a share of the full model's, of methods that have no published setting to fall back on."""
REMEMBERED_BYTES = 2**30
"""What encoded images may take, so that every method is asked about them without encoding them again."""
DECIDING_PROMPTS = 8
"""Calibration prompts on which the operations of deciding are counted: counts differ by length alone."""


# ------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Job:
    """One method at one budget (None: its published setting), with one seed."""

    method: str
    budget: float | None
    seed: int = 0


def plan(experiment: DictConfig) -> list[Job]:
    """Every run of an experiment, in order; of fixed exits what their layers are chosen by, once."""
    exits = any(issubclass(methods()[name], FixedExit) for name in experiment.methods)
    jobs = [Job(CALIBRATION, None)] if exits else []
    for budget in experiment.budgets:
        for method in experiment.methods:
            if not from_reference(method):
                seeded = "seed" in {each.name for each in fields(methods()[method])}
                seeds = range(experiment.random_seeds if seeded else 1)
                jobs += [Job(method, budget, seed) for seed in seeds]
    return jobs


def encoded(mllm: MLLM, dataset: Dataset, batch_size: int) -> Iterator[tuple[list[Sample], Batch]]:
    """The readable questions of a data set, in batches ready for the model."""
    samples = list(dataset.readable())  # the others are in the failures of the label set
    if not samples:
        raise DataError("no question can be read")
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        yield part, mllm.encode([each.image for each in part], [each.question for each in part])


def gates_of(cfg: DictConfig) -> Gates | None:
    """The gates that the methods of an experiment need; None where none does. ConfigError for an unknown method."""
    names = cfg.experiment.methods = known_methods(cfg.experiment.methods, "experiment.methods")
    return load_gates(cfg.gates) if any("gates" in methods()[name].needs for name in names) else None


def budgeted_methods() -> list[str]:
    """Every method that meets budgets without anything that only some models have."""
    found = methods().items()
    return [name for name, each in found if each.meets_budgets and "text-image similarity" not in each.needs]


def known_methods(names: Sequence[str] | str, key: str) -> list[str]:
    """The names, checked; those of `budgeted_methods` for "all"."""
    known = ", ".join(methods())
    if names == ALL:
        return budgeted_methods()
    if not names or isinstance(names, str):
        raise ConfigError(f"{key} names no method; choose from {known}")
    if unknown := [name for name in names if name not in methods()]:
        raise ConfigError(f"{key} names {unknown[0]!r}, which is no method; choose from {known}")
    return list(names)


def from_reference(method: str) -> bool:
    """Whether a method's answers are in the label set of the full model and every exit already."""
    return issubclass(methods()[method], (Unchanged, FixedExit))


def load_calibration(
    mllm: MLLM, cfg: DictConfig, gates: Gates | None = None, counted: Counted = "flops"
) -> Calibration:
    """The prompts of `calibration.data`, which settings are chosen on."""
    dataset = build_dataset(cfg.calibration.data)
    return Calibration(mllm, [batch for _, batch in encoded(mllm, dataset, cfg.batch_size)], gates, counted=counted)


def exit_agreement(calibration: Calibration, max_new_tokens: int) -> Tensor:
    """[L + 1] share of the prompts that every exit answers as the full model does, in so many tokens at most."""
    same = []
    for batch in calibration.batches:
        answers = greedy_answer_ids(calibration.mllm, batch, max_new_tokens)
        same.append(exit_sweep(calibration.mllm, batch, answers, entropy=False).up_to_ties().agree)
    return torch.cat(same).double().mean(0)


def deciding_cost(calibration: Calibration, policy: Policy) -> float:
    """What a policy computes to choose tokens or layers (scores, gates), over the full model's decoder FLOPs."""
    batch = calibration.batches[0][:DECIDING_PROMPTS]

    def outside(running: Policy) -> int:
        with running(calibration.mllm):
            count = prefill_flops(calibration.mllm, batch)
        return count.total - count.decoder

    rows, mean = len(batch["input_ids"]), replace(calibration, counted="flops").full / len(calibration.lengths)
    return (outside(policy) - outside(Unchanged())) / rows / mean


def run_job(
    job: Job,
    calibration: Calibration,
    batches: Sequence[tuple[list[Sample], Batch]],
    max_new_tokens: int,
    memory: ImageMemory,
) -> dict[str, pd.DataFrame]:
    """Tables of a run: `answers`, one row a question (none where the budget cannot be met), and `settings`.

    Of `CALIBRATION`: what the layers of fixed exits and VTW, whose answers are there already, are chosen by.
    What is made of images goes to `memory`, for the runs that follow.
    """
    mllm = calibration.mllm
    label = {"method": job.method, "budget": job.budget, "seed": job.seed}
    with remember_images(mllm, memory):
        if job.method == CALIBRATION:
            kl = mean_divergence(mllm, calibration.batches).tolist()
            agreement = exit_agreement(calibration, max_new_tokens).tolist()
            return {CALIBRATION: pd.DataFrame({"exit_layer": range(len(kl)), "kl": kl, "agreement": agreement})}
        policy = policy_at(job.method, job.budget, calibration)
        if policy is None:
            columns = [*label, "id", "answer", "correct", "flops_decoder", "visual_tokens", "exit_layer"]
            nothing, cannot = pd.DataFrame(columns=columns), pd.DataFrame([{**label, "setting": "cannot"}])
            return {"answers": nothing, "settings": cannot}
        if isinstance(policy, RandomDrop):
            policy.seed = job.seed
        rows = [row for samples, batch in batches for row in answer(mllm, policy, samples, batch, max_new_tokens)]
    deciding = deciding_cost(calibration, policy) if job.seed == 0 else 0.0
    return {
        "answers": pd.DataFrame(rows).assign(**label)[[*label, *rows[0]]],
        "settings": pd.DataFrame([{**label, "setting": describe(policy), "deciding": deciding}]),
    }


def policy_at(method: str, budget: float | None, calibration: Calibration) -> Policy | None:
    """A method at a budget, None where it cannot meet it.

    Without a budget: as its paper or its training set it; the others at half of the full model's cost.
    """
    found = methods()[method].published(calibration) if budget is None else None
    return found or methods()[method].at_cost(calibration, UNPUBLISHED_BUDGET if budget is None else budget)


def answer(
    mllm: MLLM, policy: Policy, samples: Sequence[Sample], batch: Batch, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Answers of one batch and the decoder FLOPs of each prefill, from the positions that every layer ran on."""
    seen = SeenPositions()
    with policy(mllm) as run, seen(mllm):
        answers = mllm.decode(mllm.generate_ids(batch, max_new_tokens=max_new_tokens))
        exits, counts = run.exit_layers.tolist(), torch.stack(seen.masks, dim=1).sum(2).tolist()
        shares = visual_share(seen, batch).tolist()
    return [
        {
            "id": sample.id,
            "answer": text,
            "correct": float("nan") if sample.answer is None else float(exact_match(text, sample.answer)),
            "flops_decoder": float(plan_decoder_flops(mllm, count)),
            "visual_tokens": share,
            "exit_layer": exit_layer,
        }
        for sample, text, exit_layer, count, share in zip(samples, answers, exits, counts, shares, strict=True)
    ]


def visual_share(seen: SeenPositions, batch: Batch) -> Tensor:
    """[B] share of a row's visual tokens that a decoder layer ran on, the mean over layers; NaN without an image."""
    visual = batch.layout.visual[:, None]
    return ((torch.stack(seen.masks, dim=1) & visual).sum(2) / visual.sum(2)).mean(1)


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
