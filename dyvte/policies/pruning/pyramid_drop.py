"""Visual tokens are dropped in stages, each time those that the last prompt token attends to least.

PyramidDrop (arXiv 2410.17247, Section 3.2): the decoder is split into stages, and a share lambda of the visual tokens
survives the end of every stage but the last.

Deviations: several images of a prompt share one count, by one ranking; the count behind n stages is lambda^n of all
visual tokens, rounded once. To meet a budget lambda is solved for.
"""

from __future__ import annotations

from dataclasses import dataclass

from dyvte.mllm import MLLM
from dyvte.policies.method import Source
from dyvte.policies.pruning.fastv import AttentionPruning, check_share


@dataclass
class PyramidDrop(AttentionPruning):
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

    stages: int = 4
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_share("PyramidDrop: keep", self.keep)

    def check(self, mllm: MLLM) -> None:
        """Refuse more stages than layers."""
        if not 2 <= self.stages <= mllm.num_layers:
            raise ValueError(f"PyramidDrop: stages must be in 2..{mllm.num_layers} for this model, got {self.stages}")

    def left_before(self, num_layers: int) -> dict[int, float]:
        """A power of `keep` before the first layer of every stage but the first."""
        return {round(stage * num_layers / self.stages): self.keep**stage for stage in range(1, self.stages)}
