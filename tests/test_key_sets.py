"""Keys that a knock-out cuts in the image's place: sets for each window, and controls of equal attention mass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, build, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import masked_forward
from test_sweep import random_answers

from analysis.measuring.key_sets import equal_mass_keys, keys_of_mass, received_by_group
from dyvte import knockout
from dyvte.errors import ConfigError, UnsupportedError
from dyvte.instrument.causal.groups import group_masks
from dyvte.policies.exits.fixed_exit import FixedExit

EXACT = 1e-4


@settings(max_examples=3)
@given(
    family=st.sampled_from(["llava", "qwen2_5_vl", "gemma3"]),
    side=st.sampled_from(["left", "right"]),
    invert=st.booleans(),
    seed=st.integers(0, 99),
)
def test_key_sets_of_each_window_are_those_of_a_call_with_that_window(
    family: str, side: str, invert: bool, seed: int
) -> None:
    mllm = build(family)
    generator = torch.Generator().manual_seed(seed)
    batch, answers = random_batch(mllm, generator, (1, 2), side), random_answers(2, 3, seed)
    windows = [(0, 2), (1, 2), (0, 1)]
    some = torch.rand(2, len(windows), batch.layout.roles.shape[1], generator=generator) < 0.4
    some &= ~batch.layout.padding[:, None]
    paths = [("last", "some"), ("question", "visual"), ("instruction", "first")]
    sets = {"some": some, "first": some[:, 0]}
    cut = knockout(mllm, batch, answers, paths, windows, invert, key_sets=sets)
    for index, window in enumerate(windows):
        one = knockout(mllm, batch, answers, paths, [window], invert, key_sets={**sets, "some": some[:, index]})
        torch.testing.assert_close(
            cut.token_nll[:, :, [index]], one.token_nll, atol=EXACT, rtol=0, equal_nan=True, msg=str(window)
        )
    with pytest.raises(ConfigError, match="there are 2 windows"):
        knockout(mllm, batch, answers, paths, windows[:2], key_sets=sets)


def naive_choice(mass: list[float], wanted: float) -> set[int]:
    """As the docstring says it, by sums of lists."""
    taken: list[int] = []
    for index in range(len(mass)):
        if mass[index] > 0 and sum(mass[each] for each in [*taken, index]) <= wanted:
            taken = [*taken, index]
    ways = [taken] + [[*taken, index] for index in range(len(mass)) if mass[index] > 0 and index not in taken]
    return set(min(ways, key=lambda way: abs(sum(mass[each] for each in way) - wanted)))  # the first of equals


@given(
    # whole numbers: sums are exact
    mass=st.lists(st.integers(0, 9), max_size=8),
    wanted=st.integers(0, 40),
)
def test_keys_of_mass(mass: list[int], wanted: int) -> None:
    chosen = keys_of_mass(np.array(mass, dtype=float), wanted)
    assert set(chosen) == naive_choice([float(each) for each in mass], wanted)
    assert len(set(chosen)) == len(chosen)
    total = sum(mass[each] for each in chosen)
    if sum(mass) <= wanted:
        assert total == sum(mass)
    elif total <= wanted:  # no further from it than half of the smallest key that is left out
        left = [each for index, each in enumerate(mass) if each and index not in set(chosen)]
        assert all(2 * (wanted - total) <= each for each in left)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_received_is_that_of_eager_maps_and_keys_reach_the_images_mass(family: str) -> None:
    mllm, eager = build(family), build(family, attn_implementation="eager")
    batch = random_batch(mllm, torch.Generator().manual_seed(3), (1, 2), "left")
    answers = random_answers(2, 3, 5)
    queries = ("question", "last", "instruction")
    received = received_by_group(mllm, batch, answers, queries)
    names, windows = ["a", "b"], [(0, 1), (0, mllm.num_layers)]
    for row in range(2):
        prompt = ~batch.layout.padding[row]
        alone = batch[row : row + 1]
        before_last = answers[row : row + 1, : int((answers[row] != -100).sum()) - 1]
        whole = mllm.append_answers(alone, before_last) if before_last.shape[1] else alone
        maps = masked_forward(eager, whole, mllm.num_layers, keep_maps=True).maps[0].mean(1)  # [L, N, N]
        places = (~whole.layout.padding[0]).nonzero().flatten()[: int(prompt.sum())]
        members = group_masks(whole.layout)
        for name in queries:
            rows = members[name][0].nonzero().flatten().tolist()
            others = [[q for q in rows if q != key] for key in places.tolist()]
            expected = torch.stack([maps[:, q, key].sum(1) for q, key in zip(others, places, strict=True)], 1)
            torch.testing.assert_close(received[name][row][:, prompt.cpu()], expected, atol=EXACT, rtol=EXACT)
    for name in queries:
        found = equal_mass_keys(received[name], batch, names, windows, 0, name)
        assert not (found.keys & (batch.layout.visual | batch.layout.padding)[:, None]).any()
        for row, (window, (start, stop)) in ((r, w) for r in range(2) for w in enumerate(windows)):
            mass = received[name][row, start:stop].double().sum(0)
            assert float(found.wanted[row, window]) == pytest.approx(float(mass[batch.layout.visual[row]].sum()))
            assert float(found.reached[row, window]) == pytest.approx(float(mass[found.keys[row, window]].sum()))
            of_text = float(mass[batch.layout.text[row]].sum())
            assert found.reached[row, window] >= min(of_text, float(found.wanted[row, window])) / 2 - EXACT
    again = equal_mass_keys(received["last"][[1, 0]], batch[[1, 0]], names[::-1], windows, 0, "last")
    assert torch.equal(again.keys[[1, 0]], equal_mass_keys(received["last"], batch, names, windows, 0, "last").keys)


def test_attention_of_a_driven_model_is_refused() -> None:
    mllm = build("llava")
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1,))
    with FixedExit(layer=1)(mllm), pytest.raises(UnsupportedError, match="positions"):
        received_by_group(mllm, batch, torch.tensor([[5]]), ["last"])
