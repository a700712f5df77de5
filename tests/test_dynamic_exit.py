"""DynamicExit: rows of a batch leave at their own layers, with the answers and the cost of a fixed exit there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from families import FAMILIES, random_batch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.cost.flops import prefill_flops
from dyvte.errors import ModelError, UnsupportedError
from dyvte.gates import Gates
from dyvte.gates.features import assemble, bases_of
from dyvte.gates.lens import lens_features
from dyvte.gates.metrics import first_exit
from dyvte.instrument.cache import KeptLayer
from dyvte.instrument.states import STATUS_PARTS
from dyvte.instrument.sweep import exit_sweep
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.exits.dynamic_exit import DynamicExit, exit_probabilities
from dyvte.policies.exits.fixed_exit import FixedExit

LAYERS = 5


TEXT = ("text_mean", "text_last")


def read_by(mllm: MLLM, batch: Batch, status: tuple[str, ...]) -> Tensor:
    """[B, L - 1, I] what gates of some status parts look at, from the sweep."""
    read = tuple(part for part in STATUS_PARTS if part in {"text_last", *bases_of(status)})
    said = exit_sweep(mllm, batch, status_parts=read, entropy=False).text_status[:, :-1]
    base = dict(zip(read, said.chunk(len(read), dim=-1), strict=True))
    return assemble(status, {**base, "lens": lens_features(mllm, base["text_last"])})


def spread_gates(mllm: MLLM, batch: Batch, status: tuple[str, ...] = TEXT, **settings: bool) -> DynamicExit:
    """Random gates with thresholds such that the rows of the batch leave at different layers."""
    torch.manual_seed(0)
    gates = Gates(mllm.num_layers, mllm.hidden_size, status, bias=True, **settings)  # type: ignore[arg-type]
    assert gates.inner_bias is not None
    torch.nn.init.normal_(gates.inner_bias)
    probability = gates(read_by(mllm, batch, status)).softmax(-1)[..., 1].detach()
    ordered = probability[batch.layout.has_image].sort(0, descending=True).values
    return DynamicExit(gates, threshold=((ordered[0] + ordered[1]) / 2).tolist())  # one row a gate fires


@torch.no_grad()
def run(mllm: MLLM, batch: Batch, policy: DynamicExit) -> tuple[Tensor, Tensor]:
    with policy(mllm) as active:
        logits = mllm.model(**batch, logits_to_keep=1).logits[:, -1]
    return logits, active.exit_layers


def rows_of(mllm: MLLM, batch: Batch, seed: int = 0) -> Iterator[Batch]:
    """Every row of a LLaVA batch alone, without its padding."""
    images = iter(batch["pixel_values"])
    for row in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][row].bool()
        pixels = {"pixel_values": next(images)[None]} if batch.layout.has_image[row] else {}
        yield mllm.batch(
            input_ids=batch["input_ids"][row][keep][None],
            attention_mask=torch.ones(1, int(keep.sum())).long(),
            **pixels,
        )


def batch_of(mllm: MLLM, num_images: tuple[int, ...] = (1, 1, 0, 1, 1), **kwargs: object) -> Batch:
    return random_batch(mllm, torch.Generator().manual_seed(3), num_images, **kwargs)  # type: ignore[arg-type]


DERIVED = ("text_mean", "lens", "text_last_change", "lens_change", "image_mean_change")
KINDS_OF_GATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "derived parts": {"status": DERIVED},
    "shared": {"shared": True},
    "cumulative": {"cumulative": True, "status": DERIVED},
}


@pytest.mark.parametrize(
    ("family", "kind"), [*((each, "plain") for each in FAMILIES), *(("llava", each) for each in [*KINDS_OF_GATES][1:])]
)
def test_rows_leave_where_the_sweep_says_with_the_logits_of_that_exit(family: str, kind: str) -> None:
    mllm = FAMILIES[family](num_layers=LAYERS)
    batch = batch_of(mllm)
    policy = spread_gates(mllm, batch, **KINDS_OF_GATES[kind])
    assert isinstance(policy.gates, Gates)
    sweep = exit_sweep(mllm, batch, entropy=False)
    said = policy.gates(read_by(mllm, batch, policy.gates.status)).softmax(-1)[..., 1].detach()
    wanted = first_exit(said, policy.thresholds)
    logits, exits = run(mllm, batch, policy)
    seeing = batch.layout.has_image
    assert torch.equal(exits[seeing], wanted[seeing])
    assert (exits[~seeing] == 0).all()
    assert len(exits[seeing].unique()) > 1, "a test of mixed exits needs rows that leave at different layers"
    rows = torch.arange(len(exits))
    torch.testing.assert_close(logits, sweep.logits[rows, wanted], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_its_rows_give_alone(side: str) -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm, padding_side=side, system_length=[3, 1, 2, 4, 3])
    policy = spread_gates(mllm, batch)
    with policy(mllm) as active, torch.no_grad():
        logits = mllm.model(**batch).logits
    exits, last = active.exit_layers, batch.layout.last_prompt
    for row, alone in enumerate(rows_of(mllm, batch)):
        own, own_exit = run(mllm, alone, policy)
        assert int(own_exit) == int(exits[row])
        torch.testing.assert_close(logits[row, last[row]], own[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_decoding_follows_the_exit(family: str) -> None:
    mllm = FAMILIES[family](num_layers=LAYERS)
    batch = batch_of(mllm)
    policy = spread_gates(mllm, batch)
    with policy(mllm) as active:
        answers = mllm.generate_ids(batch, max_new_tokens=6)
    exits = active.exit_layers.tolist()
    for k in set(exits) - {0}:
        with FixedExit(k)(mllm):
            fixed = mllm.generate_ids(batch, max_new_tokens=6)
        assert [fixed[row] for row in range(len(exits)) if exits[row] == k] == [
            answers[row] for row in range(len(exits)) if exits[row] == k
        ]


def test_rows_that_left_store_no_visual_keys() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm, (1, 1, 1, 1))
    policy = spread_gates(mllm, batch)
    with torch.no_grad(), policy(mllm) as active:
        cache = mllm.model(**batch, use_cache=True).past_key_values
    text, visual = batch.layout.text.sum(1), batch.layout.visual.sum(1)
    size = 2 * 4 * mllm.text_config.num_key_value_heads * mllm.text_config.head_dim  # keys and values, float32
    for index, layer in enumerate(cache.layers):
        seeing = active.exit_layers > index
        if seeing.all():
            continue
        assert isinstance(layer, KeptLayer)
        groups = [(text + visual)[seeing], text[~seeing]]
        assert layer.nbytes == sum(size * len(group) * int(group.max()) for group in groups if len(group))


def test_rows_that_left_cost_their_text_only() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm, (1, 1, 1, 1), question_length=6)
    policy = spread_gates(mllm, batch)
    _, exits = run(mllm, batch, policy)
    with policy(mllm):
        counted = prefill_flops(mllm, batch)
    fixed = {}
    for k in set(exits.tolist()):
        with FixedExit(k)(mllm):
            fixed[k] = prefill_flops(mllm, batch).decoder / len(exits)
    assert counted.decoder == pytest.approx(sum(fixed[k] for k in exits.tolist()), rel=1e-6)
    inputs, width = 2 * mllm.hidden_size, mllm.hidden_size // 2
    per_gate = 2 * len(exits) * (inputs * width + width * 2)
    overhead = counted.total - counted.decoder
    with FixedExit(LAYERS)(mllm):
        plain = prefill_flops(mllm, batch)
    assert overhead - (plain.total - plain.decoder) >= (LAYERS - 1) * per_gate, "gates are work, too"


def test_one_host_synchronisation_a_layer() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm)
    policy = spread_gates(mllm, batch)

    def reads(policy: Policy | None) -> int:
        with torch.no_grad(), _counted_reads() as count:
            if policy is None:
                mllm.model(**batch)
            else:
                with policy(mllm):
                    mllm.model(**batch)
        return count[0]

    outside_of_layers = 4  # lengths of the rows, and checks of their layout, once a prefill
    assert reads(policy) - reads(None) <= (LAYERS - 1) + outside_of_layers
    never, always = (DynamicExit(policy.gates, threshold=each) for each in (1.0, -1.0))
    one_layer = DynamicExit(policy.gates, threshold=[1.0, policy.thresholds[1], 1.0, 1.0])
    assert reads(one_layer) == reads(never) + 1, "where the threshold rules a layer out the host does not wait"
    assert reads(always) == reads(FixedExit(1)), "nor where it decides alone"


@contextmanager
def _counted_reads() -> Iterator[list[int]]:
    count = [0]

    def counting(method):  # type: ignore[no-untyped-def]
        def read(self: Tensor, *args: object) -> object:
            count[0] += 1
            return method(self, *args)

        return read

    names = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")
    with contextmanager(_nested)([mock.patch.object(Tensor, name, counting(getattr(Tensor, name))) for name in names]):
        yield count


def _nested(patches: list[mock._patch]) -> Iterator[None]:  # type: ignore[type-arg]
    if not patches:
        yield
        return
    with patches[0]:
        yield from _nested(patches[1:])


def test_exit_layers_stay_within_their_limits() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm, (1, 1))
    gates = Gates(LAYERS, mllm.hidden_size)
    for threshold, wanted in ((-1.0, 2), (2.0, 4)):  # every gate fires; none does
        _, exits = run(mllm, batch, DynamicExit(gates, threshold=threshold, min_layer=2, max_layer=4))
        assert exits.tolist() == [wanted] * 2
    _, exits = run(mllm, batch, DynamicExit(gates, threshold=2.0))
    assert exits.tolist() == [LAYERS] * 2


def test_gates_that_never_fire_change_nothing() -> None:
    mllm = FAMILIES["qwen2_5_vl"](num_layers=LAYERS)
    batch = batch_of(mllm)
    with torch.no_grad():
        plain = mllm.model(**batch, logits_to_keep=1).logits[:, -1]
    logits, _ = run(mllm, batch, DynamicExit(Gates(LAYERS, mllm.hidden_size), threshold=2.0))
    assert torch.equal(logits, plain)


def test_gates_may_look_at_the_image() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm)
    policy = spread_gates(mllm, batch, ("image_mean", "image_last", "text_last"))
    _, exits = run(mllm, batch, policy)
    assert len(exits[batch.layout.has_image].unique()) > 1


def test_what_the_gates_said_is_kept() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    batch = batch_of(mllm, (1, 1))
    policy = spread_gates(mllm, batch)
    with torch.no_grad(), policy(mllm) as active:
        assert exit_probabilities(active) == {}
        mllm.model(**batch)
    said = exit_probabilities(active)
    assert sorted(said) == list(range(1, min(int(active.exit_layers.max()), LAYERS - 1) + 1)), "asked while a row sees"
    for row, k in enumerate(active.exit_layers.tolist()):
        fired = [layer for layer, each in said.items() if each[row] > policy.thresholds[layer - 1]]
        assert k == min([*fired, LAYERS])


def test_settings_that_do_not_fit_are_refused() -> None:
    mllm = FAMILIES["llava"](num_layers=LAYERS)
    gates = Gates(LAYERS, mllm.hidden_size)
    for low, high in ((0, None), (3, 2), (1, LAYERS + 1)):
        with pytest.raises(ValueError, match=f"1 <= min_layer <= max_layer <= {LAYERS}"):
            DynamicExit(gates, min_layer=low, max_layer=high).check(mllm)
    with pytest.raises(ValueError, match='or "auto", got'):
        DynamicExit(gates, threshold="high")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="this one has 5 of width 64"), DynamicExit(Gates(4, 64))(mllm):
        pass
    with pytest.raises(UnsupportedError, match="the question alone"):
        DynamicExit(Gates(LAYERS, mllm.hidden_size, ["question"]))
