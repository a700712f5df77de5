"""The patches that the class token attends to most, summed over the tower's upper layers, stay.

VTC-CLS (arXiv 2412.05819; code THU-MIG/VTC-CLS): the class token's attention, mean over heads, summed from encoder
layer `first` to the last but one; the highest stay.

Unverified: which `first` the published tables use. The code's loader has 16 of CLIP's 24 layers, which is our default
as a share of the tower's depth.

Deviations: without class token the mean attention received takes its row's place, where the code has no answer; every
image is pruned for itself, where the code does not prune lists of images; several tiles of an image share its budget by
size; position ids are the original ones unless `positions="contiguous"`, which is what the code has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.instrument.vision_tower import TowerNeeds, VisionTower
from dyvte.mllm import MLLM
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens
from dyvte.policies.vision.tiles import PerTile

FIRST = 16 / 24
"""The first layer of the sum, of the tower's depth."""


@dataclass
class VTCCLS(PerTile):
    """Keep the tokens with most attention of the class token over several layers.

    Attributes:
        first: first encoder layer of the sum, which ends with the last but one; negative counts from the last, None is
            two thirds of the tower's depth.

    Example:
        >>> with dyvte.VTCCLS(keep=64)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "vtc_cls"
    label = "VTC-CLS"
    source = Source("2412.05819", "THU-MIG/VTC-CLS", unverified="first encoder layer of the tables")

    first: int | None = None

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """Attention from `first` to the last layer but one.

        Raises:
            ConfigError: `first` is after the last layer but one.
        """
        tower = VisionTower(mllm)
        last = max(tower.num_layers - 2, 0)
        first = min(round(FIRST * tower.num_layers), last) if self.first is None else tower.index(self.first)
        if first > last:
            raise ConfigError(f"VTCCLS: the sum starts at layer {first} and ends at {last}; give an earlier `first`")
        return TowerNeeds(attention=range(first, last + 1))

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] sum over the layers."""
        return torch.stack(list(tokens.of_tower().attentions.values())).sum(0)
