"""Counts of dispatched work: the counter against programs whose counts are known, and what policies may add."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from families import FAMILIES, random_batch

from benchmarks import counts
from benchmarks.dynamic_exit import NEARLY_NEVER
from dyvte.cost.operators import OperatorCounter, Work, count_layers
from dyvte.gates import Gates
from dyvte.mllm import MLLM
from dyvte.policies.exits.dynamic_exit import DynamicExit
from dyvte.policies.exits.fixed_exit import FixedExit
from dyvte.policies.registry import labels
from dyvte.policies.unchanged import Unchanged


def counted(run: Callable[[], object]) -> Work:
    with OperatorCounter() as counter:
        run()
    return counter.work


VALUES = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    ("run", "work"),
    [
        (lambda: VALUES + 1, Work(1, 1, 24, 0)),
        (lambda: VALUES.t()[1:], Work(2, 0, 0, 0)),  # views write nothing
        (lambda: VALUES.reshape(3, 2) * VALUES.view(3, 2), Work(3, 1, 24, 0)),
        (lambda: torch.empty(3, 4), Work(1, 0, 0, 0)),
        (lambda: torch.zeros(4).add_(1), Work(2, 2, 32, 0)),
        (lambda: VALUES.clone().index_copy_(0, torch.arange(1), VALUES[:1]), Work(4, 3, 56, 0)),
    ],
)
def test_operators_kernels_and_bytes(run: Callable[[], object], work: Work) -> None:
    assert counted(run) == work


@pytest.mark.parametrize(
    ("run", "waits"),
    [
        (lambda: VALUES[0, 0].item(), 1),
        (lambda: int(VALUES.sum()), 1),
        (lambda: bool((VALUES > 0).any()), 1),
        (lambda: VALUES.tolist(), 1),
        (lambda: VALUES.numpy(), 1),
        (lambda: VALUES.cpu(), 1),
        (lambda: torch.equal(VALUES, VALUES), 1),
        (lambda: (VALUES > 0).nonzero(), 1),
        (lambda: VALUES[VALUES > 0], 1),
        (lambda: VALUES.clone().__setitem__(VALUES > 0, 1.0), 0),
        (lambda: VALUES.clone().__setitem__(VALUES > 3, VALUES[0, 1:]), 1),
        (lambda: VALUES[:, [0, 2]], 1),  # the list becomes a tensor
        (lambda: torch.tensor([1, 2]), 1),
        (lambda: torch.tensor([]), 0),
        (lambda: VALUES.repeat_interleave(torch.ones(2, dtype=torch.long), dim=0), 1),
        (lambda: VALUES.repeat_interleave(2, dim=0), 0),
        (lambda: VALUES[torch.arange(1)].gather(1, torch.zeros(1, 1, dtype=torch.long)), 0),
        (lambda: torch.where(VALUES > 0, VALUES, 0.0), 0),
    ],
)
def test_waits_of_the_host(run: Callable[[], object], waits: int) -> None:
    assert counted(run).synchronisations == waits


@torch.no_grad()
def test_the_work_of_layers_and_of_the_rest_is_all_there_is() -> None:
    mllm = FAMILIES["llava"](num_layers=3)
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    with count_layers(mllm) as work:
        mllm.model(**batch)
    assert work.total == counted(lambda: mllm.model(**batch))
    assert work.layers[0] == work.layers[2]
    assert work.rest.operators > 0
    with OperatorCounter() as counter:
        mllm.model(**batch)
    assert counter.work == work.total, "no hook may stay behind"


def test_python_calls_are_those_of_the_package() -> None:
    mllm = FAMILIES["llava"](num_layers=3)
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    assert counts.python_calls(lambda: mllm.model(**batch)) == 0
    with FixedExit(1)(mllm):
        mllm.model(**batch)  # the model's parts are found once
        once = counts.python_calls(lambda: mllm.model(**batch))
        assert once == counts.python_calls(lambda: mllm.model(**batch)) > 0


def test_the_page_is_made_of_every_policy_and_instrument() -> None:
    mllm = counts.counted_model(layers=4)
    text = "\n".join(counts.page(mllm, batch_sizes=(2,)))
    named = [*counts.policies(mllm), *counts.instruments(mllm)]
    for label in set(labels().values()) - {Unchanged.label}:
        assert any(name == label or name.startswith(f"{label},") for name in named), label
    for name in named:
        assert text.count(f"| {name} | 2 |") == 1


def test_counts_are_the_same_in_every_run() -> None:
    mllm = counts.counted_model(layers=4)
    batch = counts.prompts(mllm, 2)
    for make in list(counts.policies(mllm).values())[:4]:
        policy = make(batch)
        assert counts.count_generation(mllm, batch, policy) == counts.count_generation(mllm, batch, policy)


# ------------------------------------------------------------------------------ bounds

LAYERS, EXIT = 8, 3


@cache
def model() -> MLLM:
    return counts.counted_model(LAYERS)


@cache
def counts_of_the_model(batch_size: int) -> counts.Count:
    return counts.count_generation(model(), counts.prompts(model(), batch_size))


def counts_of(name: str, batch_size: int) -> tuple[counts.Count, counts.Count]:
    """The unchanged model's counts and those of a policy of the page."""
    batch = counts.prompts(model(), batch_size)
    policy = counts.policies(model())[name](batch)
    return counts_of_the_model(batch_size), counts.count_generation(model(), batch, policy)


@pytest.mark.parametrize("name", ["fixed exit", "dynamic exit, all rows at once", "FastV", "uniform"])
@pytest.mark.parametrize("batch_size", [1, counts.ROWS])
def test_decoding_dispatches_no_more_than_the_plain_model(name: str, batch_size: int) -> None:
    plain, count = counts_of(name, batch_size)
    for own, step in zip(plain.steps, count.steps, strict=True):
        assert step.operators <= own.operators
        assert step.output_bytes < own.output_bytes
        assert step.synchronisations == own.synchronisations


@pytest.mark.parametrize("padded", [False, True])
def test_decoding_of_rows_that_left_at_different_layers(padded: bool) -> None:
    mllm = counts.counted_model(counts.LAYERS)
    batch = counts.prompts(mllm, counts.ROWS, padded)
    policy = counts.policies(mllm)["dynamic exit, mixed"](batch)
    plain, mixed = (counts.count_generation(mllm, batch, way).steps for way in (Unchanged(), policy))
    for own, step in zip(plain[1:], mixed[1:], strict=True):
        assert step.operators <= 1.14 * own.operators
        assert step.output_bytes < own.output_bytes
    assert [each.synchronisations for each in plain] == [each.synchronisations for each in mixed]


@pytest.mark.parametrize("batch_size", [1, counts.ROWS])
def test_an_exit_in_the_prefill(batch_size: int) -> None:
    plain, count = counts_of("fixed exit", batch_size)
    extra = [own - other for own, other in zip(count.prefill.layers, plain.prefill.layers, strict=True)]
    assert count.leaving == [LAYERS // 2]
    assert {each.operators for each in extra[: LAYERS // 2]} == {0}
    assert all(each.operators <= 8 for each in extra[LAYERS // 2 + 1 :])
    assert sum(each.synchronisations for each in extra) == 0


@pytest.mark.parametrize("thresholds", ["all stay", "all leave", "ruled out"])
def test_gates_make_the_host_wait_only_where_a_row_may_leave(thresholds: str) -> None:
    """One transfer a layer decides for the batch; none where no row sees its image, or the threshold decides alone."""
    mllm = model()
    batch = counts.prompts(mllm, counts.ROWS)
    undecided = NEARLY_NEVER
    of_gates = {
        "all stay": [undecided] * (LAYERS - 1),
        "all leave": [undecided] * (EXIT - 1) + [0.0] + [undecided] * (LAYERS - 1 - EXIT),
        "ruled out": [1.0] * (EXIT - 1) + [-1.0] + [undecided] * (LAYERS - 1 - EXIT),
    }[thresholds]
    policy = DynamicExit(Gates(LAYERS, mllm.hidden_size), threshold=of_gates)
    plain, count = counts_of_the_model(counts.ROWS), counts.count_generation(mllm, batch, policy)
    waits = [
        (own - other).synchronisations for own, other in zip(count.prefill.layers, plain.prefill.layers, strict=True)
    ]
    asked = {"all stay": range(1, LAYERS), "all leave": range(1, EXIT + 1), "ruled out": ()}[thresholds]
    assert waits == [int(layer in asked) for layer in range(LAYERS)]
    assert (count.prefill.rest - plain.prefill.rest).synchronisations <= 2  # whether rows hold text, how much
