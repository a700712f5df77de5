"""Visual tokens leave as soon as the model is sure of its next token: the confidence of the lens at the last position.

Early exit by confidence, as in CALM (Schuster et al., arXiv 2207.07061, Section 3.3, "softmax response"): after each
layer, final norm and output embedding give the distribution of the next token at the prompt's last position, and a row
leaves once its likeliest token is likely enough.

Deviations: CALM ends the whole computation of a token, here only the visual tokens leave and the text goes on; CALM
takes the lead of the first token over the second and a threshold that falls while generating, here `measure` says which
of the two and the prompt alone decides. CALM's models are trained for it, ours are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.gates.lens import final_norm, lens_features
from dyvte.mllm import MLLM
from dyvte.policies.base import Prefill
from dyvte.policies.exits.scored_exit import ScoredExit
from dyvte.policies.method import Source


@dataclass
class LensExit(ScoredExit):
    """Leave where the lens is sure of the next token.

    Attributes:
        threshold: rows leave above it.
        measure: "probability" of the likeliest token, or its "margin" over the second in nats.

    Example:
        >>> with dyvte.LensExit(threshold=0.9)(mllm) as run:
        ...     answers = mllm.generate(batch)
        >>> run.exit_layers.shape
        torch.Size([2])
    """

    name = "lens_exit"
    label = "confidence of the lens"
    source = Source("2207.07061")

    MEASURES: ClassVar[dict[str, int]] = {"probability": 1, "margin": 2}
    """Place of each among `dyvte.gates.lens.LENS_FEATURES`."""

    threshold: float = 0.9
    measure: str = "probability"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure not in self.MEASURES:
            raise ConfigError(f"LensExit: measure is one of {', '.join(self.MEASURES)}, got {self.measure!r}")

    def check(self, mllm: MLLM) -> None:
        """Refuse a decoder without a final norm that is known."""
        final_norm(mllm)

    def score(self, layer: int, prefill: Prefill) -> Tensor:
        """Of the state that the layer before this one left at the last prompt position."""
        at = prefill.layout.last_prompt[:, None, None].expand(-1, 1, prefill.hidden.shape[2])
        last = prefill.hidden.gather(1, at.to(prefill.hidden.device))[:, 0]
        return lens_features(prefill.mllm, last)[:, self.MEASURES[self.measure]]
