"""All visual tokens leave at one layer, found by how little the next-token distribution changes.

VTW (arXiv 2405.05803, Section 3.3): the first layer whose KL divergence to the full model, averaged over a few samples,
is under a threshold eta.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dyvte.batch import Batch
from dyvte.errors import DataError
from dyvte.instrument.sweep import exit_sweep
from dyvte.instrument.sweep.criteria import KL_START, kl_exit_layer, kl_to_full
from dyvte.mllm import MLLM
from dyvte.policies.exits.fixed_exit import FixedExit


@dataclass
class VTW(FixedExit):
    """A fixed exit whose layer is calibrated by the KL criterion; make one with `VTW.calibrate`.

    Attributes:
        layer: exit layer k in 0..L.
    """

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
        divergences = [kl_to_full(exit_sweep(mllm, batch, entropy=False).logits) for batch in batches]
        if not divergences:
            raise DataError("VTW.calibrate needs at least one batch of prompts")
        found = kl_exit_layer(torch.cat(divergences).mean(0), eta, start)
        return cls(mllm.num_layers if found is None else found)
