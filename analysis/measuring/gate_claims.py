"""What the four tests of gates are computed from: gates asked about statuses of runs that saw less of the image."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from omegaconf import DictConfig
from torch import Tensor

from dyvte.data.base import Dataset
from dyvte.gates.features import LENS, QUESTION
from dyvte.gates.labels import LabelSet, LabelSettings, collect_labels
from dyvte.gates.metrics import at_exit, cluster_interval, first_exit, share_interval
from dyvte.gates.module import Gates
from dyvte.gates.teacher import Teacher, everything
from dyvte.gates.training import gate_probabilities
from dyvte.instrument.states import TEXT_STATUS
from dyvte.instrument.sweep.criteria import exit_depth
from dyvte.mllm import MLLM

from ..statistics.bands import Array, ImageBootstrap
from ..statistics.gates.claims import (
    PRICES,
    Estimate,
    compare_with_constants,
    constant_frontier,
    dose_response,
    dose_verdict,
    frontier_points,
    mean_estimate,
    verdict,
    within_group_auc,
)

EVERY = slice(None)


def claim_labels(mllm: MLLM, dataset: Dataset, cfg: DictConfig) -> LabelSet:
    """Labels and answers of every exit, and the statuses of runs that saw less of the image, or another one."""
    settings = LabelSettings(
        cfg.max_new_tokens,
        status=(*TEXT_STATUS, LENS, QUESTION),
        exits=tuple(range(mllm.num_layers)),
        swapped=True,
        answers=True,
    )
    return collect_labels(mllm, dataset, cfg, cfg.labels_dir, settings, "every exit of every question")


def claim_figures(gates: Gates, labels: LabelSet, folds: int, draws: int, seed: int) -> dict[str, Any]:
    """Every number of the four tests, JSON types only."""
    images, kinds, texts = _columns(labels)
    stable = labels.labels("stable")[:, 1:-1].numpy()
    runs = {run: labels.counterfactual(run, gates.status) for run in ("exits", "swapped")}
    # exit probabilities [n, L - 1], the image seen as it was; with another; [n, L, L - 1] if it left at j, 0 never seen
    seen = gate_probabilities(gates, labels.status(gates.status))
    swapped = gate_probabilities(gates, runs["swapped"][:, 0])
    dosed = torch.stack([gate_probabilities(gates, each) for each in runs["exits"].unbind(1)], dim=1)

    def auc(groups: npt.NDArray[Any], rows: Any = EVERY, gate: Any = EVERY) -> tuple[Estimate, int]:
        said, label = (each[rows][:, gate] for each in (seen.double().numpy(), stable))
        return within_group_auc(said, label, groups[rows], images[rows])

    def exits(probability: Tensor) -> Array:
        return first_exit(probability, gates.thresholds()).double().numpy()

    def difference(changed: Tensor) -> Estimate:
        return mean_estimate((changed.double() - seen.double()).mean(1).numpy(), images)

    pooled, pairs = auc(texts)
    of_kinds = {str(kind): (kinds == kind, *auc(texts, kinds == kind)) for kind in np.unique(kinds)}
    withheld = difference(dosed[:, 0])
    doses = dose_response(dosed.double().mean(2).numpy(), images)
    dosed_exits = np.stack([exits(each) for each in dosed.unbind(1)], axis=1)
    exit_doses = dose_response(dosed_exits, images)
    return {
        "within_text": {
            **pooled.to_dict(),
            "pairs": pairs,
            "verdict": verdict(pooled, 0.5),
            "within_kind": auc(kinds)[0].to_dict(),
            "kinds": {
                kind: {**found.to_dict(), "pairs": number, "texts": len(np.unique(texts[rows]))}
                for kind, (rows, found, number) in of_kinds.items()
            },
            "gates": [auc(texts, gate=[gate])[0].to_dict() for gate in range(seen.shape[1])],
        },
        "withheld": {
            **withheld.to_dict(),
            "verdict": verdict(withheld, 0.0, above=False),
            "swapped": difference(swapped).to_dict(),
            "exit_seen": mean_estimate(exits(seen), images).to_dict(),
            "exit_withheld": mean_estimate(dosed_exits[:, 0], images).to_dict(),
            "exit_swapped": mean_estimate(exits(swapped), images).to_dict(),
        },
        "dose": {
            **doses["slope"].to_dict(),
            "verdict": dose_verdict(doses),
            "means": [each.to_dict() for each in doses["means"]],
            "steps": [each.to_dict() for each in doses["steps"]],
            "exits": [each.to_dict() for each in exit_doses["means"]],
            "exit_slope": exit_doses["slope"].to_dict(),
        },
        "cost": _costs(first_exit(seen, gates.thresholds()), labels, folds, ImageBootstrap(images, draws, seed)),
    }


def _columns(labels: LabelSet) -> tuple[npt.NDArray[Any], ...]:
    """Image, kind and text of every question."""
    return tuple(labels.samples[name].astype(str).to_numpy() for name in ("image_id", "kind", "question"))


def all_seeing_frontier(training: LabelSet, labels: LabelSet) -> list[tuple[float, float]]:
    """(cost, agreement) of exits chosen by a classifier that sees everything, by rising cost; see `Teacher`.

    It learns on `training` which exits keep the answer from the full model's statuses of all layers, the words and the
    kind of the question, and takes for each of the asked questions the exit of least expected price.
    """
    kinds = sorted({*training.samples["kind"].astype(str), *labels.samples["kind"].astype(str)})
    images = training.samples["image_id"].astype(str).tolist()
    teacher = Teacher(everything(training, kinds), training.agree[:, 1:-1], images)
    keeps = torch.cat([teacher(everything(labels, kinds)).double(), torch.ones(len(labels), 1, dtype=torch.double)], 1)
    expected = labels.cost[:, 1:].mean(0) + torch.from_numpy(PRICES)[:, None, None] * (1 - keeps)
    chosen = 1 + expected.argmin(2).numpy()
    return frontier_points(labels.agree.double().numpy(), labels.cost.double().numpy(), chosen)


def _costs(exits: Tensor, labels: LabelSet, folds: int, bootstrap: ImageBootstrap) -> dict[str, Any]:
    agree, cost, (images, kinds, texts) = labels.agree, labels.cost, _columns(labels)
    own_agree, own_cost = at_exit(agree, exits).double(), at_exit(cost, exits).double()
    loss = (labels.correct[:, -1] - at_exit(labels.correct, exits)).double()
    known = ~loss.isnan()
    lost = cluster_interval(loss[known], images[known.numpy()], largest=1.0)
    oracle = float(at_exit(cost, exit_depth(agree)).mean())
    spent = float(own_cost.mean())
    limits = ("value", "low", "high")
    found: dict[str, Any] = {
        "agreement": dict(zip(limits, map(float, share_interval(own_agree, images)), strict=True)),
        "loss": dict(zip(limits, lost, strict=True)),
        "cost": spent,
        "mean_exit_layer": float(exits.double().mean()),
        "oracle": oracle,
        "share_of_oracle": (1 - spent) / (1 - oracle) if oracle < 1 else None,
    }
    # a question's fold follows from its image alone
    fold = np.array([int(hashlib.sha256(image.encode()).hexdigest()[:8], 16) % folds for image in images])
    table = agree.double().numpy(), cost.double().numpy()
    for name, groups in (("kind", None), ("text", texts)):
        constants = constant_frontier(*table, kinds, groups, fold)
        least, ratio = compare_with_constants(own_agree.numpy(), own_cost.numpy(), *table, constants, bootstrap)
        found[name] = {
            "cost": least,
            "ratio": ratio.to_dict(),
            "verdict": verdict(ratio, 1.0, above=False),
            "frontier": frontier_points(*table, constants),
        }
    return found
