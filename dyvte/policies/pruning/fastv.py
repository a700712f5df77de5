"""Visual tokens that the last prompt token attends to least leave after an early layer.

FastV (arXiv 2403.06764, Section 4.1): with filtering layer K and filtering ratio R, tokens are ranked by the attention
they receive in layer K and the lowest R of them are left out of all later layers.

Deviations: several images of a prompt share one count, by one ranking.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.layout import TokenLayout
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import AttentionPolicy, LayerAttention
from dyvte.policies.base import Prefill
from dyvte.policies.method import Source
from dyvte.policies.token_scores import drop_lowest, keep_count


@dataclass
class AttentionPruning(AttentionPolicy):
    """A policy that drops, before some layers, what is attended to least in the layer before each."""

    acts = "thins"

    def left_before(self, num_layers: int) -> dict[int, float]:
        """The layers before which tokens leave, with the share of the visual tokens that is left."""
        raise NotImplementedError

    def shares(self, mllm: MLLM) -> list[float]:
        """What the last of these layers left."""
        left = self.left_before(mllm.num_layers).items()
        layers = range(mllm.num_layers)
        return [min((share for before, share in left if before <= layer), default=1.0) for layer in layers]

    def watched_layers(self, mllm: MLLM) -> Collection[int]:
        """Each layer before one of these."""
        return [layer - 1 for layer in self.left_before(mllm.num_layers)]

    def rank_by(self, layout: TokenLayout, attention: LayerAttention) -> Tensor:
        """[b, n] by which visual tokens are ranked: by default the last prompt token's row, mean over heads."""
        return attention.row(layout.last_prompt).mean(1)

    def see(self, layer: int, prefill: Prefill, attention: LayerAttention) -> None:
        """Rank."""
        scores = attention.unpacked(self.rank_by(prefill.layout, attention), prefill.kept)
        prefill.state[id(self)] = scores + prefill.state.get(id(self), 0.0)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Drop the lowest."""
        left = self.left_before(prefill.mllm.num_layers)
        if layer in left:
            visual = prefill.layout.visual
            keep = keep_count(left[layer], visual)
            prefill.drop(drop_lowest(prefill.state.pop(id(self)), prefill.kept & visual, keep))


@dataclass
class FastV(AttentionPruning):
    """Keep a share of the visual tokens from decoder layer `layer` on.

    Tokens are ranked once, at prefill, by the attention (mean over heads) that the last prompt token pays them in layer
    `layer - 1`; only that row of attention is computed.

    Attributes:
        layer: number of decoder layers that see all visual tokens, 1..L-1 (the paper's K).
        keep: share of the visual tokens that stay, 0..1 (one minus the paper's R).

    Example:
        >>> with dyvte.FastV(layer=2, keep=0.5)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        72
    """

    name = "fastv"
    label = "FastV"
    has_published_setting = True
    source = Source("2403.06764", "pkunlp-icler/FastV")

    layer: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_share("FastV: keep", self.keep)

    def check(self, mllm: MLLM) -> None:
        """Refuse a layer outside 1..L-1: one has to attend first."""
        self.check_layer(self.layer, mllm, first=1)

    def left_before(self, num_layers: int) -> dict[int, float]:
        """`keep` before `layer`."""
        return {self.layer: self.keep}


def check_share(name: str, share: float) -> None:
    """Refuse what is no share 0..1."""
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ConfigError(f"{name} is a share of the visual tokens, 0..1, got {share}")
