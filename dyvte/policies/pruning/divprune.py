"""The most diverse visual tokens stay, the others never enter the decoder.

DivPrune (arXiv 2503.02175): token selection as a max-min diversity problem on the visual features.

Deviations: several images of a prompt share one count and are kept apart from each other too.
"""

from __future__ import annotations

from dataclasses import dataclass

from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.method import Source
from dyvte.policies.pruning.fastv import check_share
from dyvte.policies.token_scores import keep_count, most_diverse


@dataclass
class DivPrune(Policy):
    """Keep a share of the visual tokens, chosen before the decoder to be far from each other in cosine distance.

    Attributes:
        keep: share of a row's visual tokens that stays, 0..1.

    Example:
        >>> with dyvte.DivPrune(keep=0.25)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        36
    """

    name = "divprune"
    label = "DivPrune"
    source = Source("2503.02175", "vbdi/divprune")
    acts = "thins"

    keep: float = 0.5

    def __post_init__(self) -> None:
        check_share("DivPrune: keep", self.keep)

    def shares(self, mllm: MLLM) -> list[float]:
        """`keep` from the first layer on."""
        return [self.keep] * mllm.num_layers

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Choose among the decoder's input embeddings."""
        if layer == 0:
            candidates = prefill.kept & prefill.layout.visual
            prefill.drop(most_diverse(prefill.hidden, candidates, keep_count(self.keep, prefill.layout.visual)))
