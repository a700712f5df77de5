"""Decoding where layers attend to keys of an earlier layer, of which they kept some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, KVSharingDict

from dyvte.instrument.hooks import LayerCall, Selection, pack_mask
from dyvte.instrument.kept_keys import KeyTable, locate, rectangle, take
from dyvte.instrument.keys.shared import Pair, StandIn, with_store

OUTSIDE_BLOCK = (
    "this KV cache was filled under a dyvte policy that left visual tokens out; go on generating inside the same "
    "`with policy(mllm):` block"
)


class BorrowingLayer(DummyLayer):
    """Place in a KV cache of a decoder layer that stores no keys of its own and left positions out during prefill.

    Attributes:
        length: of the prompt.
        replaced: the layer whose place it takes in the cache.
    """

    is_croppable = False

    def __init__(self, replaced: DummyLayer | DynamicLayer, under_policy: Callable[[], bool]) -> None:
        super().__init__()
        self.replaced, self._under_policy = replaced, under_policy
        self._bias: Tensor | None = None
        self.reset()

    @property
    def is_sliding(self) -> bool:
        """False. transformers asks every layer before it makes masks: the place to notice a policy that is gone."""
        if self.length and not self._under_policy():
            raise RuntimeError(OUTSIDE_BLOCK)
        return False

    @contextmanager
    def prefilling(self, selection: Selection, key_bias: Tensor | None) -> Iterator[None]:
        """While active, the decoder layer runs on the positions in `selection`."""
        self._tables.append(KeyTable.of(selection, key_bias))
        yield

    def finish_prefill(self, length: int) -> None:
        """The layer ran on all groups of rows. The prompt had `length` positions."""
        self.length = length
        self._position, self._valid, self._bias = rectangle(self._tables)

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for layers of one cache that kept the same positions."""
        return (*map(id, self._tables), self._moves)

    def key_positions(self, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Position [B, n], validity [B, n] and bias [B, n] of the keys that are left of `length` positions."""
        new = torch.arange(self.length, length, device=self._position.device).expand(len(self._position), -1)
        valid = torch.cat([self._valid, torch.ones_like(new, dtype=torch.bool)], dim=1)
        bias = None if self._bias is None else torch.cat([self._bias, self._bias.new_zeros(new.shape)], dim=1)
        return torch.cat([self._position, new], dim=1), valid, bias

    def reset(self) -> None:
        """Forget everything."""
        self.length = self._moves = 0
        self._tables: list[KeyTable] = []
        self._position = self._valid = torch.empty(0, 0)
        self._bias = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i a copy of row `beam_idx[i]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(len(self._position), device=self._position.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        self._moves += 1
        rows = indices.to(self._position.device)
        self._position, self._valid = self._position[rows], self._valid[rows]
        self._bias = None if self._bias is None else self._bias[rows]


class StepSharing:
    """Shared keys of one decoding step: where those in the model's store belong, and what borrowers see of them."""

    def __init__(self) -> None:
        self._places: dict[Any, tuple[Tensor, Tensor]] = {}  # position and validity [B or 1, n], by kind
        self._known: dict[Any, tuple[Any, Any]] = {}

    def lending(
        self, call: LayerCall, store: KVSharingDict, layer: CacheLayerMixin, places: tuple[Tensor, Tensor] | None
    ) -> LayerCall:
        """The call of a layer that leaves its keys to others.

        Args:
            call: of the decoder layer.
            store: of the model.
            layer: of the KV cache.
            places: position and validity [B, n] of the layer's keys; None where it holds all of the last ones.
        """

        def write(kind: Any, states: Pair) -> None:
            store[kind] = states
            if places is not None:
                self._places[kind] = places
                return
            last, count = layer.get_seq_length(), states[0].shape[2]
            position = torch.arange(last - count, last, device=states[0].device)[None]
            self._places[kind] = position, torch.ones_like(position, dtype=torch.bool)

        return replace(call, arguments={**call.arguments, **with_store(call, StandIn(store, store.__getitem__, write))})

    def borrowing(self, call: LayerCall, store: KVSharingDict, layer: BorrowingLayer) -> LayerCall:
        """The call of a layer that kept some of the keys that it borrows."""
        length = call.cache.get_seq_length()
        position, valid, bias = layer.key_positions(length)

        def mask() -> Tensor | None:
            # A mask as wide as a sliding window ends where the keys end.
            offset = 0 if call.mask is None else length - call.mask.shape[-1]
            seen = valid & (position >= offset)
            return pack_mask(call.mask, None, (position - offset).clamp(min=0), seen, bias, call.hidden.dtype)

        def read(kind: Any) -> Pair:
            keys, values = store[kind]

            def cut() -> Pair:
                given, known = (each.expand(len(position), -1) for each in self._places[kind])
                at = locate(given, known, position, length)
                return take(keys, at), take(values, at)

            return self._remembered((kind, layer.key), keys, cut)

        arguments = with_store(call, StandIn(store, read, store.__setitem__))
        arguments["attention_mask"] = self._remembered(("mask", id(call.mask), layer.key), call.mask, mask)
        return replace(call, arguments={**call.arguments, **arguments})

    def _remembered(self, key: Any, value: Any, make: Callable[[], Any]) -> Any:
        """`make()`, computed once a step; `value` is held, so that its id stays taken."""
        if key not in self._known:
            self._known[key] = (value, make())
        return self._known[key][1]
