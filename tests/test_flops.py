"""Counted operations do not depend on the attention kernel or the device, and the plan agrees with the count."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, random_batch
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaConfig
from transformers.models.clip import CLIPVisionConfig

from dyvte.cost.exit_flops import exit_flops
from dyvte.cost.flops import FlopCounter, overhead, plan_decoder_flops, prefill_flops
from dyvte.loading import wrap
from dyvte.mllm import MLLM
from dyvte.policies.exits.fixed_exit import FixedExit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoder_flops(mllm: MLLM, length: int, device: str) -> int:
    embeddings = torch.zeros(1, length, mllm.hidden_size, device=device)
    mllm.model.to(device)
    with FlopCounter(mllm) as counter, torch.no_grad():
        mllm.decoder(inputs_embeds=embeddings)
    assert counter.count.decoder == counter.count.total
    return counter.count.decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_eager_and_meta_count_alike(family: str):
    sdpa, eager = (FAMILIES[family](0, attn_implementation=name) for name in ("sdpa", "eager"))
    batch = random_batch(sdpa, generator(), num_images=(1, 2))
    counted = prefill_flops(sdpa, batch)
    assert counted == prefill_flops(eager, batch)
    assert 0 < counted.decoder < counted.total
    on_cpu = {decoder_flops(mllm, 11, "cpu") for mllm in (sdpa, eager)}
    assert on_cpu == {decoder_flops(mllm, 11, "meta") for mllm in (sdpa, eager)}


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "mistral3"])
@pytest.mark.parametrize("length", [1, 17, 64])
def test_the_plan_agrees_with_the_count(family: str, length: int):
    mllm = FAMILIES[family](0)
    planned = plan_decoder_flops(mllm.text_config, [length] * mllm.num_layers)
    assert decoder_flops(mllm, length, "cpu") == planned


@pytest.mark.parametrize("exit_layer", [0, 1, 3, 4])
def test_the_plan_agrees_with_an_exit(exit_layer: int):
    mllm = FAMILIES["llava"](0)
    batch = random_batch(mllm, generator(), num_images=(1,))
    visual, text = int(batch.layout.visual.sum()), int(batch.layout.text.sum())
    with FixedExit(layer=exit_layer)(mllm):
        counted = prefill_flops(mllm, batch).decoder
    lengths = [visual + text] * exit_layer + [text] * (mllm.num_layers - exit_layer)
    assert counted == plan_decoder_flops(mllm.text_config, lengths)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_two_passes_give_the_count_of_every_exit(family: str):
    mllm = FAMILIES[family](0)
    batch = random_batch(mllm, generator(), num_images=(1,))
    expected = []
    for layer in range(mllm.num_layers + 1):
        with FixedExit(layer)(mllm):
            expected.append(prefill_flops(mllm, batch))
    assert exit_flops(mllm, batch) == expected
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in mllm.layers)


def test_full_size_architectures_have_the_published_cost():
    """LLaVA-1.5's layers on meta tensors; published figures for a prefill are 8.5 to 10 (7B) and 16.7 to 18.5 (13B)."""
    for (hidden, intermediate, layers, heads), bounds in (
        ((4096, 11008, 32, 32), (8.5e12, 10e12)),
        ((5120, 13824, 40, 40), (16.7e12, 18.5e12)),
    ):
        config = LlavaConfig(
            text_config=LlamaConfig(
                hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads
            ),
            vision_config=CLIPVisionConfig(num_hidden_layers=1),
        )
        with torch.device("meta"):
            mllm = wrap(AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa"))
        flops = decoder_flops(mllm, 35 + 576 + 40, "meta")
        assert bounds[0] <= flops <= bounds[1]
        assert flops == plan_decoder_flops(config.text_config, [35 + 576 + 40] * layers)


def test_overhead_counts_in_total_only():
    mllm = FAMILIES["llava"](0)
    batch = random_batch(mllm, generator())
    plain = prefill_flops(mllm, batch)
    square = torch.ones(8, 8)

    def score(*_: object) -> None:
        with overhead():
            square @ square

    handles = [mllm.layers[1].register_forward_hook(score), mllm.model.register_forward_pre_hook(score)]
    scored = prefill_flops(mllm, batch)
    for handle in handles:
        handle.remove()
    assert scored.decoder == plain.decoder
    assert scored.total == plain.total + 2 * (2 * 8**3)


def test_nothing_stays_behind():
    mllm = FAMILIES["llava"](0)
    batch = random_batch(mllm, generator())
    before = prefill_flops(mllm, batch)
    with pytest.raises(TypeError), FlopCounter(mllm):
        mllm.model(**batch, no_such_argument=None, position_ids="none")
    assert not mllm.decoder._forward_hooks
    assert not mllm.decoder._forward_pre_hooks
    assert prefill_flops(mllm, batch) == before
    with overhead():  # outside a counter it does nothing
        pass
