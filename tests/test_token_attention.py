"""Attention of every answer token against eager attention maps, over families."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build, random_batch
from naive import masked_forward

from analysis.measuring.token_attention import SINK_RATIO, token_attention
from dyvte.errors import UnsupportedError
from dyvte.policies.exits.fixed_exit import FixedExit

EXACT = 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("length", [1, 3])
def test_attention_of_every_token_is_that_of_eager_maps(family: str, length: int) -> None:
    mllm, eager = build(family), build(family, attn_implementation="eager")
    batch = random_batch(mllm, torch.Generator().manual_seed(length), (1,))
    answer = torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(7))
    found = token_attention(mllm, batch, answer)

    whole = batch if length == 1 else mllm.append_answers(batch, answer[:, :-1])
    maps = masked_forward(eager, whole, mllm.num_layers, keep_maps=True).maps[0]  # [L, H, N, N]
    last = int(batch.layout.last_prompt[0])
    torch.testing.assert_close(found.rows, maps[:, :, last : last + length], atol=EXACT, rtol=1e-4)

    allowed = maps.amax(1) > 0  # [L, N, N]
    uniform = (allowed / allowed.sum(-1, keepdim=True)).sum(1)
    received = maps.mean(1).sum(1) / uniform
    torch.testing.assert_close(found.received, received, atol=1e-3, rtol=1e-3)
    clear = (received - SINK_RATIO).abs() > 1e-2
    expected = received > SINK_RATIO
    expected[:, 0] = clear[:, 0] = True
    assert torch.equal(found.sinks[clear], expected[clear])


def test_attention_of_a_driven_model_is_refused() -> None:
    mllm = build("llava")
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1,))
    with FixedExit(layer=1)(mllm), pytest.raises(UnsupportedError, match="positions"):
        token_attention(mllm, batch, torch.tensor([[5]]))


def test_attention_of_several_prompts_is_refused() -> None:
    mllm = build("llava")
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 1))
    with pytest.raises(ValueError, match="one prompt"):
        token_attention(mllm, batch, torch.tensor([[5], [5]]))
