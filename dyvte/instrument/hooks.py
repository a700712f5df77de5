"""Driving decoder layers: run a layer on some positions only, with the arguments that it really got.

Outside a layer the sequence keeps its length (models index it with full-length masks between layers), so kept
positions are packed before a layer and put back after it. Masks, rotary tables and position ids are packed from what
the model passed to the layer, hence every kind of mask and every rotary scheme comes along unchanged.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dyvte.errors import UnsupportedError
from dyvte.instrument.role_attention import added_to_scores
from dyvte.model_parts import (
    CACHE_NAMES,
    DRIVEN_INDEXERS,
    indexer_of,
    layer_kinds,
    renamed,
    self_attention_of,
    undrivable,
)

if TYPE_CHECKING:
    from dyvte.mllm import MLLM


@dataclass(eq=False)
class Selection:
    """Some positions of some rows of a batch, packed to one side of a rectangle: the left, unless a state runs over it.

    Attributes:
        rows: [b] rows of the batch, in ascending order.
        index: [b, n] positions in ascending order; padding repeats the row's first one.
        valid: [b, n] False at padding; None where nothing is padded.
        everyone: whether these are known to be all rows of the batch.
        row_list: the rows on the host, where they are known there.
        key_tables, places: what the layers of a KV cache that ran on these positions share while decoding
            (`dyvte.instrument.kept_keys`).
    """

    rows: Tensor
    index: Tensor
    valid: Tensor | None
    everyone: bool = False
    row_list: tuple[int, ...] | None = None
    key_tables: list[Any] = field(default_factory=list, repr=False)
    places: list[Any] = field(default_factory=list, repr=False)
    _memo: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def behind_padding(cls, kept: Tensor, counts: list[int]) -> Selection:
        """The True positions of `kept` [B, N], of which rows hold `counts`, packed to the right, padding in front."""
        rows, width = torch.arange(len(kept), device=kept.device), max(counts)
        index = kept.to(torch.int8).argsort(dim=1, stable=True)[:, -width:]
        if min(counts) == width:
            return cls(rows, index, None, True)
        valid = kept.gather(1, index)
        first = index.gather(1, valid.int().argmax(1, keepdim=True))
        return cls(rows, torch.where(valid, index, first), valid, True)

    @classmethod
    def of(cls, kept: Tensor, rows: Tensor, counts: list[int], row_list: tuple[int, ...] | None = None) -> Selection:
        """Pack the True positions of `kept` [B, N] of `rows`, which hold `counts` of them."""
        width, everyone = max(counts), row_list == tuple(range(len(kept)))
        chosen = kept if everyone else kept[rows]
        index = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        if min(counts) == width:
            return cls(rows, index, None, everyone, row_list)
        valid = torch.arange(width, device=kept.device) < chosen.sum(1, keepdim=True)
        return cls(rows, torch.where(valid, index, index[:, :1]), valid, everyone, row_list)

    @cached_property
    def _lines(self) -> Tensor:
        return self.rows[:, None]

    @cached_property
    def _sources(self) -> tuple[Tensor, Tensor]:
        """Which packed states to put where: at padding those of the row's first position, which is its place, too."""
        assert self.valid is not None
        b, n = self.index.shape
        columns = torch.arange(n, device=self.index.device)
        first = self.valid.int().argmax(1, keepdim=True)
        return torch.arange(b, device=self.index.device)[:, None], torch.where(self.valid, columns, first)

    def pack(self, tensor: Tensor) -> Tensor:
        """[B or 1, N, ...] -> [b, n, ...]."""
        if tensor.shape[0] == 1 and (len(self.rows) > 1 or not self.everyone):
            return tensor[0][self.index]
        return tensor[self._lines, self.index]

    def put_back(self, full: Tensor, packed: Tensor) -> None:
        """Write [b, n, ...] into the selected positions of [B, N, ...]; every row holds one at least."""
        full[self._lines, self.index] = packed if self.valid is None else packed[self._sources]

    def remembered(self, name: str, value: Any, make: Callable[[], Any]) -> Any:
        """`make()`, computed once for every (name, value): all layers get the same mask and rotary tables."""
        key = (name, id(value))
        if key not in self._memo:
            self._memo[key] = (value, make())  # holding the value keeps its id taken
        return self._memo[key][1]

    def forget(self) -> None:
        """Let go of what was remembered: a KV cache holds on to the selection long after the prefill."""
        self._memo.clear()


def pack_mask(
    mask: Tensor | None,
    query_index: Tensor | None,
    key_index: Tensor,
    valid: Tensor | None,
    key_bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Attention mask between packed queries and packed keys.

    Args:
        mask: [b, 1, N, K] boolean (True = attend) or additive, [b, K] (flash attention: True = not padding), or None
            for causal attention (a single query then sees every key).
        query_index: [b, q] rows of `mask` to take; None for all of them.
        key_index: [b, k] columns of `mask` to take.
        valid: [b, k] False where a packed key is padding; None where none is.
        key_bias: [b, k] added to the scores of a key.
        dtype: type of an additive mask made here.

    Returns:
        The packed mask, None where causal attention (or a single query's full attention) says the same.
    """
    if mask is not None and mask.ndim == 2:
        packed = mask.gather(1, key_index)
    elif mask is None:
        # Packed positions ascend and padding is on the right, so causal order is kept and hides the padding, except
        # from queries that came later (decoding).
        if key_bias is None and (valid is None or query_index is not None):
            return None
        if query_index is None:
            packed = torch.ones(*key_index.shape, dtype=torch.bool, device=key_index.device)[:, None, None, :]
        else:
            packed = query_index[:, None, :, None] >= key_index[:, None, None, :]
    else:
        packed = mask.expand(key_index.shape[0], -1, -1, -1)
        if query_index is not None:
            packed = packed.gather(2, query_index[:, None, :, None].expand(-1, packed.shape[1], -1, packed.shape[3]))
        packed = packed.gather(3, key_index[:, None, None, :].expand(-1, packed.shape[1], packed.shape[2], -1))
    over_queries = [None if each is None else each[:, None, None, :] for each in (valid, key_bias)]
    return combine_mask(packed, over_queries[0], over_queries[1], dtype)


def combine_mask(packed: Tensor, valid: Tensor | None, key_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A mask between packed queries and packed keys, without padding and with a bias on the keys.

    Args:
        packed: [b, 1, q, k] boolean or additive, or [b, k] (flash attention, which takes no bias).
        valid: [b, 1, 1, k] False where a key is padding; None where none is.
        key_bias: [b, 1, 1, k] added to the scores of a key; None for nothing. The mask is then of `dtype`.
    """
    if packed.ndim == 2:
        if key_bias is not None:
            raise UnsupportedError("flash attention takes no bias on its keys; load the model with attention 'sdpa'")
        return packed if valid is None else packed & valid[:, 0, 0].to(packed.dtype)
    if packed.dtype == torch.bool:
        if valid is not None:
            packed = packed & valid
        if key_bias is None:
            return packed
        packed = added_to_scores(packed, dtype)
    elif valid is not None:
        packed = packed.masked_fill(~valid, torch.finfo(packed.dtype).min)
    return packed if key_bias is None else packed + key_bias.to(packed.dtype)


_MADE_ANEW = ("prev_topk_indices",)
"""Arguments that say which keys an earlier layer chose: a layer that runs on some positions chooses its own."""


@dataclass
class LayerCall:
    """One call of a decoder layer, and how to repeat it on other positions.

    `hidden` are its input states [B, N, d], `arguments` all else by name, the KV cache always as `past_key_values`.
    """

    index: int
    forward: Callable[..., Any]
    hidden: Tensor
    arguments: dict[str, Any]
    uses_flash: bool

    @property
    def cache(self) -> Any:
        """The KV cache, or None."""
        return self.arguments.get("past_key_values")

    @property
    def mask(self) -> Tensor | None:
        """The attention mask that the model made for this layer."""
        return self.arguments.get("attention_mask")

    def run(self, hidden: Tensor | None = None, **replaced: Any) -> Any:
        """Call the layer, with other input states or arguments where given; returns what the layer returns."""
        states = self.hidden if hidden is None else hidden
        arguments = {**self.arguments, **replaced}
        return self.forward(states, **arguments)  # by position: checkpointing looks for gradients there

    def packed(
        self, selection: Selection, key_bias: Tensor | None = None, places: Selection | None = None
    ) -> dict[str, Any]:
        """The arguments for the positions in `selection` only (attention among themselves).

        With `places`, the rotary tables and position ids are those of other positions.
        """
        batch, length = self.hidden.shape[:2]
        result = {}
        for name, value in self.arguments.items():
            if name == "attention_mask":
                result[name] = selection.remembered(
                    name if key_bias is None else f"{name} {id(key_bias)}",
                    value,
                    functools.partial(self._packed_mask, selection, value, key_bias),
                )
            elif name in _MADE_ANEW:
                result[name] = None
            elif isinstance(value, (Tensor, tuple, list)):
                source = places if places is not None and name.startswith("position_") else selection
                result[name] = selection.remembered(
                    name, value, functools.partial(_pack_argument, name, value, source, batch, length, self.index)
                )
            else:
                result[name] = value
        if self.uses_flash and self.arguments.get("position_embeddings") is not None:
            # Flash attention takes gaps in position ids for packed sequences; the rotary tables hold the positions.
            result["position_ids"] = None
        return result

    def _packed_mask(self, selection: Selection, mask: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
        if mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedError(
                f"attention masks of type {type(mask).__name__} (flex attention) cannot be packed; load the model with "
                "attention 'sdpa'"
            )
        if mask is None and self.uses_flash and selection.valid is not None:
            return selection.valid
        if mask is not None:
            mask = mask.expand(self.hidden.shape[0], *mask.shape[1:])[selection.rows]
        return pack_mask(mask, selection.index, selection.index, selection.valid, key_bias, self.hidden.dtype)


def _pack_argument(name: str, value: Any, selection: Selection, batch: int, length: int, layer: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_pack_argument(name, each, selection, batch, length, layer) for each in value)
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    shape = tuple(value.shape)
    if name == "position_ids":
        at = value.ndim - 1
    elif name == "position_embeddings":
        at = value.ndim - 2  # [batch, length, size], behind one axis a section for multimodal rotary tables
    else:
        at = 1
    if at < 1 or shape[at] != length or shape[at - 1] not in (1, batch):
        raise UnsupportedError(
            f"decoder layer {layer} takes an argument {name!r} of shape {shape}; dyvte does not know how to cut it to "
            f"some positions of a batch of {batch} x {length}"
        )
    leading = shape[: at - 1]
    if not leading:
        return selection.pack(value)
    flat = value.reshape(-1, *shape[at - 1 :])
    return torch.stack([selection.pack(each) for each in flat]).reshape(
        *leading, *selection.index.shape, *shape[at + 1 :]
    )


def output_states(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returned."""
    return output[0] if isinstance(output, tuple) else output


def layer_states(mllm: MLLM, output: Any) -> Tensor:
    """What a decoder layer of a model got or returned, as `LayerCall` has it: [B, N, d], streams side by side."""
    states = output_states(output)
    return states if states.ndim == 3 else Streams.of(states, mllm).together(states)


def with_states(output: Any, hidden: Tensor) -> Any:
    """What a decoder layer returned, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class _Override:
    """Stands in for a method of one object; a deep copy of the object gets the method of its class back."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, getattr(owner, name))  # also takes over what an override below holds
        self.owner, self.name, self.function = owner, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self.owner), self.owner)
        return types.MethodType(getattr(type(owner), self.name), owner)


@contextmanager
def override_method(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace `owner.name` by `function` within the block, on this object only."""
    before = owner.__dict__.get(name)  # accelerate, for one, puts its own forward on modules that it dispatches
    owner.__dict__[name] = _Override(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


def is_driven(mllm: MLLM) -> bool:
    """Whether a policy or a sweep drives the decoder layers at this moment."""
    return any(isinstance(layer.__dict__.get("forward"), _Override) for layer in mllm.layers)


_SLICES_LAST_LAYERS = "_maybe_slice_kv_shared_inputs"
"""Method of a decoder that cuts what its last layers get (states, inputs a layer, rotary tables, masks)."""


@contextmanager
def every_position(mllm: MLLM) -> Iterator[None]:
    """Within the block all layers run on all positions: Gemma 4 runs its last ones on the last token if it can."""
    if not hasattr(getattr(mllm, "decoder", None), _SLICES_LAST_LAYERS):  # a vision tower, when watched, has no decoder
        yield
        return
    with override_method(mllm.decoder, _SLICES_LAST_LAYERS, lambda *states, **_: states[:4]):
        yield


@dataclass(frozen=True)
class Streams:
    """How a decoder layer holds several streams of hidden states: AltUp of Gemma 3n, hyper-connections.

    Attributes:
        number: of streams.
        axis: where they are in the layer's states, which are [B, N, d] otherwise.
    """

    number: int
    axis: int

    @classmethod
    def of(cls, hidden: Tensor, mllm: MLLM) -> Streams:
        """Of a layer's input states [streams, B, N, d] or [B, N, streams, d]."""
        axis = 0 if getattr(mllm.text_config, "altup_num_inputs", None) == hidden.shape[0] else 2
        return cls(hidden.shape[axis], axis)

    def together(self, states: Tensor) -> Tensor:
        """States of all streams side by side [B, N, streams * d]."""
        return states.movedim(self.axis, 2).flatten(2)

    def apart(self, states: Tensor) -> Tensor:
        """States as the layer holds them."""
        return states.unflatten(2, (self.number, -1)).movedim(2, self.axis).contiguous()


@contextmanager
def drive_layers(mllm: MLLM, run: Callable[[LayerCall], Any]) -> Iterator[None]:
    """Within the block, calling decoder layer i runs `run(call)` instead, which must return what the layer would.

    The `LayerCall` has the arguments that the layer got; `call.run()` is the layer itself.
    """
    uses_flash = "flash" in (mllm.text_config._attn_implementation or "")

    def driven(index: int, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward
        names = list(inspect.signature(forward).parameters)
        own_name = next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])

        def under_own_name(states: Tensor, **arguments: Any) -> Any:
            return forward(states, **renamed(arguments, CACHE_NAMES[0], own_name))

        layer_itself = forward if own_name == CACHE_NAMES[0] else under_own_name

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            if own_name in arguments:
                arguments[CACHE_NAMES[0]] = arguments.pop(own_name)
            hidden = arguments.pop(names[0])
            if hidden.ndim == 3:
                return run(LayerCall(index, layer_itself, hidden, arguments, uses_flash))

            def side_by_side(states: Tensor, **arguments: Any) -> Any:
                output = layer_itself(streams.apart(states), **arguments)
                return with_states(output, streams.together(output_states(output)))

            streams = Streams.of(hidden, mllm)
            output = run(LayerCall(index, side_by_side, streams.together(hidden), arguments, uses_flash))
            return with_states(output, streams.apart(output_states(output)))

        return call

    with ExitStack() as stack:
        stack.enter_context(every_position(mllm))
        for index, layer in enumerate(mllm.layers):
            stack.enter_context(override_method(layer, "forward", driven(index, layer)))
        yield


def check_model(mllm: MLLM) -> None:
    """Refuse, with the kind of layer by name, a model whose decoder layers cannot run on some positions only."""
    config = mllm.text_config
    for index, (layer, kind) in enumerate(zip(mllm.layers, layer_kinds(config), strict=True)):
        if (reason := undrivable(layer, kind)) is not None:
            raise UnsupportedError(f"decoder layer {index} is of kind {kind!r}: {reason}")
    for index, attention in enumerate(map(self_attention_of, mllm.layers)):
        indexer = indexer_of(attention)
        if indexer is not None and (kind := type(indexer).__name__) not in DRIVEN_INDEXERS:
            raise UnsupportedError(
                f"decoder layer {index} chooses its keys with a {kind}, which dyvte cannot run on some positions only"
            )
        if indexer is not None and getattr(attention, "is_kv_shared_layer", False):
            raise UnsupportedError(
                f"decoder layer {index} borrows an earlier layer's keys and chooses among them itself"
            )
        if getattr(attention, "skip_topk", False):
            raise UnsupportedError(
                f"decoder layer {index} attends to keys that an earlier layer chose, of which visual tokens would leave"
            )
    if getattr(config, "cross_attention_layers", None):
        raise UnsupportedError("the decoder reads images through cross-attention; no visual token is in its sequence")
    implementation = config._attn_implementation or ""
    if "flex" in implementation:
        raise UnsupportedError("flex attention uses block masks, which cannot be packed; load the model with 'sdpa'")
    if "flash" in implementation and getattr(config, "sliding_window", None):
        raise UnsupportedError(
            "flash attention counts a sliding window over what is left instead of original positions; load with 'sdpa'"
        )
