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


@dataclass
class _Prefix:
    """Keys and values of the prompt for a group of rows: [b, heads, n, head size] of the positions in `selection`."""

    selection: Selection
    keys: Tensor
    values: Tensor
    key_bias: Tensor | None

    def select_rows(self, order: Tensor, local: Tensor) -> _Prefix:
        """The same prompt for the new rows `order`, copied from the rows `local` of this group."""
        old = self.selection
        valid = None if old.valid is None else old.valid[local]
        return _Prefix(
            Selection(order, old.index[local], valid),
            self.keys[local],
            self.values[local],
            None if self.key_bias is None else self.key_bias[local],
        )


class KeptLayer(DynamicLayer):
    """Cache layer of a decoder layer that left positions out during prefill.

    It stores keys and values of the kept positions only, and reports the length that the layer would have with all of
    them: transformers sizes the attention masks of all layers by the first cache layer of each kind. Rows are stored
    in groups of about equal length, so that rows without visual tokens take no room for those of their neighbours.

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
        self._prefixes: list[_Prefix] = []
        self._prompt_length = 0
        self._tail_start = 0  # position of the first entry of the tail
        self._tail: tuple[Tensor, Tensor] | None = None
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
        """Tell how many positions the prompt had."""
        self.length = self._prompt_length = self._tail_start = length

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
        padded = len(self._prefixes) > 1 or self._prefixes[0].selection.valid is not None
        biased = any(prefix.key_bias is not None for prefix in self._prefixes)
        if mask is None and not padded and not biased:
            return None
        position, valid, bias = self.key_positions(num_queries)
        offset = self.get_mask_sizes(num_queries)[1]
        if self.is_sliding and mask is not None:
            valid = valid & (position >= offset)
        needed = valid if padded or self.is_sliding else None
        return pack_mask(mask, None, (position - offset).clamp(min=0), needed, bias, dtype)

    @property
    def mask_key(self) -> tuple[Any, ...]:
        """Equal for layers of one cache whose `mask` is the same."""
        stored = [(id(prefix.selection), id(prefix.key_bias)) for prefix in self._prefixes]
        return (*stored, self._tail_start, self.length, self.sliding_window)

    # ------------------------------------------------- what transformers expects of a layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all those that the new queries may attend to."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if self._writing is not None:
            selection, key_bias = self._writing
            self._prefixes.append(_Prefix(selection, key_states, value_states, key_bias))
            return key_states, value_states
        if not self._reading:
            raise RuntimeError(
                "this KV cache was filled under a dyvte policy that left visual tokens out; go on generating inside "
                "the same `with policy(mllm):` block"
            )
        if self._tail is None:
            self._tail = (key_states, value_states)
        else:
            self._tail = (
                torch.cat([self._tail[0], key_states], dim=-2),
                torch.cat([self._tail[1], value_states], dim=-2),
            )
        self.length += key_states.shape[-2]
        dense = self._dense(0), self._dense(1)
        self._forget_outside_window()
        return dense

    @property
    def keys(self) -> Tensor | None:
        """[B, heads, n, head size] keys of the kept positions, zeros where a row kept fewer than another."""
        return self._dense(0) if self._prefixes else None

    @property
    def values(self) -> Tensor | None:
        """[B, heads, n, head size] values of the kept positions."""
        return self._dense(1) if self._prefixes else None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        stored = [tensor for prefix in self._prefixes for tensor in (prefix.keys, prefix.values)]
        return sum(tensor.nbytes for tensor in [*stored, *(self._tail or ())])

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
        rows = torch.arange(self._num_rows(), device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        indices = indices.to(self.device)
        prefixes = []
        for prefix in self._prefixes:
            match = indices[:, None] == prefix.selection.rows[None, :]  # [new rows, rows of the group]
            order = match.any(1).nonzero().flatten()
            if len(order):
                prefixes.append(prefix.select_rows(order, match[order].int().argmax(1)))
        self._prefixes = prefixes
        if self._tail is not None:
            self._tail = (self._tail[0][indices], self._tail[1][indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: only assisted decoding takes tokens back."""
        raise UnsupportedError(
            "assisted decoding takes tokens back from the KV cache, which a dyvte policy cannot follow"
        )

    def offload(self) -> None:
        """Refused."""
        raise UnsupportedError("a KV cache filled under a dyvte policy cannot be offloaded")

    # -------------------------------------------------------------------------- private

    def _num_rows(self) -> int:
        return sum(len(prefix.selection.rows) for prefix in self._prefixes)

    def _width(self) -> int:
        return max((prefix.selection.index.shape[1] for prefix in self._prefixes), default=0)

    def _dense(self, part: int) -> Tensor:
        """Keys (0) or values (1) of all rows, prompts padded to the longest, then the new tokens."""
        stored = [(prefix.keys, prefix.values)[part] for prefix in self._prefixes]
        if len(stored) == 1:  # one group holds its rows in order
            return stored[0] if self._tail is None else torch.cat([stored[0], self._tail[part]], dim=-2)
        _, heads, _, size = stored[0].shape
        tail_length = 0 if self._tail is None else self._tail[part].shape[-2]
        dense = stored[0].new_zeros(self._num_rows(), heads, self._width() + tail_length, size)
        for prefix, tensor in zip(self._prefixes, stored, strict=True):
            dense[prefix.selection.rows, :, : tensor.shape[-2]] = tensor
        if self._tail is not None:
            dense[:, :, self._width() :] = self._tail[part]
        return dense

    def key_positions(self, num_queries: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Position [B, n], validity [B, n] and bias [B, n] of the keys that the next `update` will return."""
        rows, width = self._num_rows(), self._width()
        position = torch.zeros(rows, width, dtype=torch.long, device=self.device)
        valid = torch.zeros(rows, width, dtype=torch.bool, device=self.device)
        biased = any(prefix.key_bias is not None for prefix in self._prefixes)
        bias = torch.zeros(rows, width, device=self.device) if biased else None
        for prefix in self._prefixes:
            chosen, count = prefix.selection.rows, prefix.selection.index.shape[1]
            position[chosen, :count] = prefix.selection.index
            valid[chosen, :count] = True if prefix.selection.valid is None else prefix.selection.valid
            if bias is not None and prefix.key_bias is not None:
                bias[chosen, :count] = prefix.key_bias.to(bias.dtype)
        new = torch.arange(self._tail_start, self.length + num_queries, device=self.device).expand(rows, -1)
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(new.shape)], dim=1)
        position = torch.cat([position, new], dim=1)
        valid = torch.cat([valid, torch.ones_like(new, dtype=torch.bool)], dim=1)
        return position, valid, bias

    def _forget_outside_window(self) -> None:
        if self.sliding_window is None or self._tail is None:
            return
        first_needed = self.length - self.sliding_window + 1
        if first_needed > self._tail_start:
            gone = first_needed - self._tail_start
            self._tail = (self._tail[0][:, :, gone:], self._tail[1][:, :, gone:])
            self._tail_start = first_needed
        if first_needed >= self._prompt_length:
            for prefix in self._prefixes:
                empty = Selection(prefix.selection.rows, prefix.selection.index[:, :0], None)
                prefix.selection, prefix.key_bias = empty, None
                prefix.keys, prefix.values = prefix.keys[:, :, :0], prefix.values[:, :, :0]


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
