"""Budgets over the tiles of an image, and methods that are asked tile by tile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyvte.instrument.vision_tower import TowerNeeds
from dyvte.mllm import MLLM
from dyvte.policies.scorer import ScorerPolicy, VisualTokens, top


def shared_out(number: int, weights: Tensor, room: Tensor) -> list[int]:
    """Split a number in proportion to weights [G], none negative: floors, then one more each for the largest weights.

    Nobody gets more than its room [G]; what finds none goes to the others by the same rule.
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


def views_of(view: Tensor) -> list[Tensor]:
    """Indices of the tokens of every view, by the number of each token's [n], -1 for separators."""
    return [(view == each).nonzero().flatten() for each in view.unique().tolist() if each >= 0]


def tiles(view: Tensor, number: int) -> list[tuple[Tensor, int]]:
    """Indices of every tile that gets a budget, and the budget: of `number` in proportion to the tiles' sizes."""
    inside = views_of(view)
    sizes = torch.tensor([len(each) for each in inside])
    quotas = shared_out(number, sizes, sizes)
    return [(each, quota) for each, quota in zip(inside, quotas, strict=True) if quota]


def full_view(tokens: VisualTokens) -> tuple[Tensor, list[Tensor]]:
    """Indices of the view that shows the whole image, and those of each tile.

    LLaVA's families put it first, InternVL last. An image of one view has no tiles.
    """
    views = views_of(tokens.view)
    full = views.pop(-1 if tokens.mllm.model.config.model_type == "internvl" else 0)
    return full, views


def top_of_each(scores: Tensor, parts: Sequence[Tensor], quotas: Iterable[int]) -> Tensor:
    """[n] boolean: of each part (indices into the scores [n]) as many of the highest as its quota says."""
    stay = torch.zeros_like(scores, dtype=torch.bool)
    for inside, quota in zip(parts, quotas, strict=True):
        stay[inside[top(scores[inside], quota)]] = True
    return stay


def with_spare_separators(stay: Tensor, view: Tensor, number: int) -> Tensor:
    """`stay` [n] and as many separators, from the first, as a budget is larger than the number of patches."""
    spare = max(number - int((view >= 0).sum()), 0)
    return stay.index_fill(0, (view < 0).nonzero().flatten()[:spare], True)


def grid_of_tile(tokens: VisualTokens) -> tuple[Tensor, Tensor, int, int]:
    """Row [n] and column [n] of the tokens of one tile, and how many rows and columns it has."""
    row, column = (values.unique(return_inverse=True)[1] for values in tokens.of_tower().place.unbind(1))
    return row, column, int(row.max()) + 1, int(column.max()) + 1


@dataclass
class PerTile(ScorerPolicy):
    """A method whose `score`, `choose` or `reduce_tile` is asked tile by tile, each with its share of the budget.

    An image that is not cut into tiles is one. Separators stay where the budget is larger than the number of patches.
    """

    needs = ("vision tower",)
    keeps_separators: ClassVar[bool] = False
    """Whether separators stay in any case; then the budget's share counts the patches."""

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """The states that the projector gets, if only to know the tiles."""
        return TowerNeeds(features=(shown_layer(mllm),))

    def reduce(self, tokens: VisualTokens, number: int) -> tuple[Tensor, Tensor | None]:
        """As `ScorerPolicy.reduce`, of every tile, put together."""
        separators, states = tokens.view < 0, None
        if self.keeps_separators:
            stay, number = separators, round(number * (1 - float(separators.float().mean())))
        else:
            stay = with_spare_separators(torch.zeros_like(separators), tokens.view, number)
        for inside, quota in tiles(tokens.view, number):
            stay[inside], merged = self.reduce_tile(tokens.at(inside), quota)
            if merged is not None:
                states = tokens.hidden.clone() if states is None else states
                states[inside] = merged.to(states.dtype)
        return stay, states

    def reduce_tile(self, tokens: VisualTokens, number: int) -> tuple[Tensor, Tensor | None]:
        """As `ScorerPolicy.reduce`, of the tokens of one tile; `number` is 1 at least."""
        return self.choose(tokens, number), None


@dataclass
class ClassAttention(ScorerPolicy):
    """Keep the tokens with most attention of the class token, or, where there is none, of the mean query.

    Attributes:
        encoder_layer: layer of the vision tower that ranks; negative counts from the last, -1.
    """

    needs = ("vision tower",)

    encoder_layer: int = -2

    def tower_needs(self, mllm: MLLM) -> TowerNeeds:
        """Attention of the layer."""
        return TowerNeeds(attention=(self.encoder_layer,))

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] attention in the layer."""
        return tokens.of_tower().attention(self.encoder_layer)


@dataclass
class ByClassAttention(ClassAttention, PerTile):
    """`ClassAttention` tile by tile."""


def shown_layer(mllm: MLLM) -> int:
    """The encoder layer whose output goes to the projector, -1 for the last."""
    layer = getattr(mllm.model.config, "vision_feature_layer", -1)
    return layer - 1 if isinstance(layer, int) and layer >= 0 else layer if isinstance(layer, int) else -1
