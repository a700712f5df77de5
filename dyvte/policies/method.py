"""What a method says about itself, and the settings of it that meet a budget.

Tables, comparisons and configurations are made of this or checked against it; nothing else lists methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from dyvte.cost.flops import plan_decoder_flops

if TYPE_CHECKING:
    from dyvte.batch import Batch
    from dyvte.gates.module import Gates
    from dyvte.mllm import MLLM
    from dyvte.policies.base import Policy

    P = TypeVar("P", bound=Policy)

Need = Literal["gates", "calibration prompts", "vision tower", "text-image similarity", "square grid"]
"""What a method takes beside the model and the prompt."""

Counted = Literal["flops", "tokens"]
"""What a budget is a share of: decoder FLOPs of the prefill, or visual tokens seen, averaged over decoder layers."""

STEPS = 30
"""Halvings when a share or a threshold is solved for."""


@dataclass(frozen=True)
class Source:
    """Where a method is from.

    Attributes:
        paper: arXiv id; empty for a baseline.
        code: official code, as owner/name on GitHub; empty where there is none.
        unverified: what neither paper nor code was at hand for, and is our choice.
    """

    paper: str = ""
    code: str = ""
    unverified: str = ""


def largest_within(
    cost: Callable[[float], float], budget: float, low: float = 0.0, high: float = 1.0, steps: int = STEPS
) -> float | None:
    """The largest x in [low, high] whose cost, growing with x, is within the budget; None if there is none."""
    if cost(low) > budget:
        return None
    if cost(high) <= budget:
        return high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


@dataclass
class Calibration:
    """Prompts that settings are chosen on, and what they cost.

    Attributes:
        mllm: the model.
        batches: prompts; those without an image cost the same under every setting.
        gates: for methods that need some.
        counted: what a cost is a share of.
    """

    mllm: MLLM
    batches: Sequence[Batch]
    gates: Gates | None = None
    counted: Counted = "flops"

    @cached_property
    def lengths(self) -> Tensor:
        """[n, 2] text and visual tokens of every prompt."""
        return torch.cat([torch.stack([b.layout.text.sum(1), b.layout.visual.sum(1)], dim=1) for b in self.batches])

    @cached_property
    def full(self) -> float:
        """What the full model spends, summed over the prompts."""
        return self._spent([1.0] * self.mllm.num_layers)

    def cost(self, shares: Sequence[float]) -> float:
        """Cost of letting layer l see the share `shares[l]` of the visual tokens."""
        return self._spent(shares) / self.full

    def exit_costs(self, shares: Sequence[float]) -> Tensor:
        """[n, L + 1] cost of every exit for every prompt, where layers before it see `shares` of the visual tokens."""
        layers = self.mllm.num_layers
        mean = self.full / len(self.lengths)
        until = [[*shares[:k], *[0.0] * (layers - k)] for k in range(layers + 1)]
        rows = [[self._of_prompt(text, visual, each) for each in until] for text, visual in self.lengths.tolist()]
        return torch.tensor(rows, dtype=torch.float64) / mean

    def solve(self, make: Callable[[float], P], budget: float) -> P | None:
        """The policy of the largest share within the budget, as its `shares` cost; None if there is none."""
        share = largest_within(lambda keep: self.cost(make(keep).shares(self.mllm)), budget)
        return None if share is None else make(share)

    def _spent(self, shares: Sequence[float]) -> float:
        return sum(self._of_prompt(text, visual, shares) for text, visual in self.lengths.tolist())

    def _of_prompt(self, text: int, visual: int, shares: Sequence[float]) -> float:
        if self.counted == "tokens":
            return visual * sum(shares)
        return plan_decoder_flops(self.mllm, [text + int(visual * share + 0.5) for share in shares])
