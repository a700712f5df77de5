"""What gates are trained on, and for: the recipe, the data in memory, and the losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dyvte.errors import ConfigError
from dyvte.gates.counterfactual import COUNTERFACTUALS, OtherRuns
from dyvte.gates.module import Gates

OBJECTIVES = ("labels", "stopping", "hazard")


@dataclass(frozen=True)
class Recipe:
    """How gates are trained; `conf/recipe/default.yaml` says what each setting does.

    The objectives are "labels", cross-entropy of every gate on its own label (DyVTE, arXiv 2411.19628); "stopping", the
    expected price of the exit layer that the gates choose together (`stopping_loss`); and "hazard", the likelihood of
    the depth from which on the answer is right, for gates that are `cumulative` (`hazard_loss`).
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
    counterfactual: tuple[str, ...] = ()
    counterfactual_weight: float = 1.0
    kind_weight: float = 0.0
    distill: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "counterfactual", tuple(self.counterfactual))  # a list, from a file
        if unknown := [each for each in self.counterfactual if each not in COUNTERFACTUALS]:
            raise ConfigError(
                f"unknown counterfactual run {unknown[0]!r}; choose from {', '.join(COUNTERFACTUALS)} (recipe.training)"
            )
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill is {self.distill}; it is a share, from 0 to 1")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {self.objective!r}; choose from {', '.join(OBJECTIVES)}")
        if self.members < 1:
            raise ConfigError(f"members is {self.members}; need at least one gate a layer")


@dataclass(frozen=True)
class GateData:
    """What gates learn from: n samples, exit layers 0..L.

    Attributes:
        status: [n, L - 1, I].
        labels: [n, L + 1] whether exit k is right.
        cost: [n, L + 1] in full prefills.
        counted: [n, L - 1] gates whose label counts; None for all.
        kinds: [n] number of the kind of question.
        taught: [n, L - 1] probability of "right" that a teacher gives.
        others: the same samples' statuses in runs that saw less of the image, or another one.
    """

    status: Tensor
    labels: Tensor
    cost: Tensor
    counted: Tensor | None = None
    kinds: Tensor | None = None
    taught: Tensor | None = None
    others: OtherRuns | None = None

    def __len__(self) -> int:
        return len(self.status)

    def __getitem__(self, rows: Tensor) -> GateData:
        return self._each(lambda part: part[rows])

    def to(self, device: torch.device) -> GateData:
        """The same on a device; other runs are drawn where they lie."""
        return self._each(lambda part: part.to(device) if isinstance(part, Tensor) else part)

    def of_other_runs(self, generator: torch.Generator) -> GateData | None:
        """Every sample's status in one other run, drawn for it; None without such runs."""
        if self.others is None:
            return None
        status, labels, counted = self.others.draw(generator)
        return GateData(status, labels, self.cost, counted, self.kinds)

    def _each(self, change: Callable[[Any], Any]) -> GateData:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})


def label_loss(
    logits: Tensor, labels: Tensor, exit_weight: float = 1.0, mask: Tensor | None = None, target: Tensor | None = None
) -> Tensor:
    """Cross-entropy of every gate on its label, mean over samples and gates (DyVTE, arXiv 2411.19628).

    Args:
        logits: [B, L - 1, 2] (stay, exit).
        labels: [B, L + 1] boolean.
        exit_weight: weight of the label "exit".
        mask: [B, L - 1] which terms count.
        target: [B, L - 1] probability of "exit" to learn in place of the labels.
    """
    wanted = labels[:, 1:-1].to(logits.dtype) if target is None else target
    stay, leave = logits.log_softmax(-1).unbind(-1)
    loss = -wanted * leave - (1 - wanted) * stay
    weight = 1 + (exit_weight - 1) * wanted
    if mask is not None:
        weight = weight * mask
    return (loss * weight).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def exit_distribution(logits: Tensor) -> Tensor:
    """[B, L] probability of exit layer k = 1..L if every gate drew its decision: p_k * prod_{j < k} (1 - p_j)."""
    stay, leave = logits.float().log_softmax(-1).unbind(-1)
    reached = F.pad(stay.cumsum(1), (1, 0))
    return (reached + F.pad(leave, (0, 1))).exp()


def stopping_loss(logits: Tensor, labels: Tensor, cost: Tensor, disagreement_price: float) -> Tensor:
    """Expected cost of the exit layer that the gates choose together, plus the price of a changed answer.

    `sum_k P(k) (cost[k] + price * (1 - y[k]))` with P the distribution of the first gate to fire, y the labels, all
    [B, L + 1] and in full prefills. Gates trained on labels one by one do not know that an early mistake of any of them
    is final; here all of them answer for it.
    """
    price = cost + disagreement_price * (1 - labels.to(cost.dtype))
    return (exit_distribution(logits) * price[:, 1:]).sum(1).mean()


def hazard_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the depth from which on the answer is right, a term a gate that is reached.

    Gate i gives the hazard h_i: the probability that exit k = i + 1 is the first right one, given that none before was.
    A sample whose first right exit is D adds `log(1 - h_i)` for the gates before and `log h` for its own (Cox, JRSS B
    34, 1972, for discrete times); gates behind D say nothing about it. `logits` are (not yet, now), of `Gates.logits`.
    """
    right = labels[:, 1:-1].to(logits.dtype)
    reached = F.pad(1 - right[:, :-1], (1, 0), value=1.0).cumprod(1)
    return label_loss(logits, labels, mask=reached if mask is None else reached * mask)


def kind_penalty(logits: Tensor, labels: Tensor, kinds: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far gates are from calibrated in the mean of each kind of question: mean over gates of the squared gaps.

    For every kind and gate the gap is the mean of (probability of exit - label) over the kind's samples; kinds weigh by
    their samples. `kinds` are their numbers, [B].
    """
    miss = logits.softmax(-1)[..., 1] - labels[:, 1:-1].to(logits.dtype)
    member = F.one_hot(kinds).to(logits.dtype).T  # [kinds, B]
    counts = member.sum(1).clamp(min=1)
    gaps = member @ (miss if mask is None else miss * mask) / counts[:, None]
    return (gaps**2 * counts[:, None]).sum() / (len(kinds) * miss.shape[1])


def objective_loss(gates: Gates, data: GateData, recipe: Recipe, mask: Tensor | None = None) -> Tensor:
    """The recipe's loss on some samples; `mask` [B, L - 1] says which gates learn from which."""
    raw = gates.logits(data.status)
    logits = gates.decisions(raw)
    counted = data.counted if mask is None else mask if data.counted is None else mask * data.counted
    target = None
    if data.taught is not None and recipe.distill:
        target = (1 - recipe.distill) * data.labels[:, 1:-1].to(raw.dtype) + recipe.distill * data.taught
    if recipe.objective == "labels":
        loss = label_loss(logits, data.labels, recipe.exit_weight, counted, target)
    elif recipe.objective == "hazard":
        loss = hazard_loss(raw, data.labels, counted)
    else:
        loss = stopping_loss(logits, data.labels, data.cost, recipe.disagreement_price)
        if recipe.label_share:
            loss = loss + recipe.label_share * label_loss(logits, data.labels, recipe.exit_weight, counted, target)
    if recipe.kind_weight and data.kinds is not None:
        loss = loss + recipe.kind_weight * kind_penalty(logits, data.labels, data.kinds, counted)
    return loss
