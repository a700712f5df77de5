"""Floating-point operations of a forward pass: counted as it runs, and planned from what was counted.

A multiply-add is two operations. Attention is counted without its causal mask, as kernels for dense attention would
compute it, so that sdpa, eager and meta tensors give the same number (and so do published ones). What multiplies
matrices out of the counter's sight is refused by name: a number that is too small is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from dyvte.errors import UnsupportedError

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

        Works inside and around policies, and in `generate`. Not reentrant.

    Raises:
        UnsupportedError: the model runs kernels whose operations cannot be seen, or (during the forward pass) an
            operation whose cost is unknown.

    Example:
        >>> with dyvte.FlopCounter(mllm) as counter:
        ...     logits = mllm(**batch).logits
        >>> counter.count.total > counter.count.decoder > 0
        True
    """

    def __init__(self, mllm: MLLM) -> None:
        self._decoder = mllm.decoder
        self._mode = _StrictFlopCounter()
        self._stack = ExitStack()
        self._entered_at: int | None = None
        self._decoder_flops = 0

    @property
    def count(self) -> FlopCount:
        """What was counted so far."""
        return FlopCount(self._mode.get_total_flops(), self._decoder_flops)

    def __enter__(self) -> FlopCounter:
        _refuse_unseen_kernels(self._decoder)
        self._decoder_flops, self._entered_at = 0, None
        self._stack.enter_context(self._decoder.register_forward_pre_hook(self._enter_decoder))
        self._stack.enter_context(self._decoder.register_forward_hook(self._leave_decoder, always_call=True))
        self._stack.enter_context(self._mode)
        _active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        self._stack.__exit__(*error)

    def _enter_decoder(self, module: torch.nn.Module, args: Any) -> None:
        if module is self._decoder:
            self._entered_at = self._mode.get_total_flops()

    def _leave_decoder(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if module is self._decoder and self._entered_at is not None:
            self._decoder_flops += self._mode.get_total_flops() - self._entered_at
            self._entered_at = None


_active: list[FlopCounter] = []
_watches: list[Callable[[], None]] = []
_deciding: list[bool] = []
"""Holds something within the outermost `overhead`."""


@contextmanager
def overhead() -> Iterator[None]:
    """Operations inside count in `FlopCount.total` only: what a policy computes to decide (gates, token scores)."""
    if _deciding:  # counted by the block around it
        yield
        return
    before = [(counter, counter._mode.get_total_flops()) for counter in _active if counter._entered_at is not None]
    _deciding.append(True)
    for mark in _watches:
        mark()
    try:
        yield
    finally:
        for mark in _watches:
            mark()
        _deciding.pop()
        for counter, flops in before:
            counter._decoder_flops -= counter._mode.get_total_flops() - flops


@contextmanager
def watch_overhead(mark: Callable[[], None]) -> Iterator[None]:
    """Within the block, `mark()` is called where `overhead` begins and where it ends, to time what deciding takes."""
    _watches.append(mark)
    try:
        yield
    finally:
        _watches.remove(mark)


@torch.no_grad()
def prefill_flops(mllm: MLLM, batch: Batch) -> FlopCount:
    """Count one prefill of a batch as `generate` does it: with a cache, and logits for the last position only."""
    with FlopCounter(mllm) as counter:
        mllm.model(**batch, use_cache=True, logits_to_keep=1)
    return counter.count


def plan_decoder_flops(mllm: MLLM, lengths: Sequence[int]) -> int:
    """Operations of one sequence's prefill in the decoder, from the number of positions that each layer runs on.

    Every layer costs `a n + b n^2` for n positions; `a` and `b` come from counting the decoder at two lengths, once a
    model, so the plan knows nothing about the kind of decoder and is in the counter's own unit.

    A visual-token exit at layer k of V visual and T text tokens is `[V + T] * k + [T] * (L - k)`.

    Raises:
        UnsupportedError: the decoder's cost is not of that form to 1% (recurrent layers that work in chunks), or cannot
            be counted.
    """
    layers = _planned.get(mllm.decoder)
    if layers is None:
        layers = _planned[mllm.decoder] = _fit_layers(mllm)
    return round(sum(a * n + b * n**2 for n, (a, b) in zip(lengths, layers, strict=True)))


_planned: Any = WeakIdKeyDictionary()
"""(a, b) of every layer, by decoder."""


def _fit_layers(mllm: MLLM) -> list[tuple[float, float]]:
    short, long, between = 32, 64, 45
    at_short, at_long, at_between = (_layer_flops(mllm, length) for length in (short, long, between))
    layers = []
    for one, two in zip(at_short, at_long, strict=True):
        b = (two / long - one / short) / (long - short)
        layers.append((one / short - b * short, b))
    for index, ((a, b), counted) in enumerate(zip(layers, at_between, strict=True)):
        planned = a * between + b * between**2
        if not math.isclose(planned, counted, rel_tol=0.01):
            raise UnsupportedError(
                f"layer {index} of {type(mllm.decoder).__name__} costs {counted} FLOPs for {between} positions, not "
                f"{planned:.0f} as a layer linear or quadratic in their number would: its cost cannot be planned"
            )
    return layers


@torch.no_grad()
def _layer_flops(mllm: MLLM, length: int) -> list[int]:
    """Operations of each decoder layer for one sequence of so many positions."""
    with FlopCounter(mllm) as counter, layer_tally(mllm, counter) as layers:
        mllm.decoder(**decoder_inputs(mllm, length), use_cache=True)
    return layers


def decoder_inputs(mllm: MLLM, length: int) -> dict[str, Tensor]:
    """What the decoder alone takes for one sequence of so many positions: embeddings, or ids where it looks these up.

    Gemma 3n and Gemma 4 E embed ids anew for every layer.
    """
    weight = next(mllm.decoder.parameters())
    if getattr(mllm.decoder.config, "hidden_size_per_layer_input", None):
        return {"input_ids": torch.zeros(1, length, device=weight.device, dtype=torch.long)}
    return {"inputs_embeds": torch.zeros(1, length, mllm.hidden_size, device=weight.device, dtype=weight.dtype)}


@contextmanager
def layer_tally(mllm: MLLM, counter: FlopCounter) -> Iterator[list[int]]:
    """Within an entered counter: the operations of each decoder layer, in a list of L that fills as they run."""
    layers = [0] * mllm.num_layers

    def tally(index: int, sign: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            layers[index] += sign * counter.count.total

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(mllm.layers):
            stack.enter_context(layer.register_forward_pre_hook(tally(index, -1)))
            stack.enter_context(layer.register_forward_hook(tally(index, 1)))
        yield layers


# ------------------------------------------------------------------ what PyTorch's table of operations lacks


class _StrictFlopCounter(FlopCounterMode):
    """PyTorch's counter with the operations it lacks, which refuses those that neither knows."""

    def __init__(self) -> None:
        aten, ours = torch.ops.aten, torch.ops.transformers
        mapping: dict[Any, Any] = {
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
            aten.addmv: lambda bias, matrix, vector, **_: 2 * math.prod(matrix),
            aten.dot: lambda one, other, **_: 2 * math.prod(one),
            aten.linalg_solve_triangular: _triangular_flops,
        }
        for namespace, name in ((aten, "_grouped_mm"), (ours, "grouped_mm_fallback")):
            if hasattr(namespace, name):  # by version of torch and transformers
                mapping[getattr(namespace, name)] = _grouped_flops
        super().__init__(display=False, custom_mapping=mapping)

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if func_packet not in self.flop_registry:
            name = str(getattr(func_packet, "_qualified_op_name", getattr(func_packet, "__name__", func_packet)))
            namespace, _, operation = name.rpartition("::")
            if namespace not in _ELEMENTWISE_NAMESPACES or _MULTIPLIES.search(operation):
                raise UnsupportedError(
                    f"FLOPs of the operation {name} are unknown and would be left out; load the model with "
                    f"attn_implementation='sdpa' and without quantization or custom kernels to count it"
                )
        return super()._count_flops(func_packet, out, args, kwargs)


_ELEMENTWISE_NAMESPACES = {"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "torchvision"}
_MULTIPLIES = re.compile(r"(^|_)(\w*mm|\w*mv|dot|matmul|linear|conv\d*d?|convolution|attention|rnn|lstm|gru|gemm)(_|$)")
_KERNEL_PACKAGES = {"fla", "causal_conv1d", "mamba_ssm", "flash_attn", "liger_kernel", "deep_gemm", "sonicmoe"}
_COUNTED_EXPERTS = {None, "eager", "batched_mm", "grouped_mm"}


def _refuse_unseen_kernels(decoder: torch.nn.Module) -> None:
    """Raise for kernels that run outside of PyTorch's dispatcher, where no counter sees them."""
    experts = getattr(getattr(decoder, "config", None), "_experts_implementation", None)
    if experts not in _COUNTED_EXPERTS:
        raise UnsupportedError(
            f"FLOPs of experts_implementation={experts!r} cannot be counted; load the model with "
            f"experts_implementation='grouped_mm'"
        )
    for module in decoder.modules():
        for value in vars(module).values():
            package = str(getattr(value, "__module__", "")).partition(".")[0] if callable(value) else ""
            if package in _KERNEL_PACKAGES:
                raise UnsupportedError(
                    f"FLOPs of {type(module).__name__} cannot be counted: it runs kernels of the package {package}; "
                    f"uninstall it or switch it off to count them"
                )


def _grouped_flops(rows: Sequence[int], weights: Sequence[int], *_: Any, **__: Any) -> int:
    """Rows [S, in], each times the matrix of its own group, [groups, in, out]."""
    return 2 * math.prod(rows) * weights[-1]


def _triangular_flops(matrix: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Systems of equations [..., n, n] for columns [..., n, k], n^2 / 2 multiply-adds a column: linear attention."""
    return math.prod(right[:-2]) * matrix[-1] ** 2 * right[-1]


def _attention_flops(
    query_shape: Sequence[int], key_shape: Sequence[int], value_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    """Queries [B, H, N, d], keys [B, G, M, d], values [B, G, M, e]; heads may share keys (G < H)."""
    return 2 * math.prod(query_shape[:-1]) * key_shape[-2] * (query_shape[-1] + value_shape[-1])
