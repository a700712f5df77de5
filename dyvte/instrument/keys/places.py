"""What an attention module must be told of the places of its tokens, where these do not lie one behind the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.instrument.keys.indexed import choosing_among


@contextmanager
def running_at(
    attention: nn.Module | None,
    own: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    length: int,
    start: Tensor | None = None,
) -> Iterator[None]:
    """Within the block an attention module runs on some positions of a sequence without knowing of the others.

    Args:
        attention: of a decoder layer.
        own: [b, n] positions of the tokens that run, in the whole sequence.
        keys: [b, K] positions of the keys that they attend to.
        valid: [b, K] False where a key is padding; None where none is.
        length: of the whole sequence.
        start: [b, 1] positions of the rows' first tokens, from which blocks of keys are counted; None for 0.
    """
    with choosing_among(attention, own, keys, valid, length, start), counting_from(attention, own, length):
        yield


@contextmanager
def counting_from(attention: nn.Module | None, positions: Tensor, length: int) -> Iterator[None]:
    """Within the block a module that counts the tokens it gets uses their places in the whole sequence instead.

    Llama 4 multiplies the queries of layers without rotary positions by log(1 + floor((p + 1) / floor_scale)) *
    attn_scale + 1 at place p (Nakanishi, "Scalable-Softmax Is Superior for Attention", arXiv 2501.19399), which is 1 up
    to `floor_scale`. Several repetitions of the batch may run one behind the other.
    """
    module: Any = attention
    counts = getattr(module, "attn_temperature_tuning", None) and not getattr(module, "use_rope", True)
    if not counts or length < module.floor_scale:
        yield
        return
    scale = torch.log1p(torch.floor((positions.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    def scaled(projection: nn.Module, args: Any, query: Tensor) -> Tensor | None:
        if projection is not module.q_proj:
            return None
        return (query * scale.repeat(len(query) // len(scale), 1)[..., None]).to(query.dtype)

    hook, before = module.q_proj.register_forward_hook(scaled), module.attn_temperature_tuning
    module.attn_temperature_tuning = False
    try:
        yield
    finally:
        module.attn_temperature_tuning = before
        hook.remove()
