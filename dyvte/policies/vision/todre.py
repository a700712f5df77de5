"""From the most attended patch on, those that resemble the chosen ones least stay.

ToDRE (arXiv 2505.18757; no public code), its first stage: the pivot is the patch that the class token attends to most
in the last encoder layer; then, one after another, the patch whose cosines with all chosen ones sum lowest is added.

Unverified: which features are compared; here those that the projector made.

Deviations: the second stage lets all visual tokens leave in an upper decoder layer if little attention goes to them, an
exit that is not part of this policy. Every tile has a pivot of its own, where the paper takes the thumbnail's. Without
class token the pivot is the patch that receives most attention, where the paper draws one. Newlines leave. Position ids
are the original ones unless `positions="contiguous"`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.policies.merging.nearest import unit
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens
from dyvte.policies.vision.tiles import ByClassAttention


@dataclass
class ToDRE(ByClassAttention):
    """Keep the most attended token and those least like what is kept already.

    Example:
        >>> with dyvte.ToDRE(keep=0.25)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "todre"
    label = "ToDRE, first stage"
    source = Source("2505.18757", unverified="read without its code: pivot and order of the choice")

    keep: float = 0.25
    encoder_layer: int = -1

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the pivot and what is added to it."""
        features = unit(tokens.hidden)
        stay = torch.zeros_like(tokens.view, dtype=torch.bool)
        summed, best = torch.zeros_like(features[:, 0]), self.score(tokens).argmax()
        for _ in range(number):
            stay[best] = True
            summed = summed + features @ features[best]
            best = summed.masked_fill(stay, torch.inf).argmin()
        return stay
