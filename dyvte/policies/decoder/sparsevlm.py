"""Words that look at the image rate its tokens; the best of those that leave are recycled.

SparseVLM (arXiv 2410.04417; code Gumpest/SparseVLMs, version 1): raters are the text tokens after the image whose share
in a softmax of image times text embeddings is above the mean. Before layers 3, 7 and 16 of 32 the visual tokens with
the most attention from the raters stay, by fixed counts; three tenths of those that leave are clustered by density
peaks, and each cluster's mean stays too.

Deviations: clusters count within the budget, where the code adds them on top (309 for its 300); a mean takes the place
of its centre, where the code appends it; position ids are kept, as in version 2. Between the
code's four settings its counts are interpolated, as shares of the image's tokens. Ties go to the earlier token, where
the code draws noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyvte.policies.attention_policy import LayerAttention
from dyvte.policies.base import Prefill
from dyvte.policies.decoder.stages import StagedScorer
from dyvte.policies.merging.density_peaks import cluster_means
from dyvte.policies.method import Source
from dyvte.policies.scorer import VisualTokens, top

LEFT = {
    0.0: (0.0, 0.0, 0.0),
    1 / 9: (0.1146, 0.0521, 0.0295),
    1 / 6: (0.4132, 0.0833, 0.0451),
    2 / 9: (0.5260, 0.1910, 0.0625),
    1 / 3: (0.5208, 0.3472, 0.1910),
    1.0: (1.0, 1.0, 1.0),
}
"""Share of the image's tokens that each stage leaves, by the nominal share: the code's numbers for LLaVA-1.5."""
RECYCLED, A_CLUSTER = 0.3, 10
"""Share of the tokens that leave which is clustered, and tokens a cluster."""


@dataclass
class SparseVLM(StagedScorer):
    """Prune three times by the attention of the words that look at the image.

    Attributes:
        keep: the nominal share of the image's tokens; a third, two ninths, a sixth and a ninth are the code's settings.
        layers: of the three stages; None for 3, 7 and 16 of 32, in proportion.

    Example:
        >>> with dyvte.SparseVLM(keep=2 / 9)(mllm):
        ...     answers = mllm.generate(batch)
    """

    name = "sparsevlm"
    label = "SparseVLM"
    source = Source("2410.04417", "Gumpest/SparseVLMs", unverified="the paper's rank-based ratio is not in its code")
    paper_layers = (3, 7, 16)

    keep: float = 1 / 3

    def budgets(self) -> list[float]:
        """The code's shares, interpolated."""
        return [float(np.interp(self.keep, list(LEFT), stage)) for stage in zip(*LEFT.values(), strict=True)]

    @torch.no_grad()
    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Choose the raters once."""
        if layer == 0:
            text = prefill.layout.text_status_positions
            prefill.state[id(self), "raters"] = raters(prefill.hidden, prefill.layout.visual, text)
        super().before_layer(layer, prefill)

    def look(self, layer: int, prefill: Prefill, attention: LayerAttention) -> Tensor:
        """Attention received from the raters."""
        return attention.received(prefill.state[id(self), "raters"])

    def reduce(self, tokens: VisualTokens, number: int) -> tuple[Tensor, Tensor | None]:
        """The best stay, of the next best each cluster's mean."""
        leaving = len(tokens.received) - number
        clustered = int(RECYCLED * leaving) + 1
        clusters = min(clustered // A_CLUSTER + 1, clustered, number)
        stay = top(tokens.received, number - clusters)
        if leaving <= 0 or not clusters:
            return stay if leaving > 0 else torch.ones_like(stay), None
        some = top(tokens.received.masked_fill(stay, -torch.inf), clustered + clusters).nonzero().flatten()
        centres, means = cluster_means(tokens.hidden[some], clusters, clusters)
        states = tokens.hidden.index_copy(0, some[centres], means)
        return stay.index_fill(0, some[centres], True), states


def raters(embeddings: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """[B, N] boolean: text tokens whose share in the image's softmax over the text is above the mean, else all."""
    found = torch.zeros_like(text)
    for row in (visual.any(1) & text.any(1)).nonzero().flatten().tolist():
        words = text[row].nonzero().flatten()
        shares = (embeddings[row, visual[row]].float() @ embeddings[row, words].float().T).softmax(-1).mean(0)
        above = shares > shares.mean()
        found[row, words[above] if above.any() else words] = True
    return found
