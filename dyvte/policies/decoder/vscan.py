"""Half way through the decoder, the visual tokens that the last prompt token attends to most stay.

VScan's second stage (arXiv 2505.22654; code Tencent/SelfEvolvingAgent): before layer 16 of 32 a third stays, ranked by
the last prompt token, mean over heads. Its first stage looks at the vision tower and merges; compose the two.

Deviations: the ranking is that of layer 15, which has run, where the code makes the queries and keys of layer 16 for
it; position ids are kept, where the code counts anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dyvte.policies.attention_policy import LayerAttention
from dyvte.policies.base import Prefill
from dyvte.policies.decoder.stages import StagedScorer
from dyvte.policies.method import Source


@dataclass
class VScanDecoder(StagedScorer):
    """Prune once in the middle.

    Attributes:
        keep: share or number of an image's tokens that stays.
        layers: the one layer; None for 16 of 32, in proportion.

    Example:
        >>> with dyvte.VScanDecoder()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "vscan_decoder"
    label = "VScan, second stage"
    source = Source("2505.22654", "Tencent/SelfEvolvingAgent")
    paper_layers = (16,)

    keep: float = 1 / 3

    def look(self, layer: int, prefill: Prefill, attention: LayerAttention) -> Tensor:
        """The last prompt token's attention."""
        return attention.row(prefill.layout.last_prompt).mean(1)
