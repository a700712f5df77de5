"""Training the gates of all layers together, batched over layers, from a label set in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from dyvte.gates.module import Gates
from dyvte.gates.objectives import GateData, Recipe, objective_loss

MakeOptimizer = Callable[..., torch.optim.Optimizer]
Log = Callable[[int, dict[str, float]], None]


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
    """Train gates in place, on their device; gives the epochs run, the best one, training and validation loss there.

    `train` and `validation` are samples of different images; `seed` is of the order of the samples and of the layers
    drawn; `log` is called after every epoch with its number and the losses.
    """
    generator = torch.Generator().manual_seed(seed)
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
            drawn = _layer_mask(gates, rows, recipe, generator)
            loss = total_loss(gates, train[rows], recipe, generator, drawn)
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

    The members must standardise statuses alike. Their weights are rounded to half precision, in which they are stored:
    whatever is chosen on their probabilities afterwards holds for the gates that are loaded, too.
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
    generator = torch.Generator().manual_seed(0)  # of the other runs: the same at every call
    chunks = torch.arange(len(data)).split(batch_size)
    return sum(float(total_loss(gates, data[rows], recipe, generator)) * len(rows) for rows in chunks) / len(data)


def total_loss(
    gates: Gates, data: GateData, recipe: Recipe, generator: torch.Generator, mask: Tensor | None = None
) -> Tensor:
    """The recipe's loss on the statuses of the full model, and on one other run of each sample where there are some."""
    device = gates.inner.device
    loss = objective_loss(gates, data.to(device), recipe, mask)
    if (others := data.of_other_runs(generator)) is not None:
        loss = loss + recipe.counterfactual_weight * objective_loss(gates, others.to(device), recipe, mask)
    return loss


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
