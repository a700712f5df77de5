"""Decoding of rows that left at different layers: by groups, or together, the answers are those of each row alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from families import FAMILIES, random_batch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dyvte.batch import Batch
from dyvte.instrument import kept_keys
from dyvte.instrument.cache import KeptLayer
from dyvte.instrument.hooks import Selection
from dyvte.instrument.kept_keys import ROOM, KeyTable, attend_apart
from dyvte.instrument.role_attention import added_to_scores
from dyvte.mllm import MLLM
from dyvte.policies import decoding
from dyvte.policies.base import Policy, Prefill

LAYERS, EXACT = 4, 1e-4
EXITS = (1, 3, 0, 4)


@dataclass
class RowsLeaveAt(Policy):
    """Row r exits at layer `exits[r]`."""

    exits: tuple[int, ...]

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        if layer in self.exits:
            prefill.drop_image(torch.tensor([each == layer for each in self.exits]))


def batch_of(mllm: MLLM, side: str = "left", **kwargs: object) -> Batch:
    return random_batch(mllm, torch.Generator().manual_seed(5), (1, 1, 1, 1), side, **kwargs)  # type: ignore[arg-type]


def tokens(rows: int, number: int) -> Tensor:
    return torch.randint(3, 90, (rows, number), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def decoded(mllm: MLLM, batch: Batch, policy: Policy, ids: Tensor, pieces: list[int]) -> Tensor:
    """Logits of `ids` that are decoded in pieces of some length."""
    found = []
    with policy(mllm):
        cache, mask = mllm.model(**batch, use_cache=True).past_key_values, batch["attention_mask"]
        for piece in ids.split(pieces, dim=1):
            mask = torch.cat([mask, torch.ones_like(piece)], dim=1)
            found.append(mllm.model(input_ids=piece, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


@contextmanager
def attending_together() -> Iterator[None]:
    """As for a model that does something to what it stored before it attends."""
    with mock.patch.object(KeptLayer, "take", return_value=None):
        yield


@contextmanager
def counted_groups() -> Iterator[list[int]]:
    calls: list[int] = []

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return attend_apart(*args, **kwargs)  # type: ignore[arg-type]

    with mock.patch.object(decoding, "attend_apart", counting):
        yield calls


@pytest.mark.parametrize("family", FAMILIES)
def test_by_groups_and_together_are_the_same(family: str) -> None:
    mllm = FAMILIES[family](num_layers=LAYERS)
    batch = batch_of(mllm)
    with counted_groups() as calls:
        apart = generated_logits(mllm, batch)
    assert calls, "groups have to be called"
    with attending_together():
        together = generated_logits(mllm, batch)
    torch.testing.assert_close(apart, together, atol=EXACT, rtol=EXACT)


@torch.no_grad()
def generated_logits(mllm: MLLM, batch: Batch) -> Tensor:
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with RowsLeaveAt(EXITS)(mllm):
        return torch.stack(mllm.model.generate(**batch, **settings).logits, dim=1)


@given(st.integers(0, 10_000), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
def test_masks_added_to_scores_hide_what_boolean_masks_hide(
    seed: int, new: int, everyone: bool, biased: bool, masked: bool
) -> None:
    """Against a mask made key by key, for prompts of different lengths of which some positions stayed."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = 3, 6
    kept = torch.rand(rows, length, generator=generator) < 0.6
    kept[:, -1] = True
    chosen = list(range(rows)) if everyone else [2]
    row_list = tuple(chosen)
    selection = Selection.of(kept, torch.tensor(chosen), [int(kept[row].sum()) for row in chosen], row_list)
    bias = torch.randn(len(chosen), selection.index.shape[1], generator=generator) if biased else None
    own = torch.rand(rows, 1, new, length + new, generator=generator) < 0.7 if masked else None
    found = KeyTable(selection, bias).added_mask(
        None if own is None else added_to_scores(own, torch.float32), length, new, torch.float32
    )
    for at, row in enumerate(chosen):
        positions = [*kept[row].nonzero().flatten().tolist(), *range(length, length + new)]
        places = [*range(int(kept[row].sum())), *range(selection.index.shape[1], selection.index.shape[1] + new)]
        for query in range(new):
            said = torch.full((selection.index.shape[1] + new,), -torch.inf)
            for place, position in zip(places, positions, strict=True):
                shift = 0.0 if bias is None or position >= length else float(bias[at, place])
                said[place] = shift if own is None or own[row, 0, query, position] else -torch.inf
            mask = torch.zeros_like(said) if found is None else found[at, 0].expand(new, -1)[query]
            torch.testing.assert_close(torch.where(mask < -1e30, -torch.inf, mask), said)


def test_pieces_of_several_tokens() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch, policy, ids = batch_of(mllm), RowsLeaveAt(EXITS), tokens(4, 7)
    apart = decoded(mllm, batch, policy, ids, [1, 3, 2, 1])
    torch.testing.assert_close(apart, decoded(mllm, batch, policy, ids, [1] * 7), atol=EXACT, rtol=EXACT)
    with attending_together():
        together = decoded(mllm, batch, policy, ids, [1, 3, 2, 1])
    torch.testing.assert_close(apart, together, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("order", [EXITS, (4, 4, 2, 2), (2, 2, 4, 4)], ids=str)
def test_a_batch_decodes_as_its_rows_alone(order: tuple[int, ...]) -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch, ids = batch_of(mllm), tokens(4, 3)
    together = decoded(mllm, batch, RowsLeaveAt(order), ids, [1] * 3)
    for row, exit_layer in enumerate(order):
        alone = decoded(mllm, batch[[row]], RowsLeaveAt((exit_layer,)), ids[[row]], [1] * 3)
        torch.testing.assert_close(together[row], alone[0], atol=EXACT, rtol=EXACT)


def test_more_tokens_than_there_was_room_for() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch, policy, ids = batch_of(mllm, question_length=5), RowsLeaveAt(EXITS), tokens(4, 7)
    wanted = decoded(mllm, batch, policy, ids, [1] * 7)
    assert ROOM > 7
    with mock.patch.object(kept_keys, "ROOM", 2):
        torch.testing.assert_close(decoded(mllm, batch, policy, ids, [1] * 7), wanted, atol=0, rtol=0)


@torch.no_grad()
def test_a_cache_may_be_copied_and_its_rows_reordered_between_steps() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm)
    order = torch.tensor([2, 0, 3, 1])
    ids = torch.full((4, 1), 9)
    mask = batch["attention_mask"]
    with RowsLeaveAt(EXITS)(mllm):
        cache = mllm.model(**batch, use_cache=True).past_key_values
        longer = torch.cat([mask, torch.ones_like(ids)], dim=1)
        mllm.model(input_ids=ids, attention_mask=longer, past_key_values=cache)
        copied = copy.deepcopy(cache)
        cache.reorder_cache(order)
        longest = torch.cat([longer, torch.ones_like(ids)], dim=1)
        moved = mllm.model(input_ids=ids, attention_mask=longest[order], past_key_values=cache).logits
        stayed = mllm.model(input_ids=ids, attention_mask=longest, past_key_values=copied).logits
    torch.testing.assert_close(moved, stayed[order], atol=EXACT, rtol=EXACT)
