"""Training the gates of all layers together, batched over layers, from a label set in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import get_scheduler

from dyvte.errors import ConfigError
from dyvte.gates.module import Gates

OBJECTIVES = ("labels", "stopping")

MakeOptimizer = Callable[..., torch.optim.Optimizer]
Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Recipe:
    """How gates are trained.

    Attributes:
        objective: "labels": cross-entropy of every gate on its own label (DyVTE, arXiv 2411.19628). "stopping": the
            expected price of the exit layer that the gates choose together, see `stopping_loss`.
        batch_size: samples a step.
        epochs: most passes over the training samples.
        patience: stop after so many epochs without a better validation loss and take the best; 0 trains all epochs.
        schedule: a schedule of `transformers.get_scheduler`.
        warmup: share of the steps over which the learning rate rises.
        exit_weight: weight of the label "exit" in the cross-entropy; that of "stay" is 1.
        layers_per_sample: so many random layers of each sample count in a step, 1 as in DyVTE's published code; None
            for all.
        standardize: give the gates statuses of mean 0 and variance 1 over the training samples.
        disagreement_price: for "stopping": what a changed answer costs, in full prefills.
        label_share: for "stopping": weight of the cross-entropy added to it.
        members: train so many gates a layer from different weights and average their logits.
    """

    objective: str = "labels"
    batch_size: int = 128
    epochs: int = 100
    patience: int = 10
    schedule: str = "cosine"
    warmup: float = 0.03
    exit_weight: float = 1.0
    layers_per_sample: int | None = None
    standardize: bool = True
    disagreement_price: float = 10.0
    label_share: float = 0.0
    members: int = 1

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {self.objective!r}; choose from {', '.join(OBJECTIVES)}")
        if self.members < 1:
            raise ConfigError(f"members is {self.members}; need at least one gate a layer")


@dataclass(frozen=True)
class GateData:
    """What gates learn from: n samples, exit layers 0..L.

    Attributes:
        status: [n, L - 1, P * d].
        labels: [n, L + 1] whether exit k is right.
        cost: [n, L + 1] cost of exit k, in full prefills.
    """

    status: Tensor
    labels: Tensor
    cost: Tensor

    def __len__(self) -> int:
        return len(self.status)

    def __getitem__(self, rows: Tensor) -> GateData:
        return GateData(self.status[rows], self.labels[rows], self.cost[rows])


def label_loss(logits: Tensor, labels: Tensor, exit_weight: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of every gate on its label, mean over samples and gates (DyVTE, arXiv 2411.19628).

    Args:
        logits: [B, L - 1, 2] (stay, exit).
        labels: [B, L + 1] boolean.
        exit_weight: weight of the label "exit".
        mask: [B, L - 1] which terms count.
    """
    target = labels[:, 1:-1].long()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    weight = 1 + (exit_weight - 1) * target
    if mask is not None:
        weight = weight * mask
    return (loss * weight).sum() / weight.sum()


def exit_distribution(logits: Tensor) -> Tensor:
    """[B, L] probability of exit layer k = 1..L if every gate drew its decision: p_k * prod_{j < k} (1 - p_j)."""
    stay, leave = logits.float().log_softmax(-1).unbind(-1)
    reached = F.pad(stay.cumsum(1), (1, 0))
    return (reached + F.pad(leave, (0, 1))).exp()


def stopping_loss(logits: Tensor, labels: Tensor, cost: Tensor, disagreement_price: float) -> Tensor:
    """Expected cost of the exit layer that the gates choose together, plus the price of a changed answer.

    `sum_k P(k) (cost[k] + price * (1 - y[k]))` with P the distribution of the first gate to fire. Gates trained on
    labels one by one do not know that an early mistake of any of them is final; here all of them answer for it.

    Args:
        logits: [B, L - 1, 2] (stay, exit).
        labels: [B, L + 1] y, whether exit k is right.
        cost: [B, L + 1] in full prefills.
        disagreement_price: of a changed answer, in full prefills.
    """
    price = cost + disagreement_price * (1 - labels.to(cost.dtype))
    return (exit_distribution(logits) * price[:, 1:]).sum(1).mean()


def objective_loss(gates: Gates, data: GateData, recipe: Recipe, mask: Tensor | None = None) -> Tensor:
    """The recipe's loss on some samples."""
    logits = gates(data.status)
    if recipe.objective == "labels":
        return label_loss(logits, data.labels, recipe.exit_weight, mask)
    loss = stopping_loss(logits, data.labels, data.cost, recipe.disagreement_price)
    if recipe.label_share:
        loss = loss + recipe.label_share * label_loss(logits, data.labels, recipe.exit_weight, mask)
    return loss


def standardize(gates: Gates, status: Tensor) -> None:
    """Set the gates' shift and scale so that `status` [n, L - 1, P * d] has mean 0 and variance 1 in every entry."""
    for gate in range(len(gates)):
        entries = status[:, gate].float()
        gates.shift[gate] = entries.mean(0)
        gates.scale[gate] = 1 / entries.std(0).clamp(min=1e-6)


def train_gates(
    gates: Gates,
    train: GateData,
    validation: GateData,
    recipe: Recipe,
    make_optimizer: MakeOptimizer,
    seed: int = 0,
    log: Log | None = None,
) -> dict[str, Any]:
    """Train gates in place.

    Args:
        gates: untrained, on the device to train on.
        train, validation: samples of different images.
        recipe: the settings.
        make_optimizer: called with the parameters.
        seed: of the order of the samples and of the layers drawn.
        log: called after every epoch with its number and the losses.

    Returns:
        What happened: epochs run, best epoch, training and validation loss there.
    """
    generator = torch.Generator().manual_seed(seed)
    device = gates.inner.device
    if recipe.standardize:
        standardize(gates, train.status)
    optimizer = make_optimizer(gates.parameters())
    steps = math.ceil(len(train) / recipe.batch_size)
    total = steps * recipe.epochs
    scheduler = get_scheduler(recipe.schedule, optimizer, int(recipe.warmup * total), total)
    best: dict[str, Any] = {"validation_loss": float("inf")}
    weights: dict[str, Tensor] = {}
    for epoch in range(1, recipe.epochs + 1):
        gates.train()
        losses = []
        for rows in torch.randperm(len(train), generator=generator).split(recipe.batch_size):
            loss = objective_loss(gates, _to(train[rows], device), recipe, _layer_mask(gates, rows, recipe, generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()) * len(rows))
        found = {
            "train_loss": float(np.sum(losses)) / len(train),
            "validation_loss": evaluate_loss(gates, validation, recipe),
        }
        if log is not None:
            log(epoch, found)
        if found["validation_loss"] < best["validation_loss"] or not recipe.patience:
            best = {"best_epoch": epoch, **found}
            weights = copy.deepcopy(gates.state_dict()) if recipe.patience else {}
        elif epoch - best["best_epoch"] >= recipe.patience:
            break
    if weights:
        gates.load_state_dict(weights)
    gates.eval()
    return {"epochs": epoch, **best}


@torch.no_grad()
def average_gates(members: Sequence[Gates]) -> Gates:
    """Gates whose logits are the mean of the members': one wider gate a layer, so an ensemble needs nothing else.

    Their weights are rounded to half precision, in which they are stored: whatever is chosen on their probabilities
    afterwards holds for the gates that are loaded, too.

    Args:
        members: trained on the same statuses, so that they standardise them alike.
    """
    first = members[0]
    config = {**first.config(), "width": sum(each.width for each in members)}
    merged = Gates(**config).to(first.inner.device)
    merged.shift.copy_(first.shift)
    merged.scale.copy_(first.scale)
    merged.inner.copy_(torch.cat([each.inner for each in members], dim=2).half())
    merged.outer.copy_((torch.cat([each.outer for each in members], dim=1) / len(members)).half())
    biases: list[Tensor] = [each.inner_bias for each in members if each.inner_bias is not None]
    if merged.inner_bias is not None:
        merged.inner_bias.copy_(torch.cat(biases, dim=2))
    return merged.eval()


@torch.no_grad()
def evaluate_loss(gates: Gates, data: GateData, recipe: Recipe, batch_size: int = 1024) -> float:
    """The recipe's loss over a whole data set."""
    gates.eval()
    device = gates.inner.device
    chunks = torch.arange(len(data)).split(batch_size)
    sums = [float(objective_loss(gates, _to(data[rows], device), recipe)) * len(rows) for rows in chunks]
    return sum(sums) / len(data)


@torch.no_grad()
def gate_probabilities(gates: Gates, status: Tensor, batch_size: int = 1024) -> Tensor:
    """[n, L - 1] exit probability of every gate for statuses [n, L - 1, P * d], on the CPU."""
    device = gates.inner.device
    return torch.cat([gates(rows.to(device)).softmax(-1)[..., 1].cpu() for rows in status.split(batch_size)])


def _layer_mask(gates: Gates, rows: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor | None:
    if recipe.layers_per_sample is None:
        return None
    order = torch.rand(len(rows), len(gates), generator=generator).argsort(1)
    return (order < recipe.layers_per_sample).to(gates.inner.device)


def _to(data: GateData, device: torch.device) -> GateData:
    return GateData(*(getattr(data, name).to(device) for name in ("status", "labels", "cost")))
