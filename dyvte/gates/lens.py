"""How sure a model already is of its next token in the middle of its layers: three cheap features for a gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dyvte.errors import UnsupportedError
from dyvte.mllm import MLLM

LENS_FEATURES = ("entropy", "top_probability", "margin")
FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm")
"""What decoders of transformers call the norm behind their last layer."""


def final_norm(mllm: MLLM) -> nn.Module:
    """The norm between the last decoder layer and the output embedding."""
    for name in FINAL_NORMS:
        if isinstance(found := getattr(mllm.decoder, name, None), nn.Module):
            return found
    raise UnsupportedError(
        f"the lens needs the final norm of {type(mllm.decoder).__name__}, which has none of {', '.join(FINAL_NORMS)}"
    )


@torch.no_grad()
def lens_features(mllm: MLLM, states: Tensor) -> Tensor:
    """What the logit lens says of states [..., d] of the last position behind a decoder layer: [..., 3], float32.

    Final norm and output embedding (nostalgebraist, "interpreting GPT: the logit lens", 2020) give a distribution of
    the next token; of it the entropy over the log of the vocabulary's size, the probability of the likeliest token, and
    its lead over the second in nats. A scaling or soft cap of logits behind the output embedding is left out.

    Example:
        >>> status = dyvte.exit_sweep(mllm, batch).text_status  # [B, L, P * d], the last position's part last
        >>> lens_features(mllm, status[..., -mllm.hidden_size :]).shape
        torch.Size([2, 12, 3])
    """
    weight = next(final_norm(mllm).parameters())
    logits = mllm.lm_head(final_norm(mllm)(states.to(weight.device, weight.dtype))).float()
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1) / math.log(logits.shape[-1])
    first, second = logs.topk(2, dim=-1).values.unbind(-1)
    return torch.stack([entropy, first.exp(), first - second], dim=-1).to(states.device)
