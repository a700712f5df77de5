"""Counted operations do not depend on the attention kernel or the device, and the plan agrees with the count."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from families import FAMILIES, random_batch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2MoeConfig,
    Starcoder2Config,
)
from transformers.models.clip import CLIPVisionConfig

from dyvte.cost.exit_flops import exit_flops
from dyvte.cost.flops import FlopCounter, overhead, plan_decoder_flops, prefill_flops
from dyvte.errors import UnsupportedError
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
    planned = plan_decoder_flops(mllm, [length] * mllm.num_layers)
    assert decoder_flops(mllm, length, "cpu") == planned


@pytest.mark.parametrize("exit_layer", [0, 1, 3, 4])
def test_the_plan_agrees_with_an_exit(exit_layer: int):
    mllm = FAMILIES["llava"](0)
    batch = random_batch(mllm, generator(), num_images=(1,))
    visual, text = int(batch.layout.visual.sum()), int(batch.layout.text.sum())
    with FixedExit(layer=exit_layer)(mllm):
        counted = prefill_flops(mllm, batch).decoder
    lengths = [visual + text] * exit_layer + [text] * (mllm.num_layers - exit_layer)
    assert counted == plan_decoder_flops(mllm, lengths)


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
        assert flops == plan_decoder_flops(mllm, [35 + 576 + 40] * layers)


def test_overhead_counts_in_total_only():
    mllm = FAMILIES["llava"](0)
    batch = random_batch(mllm, generator())
    plain = prefill_flops(mllm, batch)
    square = torch.ones(8, 8)

    def score(*_: object) -> None:
        with overhead(), overhead():  # the inner one is part of the outer
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


# ------------------------------------------------------------- kinds of decoder, against a count by hand

SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MIXTURE: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {
    **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
DECODERS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SMALL, num_key_value_heads=2),
    "phi": lambda: PhiConfig(**SMALL),
    "starcoder2": lambda: Starcoder2Config(**SMALL, num_key_value_heads=2),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "mixtral": lambda: MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(**MIXTURE, num_experts=4, shared_expert_intermediate_size=40),
    "deepseek_v3": lambda: DeepseekV3Config(**{**MIXTURE, "num_key_value_heads": 4}, **LATENT),
}


def hand_count(decoder: torch.nn.Module, tokens: int) -> int:
    """Two operations a weight and position in every linear layer and chosen expert, and dense attention."""
    config: Any = decoder.config
    total = 0
    for module in decoder.modules():
        name = type(module).__name__
        if isinstance(module, torch.nn.Linear):
            total += 2 * tokens * module.weight.numel()
        elif name.endswith("Experts"):
            experts = [module.gate_up_proj, module.down_proj]
            total += 2 * tokens * config.num_experts_per_tok * sum(each[0].numel() for each in experts)
        elif name.endswith("Router"):
            total += 2 * tokens * module.weight.numel()
        elif name.endswith("Attention"):
            size = config.hidden_size // config.num_attention_heads
            keys, values = getattr(config, "qk_head_dim", None) or size, getattr(config, "v_head_dim", None) or size
            total += 2 * tokens**2 * config.num_attention_heads * (keys + values)
    return total


@functools.cache
def small_decoder(name: str, attention: str = "sdpa", experts: str | None = None) -> Any:
    model = AutoModelForCausalLM.from_config(DECODERS[name](), attn_implementation=attention).eval()
    if experts is not None:
        model.set_experts_implementation(experts)
    decoder = model.base_model
    return SimpleNamespace(
        model=decoder, decoder=decoder, layers=decoder.layers, num_layers=len(decoder.layers), hidden_size=32
    )


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_kind_of_decoder_is_counted_and_planned_as_by_hand(name: str, attention: str, experts: str):
    if name not in ("mixtral", "qwen2_moe", "deepseek_v3"):
        experts = None  # type: ignore[assignment]  # dense decoders have none
    small = small_decoder(name, attention, experts)
    for length in (1, 13, 40):
        expected = hand_count(small.decoder, length)
        assert decoder_flops(small, length, "cpu") == expected
        assert plan_decoder_flops(small, [length] * small.num_layers) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", DECODERS)
def test_every_kind_of_decoder_is_counted_alike_without_data(name: str):
    # PyTorch multiplies groups of float32 rows on the meta device in no version: the experts go one batch at a time
    experts = "batched_mm" if name in ("mixtral", "qwen2_moe", "deepseek_v3") else None
    small = small_decoder(name, "sdpa", experts)
    on_cpu = decoder_flops(small, 13, "cpu")
    causal = AutoModelForCausalLM.from_config(DECODERS[name](), attn_implementation="sdpa")
    if experts is not None:
        causal.set_experts_implementation(experts)
    elsewhere = causal.base_model
    other = SimpleNamespace(model=elsewhere, decoder=elsewhere, hidden_size=32)
    assert decoder_flops(other, 13, "meta") == on_cpu


def test_what_cannot_be_counted_is_refused_by_name():
    small = small_decoder("llama")

    @torch.library.custom_op("dyvte_test::hidden_product", mutates_args=())
    def hidden_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    with pytest.raises(UnsupportedError, match="hidden_product"), FlopCounter(small):
        hidden_product(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(UnsupportedError, match="_int_mm"), FlopCounter(small):
        torch._int_mm(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8))
    mixture = small_decoder("mixtral", "sdpa", "grouped_mm")
    unseen = mock.patch.object(mixture.decoder.config, "_experts_implementation_internal", "sonicmoe")
    with unseen, pytest.raises(UnsupportedError, match="sonicmoe"), FlopCounter(mixture):
        pass
