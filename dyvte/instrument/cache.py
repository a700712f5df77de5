"""A KV-cache layer that stores some of the positions it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from dyvte.errors import UnsupportedError
from dyvte.instrument.hooks import Selection, pack_mask

ROOM = 32
"""New tokens of every row that the store of a `KeptLayer` makes room for at a time."""


@dataclass(frozen=True)
class _Group:
    """Rows of a prefill that keep about as many positions: keys and values [b, heads, n, head size] of `selection`."""

    selection: Selection
    keys: Tensor
    values: Tensor
    key_bias: Tensor | None


class KeptLayer(DynamicLayer):
    """Cache layer of a decoder layer that left positions out during prefill.

    It stores keys and values of the kept positions only, and reports the length that the layer would have with all of
    them: transformers sizes the attention masks of all layers by the first cache layer of each kind. Entries, a key and
    a value of all heads each, stand one behind the other in a store, and a table says which of them a row attends to:
    rows without visual tokens take no room for those of their neighbours, beams share their prompt, and one gather
    makes the rectangle that attention reads.

    Attributes:
        length: number of positions that the layer stands for.
        replaced: the empty layer whose place it takes in the cache.
    """

    is_croppable = False

    def __init__(self, replaced: DynamicLayer) -> None:
        self.replaced = replaced
        self.sliding_window: int | None = getattr(replaced, "sliding_window", None)
        self.is_sliding = self.sliding_window is not None
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self.is_initialized = False
        self._groups: list[_Group] = []  # of the prefill; its tensors stay as they are until the first new token
        self._made_of: list[tuple[Selection, Tensor | None]] = []  # held, so that their ids stay taken
        self._store: list[Tensor] = []  # keys and values [room, heads, head size]
        self._num_entries = 0
        self._entry = torch.empty(0, 0, dtype=torch.long)  # [B, n] where the keys of each row are; any at padding
        # Of the prompt's part of the table:
        self._position, self._valid = self._entry, torch.empty(0, 0, dtype=torch.bool)
        self._bias: Tensor | None = None
        self._padded = False
        self._prompt_length = 0
        self._tail_start = 0  # position of the first new token in the table
        self._writing: tuple[Selection, Tensor | None] | None = None
        self._reading = False

    # ------------------------------------------------------------- what policies use

    @contextmanager
    def prefilling(self, selection: Selection, key_bias: Tensor | None) -> Iterator[None]:
        """While active, `update` stores keys and values of the positions in `selection`."""
        self._writing = (selection, key_bias)
        try:
            yield
        finally:
            self._writing = None

    def finish_prefill(self, length: int) -> None:
        """Make the table of what was stored of the groups of rows. The prompt had `length` positions."""
        self.length = self._prompt_length = self._tail_start = length
        groups = self._groups
        shapes = [group.selection.index.shape for group in groups]
        rows, width = sum(b for b, _ in shapes), max(n for _, n in shapes)
        self._made_of = [(group.selection, group.key_bias) for group in groups]
        self._padded = len(groups) > 1 or groups[0].selection.valid is not None
        self._position = torch.zeros(rows, width, dtype=torch.long, device=self.device)
        self._valid = torch.zeros(rows, width, dtype=torch.bool, device=self.device)
        self._entry = torch.zeros_like(self._position)
        biased = any(group.key_bias is not None for group in groups)
        self._bias = torch.zeros(rows, width, device=self.device) if biased else None
        self._num_entries = 0
        for group, (b, n) in zip(groups, shapes, strict=True):
            chosen, entries = group.selection.rows, torch.arange(b * n, device=self.device) + self._num_entries
            self._position[chosen, :n] = group.selection.index
            self._valid[chosen, :n] = True if group.selection.valid is None else group.selection.valid
            self._entry[chosen, :n] = entries.view(b, n)
            if self._bias is not None and group.key_bias is not None:
                self._bias[chosen, :n] = group.key_bias.to(self._bias.dtype)
            self._num_entries += b * n

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While active, `update` appends new tokens; the caller passes the mask that `mask` made to the layer."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def mask(self, mask: Tensor | None, num_queries: int, dtype: torch.dtype) -> Tensor | None:
        """Attention mask of new tokens for the stored keys.

        Args:
            mask: what the model made for all `length + num_queries` positions (or those in the sliding window).
            num_queries: number of new tokens.
            dtype: floating-point type of an additive mask, needed when keys carry a bias.
        """
        if mask is None and not self._padded and self._bias is None:
            return None
        position, valid, bias = self.key_positions(num_queries)
        offset = self.get_mask_sizes(num_queries)[1]
        if self.is_sliding and mask is not None:
            valid = valid & (position >= offset)
        needed = valid if self._padded or self.is_sliding else None
        return pack_mask(mask, None, (position - offset).clamp(min=0), needed, bias, dtype)

    @property
    def mask_key(self) -> tuple[Any, ...]:
        """Equal for layers of one cache whose `mask` is the same."""
        stored = [(id(selection), id(key_bias)) for selection, key_bias in self._made_of]
        return (*stored, self._tail_start, self.length, self.sliding_window)

    def key_positions(self, num_queries: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Position [B, n], validity [B, n] and bias [B, n] of the keys that the next `update` will return."""
        new = torch.arange(self._tail_start, self.length + num_queries, device=self.device)
        new = new.expand(len(self._entry), -1)
        position = torch.cat([self._position, new], dim=1)
        valid = torch.cat([self._valid, torch.ones_like(new, dtype=torch.bool)], dim=1)
        bias = None if self._bias is None else torch.cat([self._bias, self._bias.new_zeros(new.shape)], dim=1)
        return position, valid, bias

    # ------------------------------------------------- what transformers expects of a layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all those that the new queries may attend to."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if self._writing is not None:
            selection, key_bias = self._writing
            self._groups.append(_Group(selection, key_states, value_states, key_bias))
            return key_states, value_states
        if not self._reading:
            raise RuntimeError(
                "this KV cache was filled under a dyvte policy that left visual tokens out; go on generating inside "
                "the same `with policy(mllm):` block"
            )
        rows, _, new, _ = key_states.shape
        self._make_room(rows * new)
        entries = torch.arange(rows * new, device=self.device) + self._num_entries
        self._entry = torch.cat([self._entry, entries.view(rows, new)], dim=1)
        self._write(key_states, value_states)
        self.length += new
        keys, values = self._gathered()
        self._forget_outside_window()
        return keys, values

    @property
    def keys(self) -> Tensor | None:
        """[B, heads, n, head size] keys of the kept positions; where a row kept fewer than another, any key."""
        return self._gathered()[0] if self._num_entries else None

    @property
    def values(self) -> Tensor | None:
        """[B, heads, n, head size] values of the kept positions."""
        return self._gathered()[1] if self._num_entries else None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        if self._groups:
            return sum(each.nbytes for group in self._groups for each in (group.keys, group.values))
        return sum(stored[: self._num_entries].nbytes for stored in self._store)

    def get_seq_length(self) -> int:
        """Number of positions that the layer stands for."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the mask of all positions covers, as for the layer it replaces."""
        if self.sliding_window is None:
            return self.length + query_length, 0
        offset = max(self.length - self.sliding_window + 1, 0)
        return self.length - offset + query_length, offset

    def get_max_length(self) -> int:
        """The sliding window, or -1 for no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i a copy of row `beam_idx[i]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(len(self._entry), device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        indices = indices.to(self.device)
        self._entry, self._position, self._valid = (
            each[indices] for each in (self._entry, self._position, self._valid)
        )
        self._bias = None if self._bias is None else self._bias[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: only assisted decoding takes tokens back."""
        raise UnsupportedError(
            "assisted decoding takes tokens back from the KV cache, which a dyvte policy cannot follow"
        )

    def offload(self) -> None:
        """Refused."""
        raise UnsupportedError("a KV cache filled under a dyvte policy cannot be offloaded")

    # -------------------------------------------------------------------------- private

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, n, head size] of all rows: the prompt's, then those of the new tokens."""
        if self._groups:
            self._settle(room=0)
        flat = self._entry.flatten()
        keys, values = (
            stored.index_select(0, flat).unflatten(0, self._entry.shape).transpose(1, 2) for stored in self._store
        )
        return keys, values

    def _settle(self, room: int) -> None:
        """Put what the prefill stored into one store, with room for so many more entries."""
        groups, self._groups = self._groups, []
        number, self._num_entries = self._num_entries, 0
        like = groups[0].keys, groups[0].values
        self._store = [each.new_empty(number + room, each.shape[1], each.shape[3]) for each in like]
        for group in groups:
            self._write(group.keys, group.values)

    def _write(self, *states: Tensor) -> None:
        """Store keys and values [b, heads, n, head size] behind what there is, row by row."""
        for stored, each in zip(self._store, states, strict=True):
            b, heads, n, size = each.shape
            stored[self._num_entries : self._num_entries + b * n].view(b, n, heads, size).copy_(each.transpose(1, 2))
        self._num_entries += b * n

    def _make_room(self, number: int) -> None:
        """Let the store hold so many more entries; those that no row attends to any longer leave it."""
        more = max(number, ROOM * len(self._entry))
        if self._groups:
            self._settle(more)
        if self._num_entries + number <= len(self._store[0]):
            return
        live, self._entry = self._entry.unique(return_inverse=True)
        self._num_entries = len(live)
        for part, stored in enumerate(self._store):
            self._store[part] = stored.new_empty(self._num_entries + more, *stored.shape[1:])
            torch.index_select(stored, 0, live, out=self._store[part][: self._num_entries])

    def _forget_outside_window(self) -> None:
        if self.sliding_window is None:
            return
        first_needed = self.length - self.sliding_window + 1
        width = self._position.shape[1]
        if first_needed > self._tail_start:
            gone = first_needed - self._tail_start
            self._entry = torch.cat([self._entry[:, :width], self._entry[:, width + gone :]], dim=1)
            self._tail_start = first_needed
        if first_needed >= self._prompt_length and width:
            self._entry = self._entry[:, width:]
            self._position, self._valid = self._position[:, :0], self._valid[:, :0]
            self._bias = None if self._bias is None else self._bias[:, :0]
            self._padded = False


def kept_layer(cache: Cache, index: int) -> KeptLayer:
    """Put a `KeptLayer` in the place of layer `index` of an empty cache.

    Raises:
        UnsupportedError: the cache is not a dynamic one.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = KeptLayer(cache.layers[index])
    cache.layers[index] = layer
    return layer


def restore_layers(cache: Cache) -> None:
    """Give an empty cache that was used under a policy before its own layers back."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, KeptLayer) and layer.length == 0:
            cache.layers[index] = layer.replaced


def check_cache(cache: Any) -> None:
    """Refuse a cache that cannot hold different positions in different layers.

    Raises:
        UnsupportedError: with the kind of cache by name.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UnsupportedError(f"a {type(cache).__name__} cannot be used under a policy; use a DynamicCache")
    if getattr(cache, "offloading", False):
        raise UnsupportedError("an offloaded KV cache cannot be used under a policy; use a DynamicCache")
    if cache.layer_class_to_replicate not in (None, DynamicLayer):
        raise UnsupportedError(f"a {cache.layer_class_to_replicate.__name__} cannot be used under a policy")
    for index, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, KeptLayer):
            continue
        if isinstance(layer, StaticLayer):
            reason = "a static KV cache reserves room for every position"
        elif isinstance(layer, BaseQuantizedLayer):
            reason = "a quantised KV cache packs positions together"
        elif not isinstance(layer, CacheLayerMixin):
            reason = (
                "layers without keys of their own (linear attention, convolutions, shared keys) cannot leave tokens out"
            )
        else:
            reason = "this kind of cache layer is unknown to dyvte"
        raise UnsupportedError(f"cache layer {index} is a {type(layer).__name__}: {reason}; use a DynamicCache")
