"""What a policy spends on prompts, told from the positions that every layer ran on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dyvte.cost.flops import plan_decoder_flops
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.method import Calibration


@dataclass
class SeenPositions(Policy):
    """Changes nothing; notes which positions [B, N] every layer runs on. Enter it after the policy that is watched."""

    masks: list[Tensor] = field(default_factory=list, repr=False)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Note them."""
        if layer == 0:
            self.masks.clear()
        self.masks.append(prefill.kept.clone())


@torch.no_grad()
def measured_cost(calibration: Calibration, policy: Policy) -> float:
    """What a policy spends on the prompts, as a share of the full model's, by running it on all of them.

    For methods whose cost follows from what they see; others plan it (`Calibration.cost`).
    """
    mllm, spent, seen = calibration.mllm, 0.0, SeenPositions()
    for batch in calibration.batches:
        with policy(mllm), seen(mllm):
            mllm.model(**batch, logits_to_keep=1)
        masks = torch.stack(seen.masks, dim=1)  # [B, L, N]
        if calibration.counted == "tokens":
            spent += float((masks & batch.layout.visual[:, None]).sum())
        else:
            spent += sum(plan_decoder_flops(mllm, counts) for counts in masks.sum(2).tolist())
    return spent / calibration.full
