"""Planted models: text cannot use visual tokens from layer m on, however the model is run."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, random_batch
from planted import planted

from dyvte import AttentionProbe, FixedExit, exit_sweep
from dyvte.batch import Batch
from dyvte.mllm import MLLM

NUM_LAYERS, PLANTED = 4, 2


def model_and_batch(family: str, num_images: tuple[int, ...] = (1, 2, 0)) -> tuple[MLLM, Batch]:
    mllm = FAMILIES[family](num_layers=NUM_LAYERS)
    return mllm, random_batch(mllm, torch.Generator().manual_seed(1), num_images=num_images)


@torch.no_grad()
def last_logits(mllm: MLLM, batch: Batch) -> torch.Tensor:
    logits = mllm.model(**batch).logits
    return logits[torch.arange(len(logits)), batch.layout.last_prompt]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_attends_to_no_visual_key_from_the_planted_layer_on(family: str) -> None:
    mllm, batch = model_and_batch(family)
    with planted(mllm, PLANTED), AttentionProbe(mllm) as probe, torch.no_grad():
        mllm.model(**batch)
    with_image = probe.stats.mass[:2, :, :, 2, 1]
    assert (with_image[:, :PLANTED] > 0).all()
    assert (with_image[:, PLANTED:] == 0).all()
    assert (probe.stats.curve("visual")[:2] > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_sweep_and_fixed_exit_recover_the_planted_layer(family: str) -> None:
    mllm, batch = model_and_batch(family)
    with planted(mllm, PLANTED):
        full = last_logits(mllm, batch)
        sweep = exit_sweep(mllm, batch).logits
        for k in range(NUM_LAYERS + 1):
            with FixedExit(layer=k)(mllm):
                exited = last_logits(mllm, batch)
            torch.testing.assert_close(sweep[:, k], exited, atol=1e-4, rtol=0)
            differs = (exited - full).abs().amax(1) > 1e-3
            assert differs.tolist() == [k < PLANTED, k < PLANTED, False]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_generation_cannot_use_visual_keys_either(family: str) -> None:
    mllm, batch = model_and_batch(family)
    with planted(mllm, PLANTED):
        free = mllm.generate(batch, max_new_tokens=6)
        for k in (PLANTED, PLANTED + 1):
            with FixedExit(layer=k)(mllm):
                assert mllm.generate(batch, max_new_tokens=6) == free
        steps = exit_sweep(mllm, batch, torch.tensor(free)).agree
    assert steps[:, PLANTED:].all()


def test_shared_image_sees_the_plant() -> None:
    mllm, batch = model_and_batch("llava", num_images=(1,))
    twice = mllm.batch(**{name: torch.cat([value, value]) for name, value in batch.items()})
    with planted(mllm, PLANTED):
        shared = exit_sweep(mllm, twice, shared_image=[0, 0]).logits
        alone = exit_sweep(mllm, twice).logits
    torch.testing.assert_close(shared, alone, atol=1e-4, rtol=0)


def test_nothing_stays_behind_and_copies_are_free() -> None:
    mllm, batch = model_and_batch("llava")
    before = last_logits(mllm, batch)
    with planted(mllm, 0):
        assert not torch.equal(last_logits(mllm, batch), before)
        free = copy.deepcopy(mllm.model)
        with torch.no_grad():
            assert torch.equal(free(**batch).logits, free(**batch).logits)
            rows = torch.arange(len(before))
            assert torch.equal(free(**batch).logits[rows, batch.layout.last_prompt], before)
    assert torch.equal(last_logits(mllm, batch), before)


def test_layer_out_of_range_is_refused() -> None:
    mllm, _ = model_and_batch("llava")
    with pytest.raises(ValueError, match=r"0\.\.4 .* got 5"), planted(mllm, 5):
        pass
