"""`KeptLayer` holds what a plain list of keys per row would hold, through decoding, beams and sliding windows."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dyvte.instrument.cache import ROOM, KeptLayer
from dyvte.instrument.hooks import Selection

HEADS, KEY_SIZE, VALUE_SIZE, LENGTH = 2, 3, 5, 9
STEPS = 2 * ROOM + 5  # the store makes room more than once


class Listed:
    """The same cache as a list of (position, key, value) for each row."""

    def __init__(self, window: int | None) -> None:
        self.rows: list[list[tuple[int, torch.Tensor, torch.Tensor]]] = []
        self.length, self.window = 0, window

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        new = keys.shape[2]
        for row, entries in enumerate(self.rows):
            entries += [(self.length + i, keys[row, :, i], values[row, :, i]) for i in range(new)]
        self.length += new

    def seen(self, row: int, queries: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """What the last `queries` tokens together may attend to."""
        first = 0 if self.window is None else self.length - queries - self.window + 1
        return [each for each in self.rows[row] if each[0] >= first]


def filled(generator: torch.Generator, window: int | None, groups: list[list[int]]) -> tuple[KeptLayer, Listed]:
    """A layer after a prefill in which the groups of rows kept random positions."""
    layer = KeptLayer(DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window))
    listed = Listed(window)
    rows: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for members in groups:
        kept = torch.zeros(sum(map(len, groups)), LENGTH, dtype=torch.bool)
        for row in members:
            number = int(torch.randint(1, LENGTH, (), generator=generator))
            kept[row, torch.randperm(LENGTH, generator=generator)[:number]] = True
        selection = Selection.of(kept, torch.tensor(members), kept[members].sum(1).tolist())
        shape = (len(members), HEADS, selection.index.shape[1])
        keys, values = (torch.randn(*shape, size, generator=generator) for size in (KEY_SIZE, VALUE_SIZE))
        with layer.prefilling(selection, None):
            layer.update(keys, values)
        for i, row in enumerate(members):
            number = int(kept[row].sum())
            rows[row] = [(int(selection.index[i, j]), keys[i, :, j], values[i, :, j]) for j in range(number)]
    layer.finish_prefill(LENGTH)
    listed.rows, listed.length = [rows[row] for row in sorted(rows)], LENGTH
    return layer, listed


def decode(layer: KeptLayer, listed: Listed, new: int, generator: torch.Generator) -> None:
    """Append tokens to both and compare what the new queries see."""
    shape = (len(listed.rows), HEADS, new)
    keys, values = (torch.randn(*shape, size, generator=generator) for size in (KEY_SIZE, VALUE_SIZE))
    position, valid, _ = layer.key_positions(new)
    with layer.decoding():
        dense = layer.update(keys, values)
    listed.add(keys, values)
    assert dense[0].shape == (*shape[:2], position.shape[1], KEY_SIZE)
    assert dense[1].shape[-1] == VALUE_SIZE
    if layer.is_sliding:
        assert listed.window is not None
        valid = valid & (position >= listed.length - new - listed.window + 1)
    for row in range(len(listed.rows)):
        expected = listed.seen(row, new)
        assert position[row, valid[row]].tolist() == [each[0] for each in expected]
        for part, tensor in enumerate(dense, start=1):
            torch.testing.assert_close(
                tensor[row][:, valid[row]], torch.stack([each[part] for each in expected], 1), atol=0, rtol=0
            )


@pytest.mark.parametrize("window", [None, 4, 30])
@pytest.mark.parametrize("groups", [[[0, 1, 2]], [[1], [0, 2]], [[3, 0], [1, 2]]], ids=str)
def test_holds_what_lists_would_hold(window: int | None, groups: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer, listed = filled(generator, window, groups)
    for step in range(STEPS):
        decode(layer, listed, 1 if step % 7 else 3, generator)
        if step % 5 == 2:  # beams: rows take the place of others
            order = torch.randint(len(listed.rows), (len(listed.rows),), generator=generator)
            layer.reorder_cache(order)
            listed.rows = [list(listed.rows[i]) for i in order.tolist()]
    assert layer.get_seq_length() == listed.length


def test_repeated_rows_share_their_prompt() -> None:
    generator = torch.Generator().manual_seed(1)
    layer, listed = filled(generator, None, [[0, 1]])
    before = layer.nbytes
    layer.batch_repeat_interleave(3)
    listed.rows = [list(row) for row in listed.rows for _ in range(3)]
    assert layer.nbytes == before
    decode(layer, listed, 1, generator)
    of_one_entry = 4 * HEADS * (KEY_SIZE + VALUE_SIZE)
    assert layer.nbytes == before + 6 * of_one_entry


def test_rows_that_are_dropped_leave_the_store() -> None:
    generator = torch.Generator().manual_seed(2)
    layer, listed = filled(generator, None, [[0, 1, 2, 3]])
    layer.batch_select_indices(torch.tensor([2]))
    listed.rows = listed.rows[2:3]
    for _ in range(STEPS):
        decode(layer, listed, 1, generator)
    of_one_entry = 4 * HEADS * (KEY_SIZE + VALUE_SIZE)
    assert layer.nbytes <= (LENGTH + STEPS) * of_one_entry


def test_a_sliding_window_bounds_the_store() -> None:
    generator = torch.Generator().manual_seed(3)
    window = 6
    layer, listed = filled(generator, window, [[0], [1, 2]])
    for _ in range(4 * ROOM):
        decode(layer, listed, 1, generator)
    of_one_entry = 4 * HEADS * (KEY_SIZE + VALUE_SIZE)
    assert layer.nbytes <= 3 * (window + ROOM) * of_one_entry
