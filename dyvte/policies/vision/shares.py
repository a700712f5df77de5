"""Shared by the methods: budgets over tiles, and merging in the space that a paper merges in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.scorer import VisualTokens, top


def shared_out(number: int, weights: Tensor, room: Tensor) -> list[int]:
    """Split a number in proportion to weights: floors, then one more each for the largest weights.

    Nobody gets more than there is room for; what finds none goes to the others by the same rule.

    Args:
        number: what to split.
        weights: [G], none negative.
        room: [G] most that each can take.
    """
    quota = torch.zeros_like(room)
    while number > 0 and bool((quota < room).any()):
        open_to = quota < room
        share = weights.double().clamp(min=0) * open_to
        share = share / share.sum() if float(share.sum()) > 0 else open_to.double() / open_to.sum()
        given = (share * number + 1e-6).floor().long()
        order = share.masked_fill(~open_to, -1).argsort(descending=True, stable=True)[: int(open_to.sum())]
        spare = number - int(given.sum())
        given[order[:spare]] += 1
        before = quota
        quota = torch.minimum(quota + given, room)
        number -= int((quota - before).sum())
    return quota.tolist()


def top_in_views(scores: Tensor, view: Tensor, number: int) -> Tensor:
    """[n] boolean: the highest scores of every tile, whose budgets are in proportion to their sizes; no separators."""
    views = [index for index in view.unique().tolist() if index >= 0]
    sizes = torch.tensor([int((view == index).sum()) for index in views])
    stay = torch.zeros_like(view, dtype=torch.bool)
    for index, quota in zip(views, shared_out(number, sizes, sizes), strict=True):
        inside = (view == index).nonzero().flatten()
        stay[inside[top(scores[inside], quota)]] = True
    return stay


def unit(features: Tensor) -> Tensor:
    """Features [n, c] in float32, of length 1."""
    return nn.functional.normalize(features.float(), dim=-1)


def shown_layer(mllm: MLLM) -> int:
    """The encoder layer whose output goes to the projector, -1 for the last."""
    layer = getattr(mllm.model.config, "vision_feature_layer", -1)
    return layer - 1 if isinstance(layer, int) and layer >= 0 else layer if isinstance(layer, int) else -1


def merging_needs(mllm: MLLM, needs: TowerNeeds) -> TowerNeeds:
    """`needs` and what `merging_space` takes."""
    return TowerNeeds(needs.attention, needs.keys, [*needs.features, shown_layer(mllm)])


def merging_space(tokens: VisualTokens) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features [n, c] to merge, and what makes decoder states of merged ones.

    Where a token is one patch, as in the LLaVA families, these are the features that the projector gets, as in the
    papers; elsewhere the projector has mixed patches already, and they are its outputs.
    """
    projector: Any = getattr(tokens.mllm.model.base_model, "multi_modal_projector", None)
    layer = getattr(tokens.mllm.model.config, "vision_feature_layer", None)
    if tokens.mllm.model.config.model_type in ("llava", "llava_next", "llava_onevision") and isinstance(layer, int):
        features = tokens.of_tower().features(shown_layer(tokens.mllm))
        return features.float(), lambda merged: projector(merged.to(tokens.hidden.dtype)[None])[0]
    return tokens.hidden.float(), lambda merged: merged.to(tokens.hidden.dtype)
