"""A KV-cache layer that stores some of the positions it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dyvte.errors import UnsupportedError
from dyvte.instrument.hooks import Selection, pack_mask
from dyvte.instrument.kept_keys import ROOM, Group, GroupStore, KeyTable, rectangle
from dyvte.instrument.keys.borrowed import OUTSIDE_BLOCK


class UnknownOfCacheError(UnsupportedError, AttributeError):
    """A model asks a cache layer for something that a layer with keys left out does not have."""


class KeptLayer(DynamicLayer):
    """Cache layer of a decoder layer that left positions out during prefill.

    It stores keys and values of the kept positions only, and reports the length that the layer would have with all of
    them: transformers sizes the attention masks of all layers by the first cache layer of each kind.

    As long as the rows stay what they were, each group of them that the layer ran on has a rectangle of its own
    (`dyvte.instrument.kept_keys`). One group grows like transformers' own layer; for several the engine of policies
    calls the attention function one after the other. Otherwise (beams, rows taken out, a sliding window that has left
    the prompt's start, attention that cannot be called by groups) entries, a key and a value of all heads each, stand
    one behind the other in a store, and a table says which of them a row attends to: rows without visual tokens take no
    room for those of their neighbours, beams share their prompt, and one gather makes the rectangle that attention
    reads.

    Attributes:
        length: number of positions that the layer stands for.
        replaced: the empty layer whose place it takes in the cache.
    """

    is_croppable = False
    keeps_prompt = False  # whether a sliding window is over new tokens alone

    def __init__(self, replaced: DynamicLayer) -> None:
        self.replaced = replaced
        self.sliding_window: int | None = getattr(replaced, "sliding_window", None)
        self.is_sliding = self.sliding_window is not None
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self.is_initialized = False
        self._groups: list[Group] = []  # until there is a table; tensors of the prefill until the first new token
        self._apart: GroupStore | None = None  # the same groups, in place, while they attend one after the other
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
        self._reading = self._apart_reading = False
        self._pending: tuple[Tensor, Tensor] | None = None
        self._made_of: list[KeyTable] = []  # the table; held, so that their ids stay taken

    # ------------------------------------------------------------- what policies use

    @contextmanager
    def _while(self, **state: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in state}
        self.__dict__.update(state)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def prefilling(self, selection: Selection, key_bias: Tensor | None) -> AbstractContextManager[None]:
        """While active, `update` stores keys and values of the positions in `selection`."""
        return self._while(_writing=(selection, key_bias))

    def finish_prefill(self, length: int) -> None:
        """All groups of rows are stored. The prompt had `length` positions."""
        self.length = self._prompt_length = length

    def groups(self, num_queries: int) -> list[KeyTable] | None:
        """The groups of rows while each has a rectangle of its own, for so many new tokens; None for a table.

        One group attends as always, with the mask of its `KeyTable`; several with `attend_apart`.
        """
        if self._groups and self.is_sliding and self.length + num_queries > self.get_max_length():
            self.make_table()
        return [each.table for each in self._groups] or None

    def group_mask(
        self, table: KeyTable, mask: Tensor | None, num_queries: int, dtype: torch.dtype, added: bool = False
    ) -> Tensor | None:
        """Attention mask of new tokens for the keys of one of the `groups`.

        Args:
            table: of the group.
            mask: the model's.
            num_queries: number of new tokens.
            dtype: floating-point type of a mask that is added to the scores.
            added: make one of that kind in any case; `mask` is one, or None.
        """
        make = table.added_mask if added else table.mask
        return make(mask, self._prompt_length, self.length - self._prompt_length + num_queries, dtype)

    def attending_apart(self) -> AbstractContextManager[None]:
        """While active, `update` hands new keys and values back as they are, for `take` to store."""
        return self._while(_reading=True, _apart_reading=True, _pending=None)

    def take(self, key: Tensor, value: Tensor) -> GroupStore | None:
        """Store what the last `update` was given, if the attention function got just that.

        Returns:
            The groups with the new keys; None, and nothing is stored, if the model did something to them in between.
        """
        if self._pending is None or key is not self._pending[0] or value is not self._pending[1] or not self._groups:
            return None
        self._pending = None
        if self._apart is None:
            self._apart = GroupStore(self._groups)
        self._apart.append(key, value)
        self.length += key.shape[2]
        return self._apart

    def make_table(self) -> None:
        """Put the groups of rows into one table, from which every row can be read, repeated or left out."""
        if not self._groups:
            return
        groups, new = self._groups, self.length - self._prompt_length
        if self._apart is not None:
            self._apart.trim()
        self._apart, self._tail_start = None, self._prompt_length
        tables = self._made_of = [each.table for each in groups]
        shapes = [each.selection.index.shape for each in tables]
        rows, width = sum(b for b, _ in shapes), max(n for _, n in shapes)
        self._padded = len(groups) > 1 or tables[0].selection.valid is not None
        self._position, self._valid, self._bias = rectangle(tables)
        entry = torch.zeros(rows, width + new, dtype=torch.long, device=self.device)
        start = 0
        for table, (b, n) in zip(tables, shapes, strict=True):
            chosen = table.selection.rows
            entries = (torch.arange(b * (n + new), device=self.device) + start).view(b, n + new)
            entry[chosen, :n], entry[chosen, width:] = entries[:, :n], entries[:, n:]
            start += b * (n + new)
        self._entry = entry
        like = groups[0].keys, groups[0].values
        self._store = [each.new_empty(start, each.shape[1], each.shape[3]) for each in like]
        self._groups, self._num_entries = [], 0
        for group in groups:
            self._write(group.keys, group.values)

    def decoding(self) -> AbstractContextManager[None]:
        """While active, `update` appends new tokens; the caller passes the mask that `mask` made to the layer."""
        return self._while(_reading=True)

    def mask(self, mask: Tensor | None, num_queries: int, dtype: torch.dtype) -> Tensor | None:
        """Attention mask of new tokens for the keys of the table.

        Args:
            mask: what the model made for all `length + num_queries` positions (or those in the sliding window).
            num_queries: number of new tokens.
            dtype: floating-point type of an additive mask, needed when keys carry a bias.
        """
        self.make_table()
        if mask is None and not self._padded and self._bias is None:
            return None
        position, valid, bias = self.key_positions(num_queries)
        column = self.mask_columns(position, num_queries)
        if self.is_sliding and mask is not None:
            valid = valid & (column >= 0)
        needed = valid if self._padded or self.is_sliding else None
        return pack_mask(mask, None, column.clamp(min=0), needed, bias, dtype)

    def mask_columns(self, position: Tensor, num_queries: int) -> Tensor:
        """Where the model's mask has the keys at some positions; below 0 where it has none."""
        return position - self.get_mask_sizes(num_queries)[1]

    @property
    def mask_key(self) -> tuple[Any, ...]:
        """Equal for layers of one cache whose `mask` is the same."""
        self.make_table()
        return (*map(id, self._made_of), self._tail_start, self.length, self.sliding_window)

    def key_positions(self, num_queries: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Position [B, n], validity [B, n] and bias [B, n] of the keys that the next `update` will return."""
        if len(self._groups) == 1 and self.groups(num_queries) is not None:
            table = self._groups[0].table
            found = table.keys(self._prompt_length, self.length - self._prompt_length + num_queries)
            position, valid, bias = (None if each is None else each[:, 0, 0] for each in found)
            assert position is not None
            return position, torch.ones_like(position, dtype=torch.bool) if valid is None else valid, bias
        self.make_table()
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
            self._groups.append(Group(KeyTable.of(selection, key_bias), key_states, value_states))
            return key_states, value_states
        if not self._reading:
            raise RuntimeError(OUTSIDE_BLOCK)
        rows, _, new, _ = key_states.shape
        if self._apart_reading:
            self._pending = key_states, value_states
            return key_states, value_states
        if len(self._groups) == 1 and self.groups(new) is not None:
            self.length += new
            return self._groups[0].append(key_states, value_states)
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
        return self._gathered()[0] if self.length else None

    @property
    def values(self) -> Tensor | None:
        """[B, heads, n, head size] values of the kept positions."""
        return self._gathered()[1] if self.length else None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        if self._apart is not None:
            return self._apart.nbytes
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
        self.make_table()
        rows = torch.arange(len(self._entry), device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        self.make_table()
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

    def __getattr__(self, name: str) -> Any:
        """What the replaced layer has beside keys and values is not known here."""
        if not name.startswith("_") and "replaced" in self.__dict__ and hasattr(self.replaced, name):
            raise UnknownOfCacheError(
                f"{name!r} of a {type(self.replaced).__name__} is unknown to dyvte, whose policies take keys out of it"
            )
        raise AttributeError(name)

    def offload(self) -> None:
        """Refused."""
        raise UnsupportedError("a KV cache filled under a dyvte policy cannot be offloaded")

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, n, head size] of all rows: the prompt's, then those of the new tokens."""
        if len(self._groups) == 1:
            return self._groups[0].keys, self._groups[0].values
        self.make_table()
        flat = self._entry.flatten()
        keys, values = (
            stored.index_select(0, flat).unflatten(0, self._entry.shape).transpose(1, 2) for stored in self._store
        )
        return keys, values

    def _write(self, *states: Tensor) -> None:
        """Store keys and values [b, heads, n, head size] behind what there is, row by row."""
        for stored, each in zip(self._store, states, strict=True):
            b, heads, n, size = each.shape
            stored[self._num_entries : self._num_entries + b * n].view(b, n, heads, size).copy_(each.transpose(1, 2))
        self._num_entries += b * n

    def _make_room(self, number: int) -> None:
        """Let the store hold so many more entries; those that no row attends to any longer leave it."""
        self.make_table()
        more = max(number, ROOM * len(self._entry))
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
        if first_needed >= self._prompt_length and width and not self.keeps_prompt:
            self._entry = self._entry[:, width:]
            self._position, self._valid = self._position[:, :0], self._valid[:, :0]
            self._bias = None if self._bias is None else self._bias[:, :0]
            self._padded = False
