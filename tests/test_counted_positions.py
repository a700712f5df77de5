"""Llama 4 counts the tokens that a layer receives to scale its queries: where some left, it must not count anew."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import masked_forward, with_generated

from dyvte import FixedExit, exit_sweep, knockout
from dyvte.batch import Batch
from dyvte.loading import wrap
from dyvte.mllm import MLLM
from tests.zoo.specimens import Row, build_model, make_inputs

LAYERS = 4
EXACT = 1e-4


@cache
def model(floor_scale: int = 3) -> MLLM:
    """Two of four layers have no rotary positions and scale their queries, every third token more."""
    text = {"no_rope_layers": [1, 0, 1, 0], "floor_scale": floor_scale, "attn_scale": 0.7}
    return wrap(build_model("llama4", text_config=text))


def batch_of(mllm: MLLM, seed: int, images: tuple[int, ...] = (4, 2)) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def words(number: int) -> list[int]:
        return torch.randint(3, 90, (number,), generator=generator).tolist()

    rows = [Row(words(3), (1, count), words(5 + row), seed) for row, count in enumerate(images)]
    return mllm.batch(**make_inputs(mllm.model, rows))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


@settings(max_examples=3)
@given(seed=st.integers(0, 99), exits=st.tuples(st.integers(0, LAYERS), st.integers(0, LAYERS)))
@torch.no_grad()
def test_places_are_those_of_the_whole_sequence(seed: int, exits: tuple[int, ...]) -> None:
    mllm, own = model(), list(exits)
    batch = batch_of(mllm, seed)
    with FixedExit(own)(mllm):
        logits = mllm.model(**batch).logits
        generated = mllm.model.generate(
            **batch, max_new_tokens=4, do_sample=False, eos_token_id=[1000], pad_token_id=0,
            suppress_tokens=list(range(100, 128)), return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    text = batch.layout.text
    close(logits[text], masked_forward(mllm, batch, own).logits[text])
    whole = with_generated(mllm, batch, generated.sequences[:, batch["input_ids"].shape[1] :])
    close(torch.stack(generated.logits, 1), masked_forward(mllm, whole, own).logits[:, -5:-1])
    assert all(each.self_attn.attn_temperature_tuning for each in mllm.layers)


@torch.no_grad()
def test_branches_count_from_where_they_are() -> None:
    mllm = model()
    batch = batch_of(mllm, 1)
    sweep = exit_sweep(mllm, batch)
    windows = [(k, LAYERS) for k in range(LAYERS)]
    cut = knockout(mllm, batch, paths=[("instruction", "visual")], windows=windows)
    for k in range(LAYERS):
        expected = masked_forward(mllm, batch, k).logits[:, -1]
        close(sweep.logits[:, k], expected)
        close(cut.logits[:, 0, k], expected)
    plain = model(floor_scale=8192).model(**batch).logits
    assert (plain - mllm.model(**batch).logits)[batch.layout.text].abs().max() > 100 * EXACT
