"""FastV thins visual tokens out, gates let the rest go: the DyVTE+FastV of arXiv 2411.19628, Table 5.

Deviations: those of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dyvte.policies.base import Policy
from dyvte.policies.compose import Compose
from dyvte.policies.exits.dynamic_exit import DynamicExit, threshold_at_cost
from dyvte.policies.method import Calibration, Source
from dyvte.policies.pruning.fastv import FastV


@dataclass
class FastVDynamicExit(Compose):
    """`Compose([FastV(...), DynamicExit(gates, min_layer=...)])` by a name of its own, with a budget for both.

    Attributes:
        policies: the two.

    Example:
        >>> parts = [dyvte.FastV(layer=2, keep=0.5), dyvte.DynamicExit("llava_shapes", min_layer=3)]
        >>> with dyvte.FastVDynamicExit(parts)(mllm) as run:
        ...     answers = mllm.generate(batch)
    """

    name = "fastv_dynamic_exit"
    label = "FastV + dynamic exit"
    source = Source("2411.19628", "DoubtedSteam/DyVTE")
    needs = ("gates",)

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """FastV saves the first half of what the budget asks for, gates with one threshold the rest."""
        thinning = FastV.at_cost(calibration, (1 + budget) / 2)
        if not isinstance(thinning, FastV):
            return None
        threshold = threshold_at_cost(calibration, budget, thinning)
        return None if threshold is None else cls.of(thinning, calibration, threshold)

    @classmethod
    def published(cls, calibration: Calibration) -> Policy:
        """Both at their own settings."""
        return cls.of(FastV(), calibration, "auto")

    @classmethod
    def of(cls, thinning: FastV, calibration: Calibration, threshold: float | Literal["auto"]) -> FastVDynamicExit:
        """Gates are asked after the layer behind which FastV thins."""
        assert calibration.gates is not None
        return cls([thinning, DynamicExit(calibration.gates, threshold, min_layer=thinning.layer + 1)])
