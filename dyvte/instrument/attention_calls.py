"""Watching the attention function of every decoder layer as it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dyvte.errors import UnsupportedError
from dyvte.instrument.hooks import every_position
from dyvte.instrument.role_attention import Block, Geometry, score_rows

if TYPE_CHECKING:
    from dyvte.mllm import MLLM


@contextmanager
def watch_attention(mllm: MLLM, see: Callable[[int, AttentionCall], None]) -> Iterator[None]:
    """Within the block, `see(layer, call)` is told of every call of a decoder layer's attention function.

    The model's own function runs unchanged, on all positions. Calls of other modules, and of deep copies of the model,
    are not seen.

    Raises:
        UnsupportedError: a layer does not go through transformers' attention functions.
    """
    index_of = {id(module): index for index, module in enumerate(mllm.attentions) if module is not None}

    def observe(module: nn.Module, call: AttentionCall) -> None:
        see(index_of[id(module)], call)

    with ExitStack() as stack:
        stack.enter_context(every_position(mllm))
        for table, name in _attention_functions(mllm):
            stack.callback(_Door.open(table, name, _Observer(frozenset(index_of), observe)))
        yield


@contextmanager
def replace_attention(mllm: MLLM, run: Callable[..., Any]) -> Iterator[None]:
    """Within the block, decoder layers compute their attention with `run(original, module, **arguments)`.

    `original` is the function that they would have called, and the arguments are its own by name. Deep copies of the
    model and other modules call the original.

    Raises:
        UnsupportedError: a layer does not go through transformers' attention functions.
    """
    modules = frozenset(id(module) for module in mllm.attentions if module is not None)
    with ExitStack() as stack:
        for table, name in _attention_functions(mllm):
            stack.callback(_Door.open(table, name, _Observer(modules, None, run)))
        yield


@dataclass
class AttentionCall:
    """What an attention function was called with.

    Attributes:
        query: [B, H, N, head size].
        key: [B, H_kv, K, head size].
        value: [B, H_kv, K, value size].
        output: [B, N, H, value size], what the function gave.
        position_bias: [B, H, N, K] that a module adds to its scores, of relative positions; None where it adds none.
        weights: [B, H, N, K] where the function computed them anyway (eager attention), else None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    sliding_window: int | None
    softcap: float | None
    position_bias: Tensor | None
    weights: Tensor | None

    def rows(self, geometry: Geometry) -> Callable[[Block], Tensor]:
        """Attention rows for `role_sums`."""
        if self.weights is None:
            length = self.query.shape[2]
            key = self.key[:, :, :length]
            return score_rows(self.query, key, self.scale, self.softcap, geometry, self.position_bias)
        weights = self.weights
        return lambda block: weights[:, :, block.rows, block.columns].float()


def _attention_functions(mllm: MLLM) -> list[tuple[MutableMapping[str, Any], str]]:
    """Where the decoder's attention modules look up the function that computes attention: (table, name) pairs."""
    found: dict[tuple[int, str], tuple[MutableMapping[str, Any], str]] = {}
    for index, module in enumerate(mllm.attentions):
        if module is None:
            continue
        names = inspect.unwrap(type(module).forward).__globals__
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
        # Models look an implementation up in transformers' table, and fall back on a function of their own for "eager".
        table = names if implementation == "eager" else names.get("ALL_ATTENTION_FUNCTIONS", {})
        name = "eager_attention_forward" if implementation == "eager" else implementation
        if name not in table:
            raise UnsupportedError(
                f"AttentionProbe cannot look into decoder layer {index} ({type(module).__name__}, attention "
                f"{implementation!r}): it does not use transformers' attention functions"
            )
        found[id(table), name] = (table, name)
    return list(found.values())


@dataclass(frozen=True)
class _Observer:
    """Wants to see the calls of some modules, known by their ids, or to make them itself."""

    modules: frozenset[int]
    see: Callable[[nn.Module, AttentionCall], None] | None
    run: Callable[..., Any] | None = None


class _Door:
    """An attention function that shows what it is called with to those who look.

    It calls the original unchanged, unless one of them makes the calls itself.

    One door serves all the probes on the same function, so they may be left in any order.
    """

    _doors: dict[tuple[int, str], _Door] = {}  # noqa: RUF012

    def __init__(self, table: MutableMapping[str, Any], name: str) -> None:
        self.table, self.name, self.original = table, name, table[name]
        self.signature = list(inspect.signature(self.original).parameters)
        self.observers: list[_Observer] = []
        self.was_local = name in getattr(table, "_local_mapping", table)

    @classmethod
    def open(cls, table: MutableMapping[str, Any], name: str, observer: _Observer) -> Callable[[], None]:
        """Let `observer` look at the calls of `table[name]`; returns what ends it."""
        door = cls._doors.get((id(table), name))
        if door is None:
            door = cls._doors[id(table), name] = cls(table, name)

            def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                looking = [each for each in door.observers if id(module) in each.modules]
                running = next((each.run for each in looking if each.run is not None), None)
                if running is None:
                    result = door.original(module, *args, **kwargs)
                else:
                    arguments = dict(zip(door.signature[1:], args, strict=False)) | kwargs
                    result = running(door.original, module, **arguments)
                watching = [each.see for each in looking if each.see is not None]
                if watching:
                    call = door.describe(module, args, kwargs, result)
                    for see in watching:
                        see(module, call)
                return result

            table[name] = attention
        door.observers.append(observer)

        def close() -> None:
            door.observers.remove(observer)
            if not door.observers:
                del cls._doors[id(table), name]
                if door.was_local:
                    table[name] = door.original
                else:  # an override on top of transformers' global table
                    del table[name]

        return close

    def describe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> AttentionCall:
        """What the function was called with and what it returned, by name."""
        arguments = dict(zip(self.signature[1:], args, strict=False)) | kwargs
        unknown = [name for name in ("s_aux", "cu_seq_lens_q") if arguments.get(name) is not None]
        mask = arguments.get("attention_mask")
        weights = result[1] if self.name == "eager_attention_forward" else None
        if mask is not None and not isinstance(mask, Tensor):
            unknown.append(type(mask).__name__)
        if unknown and weights is None:
            raise UnsupportedError(
                f"AttentionProbe cannot follow {self.name!r} attention with {unknown[0]} in {type(module).__name__}; "
                "load the model with attn_implementation='sdpa' or 'eager'"
            )
        query = arguments["query"]
        scale = arguments.get("scaling")
        causal = arguments.get("is_causal")
        return AttentionCall(
            query=query,
            key=arguments["key"],
            value=arguments["value"],
            output=result[0],
            mask=mask,
            causal=getattr(module, "is_causal", True) if causal is None else causal,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            sliding_window=arguments.get("sliding_window"),
            softcap=arguments.get("softcap"),
            position_bias=arguments.get("position_bias"),
            weights=weights,
        )
