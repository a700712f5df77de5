"""Rows that left their image beside rows that still see it: in one padded call of a layer where that is cheaper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attending_apart import EXACT, EXITS, LAYERS, RowsLeaveAt, batch_of, decoded, tokens
from torch import nn

from benchmarks import counts
from dyvte.cost import calls
from dyvte.cost.calls import FLOPS_PER_OPERATOR, OPERATORS_OF_CALLS, together_is_cheaper
from dyvte.cost.operators import count_layers
from dyvte.gates import Gates
from dyvte.policies.base import PolicyRun
from dyvte.policies.exits.dynamic_exit import DynamicExit, exit_probabilities
from dyvte.policies.unchanged import Unchanged

BY_DEFAULT = FLOPS_PER_OPERATOR["cpu"]  # read before `groups_stay_apart` replaces it
ALWAYS = 1e15
"""Operations in the time of one dispatch for which nothing is as dear as a second call."""


@contextmanager
def dispatch_costs(flops: float) -> Iterator[None]:
    with mock.patch.dict(calls.FLOPS_PER_OPERATOR, cpu=flops):
        yield


def model_of(device: str, weights: int, hidden: int) -> Any:
    """What the cost model asks of a model."""
    layer = nn.Linear(weights, 1, bias=False)
    return SimpleNamespace(layers=[layer], hidden_size=hidden, device=torch.device(device))


def groups_of(run: PolicyRun) -> int:
    """Calls of the last layer."""
    assert run.prefill is not None
    return len(run.prefill.selections() or ())


groups_of_rows = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=2, max_size=2)


@settings(max_examples=30)
@given(groups_of_rows, st.integers(1, 50), st.integers(1, 8), st.floats(0, 1e5))
def test_a_cpu_weighs_operators_against_padding(
    groups: list[list[int]], weights: int, hidden: int, flops: float
) -> None:
    def layer(rows: list[int]) -> int:
        width = max(rows)
        return sum(2 * weights * width + 2 * width * hidden * width + 2 * width * width * hidden for _ in rows)

    padding = layer(groups[0] + groups[1]) - layer(groups[0]) - layer(groups[1])
    saved = (OPERATORS_OF_CALLS[2] - OPERATORS_OF_CALLS[1]) * flops
    with dispatch_costs(flops):
        found = together_is_cheaper(model_of("cpu", weights, hidden), groups)
    assert found == (padding < saved) or abs(padding - saved) < 1e-6 * max(saved, 1)


@settings(max_examples=10)
@given(groups_of_rows, st.integers(1, 50))
def test_a_gpu_that_computes_for_longer_than_the_host_dispatches_pads_nothing(
    groups: list[list[int]], weights: int
) -> None:
    large = model_of("meta", weights, 1)  # any device that is no CPU
    with mock.patch.dict(calls.FLOPS_PER_OPERATOR, cuda=1e-3):
        assert not together_is_cheaper(large, groups)
    with mock.patch.dict(calls.FLOPS_PER_OPERATOR, cuda=ALWAYS):
        assert together_is_cheaper(large, groups)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_together_is_what_rows_give_alone(family: str, side: str) -> None:
    mllm = FAMILIES[family](num_layers=LAYERS)
    batch = batch_of(mllm, side)
    with dispatch_costs(ALWAYS), RowsLeaveAt(EXITS)(mllm) as run:
        together = mllm.model(**batch).logits
        assert groups_of(run) == 1
    assert run.exit_layers.tolist() == list(EXITS)
    for row, exit_layer in enumerate(EXITS):
        with RowsLeaveAt((exit_layer,))(mllm):
            alone = mllm.model(**batch[[row]]).logits
        mask = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row, mask], alone[0, mask], atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("family", ["llava", "gemma3", "mistral3"])
def test_decoding_after_rows_went_together(family: str) -> None:
    mllm = FAMILIES[family](num_layers=LAYERS)
    batch, ids = batch_of(mllm), tokens(4, 4)
    apart = decoded(mllm, batch, RowsLeaveAt(EXITS), ids, [1, 2, 1])
    with dispatch_costs(ALWAYS):
        together = decoded(mllm, batch, RowsLeaveAt(EXITS), ids, [1, 2, 1])
    torch.testing.assert_close(together, apart, atol=EXACT, rtol=EXACT)


def test_operators_of_one_call_and_of_two() -> None:
    """The cost model's counts, of a layer before which nothing left; and one wait a layer, whatever the groups."""
    mllm = counts.counted_model(LAYERS)
    batch = counts.prompts(mllm, 2)
    found, policy = {}, RowsLeaveAt((1, LAYERS))
    for number, flops, way in ((0, 1.0, Unchanged()), (1, ALWAYS, policy), (2, 1.0, policy)):
        with torch.no_grad(), dispatch_costs(flops), way(mllm), count_layers(mllm) as work:
            mllm.model(**batch, use_cache=True, logits_to_keep=1)
        found[number] = work.layers
    for number in (1, 2):
        assert found[number][-1].operators == pytest.approx(OPERATORS_OF_CALLS[number], rel=0.1)
    assert found[1][-1].operators <= found[0][-1].operators + 8
    waits = {number: [each.synchronisations for each in layers] for number, layers in found.items()}
    assert waits[1] == waits[2]
    assert waits[1][:1] + waits[1][2:] == waits[0][1:] == [0] * (LAYERS - 1), "no wait but where rows leave"


def test_gates_of_a_small_model_let_rows_go_together_by_default() -> None:
    """The constant of the library, on a model too small to fill a CPU."""
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm)
    gates = Gates(LAYERS, mllm.hidden_size)
    with DynamicExit(gates, threshold=2.0)(mllm) as run, torch.no_grad():
        mllm.model(**batch)
    threshold = float(exit_probabilities(run)[1].sort().values[-2:].mean())  # one row leaves at once
    for flops, number in ((BY_DEFAULT, 1), (1.0, 2)):
        with dispatch_costs(flops), DynamicExit(gates, threshold=[threshold, 2.0, 2.0])(mllm) as run, torch.no_grad():
            mllm.model(**batch)
        assert run.exit_layers.tolist().count(1) == 1
        assert groups_of(run) == number
