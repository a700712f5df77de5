"""Strips of the image get budgets by attention and by how varied they are; in each the most attended patches stay.

HoloV (arXiv 2510.02912; code obananas/HoloV): the image's tokens are cut into 16 strips in raster order. In a strip, a
token's score is its attention (class token's row in the last encoder layer but one) plus 0.09 times the variance of its
cosines with the others of the strip (projected features), scaled to the attention's mean. The budget is shared out by
the strips' mean scores, rounded down, the rest to the largest; within a strip attention alone ranks, as in the code
(the paper says the score). Newlines leave.

Deviations: what a strip has no room for goes to the others, as in the paper; the code fills up with zero vectors. The
paper's exponent on the strips' weights, which the code does not have, is left out. Without class token attention is
that received from the mean query in `encoder_layer`, in Qwen averaged over a token's four patches; the code takes
Qwen's last block and another number of strips. Position ids are the original ones unless `positions="contiguous"`,
which is what the code has for LLaVA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.policies.merging.nearest import unit
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens
from dyvte.policies.vision.tiles import ClassAttention, shared_out, top_of_each, with_spare_separators


@dataclass
class HoloV(ClassAttention):
    """Budgets of strips by attention and variety.

    Attributes:
        strips: number of strips of an image.
        variety: weight of the variance beside attention.

    Example:
        >>> with dyvte.HoloV(keep=64)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "holov"
    label = "HoloV"
    source = Source("2510.02912", "obananas/HoloV")

    strips: int = 16
    variety: float = 0.09

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the most attended of every strip, by the strips' budgets; separators stay if nothing else can."""
        patches = (tokens.view >= 0).nonzero().flatten()
        scores = self.score(tokens)
        parts = list(patches.tensor_split(min(self.strips, len(patches))))
        weights = [holistic(scores[part], tokens.hidden[part], self.variety).mean() for part in parts]
        room = torch.tensor([len(part) for part in parts])
        quotas = shared_out(number, torch.stack(weights).cpu(), room)
        return with_spare_separators(top_of_each(scores, parts, quotas), tokens.view, number)


SMALL = 1e-6
"""The code's constant that keeps a strip of equal tokens from dividing by zero."""


def holistic(attention: Tensor, features: Tensor, variety: float) -> Tensor:
    """Scores [n] of the tokens of a strip from their attention [n] and features [n, c].

    Of the cosines with the others; among what deviates from their mean is the token's own zero, as in the code.
    """
    alike = (unit(features) @ unit(features).T).fill_diagonal_(0)
    others = max(len(alike) - 1, 1)
    variance = (alike - alike.sum(1, keepdim=True) / others).square().sum(1) / others
    return attention + variety * variance * attention.mean() / (variance.mean() + SMALL)
