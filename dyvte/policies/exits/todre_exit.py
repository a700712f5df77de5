"""Late in the decoder all visual tokens leave if the text hardly looks at them any longer: ToDRE's second stage.

ToDRE (arXiv 2505.18757, Section 3.3): before layer 28 of 32 all visual tokens leave if the text's attention to them and
theirs to the text are both below 0.10, shares of the rows' whole attention. No code; the paper's ablation puts 5/8, 6/8
and 7/8 of the depth beside each other. The first stage is `ToDRE`.

Unverified: which rows and heads are averaged. Here the rows of all text after the image, and the mean over heads.

Deviations: with causal attention and the text behind the image its attention to the text is zero, so the text's alone
decides. To meet a budget it is asked before every layer, with one threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.mllm import MLLM
from dyvte.policies.attention_policy import AttentionPolicy, LayerAttention
from dyvte.policies.base import Prefill
from dyvte.policies.decoder.stages import in_proportion
from dyvte.policies.exits.scored_exit import NEVER, ScoredExit
from dyvte.policies.method import Source

PAPER_LAYER, DEPTH = 28, 32
"""Where the paper asks, in its model's depth."""


@dataclass
class ToDREExit(ScoredExit, AttentionPolicy):
    """Leave where the text keeps its attention to itself.

    Attributes:
        threshold: rows leave where the text's attention to anything but the image is above it: one minus the paper's.
        layers: before which it is asked; None is the paper's, in proportion to the depth, "all" are all but the first.

    Example:
        >>> with dyvte.ToDREExit()(mllm) as run:
        ...     answers = mllm.generate(batch)
        >>> run.exit_layers.shape
        torch.Size([2])
    """

    name = "todre_exit"
    label = "ToDRE, second stage"
    has_published_setting = True
    source = Source("2505.18757", unverified="rows and heads of the average")

    threshold: float = 0.9
    layers: Sequence[int] | Literal["all"] | None = None

    def asked_layers(self, mllm: MLLM) -> range | list[int]:
        """The layers, or the paper's."""
        if self.layers is None:
            return [min(*in_proportion([PAPER_LAYER], DEPTH, mllm.num_layers), mllm.num_layers - 1)]
        return super().asked_layers(mllm) if isinstance(self.layers, str) else list(self.layers)

    def check(self, mllm: MLLM) -> None:
        """Refuse layers that have none before them, or are not the model's."""
        last, asked = mllm.num_layers - 1, self.asked_layers(mllm)
        if (isinstance(self.layers, str) and self.layers != "all") or not asked or min(asked) < 1 or max(asked) > last:
            raise ConfigError(f'ToDREExit: layers are "all" or some of 1..{last} for this model, got {self.layers!r}')

    def watched_layers(self, mllm: MLLM) -> list[int]:
        """Each layer before one where it is asked."""
        return [layer - 1 for layer in self.asked_layers(mllm)]

    def see(self, layer: int, prefill: Prefill, attention: LayerAttention) -> None:
        """What every position receives from the text after the image."""
        received = attention.received(prefill.layout.text_status_positions)
        key = (id(self), layer)
        prefill.state[key] = prefill.state.get(key, 0.0) + attention.unpacked(received, prefill.kept)

    def score(self, layer: int, prefill: Prefill) -> Tensor:
        """One minus the share of the text's attention that goes to the image."""
        received: Tensor = prefill.state.pop((id(self), layer - 1))
        rows = prefill.layout.text_status_positions.sum(1).clamp(min=1)
        return 1 - (received * prefill.layout.visual).sum(1) / rows

    def asking_everywhere(self) -> Self:
        """Before every layer."""
        return replace(self, threshold=NEVER, layers="all")
