"""What the four tests of gates are computed from: gates asked about statuses of runs that saw less of the image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
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

from ..statistics.bands import ImageBootstrap
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


@dataclass(frozen=True)
class Asked:
    """What some gates say about n questions, L - 1 gates each, and where they let the image go.

    Attributes:
        seen: [n, L - 1] exit probability, the image seen as it was.
        dosed: [n, L, L - 1] the same in runs whose image left at exit j = 0..L-1; j = 0 never saw it.
        swapped: [n, L - 1] in a run with another image.
        thresholds: of the gates.
    """

    seen: Tensor
    dosed: Tensor
    swapped: Tensor
    thresholds: list[float]

    @classmethod
    def of(cls, gates: Gates, labels: LabelSet) -> Asked:
        """Ask the gates about a label set of `claim_labels`."""
        dosed = labels.counterfactual("exits", gates.status)
        return cls(
            gate_probabilities(gates, labels.status(gates.status)),
            torch.stack([gate_probabilities(gates, dosed[:, j]) for j in range(dosed.shape[1])], dim=1),
            gate_probabilities(gates, labels.counterfactual("swapped", gates.status)[:, 0]),
            gates.thresholds(),
        )

    def exits(self, probability: Tensor) -> Tensor:
        """[n] exit layer that the gates choose when they say so."""
        return first_exit(probability, self.thresholds)


def image_folds(images: list[str], folds: int) -> npt.NDArray[np.int64]:
    """[n] fold of every question, from its image's id alone."""
    return np.array([int(hashlib.sha256(image.encode()).hexdigest()[:8], 16) % folds for image in images])


def claim_figures(gates: Gates, labels: LabelSet, folds: int, draws: int, seed: int) -> dict[str, Any]:
    """Every number of the four tests, JSON types only."""
    asked = Asked.of(gates, labels)
    images = labels.samples["image_id"].tolist()
    kinds = labels.samples["kind"].astype(str).to_numpy()
    texts = labels.samples["question"].tolist()
    stable = labels.labels("stable")[:, 1:-1].numpy()
    seen = asked.seen.double().numpy()
    pooled, pairs = within_group_auc(seen, stable, texts, images)
    of_kinds = {
        str(kind): _auc(seen[kinds == kind], stable[kinds == kind], labels, kinds == kind) for kind in np.unique(kinds)
    }
    of_gates = [
        within_group_auc(seen[:, [gate]], stable[:, [gate]], texts, images)[0].to_dict()
        for gate in range(seen.shape[1])
    ]
    withheld = _difference(asked.dosed[:, 0], asked.seen, images)
    doses = dose_response(asked.dosed.double().mean(2).numpy(), images)
    dosed_exits = torch.stack([asked.exits(each) for each in asked.dosed.unbind(1)], 1).double()
    natural = asked.exits(asked.seen)
    return {
        "within_text": {
            **pooled.to_dict(),
            "pairs": pairs,
            "verdict": verdict(pooled, 0.5),
            "within_kind": within_group_auc(seen, stable, kinds.tolist(), images)[0].to_dict(),
            "kinds": of_kinds,
            "gates": of_gates,
        },
        "withheld": {
            **withheld.to_dict(),
            "verdict": verdict(withheld, 0.0, above=False),
            "swapped": _difference(asked.swapped, asked.seen, images).to_dict(),
            "exit_seen": mean_estimate(natural.double().numpy(), images).to_dict(),
            "exit_withheld": mean_estimate(dosed_exits[:, 0].numpy(), images).to_dict(),
            "exit_swapped": mean_estimate(asked.exits(asked.swapped).double().numpy(), images).to_dict(),
        },
        "dose": {
            **doses["slope"].to_dict(),
            "verdict": dose_verdict(doses),
            "means": [each.to_dict() for each in doses["means"]],
            "steps": [each.to_dict() for each in doses["steps"]],
            "exits": [each.to_dict() for each in dose_response(dosed_exits.numpy(), images)["means"]],
            "exit_slope": dose_response(dosed_exits.numpy(), images)["slope"].to_dict(),
        },
        "cost": _costs(natural, labels, kinds, texts, folds, ImageBootstrap(images, draws, seed)),
    }


def _auc(
    scores: npt.NDArray[np.float64], stable: npt.NDArray[np.bool_], labels: LabelSet, rows: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    of_kind = labels.samples[rows]
    found, pairs = within_group_auc(scores, stable, of_kind["question"].tolist(), of_kind["image_id"].tolist())
    return {**found.to_dict(), "pairs": pairs, "texts": int(of_kind["question"].nunique())}


def _difference(changed: Tensor, seen: Tensor, images: list[str]) -> Estimate:
    return mean_estimate((changed.double() - seen.double()).mean(1).numpy(), images)


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


def _costs(
    exits: Tensor,
    labels: LabelSet,
    kinds: npt.NDArray[Any],
    texts: list[str],
    folds: int,
    bootstrap: ImageBootstrap,
) -> dict[str, Any]:
    agree, cost, images = labels.agree, labels.cost, list(bootstrap.images)
    own_agree, own_cost = at_exit(agree, exits).double(), at_exit(cost, exits).double()
    share, low, high = (float(each) for each in share_interval(own_agree, images))
    loss = (labels.correct[:, -1] - at_exit(labels.correct, exits)).double()
    known = ~loss.isnan()
    lost = cluster_interval(
        loss[known], [each for each, there in zip(images, known.tolist(), strict=True) if there], largest=1.0
    )
    oracle = float(at_exit(cost, exit_depth(agree)).mean())
    spent = float(own_cost.mean())
    found: dict[str, Any] = {
        "agreement": {"value": share, "low": low, "high": high},
        "loss": dict(zip(("value", "low", "high"), lost, strict=True)),
        "cost": spent,
        "mean_exit_layer": float(exits.double().mean()),
        "oracle": oracle,
        "share_of_oracle": (1 - spent) / (1 - oracle) if oracle < 1 else None,
    }
    table = agree.double().numpy(), cost.double().numpy()
    for name, groups in (("kind", None), ("text", texts)):
        constants = constant_frontier(*table, kinds.tolist(), groups, image_folds(images, folds))
        each = compare_with_constants(own_agree.numpy(), own_cost.numpy(), *table, constants, bootstrap)
        found[name] = {
            "cost": each.cost,
            "ratio": each.ratio.to_dict(),
            "verdict": verdict(each.ratio, 1.0, above=False),
            "frontier": frontier_points(*table, constants),
        }
    return found
