"""From half way on fewer and fewer visual tokens stay, those that a random walk along the attention visits most.

AIM's second part (arXiv 2412.03248; code LaVi-Lab/AIM): behind layer 14 of 28 an eighth of the visual tokens leaves a
layer until none is left. Importance is a random walk of five steps without damping, head by head, on attention whose
scores are divided by 0.1; the root of the mean square over heads. Its first part merges before the decoder to a
quarter: `Compose([ToMe(keep=0.25), AIM()])`.

Deviations: tokens leave, where the code masks them. The merging of ToMe goes by keys' log sizes, the code's is a plain
mean. The schedule is in proportion to the depth, and its start moves to meet a budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.instrument.role_attention import MAP_ENTRIES
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import LayerAttention
from dyvte.policies.base import Prefill
from dyvte.policies.method import Source
from dyvte.policies.scorer import ScorerPolicy

TEMPERATURE, STEPS = 0.1, 5
SPAN = 8 / 28
"""Share of the layers over which the tokens leave."""


@dataclass
class AIM(ScorerPolicy):
    """Prune a little before every layer of the second half.

    Attributes:
        keep: share of the decoder layers that see all visual tokens.

    Example:
        >>> with dyvte.AIM()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "aim"
    label = "AIM, second part"
    source = Source("2412.03248", "LaVi-Lab/AIM")

    def stages(self, mllm: MLLM) -> dict[int, float]:
        """A line from all tokens to none."""
        start, span = round(self.keep * mllm.num_layers), max(1, round(SPAN * mllm.num_layers))
        last = min(start + span, mllm.num_layers - 1)
        return {layer: 1 - (layer - start) / span for layer in range(start + 1, last + 1)}

    def look(self, layer: int, prefill: Prefill, attention: LayerAttention) -> Tensor:
        """Where the walk ends."""
        return walk(attention, STEPS, TEMPERATURE)


def walk(attention: LayerAttention, steps: int, temperature: float) -> Tensor:
    """[b, n] root of the mean square over heads of a walk's distribution, uniform at first, after some steps.

    The temperature is what scores are divided by before the softmax; rows are made a few at a time and never kept.
    """
    index, valid = attention.selection.index, attention.selection.valid
    rows, length = index.shape
    present = torch.ones(rows, length, device=index.device) if valid is None else valid.float()
    at = (present / present.sum(1, keepdim=True))[:, None].expand(-1, attention.num_heads, -1)
    at_once = max(1, MAP_ENTRIES // (rows * attention.num_heads * length))
    for _ in range(steps):
        reached = torch.zeros_like(at)
        for start in range(0, length, at_once):
            part = slice(start, start + at_once)
            map_ = attention.rows(part).pow(1 / temperature)
            map_ = map_ / map_.sum(-1, keepdim=True).clamp(min=torch.finfo(map_.dtype).tiny)
            reached = reached + (at[:, :, None, part] @ map_)[:, :, 0]
        at = reached
    return at.square().mean(1).sqrt()
