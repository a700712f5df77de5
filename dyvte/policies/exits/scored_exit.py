"""All visual tokens of a row leave at the first layer where its score is high enough; the score is the method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.gates.metrics import at_exit, first_exit
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.method import Calibration, largest_within

NEVER = float("inf")


@dataclass
class ScoredExit(Policy):
    """Leave out a row's visual tokens from the first layer on before which its score is above the threshold.

    Override `score` and, where it is not asked before every layer, `asked_layers`. A score may not depend on the
    threshold, so that one pass tells what every threshold would cost.

    Attributes:
        threshold: rows leave above it.

    Example:
        >>> from dyvte.policies.exits.scored_exit import ScoredExit
        >>> class QuietText(ScoredExit):
        ...     def score(self, layer, prefill):
        ...         last = prefill.layout.last_prompt[:, None, None].expand(-1, 1, prefill.hidden.shape[2])
        ...         return -prefill.hidden.gather(1, last)[:, 0].norm(dim=-1)
        >>> with QuietText(threshold=-5.0)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> run.exit_layers.shape
        torch.Size([2])
    """

    acts = "exits"

    threshold: float

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise ConfigError(f"{type(self).__name__}: threshold is a number, got {self.threshold!r}")

    def asked_layers(self, mllm: MLLM) -> range | list[int]:
        """The exit layers k at which a row may leave; by default all but 0 and L."""
        return range(1, mllm.num_layers)

    def score(self, layer: int, prefill: Prefill) -> Tensor:
        """[B] of every row before `layer` runs; what a row without image gets does not matter."""
        raise NotImplementedError

    def asking_everywhere(self) -> Self:
        """This method asked before every layer, and without a threshold: what budgets are met with."""
        return replace(self, threshold=NEVER)

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Ask, and drop the visual tokens of the rows above the threshold."""
        if not prefill.sees_image or layer not in self.asked_layers(prefill.mllm):
            return
        score = self.score(layer, prefill)
        prefill.state.setdefault((id(self), "scores"), {})[layer] = score
        if self.threshold < NEVER:
            prefill.drop_image(score > self.threshold)

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """The threshold whose mean cost over the prompts is the budget, asked before every layer."""
        policy = cls().asking_everywhere()  # type: ignore[call-arg]
        scores, costs = policy.scores(calibration), calibration.exit_costs([1.0] * calibration.mllm.num_layers)

        def cost(threshold: float) -> float:
            return float(at_exit(costs, first_exit(scores, [threshold] * scores.shape[1])).mean())

        # scores may lie anywhere: it is their ranks that are halved
        ranks = torch.cat([scores.min()[None] - 1, scores.flatten().unique()]).tolist()
        place = largest_within(lambda share: cost(ranks[int(share * (len(ranks) - 1))]), budget)
        return None if place is None else replace(policy, threshold=ranks[int(place * (len(ranks) - 1))])

    @torch.no_grad()
    def scores(self, calibration: Calibration) -> Tensor:
        """[n, L - 1] scores of the prompts at every exit layer k = 1..L - 1; -inf where none was asked."""
        found = []
        for batch in calibration.batches:
            with self(calibration.mllm) as run:
                calibration.mllm.model(**batch, logits_to_keep=1)
            assert run.prefill is not None
            asked = run.prefill.state.get((id(self), "scores"), {})
            nothing = torch.full((len(batch["input_ids"]),), -torch.inf)
            every = range(1, calibration.mllm.num_layers)
            found.append(torch.stack([asked.get(k, nothing).float().cpu() for k in every], dim=1))
        return torch.cat(found)
