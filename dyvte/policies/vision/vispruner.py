"""Important patches by the class token's attention stay, and of the rest those unlike each other.

VisPruner (arXiv 2412.01818, ICCV 2025; code Theia-4869/VisPruner): a part of the budget goes to the patches that the
class token attends to most in the last encoder layer but one. The rest, in order of attention, is thinned until it
fits: every second one is compared with those between, by cosine of the features that the projector gets, and up to 8 of
the most alike go. LLaVA-NeXT: tile by tile.

Deviations: a round takes away no more than there are candidates, where the code fails if the second part is tiny, and
an odd number of tokens is split with one more among the candidates. Without class token attention is that received from
the mean query of the same layer; the code takes the last layer (`encoder_layer=-1`). Newlines leave. Position ids are
the original ones unless `positions="contiguous"`, which is what the code has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.merging.nearest import unit
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top
from dyvte.policies.vision.tiles import ByClassAttention, shown_layer

A_ROUND = 8
"""Tokens that a round takes away at most, as in the code."""


@dataclass
class VisPruner(ByClassAttention):
    """Keep important tokens and diverse ones.

    Attributes:
        important: share of the budget that goes by attention.

    Example:
        >>> with dyvte.VisPruner(keep=64)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "vispruner"
    label = "VisPruner"
    source = Source("2412.01818", "Theia-4869/VisPruner")

    important: float = 0.5

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """Attention of one layer, and the features that the projector gets."""
        return TowerNeeds(attention=(self.encoder_layer,), features=(shown_layer(mllm),))

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the most attended, and of the others those left after thinning."""
        scores = self.score(tokens)
        stay = top(scores, int(number * self.important))
        order = scores.masked_fill(stay, -torch.inf).argsort(descending=True, stable=True)
        rest = order[: len(scores) - int(stay.sum())]
        features = tokens.of_tower().features(shown_layer(tokens.mllm))
        return stay.index_fill(0, thinned_out(rest, unit(features), number - int(stay.sum())), True)


def thinned_out(rest: Tensor, features: Tensor, number: int) -> Tensor:
    """`number` of the indices `rest` [m] into features [n, c] of length 1, most alike ones taken away."""
    if number == 0:
        return rest[:0]
    while len(rest) > number:
        even, odd = rest[::2], rest[1::2]
        best = (features[even] @ features[odd].T).amax(1)
        away = min(A_ROUND, len(rest) - number, len(even))
        rest = torch.cat([even[best.argsort(descending=True, stable=True)[away:]], odd])
    return rest
