"""Keys and values of rows that kept about as many positions, and how decoding attends to them.

A decoder layer runs at most twice in a prefill: on the rows that still see their image, and on those that do not. Each
such group keeps a rectangle of its own, so that a row without visual tokens is never as wide as one with them. What
depends on the positions alone (masks, where new keys go) is made once for all layers that ran on the same groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyvte.instrument.hooks import Selection, combine_mask
from dyvte.instrument.role_attention import added_to_scores

ROOM = 32
"""New tokens of every row that stores make room for at a time."""


class KeyTable:
    """Positions of the keys of a selection's rows, those of new tokens included, as masks are gathered by.

    Attributes:
        selection: positions of the prompt that the rows kept.
        bias: [b, n] added to the scores of their keys, or None.
    """

    def __init__(self, selection: Selection, bias: Tensor | None) -> None:
        self.selection, self.bias = selection, bias
        self._rooms: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        self._start = -1
        self._added: Tensor | None = None

    @classmethod
    def of(cls, selection: Selection, bias: Tensor | None) -> KeyTable:
        """The one table of a selection and a bias."""
        known = next((each for each in selection.key_tables if each.bias is bias), None)
        if known is None:
            known = cls(selection, bias)
            selection.key_tables.append(known)
        return known

    def keys(self, start: int, new: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Position, validity (None: all) and bias (None: none) [b, 1, 1, n + new] of the keys.

        Args:
            start: length of the prompt, the first new token's position.
            new: number of tokens since.
        """
        width = self.selection.index.shape[1] + new
        position, *rest = self._with_room(start, new)
        valid, bias = (None if each is None else each.narrow(3, 0, width) for each in rest)
        return position.narrow(3, 0, width), valid, bias

    def _with_room(self, start: int, new: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `keys` cuts, with room for tokens to come."""
        index = self.selection.index
        if self._rooms is None or self._start != start or self._rooms[0].shape[3] < index.shape[1] + new:
            self._start, self._added = start, None
            further = torch.arange(start, start + new + ROOM, device=index.device).expand(len(index), -1)
            self._rooms = (
                torch.cat([index, further], dim=1)[:, None, None, :],
                _with_room(self.selection.valid, further.shape[1], True),
                _with_room(self.bias, further.shape[1], 0.0),
            )
        return self._rooms

    def mask(self, mask: Tensor | None, start: int, new: int, dtype: torch.dtype) -> Tensor | None:
        """Attention mask of the last tokens for the keys of `keys(start, new)`.

        Args:
            mask: what the model made for all positions of all rows.
            start, new: as for `keys`.
            dtype: floating-point type of an additive mask.

        Returns:
            None where every key may be seen.
        """
        if mask is None and self.selection.valid is None and self.bias is None:
            return None
        position, valid, bias = self.keys(start, new)
        rows = len(position)
        if mask is None:
            packed = torch.ones_like(position, dtype=torch.bool)
        else:
            own = mask if self.selection.everyone or mask.shape[0] == 1 else mask.index_select(0, self.selection.rows)
            if mask.ndim == 2:
                return combine_mask(own.expand(rows, -1).gather(1, position[:, 0, 0]), valid, bias, dtype)
            own = own.expand(rows, -1, -1, -1)
            packed = own.gather(3, position.expand(-1, own.shape[1], own.shape[2], -1))
        return combine_mask(packed, valid, bias, dtype)

    def added_mask(self, mask: Tensor | None, start: int, new: int, dtype: torch.dtype) -> Tensor | None:
        """As `mask`, but always what is added to the scores, of which validity and bias are made once a generation.

        Args:
            mask: None, or added to the scores as well (see `added_to_scores`).
            start, new, dtype: as for `mask`.
        """
        if mask is None and self.selection.valid is None and self.bias is None:
            return None
        positions, valid, bias = self._with_room(start, new)
        if self._added is None and (valid is not None or bias is not None):
            of_valid = None if valid is None else added_to_scores(valid, dtype)
            of_bias = None if bias is None else bias.to(dtype)
            self._added = of_valid if of_bias is None else of_bias if of_valid is None else of_valid + of_bias
        width = self.selection.index.shape[1] + new
        added = None if self._added is None else self._added.narrow(3, 0, width)
        if mask is None:
            return added
        everyone = self.selection.everyone or mask.shape[0] == 1
        own = mask if everyone else mask.index_select(0, self.selection.rows)
        over = (len(positions), *own.shape[1:3])  # expanding what has the shape would be dispatched, too
        own = own if len(own) == over[0] else own.expand(over[0], -1, -1, -1)
        position = positions.narrow(3, 0, width)
        packed = own.gather(3, position if position.shape[:3] == over else position.expand(*over, -1))
        return packed if added is None else packed + added


def _with_room(prompt: Tensor | None, room: int, filling: bool | float) -> Tensor | None:
    if prompt is None:
        return None
    return torch.cat([prompt, prompt.new_full((len(prompt), room), filling)], dim=1)[:, None, None, :]


def rectangle(tables: Sequence[KeyTable]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Position, validity and bias (None: none) [B, n] of the prompt's keys of all rows, those of groups together."""
    shapes = [each.selection.index.shape for each in tables]
    rows, width, like = sum(b for b, _ in shapes), max(n for _, n in shapes), tables[0].selection.index
    position = like.new_zeros(rows, width)
    valid = torch.zeros(rows, width, dtype=torch.bool, device=like.device)
    biased = next((each.bias for each in tables if each.bias is not None), None)
    bias = None if biased is None else torch.zeros(rows, width, device=like.device)
    for table, (_, n) in zip(tables, shapes, strict=True):
        selection, chosen = table.selection, table.selection.rows
        position[chosen, :n] = selection.index
        valid[chosen, :n] = True if selection.valid is None else selection.valid
        if bias is not None and table.bias is not None:
            bias[chosen, :n] = table.bias.to(bias.dtype)
    return position, valid, bias


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """[b, heads, N, size] at positions [b, n]."""
    return tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def locate(positions: Tensor, valid: Tensor, wanted: Tensor, length: int) -> Tensor:
    """Where the positions `wanted` [b, n] stand in `positions` [b, m]: [b, n]."""
    table = wanted.new_zeros(len(wanted), length + 1)
    order = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    table.scatter_(1, torch.where(valid, positions, length), order)
    return table.gather(1, wanted)


@dataclass
class Group:
    """Rows of a layer with their keys and values [b, heads, n, head size], the prompt's before those of new tokens."""

    table: KeyTable
    keys: Tensor
    values: Tensor

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store what new tokens brought; returns all there is."""
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values


@dataclass
class Places:
    """Where the keys of groups of rows stand in one store, one group behind the other, each with room for new tokens.

    Attributes:
        selections: of the groups.
        heads: of the keys.
        room: new tokens that there is room for.
        widths: of every group's rectangle, room included.
        order: [B] the rows, group by group; None where that is their own order.
        inverse: [B] where every row is in `order`.
        first: [B, heads, 1] place of the first new key of every row and head.
    """

    selections: list[Selection]
    heads: int
    room: int
    widths: list[int] = field(init=False)
    order: Tensor | None = field(init=False)
    inverse: Tensor = field(init=False)
    first: Tensor = field(init=False)
    _of_step: tuple[tuple[int, int], Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        shapes = [each.index.shape for each in self.selections]
        self.widths = [n + self.room for _, n in shapes]
        rows = torch.cat([each.rows for each in self.selections])
        self.inverse = rows.argsort()
        listed = [each.row_list for each in self.selections]
        known = [row for each in listed if each is not None for row in each]
        self.order = None if known == list(range(len(rows))) else rows
        first, start = [], 0
        for (b, n), width in zip(shapes, self.widths, strict=True):
            lines = torch.arange(b * self.heads, device=rows.device).view(b, self.heads, 1)
            first.append(lines * width + (start + n))
            start += b * self.heads * width
        self.first = torch.cat(first).index_select(0, self.inverse)

    @classmethod
    def of(cls, groups: Sequence[Group], room: int) -> Places:
        """The one object for all layers that ran on the same groups."""
        selections, heads = [each.table.selection for each in groups], groups[0].keys.shape[1]
        for known in selections[0].places:
            same = len(known.selections) == len(selections) and all(
                one is other for one, other in zip(known.selections, selections, strict=True)
            )
            if same and (known.heads, known.room) == (heads, room):
                return known
        made = cls(selections, heads, room)
        selections[0].places.append(made)
        return made

    def of_new(self, done: int, new: int) -> Tensor:
        """[B, heads, new] places of new keys, after `done` of them."""
        if self._of_step is None or self._of_step[0] != (done, new):
            offset = done if new == 1 else torch.arange(done, done + new, device=self.first.device)
            self._of_step = (done, new), self.first + offset
        return self._of_step[1]

    @property
    def size(self) -> int:
        """Vectors that the store holds."""
        return sum(len(each.index) * self.heads * w for each, w in zip(self.selections, self.widths, strict=True))

    def rectangles(self, store: Tensor) -> list[Tensor]:
        """The groups' views [b, heads, width, head size] of a store [size, head size]."""
        found, start = [], 0
        for selection, width in zip(self.selections, self.widths, strict=True):
            lines = len(selection.index) * self.heads
            part = store.narrow(0, start, lines * width)
            found.append(part.view(-1, self.heads, width, store.shape[1]))
            start += lines * width
        return found


class GroupStore:
    """Keys and values of a layer's groups, in place: a new token is written and nothing else is copied.

    Attributes:
        groups: as the prefill left them.
        done: new tokens of every row so far.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.prompt = [each.keys.shape[2] for each in groups]
        self.done = 0
        self._fill(ROOM)

    def _fill(self, room: int) -> None:
        """Move what there is into a store with room for so many new tokens."""
        self.places = Places.of(self.groups, room)
        self._stores: list[Tensor] = []
        self._views: list[list[Tensor]] = []
        for name in ("keys", "values"):
            parts = [getattr(each, name) for each in self.groups]
            store = parts[0].new_empty(self.places.size, parts[0].shape[3])
            views = self.places.rectangles(store)
            for view, part in zip(views, parts, strict=True):
                view.narrow(2, 0, part.shape[2]).copy_(part)
            self._stores.append(store)
            self._views.append(views)
        for group, keys, values in zip(self.groups, *self._views, strict=True):
            group.keys, group.values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values [B, heads, new, head size] of new tokens."""
        new = keys.shape[2]
        if self.done + new > self.places.room:
            self.trim()
            self._fill(self.done + new + ROOM)
        places = self.places.of_new(self.done, new)
        for store, each in zip(self._stores, (keys, values), strict=True):
            store.index_put_((places,), each)
        self.done += new

    def stored(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every group, without the room."""
        return [
            (keys.narrow(2, 0, n + self.done), values.narrow(2, 0, n + self.done))
            for n, keys, values in zip(self.prompt, *self._views, strict=True)
        ]

    def trim(self) -> list[Group]:
        """The groups with what is stored of them."""
        for group, (keys, values) in zip(self.groups, self.stored(), strict=True):
            group.keys, group.values = keys, values
        return self.groups

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values, without the room."""
        return sum(each.nbytes for pair in self.stored() for each in pair)


def attend_apart(
    attention: Callable[..., Any], store: GroupStore, query: Tensor, masks: Sequence[Tensor | None], **settings: Any
) -> tuple[Tensor, None]:
    """Call an attention function of transformers for every group of rows.

    Args:
        attention: takes `query`, `key`, `value`, `attention_mask` and settings; returns [b, N, heads, head size] first.
        store: keys and values of the groups.
        query: [B, heads, N, head size].
        masks: one a group.

    Returns:
        What the function would return for all rows, without attention weights.
    """
    order = store.places.order
    queries = (query if order is None else query.index_select(0, order)).split_with_sizes(
        [len(each.index) for each in store.places.selections]
    )
    found = [
        attention(query=own, key=keys, value=values, attention_mask=mask, **settings)[0]
        for own, (keys, values), mask in zip(queries, store.stored(), masks, strict=True)
    ]
    together = torch.cat(found)
    return together if order is None else together.index_select(0, store.places.inverse), None
