"""Tokens that take others in: who goes to whom, and the space that a paper merges in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.scorer import VisualTokens
from dyvte.policies.vision.tiles import shown_layer

ONE_PATCH_A_TOKEN = ("llava", "llava_next", "llava_onevision")
"""Model types whose projector makes one token of one patch, so that merging before it has a meaning."""


def unit(features: Tensor) -> Tensor:
    """Features [n, c] in float32, of length 1."""
    return nn.functional.normalize(features.float(), dim=-1)


def with_nearest(features: Tensor, compared: Tensor, targets: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [n, c] of the features [n, c] that each target takes in, and their number [n, 1].

    Each of the `others` (indices, as `targets`) goes to the target of largest cosine of what is `compared` [n, k].
    """
    sums, count = torch.zeros_like(features), torch.zeros_like(features[:, :1])
    if len(targets) and len(others):
        alike = unit(compared)
        into = targets[(alike[others] @ alike[targets].T).argmax(1)]
        sums.index_add_(0, into, features[others])
        count.index_add_(0, into, torch.ones_like(features[others, :1]))
    return sums, count


def merging_needs(mllm: MLLM, layer: int) -> TowerNeeds:
    """Attention and keys of an encoder layer, and what `merging_space` takes."""
    return TowerNeeds(attention=(layer,), keys=(layer,), features=(shown_layer(mllm),))


def merging_space(tokens: VisualTokens) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features [n, c] to merge, and what makes decoder states of merged ones.

    Where a token is one patch, as in the LLaVA families, these are the features that the projector gets, as in the
    papers; elsewhere the projector has mixed patches already, and they are its outputs.
    """
    config = tokens.mllm.model.config
    if config.model_type in ONE_PATCH_A_TOKEN and isinstance(config.vision_feature_layer, int):
        projector: Any = tokens.mllm.model.base_model.multi_modal_projector
        features = tokens.of_tower().features(shown_layer(tokens.mllm))
        return features.float(), lambda merged: projector(merged.to(tokens.hidden.dtype)[None])[0]
    return tokens.hidden.float(), lambda merged: merged.to(tokens.hidden.dtype)
