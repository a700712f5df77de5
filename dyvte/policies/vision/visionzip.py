"""Dominant patches by the class token's attention stay, and a few that stand for the rest.

VisionZip (arXiv 2412.04467; code dvlab-research/VisionZip): the class token's attention in the last encoder layer but
one picks the dominant tokens; of the rest, evenly spaced targets take in the others by cosine of their mean keys. A
target becomes itself plus the mean of what it takes in, a sum of about twice a token's length, as in the code.
LLaVA-NeXT: tile by tile, without newlines.

Deviations: the code's dominant tokens include the class token's own feature, which has no position here: one more patch
takes its place. Contextual tokens stay at their target's place, where the code puts them at the end. Where the
projector mixes patches (InternVL, Qwen, Gemma 3), tokens are merged after it. Without class token attention is that
received from the mean query. Position ids are the original ones unless `positions="contiguous"`, which is what the code
has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.merging.nearest import merging_needs, merging_space, with_nearest
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top
from dyvte.policies.vision.tiles import ByClassAttention


@dataclass
class VisionZip(ByClassAttention):
    """Keep dominant tokens and merge the rest into contextual ones.

    Attributes:
        contextual: share of the budget that stands for the rest (10 of 64 in the paper).

    Example:
        >>> with dyvte.VisionZip(keep=64)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "visionzip"
    label = "VisionZip"
    source = Source("2412.04467", "dvlab-research/VisionZip")

    contextual: float = 10 / 64

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """Attention and keys of one layer, and what is merged."""
        return merging_needs(mllm, self.encoder_layer)

    def reduce_tile(self, tokens: VisualTokens, number: int) -> tuple[Tensor, Tensor | None]:
        """Dominant tokens and targets, which take in the rest."""
        few = round(number * self.contextual)
        dominant = top(self.score(tokens), number - few)
        rest = (~dominant).nonzero().flatten()
        chosen = contextual_targets(len(rest), few).to(rest.device)
        targets, others = rest[chosen], rest[~torch.isin(torch.arange(len(rest), device=rest.device), chosen)]
        stay = dominant.index_fill(0, targets, True)
        if not len(targets):
            return stay, None
        features, back = merging_space(tokens)
        sums, count = with_nearest(features, tokens.of_tower().mean_keys(self.encoder_layer), targets, others)
        states = tokens.hidden.clone()
        states[targets] = back((features + sums / count.clamp(min=1))[targets])
        return stay, states


def contextual_targets(rest: int, number: int) -> Tensor:
    """`number` of `range(rest)`, every (rest // number)-th from the first."""
    number = min(number, rest)
    return torch.arange(number) * max(1, rest // max(number, 1))
