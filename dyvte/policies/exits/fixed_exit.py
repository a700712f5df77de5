"""All visual tokens leave at one fixed layer.

VTW (arXiv 2405.05803) withdraws them at a calibrated layer; DyVTE (arXiv 2411.19628, Fig. 3) tries every layer by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.method import Calibration, Source


@dataclass
class FixedExit(Policy):
    """Leave out visual tokens from decoder layer `layer` on.

    Attributes:
        layer: exit layer k in 0..L, the number of decoder layers that still see visual tokens. L changes nothing, 0
            shows the decoder no image.

    Example:
        >>> with dyvte.FixedExit(layer=8)(mllm):
        ...     answers = mllm.generate(batch)
        >>> len(answers)
        2
    """

    name = "fixed_exit"
    label = "fixed exit"
    source = Source("2411.19628", "DoubtedSteam/DyVTE")
    acts = "exits"

    layer: int

    def check(self, mllm: MLLM) -> None:
        """Refuse an exit layer outside 0..L."""
        if not 0 <= self.layer <= mllm.num_layers:
            raise ValueError(f"FixedExit: layer must be in 0..{mllm.num_layers} for this model, got {self.layer}")

    def shares(self, mllm: MLLM) -> list[float]:
        """All before the exit, none behind it."""
        return [1.0] * self.layer + [0.0] * (mllm.num_layers - self.layer)

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """The exit whose cost is nearest to the budget; `analysis.tables` mixes two that meet it."""
        layers = range(calibration.mllm.num_layers + 1)
        return cls(min(layers, key=lambda k: abs(calibration.cost(cls(k).shares(calibration.mllm)) - budget)))

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Drop every visual position at layer k."""
        if layer == self.layer:
            prefill.drop_image()
