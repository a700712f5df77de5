"""Final norm and output embedding of a model, applied to states from anywhere in its decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.instrument.hooks import LayerCall, drive_layers, with_states
from dyvte.mllm import MLLM
from dyvte.model_parts import language_model_of

LOGITS_AT_ONCE = 2**21
"""Logits computed at once: 8 MiB in float32, and as much again while they are looked at."""


def read_out(mllm: MLLM, batch: Batch, states: Tensor, template: Any) -> Tensor:
    """Logits [r, T, vocab] of states [r, T, d] that left some decoder layer: the model's own norm, head and scaling.

    They come from running the model on one text token of `batch` with its layers bypassed.

    Args:
        mllm: the model.
        batch: where the token is taken from.
        states: before the final norm.
        template: what a decoder layer of this model returned.
    """

    def bypass(call: LayerCall) -> Any:
        last = call.index == mllm.num_layers - 1
        return with_states(template, states if last else call.hidden)

    token = batch["input_ids"][:1].gather(1, batch.layout.last_prompt[:1, None])
    with drive_layers(mllm, bypass):
        model = language_model_of(mllm.model) or mllm.model
        return model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits.float()
