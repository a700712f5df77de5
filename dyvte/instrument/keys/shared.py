"""Keys and values that decoder layers take from an earlier layer instead of making their own.

In Gemma 3n and in the small models of Gemma 4 the last layers attend to what the last layer of their kind before them
left in a store (`KVSharingDict`) that transformers hands from layer to layer. A layer that runs on some positions only
must find there the keys of just these: the stores below stand in for the model's own for one call of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import KVSharingDict

from dyvte.instrument.hooks import LayerCall, Selection
from dyvte.instrument.kept_keys import take

Pair = tuple[Tensor, Tensor]
"""Keys and values, each [B, heads, N, head size]."""


def borrows_keys(attention: nn.Module | None) -> bool:
    """Whether an attention module takes the keys and values of an earlier layer."""
    return bool(getattr(attention, "is_kv_shared_layer", False))


def lends_keys(attention: nn.Module | None) -> bool:
    """Whether an attention module leaves its keys and values to later layers."""
    return bool(getattr(attention, "store_full_length_kv", False))


def store_of(call: LayerCall) -> KVSharingDict | None:
    """The model's store of shared keys, where it hands one to its layers."""
    return next((each for each in call.arguments.values() if isinstance(each, KVSharingDict)), None)


def with_store(call: LayerCall, store: KVSharingDict | None) -> dict[str, Any]:
    """The argument that makes a layer use another store; none where the model has none."""
    if store is None:
        return {}
    return {name: store for name, value in call.arguments.items() if isinstance(value, KVSharingDict)}


class StandIn(KVSharingDict):
    """A store that answers for another one within one call of one layer.

    Args:
        store: of the model.
        read: makes of a kind what the layer is given.
        write: gets a kind and what the layer leaves.
    """

    def __init__(self, store: KVSharingDict, read: Callable[[Any], Pair], write: Callable[[Any, Pair], None]) -> None:
        super().__init__()
        self.store, self._read, self._write = store, read, write

    def __getitem__(self, kind: Any) -> Pair:
        return self._read(kind)

    def __setitem__(self, kind: Any, states: Pair) -> None:
        self._write(kind, states)

    def __contains__(self, kind: Any) -> bool:
        return kind in self.store

    def to(self, *args: Any, **kwargs: Any) -> StandIn:
        """As of the model's own, in place (accelerate moves it from device to device)."""
        self.store.to(*args, **kwargs)
        return self


class PrefillSharing:
    """Shared keys of a layer that runs on some positions, one group of rows after the other.

    What the model's store holds keeps its full length, so layers may leave positions out at different depths: what a
    layer leaves on packed positions is put back to its places, and what it takes is cut to its positions.
    """

    def __init__(self, call: LayerCall) -> None:
        self.call = call
        self.store = store_of(call)
        self._written: dict[Any, Pair] = {}

    def on(self, selection: Selection) -> dict[str, Any]:
        """The layer's argument while it runs on a selection."""
        store = self.store
        if store is None:
            return {}

        def read(kind: Any) -> Pair:
            keys, values = store[kind]
            return selection.remembered(f"shared {kind}", keys, lambda: (pack(keys), pack(values)))

        def pack(full: Tensor) -> Tensor:
            return selection.pack(full.transpose(1, 2)).transpose(1, 2)

        def write(kind: Any, states: Pair) -> None:
            if kind not in self._written:
                batch, length = self.call.hidden.shape[:2]
                keys, values = (each.new_zeros(batch, each.shape[1], length, each.shape[3]) for each in states)
                self._written[kind] = store[kind] = (keys, values)
            for full, packed in zip(self._written[kind], states, strict=True):
                selection.put_back(full.transpose(1, 2), packed.transpose(1, 2))

        return with_store(self.call, StandIn(store, read, write))


class BranchSharing:
    """Shared keys of branches that go through layers in states of their own, beside the main pass.

    A branch finds what it left itself where it had left the main pass already, and else what the main pass left.
    """

    def __init__(self) -> None:
        self._own: dict[tuple[Any, int], Pair] = {}  # by kind and branch: [b, heads, K, head size]

    def follow(self, parents: Sequence[int]) -> None:
        """From now on branch i is the one that goes on from branch `parents[i]`; a negative one, from the main pass."""
        before, kinds = self._own, {kind for kind, _ in self._own}
        self._own = {
            (kind, branch): before[kind, parent]
            for kind in kinds
            for branch, parent in enumerate(parents)
            if (kind, parent) in before
        }

    def on(self, call: LayerCall, selection: Selection, positions: Tensor, branches: range) -> dict[str, Any]:
        """The layer's argument while it runs on some branches, one behind the other.

        Args:
            call: of the layer in the main pass.
            selection: of the rows that branch.
            positions: [b, K] of the keys that a branch attends to.
            branches: their numbers.
        """
        store = store_of(call)
        if store is None:
            return {}

        def read(kind: Any) -> Pair:
            keys, values = store[kind]

            def cut() -> Pair:
                rows = selection.rows
                return take(keys[rows], positions), take(values[rows], positions)

            found = [
                self._own.get((kind, branch)) or selection.remembered(f"shared {kind}", keys, cut)
                for branch in branches
            ]
            return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])

        def write(kind: Any, states: Pair) -> None:
            for branch, *own in zip(branches, *(each.chunk(len(branches)) for each in states), strict=True):
                self._own[kind, branch] = own[0], own[1]

        return with_store(call, StandIn(store, read, write))
