"""Each tile gets what the full view's lower layer says of it, and keeps what its own upper layer says.

HiRED (arXiv 2408.10945; code hasanar1f/HiRED): half of the budget goes to the full view, the rest to the tiles by how
many of the full view's most attended patches fall in each (class token's row in the first encoder layer); within a view
the patches stay that the class token attends to most in the last layer but one. Newlines leave. An image of one view
keeps the most attended.

Deviations: which tile a patch of the full view falls in is told by its place in raster order, as in the code, so by
horizontal strips and not by the tiles' true places. Rounding is by largest remainders, where the code cuts; a tile
smaller than its quota, after cutting to the image, leaves the rest to the others. Heads are averaged, where the code
sums, which ranks alike. Without class token the attention received takes its row's place. Position ids are the original
ones unless `positions="contiguous"`, which is what the code has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top
from dyvte.policies.vision.tiles import ClassAttention, full_view, shared_out, top_of_each, with_spare_separators


@dataclass
class HiRED(ClassAttention):
    """Budgets of tiles by attention in the full view.

    Attributes:
        full_share: share of the budget that goes to the full view (the paper's alpha).
        count_layer: encoder layer whose attention in the full view tells the tiles' budgets.

    Example:
        >>> with dyvte.HiRED(keep=0.2)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "hired"
    label = "HiRED"
    source = Source("2408.10945", "hasanar1f/HiRED")

    full_share: float = 0.5
    count_layer: int = 0

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """Attention of two layers."""
        return TowerNeeds(attention=(self.count_layer, self.encoder_layer))

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the most attended of every view, by the views' budgets; separators stay if nothing else can."""
        full, others = full_view(tokens)
        views = [full, *others]
        room = torch.tensor([len(each) for each in views])
        first = min(int(number * self.full_share), len(full)) if others else min(number, len(full))
        low = tokens.of_tower().attention(self.count_layer)[full]
        quotas = [first, *shared_out(number - first, self._in_strips(low, len(others)), room[1:])]
        quotas[0] = min(number - sum(quotas[1:]), len(full))  # what the tiles have no room for
        return with_spare_separators(top_of_each(self.score(tokens), views, quotas), tokens.view, number)

    def _in_strips(self, scores: Tensor, strips: int) -> Tensor:
        """[strips] how many of the most attended patches [n] of the full view each strip of it has."""
        chosen = top(scores, int(len(scores) * (1 - self.full_share))).nonzero().flatten()
        return torch.bincount((chosen * strips).div(len(scores), rounding_mode="floor").cpu(), minlength=strips)
