"""Unlimited OCR: new tokens see the whole prompt, as far as it stayed, and a sliding window of new tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from naive import masked_forward, with_generated
from transformers import DynamicCache

from dyvte import FixedExit
from dyvte.instrument.keys.reference import KeptReferenceLayer
from dyvte.loading import wrap
from dyvte.mllm import MLLM
from tests.zoo.specimens import Row, build_model, make_inputs

WINDOW, NEW, LAYERS = 3, 9, 4


@cache
def model() -> MLLM:
    return wrap(build_model("unlimited_ocr", text_config={"sliding_window": WINDOW}))


@pytest.mark.parametrize("exits", [[1, 1], [0, 0], [2, 0], [3, 4]], ids=str)
@torch.no_grad()
def test_the_prompt_stays_and_new_tokens_slide_away(exits: list[int]) -> None:
    mllm = model()
    rows = [Row([5, 6, 7], (1, 4), [8, 9, 10, 11], 0), Row([7, 5, 6], (1, 4), [18, 19, 20, 21], 1)]
    batch = mllm.batch(**make_inputs(mllm.model, rows))
    prompt = batch["input_ids"].shape[1]
    with FixedExit(exits)(mllm):
        cache = DynamicCache(config=mllm.text_config)
        for _ in range(2):  # an emptied cache takes another prompt
            cache.reset()
            output = mllm.model.generate(
                **batch, past_key_values=cache, max_new_tokens=NEW, do_sample=False, eos_token_id=[1000],
                pad_token_id=0, suppress_tokens=list(range(100, 128)), return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
    assert [type(each) is KeptReferenceLayer for each in cache.layers] == [k >= min(exits) for k in range(LAYERS)]

    def slide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["position_ids"].shape[-1]
        place = torch.arange(length)
        gone = (place[:, None] - place >= WINDOW) & (place >= prompt)
        mask = kwargs["attention_mask"]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if mask is None else mask
        return args, {**kwargs, "attention_mask": mask & ~gone}

    handles = [layer.register_forward_pre_hook(slide, with_kwargs=True) for layer in mllm.layers]
    whole = with_generated(mllm, batch, output.sequences[:, prompt:])
    expected = masked_forward(mllm, whole, exits).logits[:, prompt - 1 : -1]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, atol=1e-4, rtol=0)
    unbounded = masked_forward(mllm, whole, exits).logits[:, prompt - 1 : -1]
    assert (unbounded - expected).abs().max() > 1e-2
