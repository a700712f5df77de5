"""Visual tokens are dropped in stages, each time those that the last prompt token attends to least.

PyramidDrop (arXiv 2410.17247, Section 3.2): the decoder is split into stages, and a share lambda of the visual tokens
survives the end of every stage but the last.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import AttentionPolicy, LayerAttention
from dyvte.policies.base import Prefill
from dyvte.policies.method import Source
from dyvte.policies.pruning.fastv import check_share, remember_last_row
from dyvte.policies.token_scores import drop_lowest, keep_count


@dataclass
class PyramidDrop(AttentionPolicy):
    """Keep the share `keep` of the visual tokens at the end of every stage, ranked by the stage's last layer.

    Attributes:
        stages: number of stages of equal length, 2..L.
        keep: share that survives each of the `stages - 1` stage ends; after n of them `keep ** n` is left.

    Example:
        >>> with dyvte.PyramidDrop(stages=4, keep=0.5)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        18
    """

    name = "pyramid_drop"
    label = "PyramidDrop"
    source = Source("2410.17247", "Cooperx521/PyramidDrop")
    acts = "thins"

    stages: int = 4
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_share("PyramidDrop: keep", self.keep)

    def check(self, mllm: MLLM) -> None:
        """Refuse more stages than layers."""
        if not 2 <= self.stages <= mllm.num_layers:
            raise ValueError(f"PyramidDrop: stages must be in 2..{mllm.num_layers} for this model, got {self.stages}")

    def stage_ends(self, num_layers: int) -> list[int]:
        """The layers before which tokens are dropped."""
        return [round(stage * num_layers / self.stages) for stage in range(1, self.stages)]

    def shares(self, mllm: MLLM) -> list[float]:
        """A power of `keep`, by the stages that have ended."""
        ends = self.stage_ends(mllm.num_layers)
        return [self.keep ** sum(end <= layer for end in ends) for layer in range(mllm.num_layers)]

    def watched_layers(self, mllm: MLLM) -> Collection[int]:
        """The last layer of every stage but the last."""
        return [end - 1 for end in self.stage_ends(mllm.num_layers)]

    def see(self, layer: int, prefill: Prefill, attention: LayerAttention) -> None:
        """Rank by the last prompt token's row."""
        remember_last_row(self, prefill, attention)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Drop the lowest at the end of a stage."""
        ends = self.stage_ends(prefill.mllm.num_layers)
        if layer in ends:
            candidates = prefill.kept & prefill.layout.visual
            keep = keep_count(self.keep ** (ends.index(layer) + 1), prefill.layout.visual)
            prefill.drop(drop_lowest(prefill.state.pop(id(self)), candidates, keep))
