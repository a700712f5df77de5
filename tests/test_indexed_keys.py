"""Layers that choose their keys, MiniMax M3 by blocks, Mistral Large 4 and DOTS key by key: they choose what stayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import masked_forward, with_generated
from test_knockout import masked, naive_groups
from torch import Tensor, nn

from dyvte import AttentionProbe, FixedExit, exit_sweep, knockout
from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.loading import wrap
from dyvte.mllm import MLLM
from tests.zoo.specimens import Row, build_model, make_inputs

LAYERS = 4
EXACT = 1e-4
HEADS = 16
"""Of key-by-key indexers: with few of them many keys score 0 alike, and which of these is chosen is anyone's guess."""

FAMILIES: dict[str, dict[str, Any]] = {
    "minimax_m3_vl": {
        "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 3,
        "index_topk_blocks": 3,
        "index_local_blocks": 1,
    },
    "mistral_large4": {"index_n_heads": HEADS, "index_topk": 6},
    "dots3_note": {"index_n_heads": HEADS, "index_topk": 6},
}


@cache
def model(family: str, attention: str = "sdpa", **changes: Any) -> MLLM:
    return wrap(build_model(family, attention, text_config=FAMILIES[family] | changes))


def batch_of(
    mllm: MLLM, images: tuple[int, ...] = (6, 3, 0), seed: int = 0, side: str = "right", only: int | None = None
) -> Batch:
    """Rows with so many visual tokens; or only one of them."""
    generator = torch.Generator().manual_seed(seed)

    def words(number: int) -> list[int]:
        return torch.randint(3, 90, (number,), generator=generator).tolist()

    rows = [Row(words(3), (1, count), words(6 + 2 * row), seed + row) for row, count in enumerate(images)]
    batch = mllm.batch(**make_inputs(mllm.model, rows if only is None else rows[only : only + 1]))
    return batch.right_padded() if side == "right" else batch


@contextmanager
def blind_indexers(mllm: MLLM, batch: Batch, exits: list[int]) -> Iterator[None]:
    """MiniMax M3's indexers score no visual key from a row's exit on; they are not told of masks otherwise."""

    def chooser(index: int, indexer: nn.Module) -> Any:
        hidden_keys = batch.layout.visual & (torch.tensor(exits) <= index)[:, None]

        def choose(states: Tensor, rotary: Any, cache: Any, position_ids: Tensor) -> Tensor:
            seen: dict[str, Tensor] = {}

            def matmul(query: Tensor, key: Tensor) -> Tensor:
                scores = query @ key
                seen["scores"] = scores
                return scores

            plain = type(indexer).forward
            with mock.patch.object(torch, "matmul", matmul):
                plain(indexer, states, rotary, cache, position_ids)
            scores, size = seen["scores"], indexer.block_size
            rows, heads, length, _ = scores.shape
            places = position_ids.expand(rows, -1)
            chosen = torch.full((rows, heads, length, indexer.topk_blocks), -1)
            for row in range(rows):
                for head in range(heads):
                    for query in range(length):
                        place = int(places[row, query])
                        best = {}
                        for key in range(place + 1):
                            if not hidden_keys[row, key]:
                                score = float(scores[row, head, query, key])
                                best[key // size] = max(score, best.get(key // size, score))
                        for back in range(indexer.local_blocks):
                            best[max(place // size - back, 0)] = float("inf")
                        blocks = sorted(best, key=best.__getitem__, reverse=True)[: indexer.topk_blocks]
                        chosen[row, head, query, : len(blocks)] = torch.tensor(blocks)
            return chosen

        return choose

    with ExitStack() as stack:
        for index, layer in enumerate(mllm.layers):
            indexer = getattr(layer.self_attn, "indexer", None)
            if mllm.model.config.model_type == "minimax_m3_vl" and indexer is not None:
                stack.enter_context(mock.patch.object(indexer, "forward", chooser(index, indexer)))
        yield


def naive(mllm: MLLM, batch: Batch, exits: list[int]) -> Tensor:
    """Logits of the full model in which visual keys are neither scored by indexers nor attended to."""
    with blind_indexers(mllm, batch, exits):
        return masked_forward(mllm, batch, exits).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(
    exits=st.tuples(*[st.integers(0, LAYERS)] * 3),
    images=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(0, 4)),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_each_row_chooses_among_the_keys_that_stayed(
    family: str, attention: str, exits: tuple[int, ...], images: tuple[int, ...], seed: int
) -> None:
    mllm = model(family, attention)
    batch = batch_of(mllm, images, seed)
    expected = naive(mllm, batch, list(exits))
    with FixedExit(list(exits))(mllm):
        logits = mllm.model(**batch).logits
    text = batch.layout.text
    close(logits[text], expected[text])


@torch.no_grad()
def test_the_choice_is_a_real_one() -> None:
    """With all keys chosen the logits are others, and so they are if indexers see the image after the exit."""
    for family in FAMILIES:
        mllm, changes = model(family), {"index_topk_blocks": 99} if "minimax" in family else {"index_topk": 99}
        batch = batch_of(mllm)
        with FixedExit(1)(mllm):
            logits = mllm.model(**batch).logits[batch.layout.text]
        dense = model(family, **changes)
        with FixedExit(1)(dense):
            assert (dense.model(**batch).logits[batch.layout.text] - logits).abs().max() > 100 * EXACT
    mllm = model("minimax_m3_vl")
    leaking = masked_forward(mllm, batch, 0).logits
    assert (leaking - naive(mllm, batch, [0] * 3))[batch.layout.text].abs().max() > 100 * EXACT


def generate(mllm: MLLM, batch: Batch, **kwargs: Any) -> Any:
    return mllm.model.generate(
        **batch,
        **{"max_new_tokens": 6, "do_sample": False, "eos_token_id": [1000], "pad_token_id": 0} | kwargs,
        suppress_tokens=list(range(100, mllm.lm_head.weight.shape[0])),
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2)
@given(exits=st.tuples(*[st.integers(0, LAYERS)] * 2), seed=st.integers(0, 99))
@torch.no_grad()
def test_generation_goes_on_choosing(family: str, exits: tuple[int, ...], seed: int) -> None:
    """In a batch that is padded on the left, where MiniMax M3 itself counts blocks from the padding on."""
    mllm, images = model(family), (6, 2)
    batch = batch_of(mllm, images, seed, "left")
    with FixedExit(list(exits))(mllm):
        cached = generate(mllm, batch)
        again = generate(mllm, batch, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    close(torch.stack(cached.logits), torch.stack(again.logits))
    new = cached.sequences[:, batch["input_ids"].shape[1] :]
    for row, k in enumerate(exits):
        whole = with_generated(mllm, batch_of(mllm, images, seed, only=row), new[row : row + 1])
        close(torch.stack(cached.logits, 1)[row], naive(mllm, whole, [k])[0, -7:-1])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=1)
@given(seed=st.integers(0, 99))
@torch.no_grad()
def test_the_sweep_equals_recomputation(family: str, seed: int) -> None:
    mllm = model(family)
    batch = batch_of(mllm, (6, 3, 0), seed)
    sweep = exit_sweep(mllm, batch, entropy=False)
    rows = torch.arange(3)
    for k in range(LAYERS + 1):
        close(sweep.logits[:, k], naive(mllm, batch, [k] * 3)[rows, batch.layout.last_prompt])
    left = exit_sweep(mllm, batch.left_padded(), entropy=False)
    close(left.logits, sweep.logits)


@pytest.mark.parametrize("family", ["minimax_m3_vl", "mistral_large4"])
@torch.no_grad()
def test_entropies_are_those_of_the_chosen_keys(family: str) -> None:
    mllm, eager = model(family), model(family, "eager")
    batch = batch_of(mllm, (6, 3))
    sweep = exit_sweep(mllm, batch)
    asks, text = batch.layout.text_status_positions, batch.layout.text
    for k in range(LAYERS + 1):
        with blind_indexers(eager, batch, [k] * 2):
            maps = masked_forward(eager, batch, k, keep_maps=True).maps
        for row in range(2):
            on_text = maps[row][:, :, asks[row]][..., text[row]]
            share = on_text / on_text.sum(-1, keepdim=True)  # NaN where a query chose no text
            expected = torch.special.entr(share).sum(-1).flatten(1).nanmean(1)
            layers = slice(0, LAYERS) if k == LAYERS else slice(k, LAYERS)
            close(sweep.text_entropy[row, k, layers], expected[layers])


@torch.no_grad()
def test_entropies_of_pools_are_those_of_text_alone() -> None:
    """Exit 0 of GLM-5-Next, which has no positions, is the prompt without its image."""
    config = {"layer_types": ["indexed_attention", "linear_attention"] * 2}
    mllm, eager = (wrap(build_model("glm5_next", kind, text_config=config)) for kind in ("sdpa", "eager"))
    batch = batch_of(mllm, (6, 3))
    sweep = exit_sweep(mllm, batch)
    for row in range(2):
        text, asks = batch.layout.text[row], batch.layout.text_status_positions[row]
        maps: list[Tensor] = []
        with ExitStack() as stack:
            for layer in eager.attention_layers:
                keep = partial(lambda maps, *call: maps.append(call[-1][1]), maps)
                stack.callback(eager.attention_of(layer).register_forward_hook(keep).remove)
            eager.model(input_ids=batch["input_ids"][row : row + 1, text])
        expected = [torch.special.entr(each[0][:, asks[text]]).sum(-1).mean() for each in maps]
        close(sweep.text_entropy[row, 0, eager.attention_layers], torch.stack(expected))
    assert sweep.text_entropy[:, 0, 1::2].isnan().all()


@torch.no_grad()
def test_the_probe_sees_what_eager_attention_gives() -> None:
    mllm, eager = model("minimax_m3_vl"), model("minimax_m3_vl", "eager")
    batch = batch_of(mllm)
    expected = masked_forward(eager, batch, LAYERS, keep_maps=True).maps.mean(2)
    plain = mllm.model(**batch).logits
    with AttentionProbe(mllm, maps=True) as probe:
        assert torch.equal(mllm.model(**batch).logits, plain)
    assert probe.stats.maps is not None
    for row, own in enumerate(~batch.layout.padding):
        close(probe.stats.maps[row][:, own][:, :, own], expected[row][:, own][:, :, own])


@pytest.mark.parametrize("family", ["mistral_large4", "dots3_note"])
@settings(max_examples=2)
@given(
    seed=st.integers(0, 99),
    side=st.sampled_from(["left", "right"]),
    path=st.sampled_from([("instruction", "visual"), ("visual", "visual"), ("last", "question")]),
    windows=st.lists(st.sampled_from([(0, 2), (1, 4), (2, 3), (0, 4)]), min_size=1, max_size=2),
    at_once=st.sampled_from([None, 1]),
)
@torch.no_grad()
def test_a_cut_leaves_the_choice_among_the_other_keys(
    family: str,
    seed: int,
    side: str,
    path: tuple[str, str],
    windows: list[tuple[int, int]],
    at_once: int | None,
) -> None:
    mllm = model(family)
    batch = batch_of(mllm, (6, 3, 0), seed, side)
    cut = knockout(mllm, batch, paths=[path], windows=windows, branch_tokens=at_once)
    groups = naive_groups(mllm, batch)
    assert cut.logits is not None
    for place, (start, stop) in enumerate(windows):
        expected = masked(mllm, batch, groups[path[0]], groups[path[1]], list(range(start, stop)))
        close(cut.logits[:, 0, place], expected[torch.arange(3), batch.layout.last_prompt])


@torch.no_grad()
def test_what_would_not_be_exact_is_refused_in_one_line() -> None:
    mllm = model("minimax_m3_vl")
    with pytest.raises(UnsupportedError, match="layer 0 chooses its keys in blocks or pools"):
        knockout(mllm, batch_of(mllm), windows=[(0, 1)])
    with pytest.raises(UnsupportedError, match="layer 0 chooses its keys, so they cannot be replaced"):
        knockout(model("mistral_large4"), batch_of(mllm), windows=[(0, 1)], mode="mean")
    taking_over = model("mistral_large4", index_skip_topk_offset=1, index_topk_freq=2)
    with pytest.raises(UnsupportedError, match="decoder layer 1 attends to keys that an earlier layer chose"):
        FixedExit(1)(taking_over).__enter__()
