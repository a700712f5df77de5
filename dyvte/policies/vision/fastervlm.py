"""The patches that the class token attends to most stay.

FasterVLM (arXiv 2412.01818, version 1; code Theia-4869/FasterVLM): mean over heads of the class token's attention in
the last encoder layer but one, the highest stay; in LLaVA-NeXT as many of every tile, and all newline tokens.

Deviations: `keep` is shared out over tiles by their size after cutting to the image, where the code takes a number of
every whole tile; without class token (SigLIP, Qwen) the mean attention that a patch receives takes its row's place;
position ids are the original ones unless `positions="contiguous"`, which is what the code has.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.scorer import ScorerPolicy, VisualTokens
from dyvte.policies.vision.shares import top_in_views


@dataclass
class FasterVLM(ScorerPolicy):
    """Keep the tokens with most attention of the class token.

    Attributes:
        encoder_layer: layer of the vision tower that ranks.
    """

    encoder_layer: int = -2

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """Attention of one layer."""
        return TowerNeeds(attention=(self.encoder_layer,))

    def score(self, tokens: VisualTokens) -> Tensor:
        """Attention of the class token."""
        return tokens.of_tower().attention(self.encoder_layer)

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """The highest of every tile, and the separators; `keep` counts the patches."""
        separator = tokens.view < 0
        patches = round(number * (1 - float(separator.float().mean())))
        return top_in_views(self.score(tokens), tokens.view, patches) | separator
