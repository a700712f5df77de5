"""Floating-point operations of a forward pass: counted as it runs, and planned from a config.

A multiply-add is two operations. Attention is counted without its causal mask, as kernels for dense attention would
compute it, so that sdpa, eager and meta tensors give the same number (and so do published ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

if TYPE_CHECKING:
    from dyvte.batch import Batch
    from dyvte.mllm import MLLM


@dataclass(frozen=True)
class FlopCount:
    """Operations counted by a `FlopCounter`.

    Attributes:
        total: Everything: vision tower, projector, decoder, vocabulary projection, gates and token scoring.
        decoder: The text decoder stack without what a policy computes in it (see `overhead`).
    """

    total: int
    decoder: int


class FlopCounter:
    """Count the operations of a model's forward passes.

        with FlopCounter(mllm) as counter:
            mllm.model(**batch)
        counter.count

    Works inside and around policies, and in `generate`. Not reentrant.
    """

    def __init__(self, mllm: MLLM) -> None:
        self._decoder = mllm.decoder
        # PyTorch's table lacks the kernel that scaled_dot_product_attention takes on the CPU
        self._mode = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        )
        self._handles: list[Any] = []
        self._entered_at: int | None = None
        self._decoder_flops = 0

    @property
    def count(self) -> FlopCount:
        """What was counted so far."""
        return FlopCount(self._mode.get_total_flops(), self._decoder_flops)

    def __enter__(self) -> FlopCounter:
        self._decoder_flops, self._entered_at = 0, None
        self._handles = [
            self._decoder.register_forward_pre_hook(self._enter_decoder),
            self._decoder.register_forward_hook(self._leave_decoder, always_call=True),
        ]
        self._mode.__enter__()
        _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        self._mode.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def _enter_decoder(self, module: torch.nn.Module, args: Any) -> None:
        if module is self._decoder:
            self._entered_at = self._mode.get_total_flops()

    def _leave_decoder(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if module is self._decoder and self._entered_at is not None:
            self._decoder_flops += self._mode.get_total_flops() - self._entered_at
            self._entered_at = None


_active: list[FlopCounter] = []


@contextmanager
def overhead() -> Iterator[None]:
    """Operations inside count in `FlopCount.total` only: what a policy computes to decide (gates, token scores)."""
    before = [(counter, counter._mode.get_total_flops()) for counter in _active if counter._entered_at is not None]
    try:
        yield
    finally:
        for counter, flops in before:
            counter._decoder_flops -= counter._mode.get_total_flops() - flops


@torch.no_grad()
def prefill_flops(mllm: MLLM, batch: Batch) -> FlopCount:
    """Count one prefill of a batch as `generate` does it: with a cache, and logits for the last position only."""
    with FlopCounter(mllm) as counter:
        mllm.model(**batch, use_cache=True, logits_to_keep=1)
    return counter.count


def plan_decoder_flops(text_config: Any, lengths: Sequence[int]) -> int:
    """Operations of one sequence's prefill in a decoder of Llama's form, from its config alone.

    Args:
        text_config: Config of a decoder with (grouped-query) attention and a gated MLP in every layer.
        lengths: Positions that each of the L layers runs on. A visual-token exit at layer k of V visual and T text
            tokens is `[V + T] * k + [T] * (L - k)`.
    """
    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, text_config.num_key_value_heads * head_dim
    weights = hidden * (2 * queries + 2 * keys) + 3 * hidden * text_config.intermediate_size
    return sum(2 * length * weights + 4 * length**2 * queries for length in lengths)


def _attention_flops(
    query_shape: Sequence[int], key_shape: Sequence[int], value_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)
