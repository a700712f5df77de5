"""Patches that much of the image resembles stay: what flows along a graph of similar patches.

G-Prune (arXiv 2501.02268; code jytmelon/G-Prune): patches are the nodes of a graph, with edges where the cosine of
their projected features is at least 0.5; a row of the transition matrix is the softmax of the cosines over 0.03. The
lengths of the features flow along it for five steps, what a node then has is divided by its number of edges, and the
highest stay. Tile by tile; newline tokens stay.

Deviations: images without tiles are treated alike, where only the code's path for tiles works; `keep` counts patches
after cutting to the image. Position ids are the original ones, as in the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dyvte.policies.merging.nearest import unit
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens
from dyvte.policies.vision.tiles import PerTile

CLOSED = -5000.0
"""Score of a pair without an edge, before the softmax, as in the code."""


@dataclass
class GPrune(PerTile):
    """Keep the tokens that information ends up in on the graph of similar tokens.

    Attributes:
        edge: least cosine of an edge.
        temperature: of the softmax over a node's edges.
        steps: of the flow.

    Example:
        >>> with dyvte.GPrune(keep=0.25)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "gprune"
    label = "G-Prune"
    source = Source("2501.02268", "jytmelon/G-Prune")

    keeps_separators: ClassVar[bool] = True

    edge: float = 0.5
    temperature: float = 0.03
    steps: int = 5

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] what flows to a token, by its number of edges."""
        cosines = unit(tokens.hidden) @ unit(tokens.hidden).T
        linked = cosines >= self.edge
        transition = (cosines / self.temperature).masked_fill(~linked, CLOSED).softmax(-1)
        flow = tokens.hidden.float().norm(dim=-1)
        for _ in range(self.steps):
            flow = flow @ transition
        return flow / linked.sum(1)
