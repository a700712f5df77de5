"""All visual tokens leave at one fixed layer.

VTW (arXiv 2405.05803) withdraws them at a calibrated layer; DyVTE (arXiv 2411.19628, Fig. 3) tries every layer by hand.

Deviations: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.method import Calibration, Source


@dataclass
class FixedExit(Policy):
    """Leave out visual tokens from decoder layer `layer` on.

    Attributes:
        layer: exit layer k in 0..L, the number of decoder layers that still see visual tokens. L changes nothing, 0
            shows the decoder no image. Several, one for each row of the batch, are possible.

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

    layer: int | Sequence[int]

    @property
    def layers(self) -> list[int]:
        """The exit layer, or those of the rows."""
        return list(self.layer) if isinstance(self.layer, Sequence) else [self.layer]

    def check(self, mllm: MLLM) -> None:
        """Refuse an exit layer outside 0..L."""
        if wrong := [layer for layer in self.layers if not 0 <= layer <= mllm.num_layers]:
            raise ValueError(f"FixedExit: layer must be in 0..{mllm.num_layers} for this model, got {wrong[0]}")

    def shares(self, mllm: MLLM) -> list[float]:
        """All before the exit, none behind it."""
        return [sum(each > layer for each in self.layers) / len(self.layers) for layer in range(mllm.num_layers)]

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """The exit whose cost is nearest to the budget; `analysis.tables` mixes two that meet it."""
        layers = range(calibration.mllm.num_layers + 1)
        return cls(min(layers, key=lambda k: abs(calibration.cost(cls(k).shares(calibration.mllm)) - budget)))

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Drop every visual position at layer k, or those of the rows whose exit this is."""
        layers, rows = self.layers, len(prefill.kept)
        if len(layers) not in (1, rows):
            raise ValueError(f"FixedExit: {len(layers)} exit layers for a batch of {rows} rows; give one, or one a row")
        if all(each == layer for each in layers):
            prefill.drop_image()
        elif layer in layers:
            prefill.drop_image(torch.tensor([each == layer for each in layers]))
