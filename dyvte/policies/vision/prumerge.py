"""Patches whose attention of the class token is an outlier stay and take their likes in.

LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388; code 42Shawn/LLaVA-PruMerge): softmax of the class token's query times
the keys over the full width, in the last encoder layer; the share of tokens above Q3 + 1.5 IQR is the share that stays,
sample by sample. Each token that stays gets its 32 nearest by cosine of keys added, weighted by their attention,
whether they stay or not; one extra token is the weighted sum of those that leave. PruMerge+ adds every int(int(1 /
share) / 3)-th token.

Deviations: tokens stay in image order, where the code has them in order of attention, and the extra token takes the
place of the first that leaves. A step of 0, with which the code fails when more than a third are outliers, is 1. With
`keep` the number is fixed: PruMerge keeps the highest, PruMerge+ a fifth of them by attention and the others evenly
spaced (ours; the VTC-CLS code has 13 and every 11th for 64, 40 and every 6th for 128). Tiles are treated one by one.
Without class token its attention is replaced by that received from the mean query. Where the projector mixes patches,
tokens are merged after it. Position ids are the original ones unless `positions="contiguous"`, which is what the code
has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.merging.nearest import merging_needs, merging_space, unit
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top
from dyvte.policies.token_scores import evenly_spaced
from dyvte.policies.vision.tiles import PerTile

BY_ATTENTION = 1 / 5
"""Share of a fixed budget that PruMerge+ gives to attention, as 13 of 64 is."""


@dataclass
class PruMerge(PerTile):
    """Keep attention's outliers and merge the others into them.

    Attributes:
        keep: share or number that stays; None for as many as are outliers.
        neighbours: tokens that each kept one takes in.
        encoder_layer: layer of the vision tower whose class token and keys are used.

    Example:
        >>> with dyvte.PruMerge()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "prumerge"
    label = "PruMerge"
    source = Source("2403.15388", "42Shawn/LLaVA-PruMerge")

    keep: float | None = None  # type: ignore[assignment]
    neighbours: int = 32
    encoder_layer: int = -1
    _evenly_spaced: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.keep is not None:
            super().__post_init__()

    def stages(self, mllm: MLLM) -> Mapping[int, float]:
        """Before the decoder; of an unknown number the largest."""
        return {0: 1.0 if self.keep is None else self.keep}

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """The class token's query, keys and attention of one layer, and what is merged."""
        return merging_needs(mllm, self.encoder_layer)

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] attention of the class token, all heads as one."""
        tower = tokens.of_tower()
        attention = tower.class_query_attention if tower.class_queries else tower.attention
        return attention(self.encoder_layer)

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the tokens that stay as themselves, without the extra one."""
        scores = self.score(tokens)
        if self.keep is not None:
            number -= 1  # the extra token
            stay = top(scores, round(number * BY_ATTENTION) if self._evenly_spaced else number)
            free = (~stay).nonzero().flatten()
            return stay.index_fill(0, free[evenly_spaced(len(free), number - int(stay.sum())).to(free.device)], True)
        share = outlier_share(scores)
        stay = top(scores, int(len(scores) * share))
        if self._evenly_spaced and share > 0:
            stay[:: max(int(1 / share) // 3, 1)] = True
        return stay

    def reduce_tile(self, tokens: VisualTokens, number: int) -> tuple[Tensor, Tensor | None]:
        """What stays takes its neighbours in; the extra token holds the rest."""
        own = self.choose(tokens, number)
        left = (~own).nonzero().flatten()
        features, back = merging_space(tokens)
        weighted = features * self.score(tokens)[:, None]
        alike = unit(tokens.of_tower().keys(self.encoder_layer))
        near = (alike @ alike.T).fill_diagonal_(-torch.inf)[own]
        features[own] += weighted[near.topk(min(self.neighbours, len(own) - 1)).indices].sum(1)
        features[left[:1]] = weighted[left].sum(0)
        stay = own.index_fill(0, left[:1], True)
        states = tokens.hidden.clone()
        states[stay] = back(features[stay])
        return stay, states


@dataclass
class PruMergePlus(PruMerge):
    """Keep attention's outliers and evenly spaced tokens, and merge the others into them.

    Example:
        >>> with dyvte.PruMergePlus(keep=0.25)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "prumerge_plus"
    label = "PruMerge+"
    source = Source("2403.15388", "42Shawn/LLaVA-PruMerge")

    _evenly_spaced: ClassVar[bool] = True


def outlier_share(scores: Tensor) -> float:
    """Share of the scores above the third quartile plus 1.5 interquartile ranges."""
    quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64, device=scores.device)
    first, third = torch.quantile(scores.double(), quartiles).unbind()
    return float((scores > third + 1.5 * (third - first)).double().mean())
