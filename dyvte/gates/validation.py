"""What recipes are compared by on validation questions: cost at equal agreement, and use of the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.gates.labels import LabelSet
from dyvte.gates.metrics import first_exit, mixture_cost, thresholds_by_depth
from dyvte.gates.module import Gates
from dyvte.gates.training import gate_probabilities

AGREEMENTS = (0.985, 0.99, 0.995)
"""Shares of kept answers at which costs are compared, around what gates are asked for."""
THRESHOLDS = 200
"""Thresholds whose agreement and cost make the frontier."""


def threshold_frontier(probability: Tensor, agree: Tensor, cost: Tensor, caution: float) -> tuple[Tensor, Tensor]:
    """What every question costs and whether its answer is kept (1), under each of T thresholds: both [n, T].

    Thresholds are spread evenly over how certain the questions' most certain gates are; the first is never reached.
    `agree` and `cost` are [n, L + 1], `caution` as for `dyvte.gates.metrics.thresholds_by_depth`.

    Example:
        >>> agree, cost = torch.tensor([[0, 1, 1], [0, 0, 1]]), torch.tensor([[0.0, 0.5, 1.0]] * 2)
        >>> costs, kept = threshold_frontier(torch.tensor([[0.9], [0.2]]), agree, cost, caution=0.0)
        >>> costs.mean(0).tolist(), kept.mean(0).tolist()
        ([1.0, 0.75, 1.0], [1.0, 1.0, 1.0])
    """
    num_layers = probability.shape[1] + 1
    risk = 1 - torch.tensor(thresholds_by_depth(0.0, num_layers, caution), dtype=torch.float64)
    certain = (1 - (1 - probability.double()) / risk).amax(1)
    exits = [torch.full((len(probability),), num_layers)]
    grid = torch.linspace(0, 1, THRESHOLDS, dtype=torch.float64)
    for threshold in certain.quantile(grid, interpolation="lower").unique().tolist():
        exits.append(first_exit(probability, thresholds_by_depth(threshold, num_layers, caution)))
    chosen = torch.stack(exits, dim=1)
    return cost.double().gather(1, chosen), agree.double().gather(1, chosen)


def cost_at_agreement(
    probability: Tensor, agree: Tensor, cost: Tensor, caution: float, wanted: Sequence[float] = AGREEMENTS
) -> dict[str, float]:
    """Mean cost of gates at some agreements, whatever the threshold that reaches them: mixtures of two thresholds.

    Returns:
        `cost_at_0.99` and so on, and `mean_cost`, their mean.
    """
    costs, agreements = (each.mean(0).numpy() for each in threshold_frontier(probability, agree, cost, caution))
    found = {f"cost_at_{each:g}": mixture_cost(costs, agreements, each) for each in wanted}
    return {**found, "mean_cost": float(np.mean(list(found.values())))}


def use_of_image(gates: Gates, labels: LabelSet, rows: Tensor) -> dict[str, float]:
    """Whether gates say exit more if the status has seen more of the image; empty without statuses that say so.

    Returns:
        `withheld_less_seen`: mean probability of exit of statuses that never saw the image, less that of the full
        model's (below 0 if gates wait for the image). `dose_slope`: least-squares slope of the mean probability over
        the number of layers that saw the image (above 0 if they do).
    """
    try:
        runs = labels.counterfactual("exits", gates.status)[rows]
    except ConfigError:  # statuses of the image or the question, or a set without other runs
        return {}
    seen = float(gate_probabilities(gates, labels.status(gates.status)[rows]).mean())
    means = [float(gate_probabilities(gates, runs[:, place]).mean()) for place in range(runs.shape[1])]
    found = {"withheld_less_seen": means[labels.exits.index(0)] - seen} if 0 in labels.exits else {}
    if len(means) > 1:
        found["dose_slope"] = float(np.polyfit(labels.exits, means, 1)[0])
    return found
