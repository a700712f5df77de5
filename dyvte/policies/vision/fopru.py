"""The patches, or whole rows of patches, that get most attention in the vision tower stay.

FoPru (arXiv 2411.14164; no public code): a token's significance is its attention in the vision tower; `rank` keeps the
highest tokens, `row` the rows of the grid whose significance is highest; the order is the image's.

Unverified (the abstract says no more): the encoder layer, the class token's row against attention received, the mean
over heads, a row's score as a sum, and what becomes of a budget that is no multiple of a row. Here: the layer that
LLaVA shows, the class token's row where there is one, and as many rows as the budget holds whole, one at least.

Deviations: tiles share the budget by size; position ids are the original ones unless `positions="contiguous"`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top
from dyvte.policies.vision.tiles import ByClassAttention, grid_of_tile


@dataclass
class FoPru(ByClassAttention):
    """Keep the tokens, or the rows of the grid, with most attention.

    Attributes:
        by: "rank" or "row".

    Example:
        >>> with dyvte.FoPru(keep=0.25, by="row")(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "fopru"
    label = "FoPru"
    source = Source("2411.14164", unverified="encoder layer, row score and rounding: read in the abstract only")

    by: str = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("rank", "row"):
            raise ConfigError(f"FoPru: by is 'rank' or 'row', got {self.by!r}")

    def choose(self, tokens: VisualTokens, number: int) -> Tensor:
        """[n] the highest tokens, or all tokens of the highest rows."""
        if self.by == "rank":
            return super().choose(tokens, number)
        row, _, height, width = grid_of_tile(tokens)
        scores = self.score(tokens)
        sums = torch.zeros(height, dtype=scores.dtype, device=scores.device).index_add_(0, row, scores)
        return top(sums, max(number // width, 1))[row]
