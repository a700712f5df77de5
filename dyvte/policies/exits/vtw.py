"""All visual tokens leave at one layer, found by how little the next-token distribution changes.

VTW (arXiv 2405.05803, Section 3.3): the first layer whose KL divergence to the full model, averaged over a few samples,
is under a threshold eta.

Deviations: at a budget any eta is allowed, and two of the layers that it then chooses are mixed over the questions; the
paper has one eta a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.errors import DataError
from dyvte.instrument.sweep import exit_sweep
from dyvte.instrument.sweep.criteria import KL_START, kl_exit_layer, kl_to_full
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.exits.fixed_exit import FixedExit
from dyvte.policies.method import Calibration, Source


@dataclass
class VTW(FixedExit):
    """A fixed exit whose layer is calibrated by the KL criterion; make one with `VTW.calibrate`.

    Attributes:
        layer: exit layer k in 0..L.

    Example:
        >>> 0 <= dyvte.VTW.calibrate(mllm, [batch], eta=0.01).layer <= mllm.num_layers
        True
    """

    name = "vtw"
    label = "VTW"
    source = Source("2405.05803", "lzhxmu/VTW")
    needs = ("calibration prompts",)

    @classmethod
    def calibrate(cls, mllm: MLLM, batches: Iterable[Batch], eta: float, start: int = KL_START) -> VTW:
        """The first exit layer k >= start with mean KL(P_exit(k) || P_full) <= eta; L if there is none.

        Args:
            mllm: the model.
            batches: prompts; the paper uses about 20 samples in all.
            eta: threshold in nats (`dyvte.instrument.sweep.criteria.KL_PRESETS` holds the published ones).
            start: first exit layer considered (the paper's 5 is for models of 32 layers and more).

        Raises:
            DataError: no prompts.
        """
        found = kl_exit_layer(mean_divergence(mllm, batches), eta, start)
        return cls(mllm.num_layers if found is None else found)

    @classmethod
    def at_cost(cls, calibration: Calibration, budget: float) -> Policy | None:
        """The layer of the smallest eta that is within the budget."""
        mllm = calibration.mllm
        choices = kl_layers(mean_divergence(mllm, calibration.batches).tolist())
        within = [k for k in choices if calibration.cost(cls(k).shares(mllm)) <= budget]
        return cls(within[-1]) if within else None


def mean_divergence(mllm: MLLM, batches: Iterable[Batch]) -> Tensor:
    """[L + 1] mean KL of every exit to the full model over some prompts."""
    found = [kl_to_full(exit_sweep(mllm, batch, entropy=False).logits) for batch in batches]
    if not found:
        raise DataError("VTW.calibrate needs at least one batch of prompts")
    return torch.cat(found).mean(0)


def kl_layers(divergence: Sequence[float]) -> list[int]:
    """The exits that VTW chooses under one eta or another: layers with a smaller divergence than all before them."""
    return [k for k, each in enumerate(divergence) if all(each < earlier for earlier in divergence[:k])]
