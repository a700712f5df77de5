"""Decoding with a KV cache whose layers store some of the positions they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from dyvte.errors import UnsupportedError
from dyvte.instrument.attention_calls import replace_attention
from dyvte.instrument.cache import KeptLayer
from dyvte.instrument.hooks import LayerCall, combine_mask
from dyvte.instrument.kept_keys import KeyTable, attend_apart
from dyvte.instrument.keys.borrowed import BorrowingLayer, StepSharing
from dyvte.instrument.keys.indexed import KeptIndexedLayer, choosing_among
from dyvte.instrument.keys.shared import lends_keys, store_of
from dyvte.instrument.role_attention import added_to_scores

if TYPE_CHECKING:
    from dyvte.mllm import MLLM


class Decoding:
    """Runs decoder layers on new tokens, step by step.

    Rows that left their image before a layer and rows that did not attend one group after the other, each to keys of
    its own length. Where a model does not hand what it stored to its attention function as it is, or wants attention
    weights of all rows, they attend together, to a rectangle as wide as the longest.
    """

    def __init__(self, mllm: MLLM) -> None:
        self.mllm = mllm
        self._sharing = StepSharing()
        self._masks: dict[Any, tuple[Any, Tensor | None]] = {}  # of one step; many layers share them
        implementation = mllm.text_config._attn_implementation
        self._attends_apart = implementation not in (None, "eager")  # eager returns weights
        self._adds_masks = implementation == "sdpa"  # makes numbers of boolean masks, at every call
        self._apart: tuple[KeptLayer, list[Tensor | None]] | None = None  # the layer that runs, and its groups' masks
        self._door = ExitStack()

    def begin(self, start: Tensor | None, together: bool = False) -> None:
        """A decoding step begins: within it, groups of rows can attend apart.

        Args:
            start: of the rows, as `starts_of` finds it.
            together: they shall not.
        """
        self._start = start
        self._attends_apart = self._attends_apart and not together
        if self._attends_apart:
            try:
                self._door.enter_context(replace_attention(self.mllm, self._attend))
            except UnsupportedError:
                self._attends_apart = False

    def end(self) -> None:
        """A step ends."""
        self._door.close()
        self._masks.clear()
        self._sharing = StepSharing()

    def run_layer(self, call: LayerCall, layer: Any) -> Any:
        """Run a decoder layer on new tokens.

        Args:
            call: of the layer.
            layer: of the KV cache, which may hold some of the positions.
        """
        store = store_of(call)
        if store is not None and isinstance(layer, BorrowingLayer):
            return self._sharing.borrowing(call, store, layer).run()
        if store is not None and lends_keys(self.mllm.attentions[call.index]):
            places = None
            if isinstance(layer, KeptLayer):
                if len(layer.groups(call.hidden.shape[1]) or ()) > 1:
                    layer.make_table()  # borrowers want all rows in one rectangle
                position, valid, _ = layer.key_positions(call.hidden.shape[1])
                places = position, valid
            call = self._sharing.lending(call, store, layer, places)
        if isinstance(layer, KeptLayer):
            return self._run_kept(call, layer)
        return call.run() if self._start is None else self._run_from(self._start, call, layer)

    def _run_from(self, start: Tensor, call: LayerCall, layer: Any) -> Any:
        """Run a layer that kept all positions and may count blocks of keys, which are to begin at the rows' starts."""
        done = layer.get_seq_length()
        length = done + call.hidden.shape[1]
        places = torch.arange(length, device=start.device).expand(len(start), -1)
        with choosing_among(self.mllm.attentions[call.index], places[:, done:], places, None, length, start):
            return call.run()

    def _run_kept(self, call: LayerCall, layer: KeptLayer) -> Any:
        new = call.hidden.shape[1]
        groups = layer.groups(new)
        if groups is not None and len(groups) > 1:
            if self._attends_apart:
                masks = [self._mask(call, layer, each, self._adds_masks) for each in groups]
                try:
                    return self._run_apart(call, layer, masks)
                except _CannotAttendApartError:
                    self._attends_apart = False
            layer.make_table()
            groups = None
        mask = self._mask(call, layer, None if groups is None else groups[0])
        attention, indexed = self.mllm.attentions[call.index], isinstance(layer, KeptIndexedLayer)
        with layer.decoding(), layer.choosing(attention, new, self._start) if indexed else nullcontext():
            return call.run(attention_mask=mask)

    def _mask(self, call: LayerCall, layer: KeptLayer, table: KeyTable | None, added: bool = False) -> Tensor | None:
        """The mask of a group of rows, or of the whole table of a layer; layers share them for a step."""
        mask, new, dtype = call.mask, call.hidden.shape[1], call.hidden.dtype

        def make() -> Tensor | None:
            if table is None:
                return layer.mask(mask, new, dtype)
            own = (
                self._once(mask, ("added",), lambda: added_to_scores(mask, dtype))
                if added and mask is not None
                else mask
            )
            return layer.group_mask(table, own, new, dtype, added)

        return self._once(mask, (added, layer.length, layer.mask_key if table is None else id(table)), make)

    def _once(self, mask: Tensor | None, key: tuple[Any, ...], make: Callable[[], Tensor | None]) -> Tensor | None:
        """`make()`, called once a step for a mask of the model's and a key."""
        if (known := self._masks.get((id(mask), *key))) is None:
            known = self._masks[id(mask), *key] = (mask, make())  # held, so that its id stays taken
        return known[1]

    def _run_apart(self, call: LayerCall, layer: KeptLayer, masks: list[Tensor | None]) -> Any:
        """Run a layer whose groups of rows attend one after the other."""
        self._apart = layer, masks
        try:
            with layer.attending_apart():
                result = call.run(attention_mask=None)
        finally:
            attended, self._apart = self._apart is None, None
        if not attended:
            raise _CannotAttendApartError
        return result

    def _attend(self, original: Callable[..., Any], module: nn.Module, **arguments: Any) -> Any:
        """Stands in for the attention function while decoding."""
        if self._apart is None:
            return original(module, **arguments)
        (layer, masks), self._apart = self._apart, None
        query, mask = arguments.pop("query"), arguments.pop("attention_mask", None)
        store = layer.take(arguments.pop("key"), arguments.pop("value")) if mask is None else None
        if store is None:
            raise _CannotAttendApartError
        arguments.pop("position_ids", None)  # of all rows; flash attention takes those for packed sequences
        return attend_apart(functools.partial(original, module), store, query, masks, **arguments)


def without_keys(call: LayerCall, hidden: Tensor, layer: Any) -> LayerCall:
    """The call of a decoding step whose new tokens do not see some keys of the prompt.

    Args:
        call: of the layer, with the model's mask.
        hidden: [B, N] boolean, positions of the prompt.
        layer: of the KV cache.

    Raises:
        UnsupportedError: the layer reads keys that another layer stored.
    """
    if not isinstance(layer, DynamicLayer):  # borrowers
        raise UnsupportedError(
            f"decoder layer {call.index} reads keys that another layer stored, which cannot be hidden from it alone"
        )
    new, mask = call.hidden.shape[1], call.mask
    length, offset = layer.get_mask_sizes(new)
    prompt = hidden[:, offset : offset + length]
    seen = ~nn.functional.pad(prompt, (0, length - prompt.shape[1]))
    if call.uses_flash:
        seen = seen.to(torch.long if mask is None else mask.dtype)
        made = seen if mask is None else mask[:, -length:] * seen
    elif mask is None:
        made = added_to_scores(seen[:, None, None] & seen.new_ones(new, length).tril(length - new), call.hidden.dtype)
    else:
        made = combine_mask(mask, seen[:, None, None], None, call.hidden.dtype)
    return replace(call, arguments={**call.arguments, "attention_mask": made})


class _CannotAttendApartError(Exception):
    """The model does not hand what it stored to its attention function as it is."""
