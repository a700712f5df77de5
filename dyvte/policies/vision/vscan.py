"""Patches stay that matter within their window or in the whole image; the others join the most alike of them.

VScan (arXiv 2505.22654; code Tencent/SelfEvolvingAgent, VScan), its first stage: half of the budget goes to 4 x 4
windows of the image, in each to the patches that the class token attends to most in a low encoder layer; the rest to
the patches that it attends to most in the last layer but one. After the projector each patch that leaves is averaged
into the one of largest cosine that stays.

Deviations: the second stage, which prunes again before decoder layer 16 by the last token's attention, is FastV's with
another layer: compose the two. The low layer is CLIP's 5th of 24, as a share of the tower's depth. What the windows'
rounding leaves over goes to the whole image, where the code keeps fewer tokens (98 for 100). A tile of fewer than four
rows has fewer windows. Without class token attention is that received from the mean query; for Qwen2.5-VL the code
takes the first block of full attention and the last. Newlines leave. Position ids are the original ones unless
`positions="contiguous"`, which is what the code has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.instrument.vision_tower import TowerNeeds, VisionTower
from dyvte.mllm import MLLM
from dyvte.policies.merging.nearest import with_nearest
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top
from dyvte.policies.vision.tiles import ByClassAttention, grid_of_tile, top_of_each, views_of

LOW = 5 / 24
"""The low layer, of the tower's depth."""
SIDE = 4
"""Windows along a side of the image."""


@dataclass
class VScan(ByClassAttention):
    """Keep tokens that matter within their window or in the whole image, and merge the others into them.

    Attributes:
        local: share of the budget that goes to windows.
        local_layer: encoder layer that ranks within windows; None is 5/24 of the tower's depth.

    Example:
        >>> with dyvte.Compose([dyvte.VScan(keep=96), dyvte.FastV(layer=6, keep=1 / 3)])(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "vscan"
    label = "VScan, first stage"
    source = Source("2505.22654", "Tencent/SelfEvolvingAgent")

    local: float = 0.5
    local_layer: int | None = None

    def _low(self, mllm: MLLM) -> int:
        return int(LOW * VisionTower(mllm).num_layers) if self.local_layer is None else self.local_layer

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """Attention of two layers."""
        return TowerNeeds(attention=(self._low(mllm), self.encoder_layer))

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the most attended of every window, then of the whole tile."""
        row, column, height, width = grid_of_tile(tokens)
        window = (row * SIDE).div(height, rounding_mode="floor") * SIDE + (column * SIDE) // width
        low = tokens.of_tower().attention(self._low(tokens.mllm))
        windows = views_of(window)
        stay = top_of_each(low, windows, [int(number * self.local) // len(windows)] * len(windows))
        high = self.score(tokens).masked_fill(stay, -torch.inf)
        return stay | top(high, number - int(stay.sum()))

    def reduce_tile(self, tokens: VisualTokens, number: int) -> tuple[Tensor, Tensor | None]:
        """What leaves joins the nearest that stays."""
        stay = self.choose(tokens, number)
        states = tokens.hidden.float()
        sums, count = with_nearest(states, states, stay.nonzero().flatten(), (~stay).nonzero().flatten())
        return stay, (states + sums) / (1 + count)
