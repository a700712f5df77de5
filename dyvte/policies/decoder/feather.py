"""Ranking by attention without its bias for places, and a coarse grid that stays whatever it says.

FEATHER (arXiv 2412.13180; code markendo/FEATHER): before layer 8 of 32 the last prompt token's attention to the image,
in the layer before and without rotary positions, picks a share 1 - R of the tokens, to which every third of every third
row is added; before layer 16 the same ranking leaves (1 - R)^2 of those, without a grid.

Deviations: the first stage leaves as many as a share 1 - R and the grid have together on average, R + 1/9 (1 - R) of
the image, grid first; in the code their union varies. Without a square grid every ninth token in raster order stands
for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.mllm import MLLM
from dyvte.policies.base import PolicyRun, Prefill
from dyvte.policies.decoder.stages import StagedScorer, keep_projections, projected
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top
from dyvte.policies.token_scores import attention_rows, grid_sides


@dataclass
class FEATHER(StagedScorer):
    """Prune twice by attention without rotary positions.

    Attributes:
        keep: one minus the paper's R.
        layers: of the two stages; None for 8 and 16 of 32, in proportion.
        stride: of the grid that stays in the first stage.

    Example:
        >>> with dyvte.FEATHER()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "feather"
    label = "FEATHER"
    source = Source("2412.13180", "markendo/FEATHER")
    paper_layers = (8, 16)

    keep: float = 0.3
    stride: int = 3

    def budgets(self) -> list[float]:
        """The share and the grid, then the square of the share of that."""
        first = self.keep + (1 - self.keep) / self.stride**2
        return [first, first * self.keep**2]

    @contextmanager
    def hooks(self, mllm: MLLM, run: PolicyRun) -> Iterator[None]:
        """Keep queries and keys of the layer before each stage."""
        before = [layer - 1 for layer in self.layers_of(mllm)]
        with super().hooks(mllm, run), keep_projections(self, mllm, run, before, "q_proj", "k_proj"):
            yield

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Rank before a stage."""
        if layer in self.layers_of(prefill.mllm):
            query, key = (projected(self, prefill, layer - 1, name) for name in ("q_proj", "k_proj"))
            last = prefill.layout.last_prompt[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3])
            image, attention = prefill.kept & prefill.layout.visual, prefill.mllm.attention_of(layer - 1)
            scale = getattr(attention, "scaling", query.shape[3] ** -0.5)
            found = attention_rows(query.gather(2, last), key, image[:, None], scale).mean(1)[:, 0]
            prefill.state[id(self), "seen"] = (layer - 1, found)
        super().before_layer(layer, prefill)

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """In the first stage the grid stays first."""
        first = tokens.layer == self.layers_of(tokens.mllm)[0]
        grid = grid_places(tokens.place, tokens.size, self.stride) if first else torch.zeros_like(tokens.place)
        return top(tokens.received + 2 * grid, number)  # attention is 1 at most


def grid_places(place: Tensor, size: int, stride: int) -> Tensor:
    """[n] boolean: every `stride`-th of every `stride`-th row of a square image, else every `stride ** 2`-th token."""
    height, width = grid_sides(size)
    if height == 1:
        return place % stride**2 == 0
    return (place // width % stride == 0) & (place % width % stride == 0)
