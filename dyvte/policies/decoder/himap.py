"""First what the text attends to stays, later what the image itself attends to.

HiMAP (arXiv 2503.13108; code ustc-hyin/HiMAP): before layer 2 the visual tokens that the rows after the image attend to
most stay (half of them), before layer 8 those of them that receive most from the other visual tokens (an eighth of
all). Attention is the mean over heads of the layer before, summed over rows.

Deviations: one setting for both counts, `keep` and its third power, which gives the paper's 50% and 12.5%. Of several
images each keeps its share, while rows are those after the last one and those of all images. Padding is left out of
every sum, which the code's is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dyvte.policies.attention_policy import LayerAttention
from dyvte.policies.base import Prefill
from dyvte.policies.decoder.stages import StagedScorer
from dyvte.policies.method import Source


@dataclass
class HiMAP(StagedScorer):
    """Prune by the text's attention, then by the image's own.

    Attributes:
        keep: share that the first stage leaves; the second leaves `keep ** 3`.
        layers: of the two stages; None for 2 and 8 of 32, in proportion.

    Example:
        >>> with dyvte.HiMAP()(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "himap"
    label = "HiMAP"
    source = Source("2503.13108", "ustc-hyin/HiMAP")
    paper_layers = (2, 8)

    def budgets(self) -> list[float]:
        """Half, then an eighth."""
        return [self.keep, self.keep**3]

    def look(self, layer: int, prefill: Prefill, attention: LayerAttention) -> Tensor:
        """Attention received from the text after the image, in the second stage from visual tokens."""
        first = layer == self.layers_of(prefill.mllm)[0] - 1
        rows = prefill.layout.text_status_positions if first else prefill.kept & prefill.layout.visual
        return attention.received(rows)
