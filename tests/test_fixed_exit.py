"""FixedExit and the engine below it: exact in every family, visual keys really gone, nothing left behind."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, IMAGE_TOKEN, PAD, VIDEO_TOKEN, VISION_END, VISION_START, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from leftovers import pristine
from naive import masked_forward, with_generated
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from dyvte import FixedExit
from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.instrument.cache import KeptLayer
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill

EXACT = 1e-4
LAYERS = 4
NO_IMAGE_TOKENS = {"suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END], "pad_token_id": PAD}


@cache
def model(family: str, attention: str = "sdpa") -> MLLM:
    return FAMILIES[family](0, num_layers=LAYERS, attn_implementation=attention)


def batch_of(
    mllm: MLLM, images: tuple[int, ...] = (1, 2, 0), side: str = "left", seed: int = 1, **kwargs: Any
) -> Batch:
    return random_batch(mllm, torch.Generator().manual_seed(seed), images, side, **kwargs)


def generate(mllm: MLLM, batch: Batch, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": [EOS + 1000], **NO_IMAGE_TOKENS}
    return mllm.model.generate(**batch, **{**settings, **kwargs})


# --------------------------------------------------------------------------- forward


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(
    images=st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any),
    side=st.sampled_from(["left", "right"]),
    layer=st.integers(0, LAYERS),
    system=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_equals_the_full_model_with_visual_keys_masked(
    family: str, attention: str, images: list[int], side: str, layer: int, system: int, seed: int
) -> None:
    mllm = model(family, attention)
    batch = batch_of(mllm, tuple(images), side, seed, system_length=system)
    expected = masked_forward(mllm, batch, layer).logits
    with FixedExit(layer)(mllm), torch.no_grad():
        logits = mllm.model(**batch).logits
    text = batch.layout.text
    torch.testing.assert_close(logits[text], expected[text], atol=EXACT, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exit_at_the_last_layer_changes_no_bit(family: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm)
    plain = mllm.model(**batch)
    with FixedExit(LAYERS)(mllm):
        exited = mllm.model(**batch)
    assert torch.equal(plain.logits, exited.logits)
    for before, after in zip(plain.past_key_values.layers, exited.past_key_values.layers, strict=True):
        assert type(before) is type(after)
        assert torch.equal(before.keys, after.keys)


@torch.no_grad()
def test_exits_differ_so_that_the_tests_can_fail() -> None:
    mllm = model("llava")
    batch = batch_of(mllm)
    last = []
    for layer in range(LAYERS + 1):
        with FixedExit(layer)(mllm):
            last.append(mllm.model(**batch).logits[:2, -1])
    gaps = [(first - second).abs().max() for first, second in itertools.pairwise(last)]
    assert min(gaps) > 100 * EXACT


@torch.no_grad()
def test_labels_and_all_hidden_states_keep_their_length() -> None:
    mllm = model("qwen3_vl")
    batch = batch_of(mllm)
    text = batch.layout.text
    labels = batch["input_ids"].masked_fill(~(text & text.roll(1, dims=1)), -100)  # predicted from a text token
    with FixedExit(2)(mllm):
        output = mllm.model(**batch, labels=labels, output_hidden_states=True)
    expected = masked_forward(mllm, Batch({**batch, "labels": labels}, batch.layout), 2)
    torch.testing.assert_close(output.loss, expected.loss, atol=EXACT, rtol=0)
    assert {tuple(states.shape) for states in output.hidden_states} == {(*batch["input_ids"].shape, mllm.hidden_size)}


@torch.no_grad()
def test_deepstack_features_do_not_come_back_after_the_exit() -> None:
    """Qwen3-VL adds visual features after layers 0 and 1; under exit 0 and 1 the image must not matter later."""
    mllm = model("qwen3_vl")
    batch = batch_of(mllm, (1,))
    other = Batch({**batch, "pixel_values": -batch["pixel_values"]}, batch.layout)
    text = batch.layout.text
    with FixedExit(0)(mllm):
        assert torch.equal(mllm.model(**batch).logits[text], mllm.model(**other).logits[text])
    with FixedExit(1)(mllm):
        assert not torch.equal(mllm.model(**batch).logits[text], mllm.model(**other).logits[text])


@torch.no_grad()
def test_a_batch_equals_its_rows_one_by_one() -> None:
    mllm = model("gemma3")
    batch = batch_of(mllm, (1, 0), "left")
    with FixedExit(1)(mllm):
        together = mllm.model(**batch).logits
        for row in range(2):
            kept = ~batch.layout.padding[row]
            inputs = {
                name: batch[name][row : row + 1, kept] for name in ("input_ids", "attention_mask", "token_type_ids")
            }
            pixels = {"pixel_values": batch["pixel_values"]} if row == 0 else {}
            alone = mllm.model(**inputs, **pixels).logits[0]
            text = batch.layout.text[row]
            torch.testing.assert_close(together[row][text], alone[text[kept]], atol=EXACT, rtol=0)


# ------------------------------------------------------------------------ generation


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2)
@given(layer=st.integers(0, LAYERS), attention=st.sampled_from(["sdpa", "eager"]), seed=st.integers(0, 99))
def test_generation_equals_recomputing_everything_with_visual_keys_masked(
    family: str, layer: int, attention: str, seed: int
) -> None:
    mllm = model(family, attention)
    batch = batch_of(mllm, (1, 2, 0), "left", seed)
    with FixedExit(layer)(mllm):
        output = generate(mllm, batch, max_new_tokens=14, return_dict_in_generate=True, output_logits=True)
    prompt = batch["input_ids"].shape[1]
    whole = with_generated(mllm, batch, output.sequences[:, prompt:])
    expected = masked_forward(mllm, whole, layer).logits[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_beams_samples_and_no_cache(family: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm)
    with FixedExit(2)(mllm):
        greedy = generate(mllm, batch)
        assert torch.equal(greedy, generate(mllm, batch, use_cache=False))
        beams = generate(mllm, batch, num_beams=3, return_dict_in_generate=True, output_scores=True)
        torch.manual_seed(0)
        sampled = generate(mllm, batch, do_sample=True, top_k=50)
        torch.manual_seed(0)
        assert torch.equal(sampled, generate(mllm, batch, do_sample=True, top_k=50, use_cache=False))
    for hypothesis, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        torch.testing.assert_close(beam_score(mllm, batch, beams.sequences, hypothesis, 2), score, atol=EXACT, rtol=0)


def beam_score(mllm: MLLM, batch: Batch, sequences: Tensor, hypothesis: Tensor, layer: int) -> Tensor:
    """Mean log-probability of a beam, recomputed in full with visual keys masked."""
    prompt = batch["input_ids"].shape[1]
    row = next(i for i in range(len(batch["input_ids"])) if torch.equal(batch["input_ids"][i], hypothesis[:prompt]))
    new = hypothesis[prompt:]
    whole = with_generated(mllm, batch, new.expand(len(batch["input_ids"]), -1))
    logits = masked_forward(mllm, whole, layer).logits[row, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(1, new[:, None]).mean()


@torch.no_grad()
def test_a_further_turn_on_the_same_cache() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1, 1), question_length=5)
    more = torch.randint(3, 99, (2, 4), generator=torch.Generator().manual_seed(0))
    with FixedExit(1)(mllm):
        cache = mllm.model(**batch).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
        logits = mllm.model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    expected = masked_forward(mllm, with_generated(mllm, batch, more), 1).logits[:, -4:]
    torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)


# ----------------------------------------------------------------------------- cache


@pytest.mark.parametrize("family", FAMILIES)
def test_exited_layers_store_no_visual_keys(family: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm, (2, 1), question_length=6)
    text_tokens = batch.layout.text.sum(1).tolist()
    steps, layer = 3, 2
    with FixedExit(layer)(mllm):
        cache = generate(mllm, batch, max_new_tokens=steps + 1, return_dict_in_generate=True).past_key_values
    plain = generate(mllm, batch, max_new_tokens=steps + 1, return_dict_in_generate=True).past_key_values
    for index, (exited, full) in enumerate(zip(cache.layers, plain.layers, strict=True)):
        assert exited.get_seq_length() == full.get_seq_length()
        if index < layer:
            assert exited.keys.shape == full.keys.shape
            continue
        assert exited.keys.shape[-2] == exited.values.shape[-2] == max(text_tokens) + steps
        # What is stored are the text's own keys: one row computed without any image token around has the same.
        assert exited.nbytes == 2 * exited.keys.nbytes
        assert len(exited.keys[0, 0].unique(dim=0)) == text_tokens[0] + steps + (text_tokens[0] < max(text_tokens))


@torch.no_grad()
def test_stored_keys_are_those_of_the_text_positions() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1,))
    plain = mllm.model(**batch).past_key_values
    with FixedExit(0)(mllm):
        exited = mllm.model(**batch).past_key_values
    # Nothing has attended to anything yet in layer 0: its keys only depend on the token and its position.
    expected = plain.layers[0].keys[:, :, batch.layout.text[0]]
    torch.testing.assert_close(exited.layers[0].keys, expected, atol=1e-6, rtol=0)


@dataclass
class RowsLeaveAt(Policy):
    """Test policy: row r exits at layer `exits[r]`."""

    exits: tuple[int, ...]

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        leaving = torch.tensor([exit_layer == layer for exit_layer in self.exits])
        prefill.drop(prefill.layout.visual & leaving[:, None])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_rows_may_leave_at_different_layers(family: str) -> None:
    mllm, exits = model(family), (1, 3, 0)
    batch = batch_of(mllm, (1, 2, 1))
    with RowsLeaveAt(exits)(mllm) as run:
        output = generate(mllm, batch, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
        assert run.exit_layers.tolist() == list(exits)
    prompt = batch["input_ids"].shape[1]
    whole = with_generated(mllm, batch, output.sequences[:, prompt:])
    expected = masked_forward(mllm, whole, list(exits)).logits[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=EXACT, rtol=0)


def test_rows_that_left_take_no_room_for_their_neighbours() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1, 1), question_length=4)
    with RowsLeaveAt((1, 4))(mllm), torch.no_grad():
        layer = mllm.model(**batch).past_key_values.layers[1]
    assert isinstance(layer, KeptLayer)
    full, text = batch["input_ids"].shape[1], int(batch.layout.text[0].sum())
    of_one_position = 2 * mllm.num_heads * 16 * 4
    assert layer.nbytes == (full + text) * of_one_position
    assert layer.keys is not None
    assert layer.keys.shape[-2] == full


def test_rows_leaving_at_different_layers_with_beams() -> None:
    mllm, exits = model("llava"), (1, 3)
    batch = batch_of(mllm, (1, 1))
    repeated = tuple(exit_layer for exit_layer in exits for _ in range(2))
    with RowsLeaveAt(repeated)(mllm):
        cached = generate(mllm, batch, num_beams=2)
        assert torch.equal(cached, generate(mllm, batch, num_beams=2, use_cache=False))


@dataclass
class EveryOther(Policy):
    """Test policy: every other visual token leaves at `layer`, with a bias on the keys that stay."""

    layer: int
    bias: float = 0.0

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        if layer == self.layer:
            odd = torch.arange(prefill.kept.shape[1]) % 2 == 1
            prefill.drop(odd.expand_as(prefill.kept))
            if self.bias:
                prefill.key_bias = self.bias * prefill.layout.visual.float()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_some_visual_tokens_may_leave_and_keys_may_carry_a_bias(bias: float, attention: str) -> None:
    mllm = model("llava", attention)
    batch = batch_of(mllm, (1, 2))
    with EveryOther(1, bias)(mllm):
        cached = generate(mllm, batch, return_dict_in_generate=True, output_logits=True)
        again = generate(mllm, batch, use_cache=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(again.logits), atol=EXACT, rtol=0)
    with EveryOther(1, 0.0)(mllm), torch.no_grad():
        unbiased = mllm.model(**batch).logits[:, -1]
    assert torch.allclose(cached.logits[0], unbiased, atol=EXACT) == (bias == 0.0)


# -------------------------------------------------------------------- nothing left behind


def test_nothing_is_left_behind() -> None:
    mllm = model("llava_next")
    assert pristine(mllm)
    for _ in range(2):
        with FixedExit(1)(mllm):
            assert not pristine(mllm)
        assert pristine(mllm)

    def leave_by_error() -> None:
        with FixedExit(1)(mllm), FixedExit(2)(mllm):
            mllm.model(input_ids=torch.tensor([[5, IMAGE_TOKEN, 6]]), pixel_values=torch.zeros(1))

    with pytest.raises(TypeError):
        leave_by_error()  # LLaVA-NeXT wants the sizes of its images
    assert pristine(mllm)


@torch.no_grad()
def test_nested_exits_take_the_earlier_one_and_may_end_in_any_order() -> None:
    mllm = model("llava")
    batch = batch_of(mllm)
    expected = {layer: masked_forward(mllm, batch, layer).logits[:, -1] for layer in (1, 3)}
    outer, inner = FixedExit(3)(mllm), FixedExit(1)(mllm)
    outer.__enter__()
    inner.__enter__()
    torch.testing.assert_close(mllm.model(**batch).logits[:, -1], expected[1], atol=EXACT, rtol=0)
    inner.__exit__(None, None, None)
    torch.testing.assert_close(mllm.model(**batch).logits[:, -1], expected[3], atol=EXACT, rtol=0)
    outer.__exit__(None, None, None)
    assert pristine(mllm)


@torch.no_grad()
def test_a_deep_copy_made_inside_is_an_ordinary_model() -> None:
    mllm = FAMILIES["llava"](3)
    batch = batch_of(mllm)
    plain = mllm.model(**batch).logits
    with FixedExit(1)(mllm):
        twin = copy.deepcopy(mllm.model)
        assert torch.equal(twin(**batch).logits, plain)
        assert not torch.equal(mllm.model(**batch).logits, plain)
    assert torch.equal(twin(**batch).logits, plain)
    assert twin.generate.__self__ is twin
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(**batch).logits, plain)
    assert torch.equal(mllm.model(**batch).logits, plain)


def test_the_pipeline_runs_under_a_policy() -> None:
    from families import processor_for
    from PIL import Image
    from transformers import pipeline

    mllm = FAMILIES["llava"](0)
    pipe = pipeline("image-text-to-text", model=mllm.model, processor=processor_for("llava"))
    image = Image.effect_noise((8, 8), 80).convert("RGB")
    message = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what color"}]}]

    def tokens() -> str:
        return pipe(text=message, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]

    plain = tokens()
    with FixedExit(LAYERS)(mllm):
        assert tokens() == plain
    with FixedExit(0)(mllm) as run:
        tokens()
        assert run.prefill is not None
        assert run.prefill.layout.visual.sum() == 16
        assert run.exit_layers.tolist() == [0]


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layer", [-1, LAYERS + 1])
def test_exit_layers_out_of_range(layer: int) -> None:
    with pytest.raises(ValueError, match=f"0..{LAYERS}"), FixedExit(layer)(model("llava")):
        pass


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cache_implementation": "static"}, "static"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"cache_implementation": "quantized"}, "quantized"),
        ({"prefill_chunk_size": 4}, "chunked prefill"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"assistant_model": "self"}, "assisted decoding"),
    ],
)
def test_ways_of_generating_that_are_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    mllm = model("llava")
    if settings.get("assistant_model"):
        settings = {"assistant_model": mllm.model}
    with FixedExit(1)(mllm), pytest.raises(UnsupportedError, match=reason):
        generate(mllm, batch_of(mllm, (1,)), **settings)


def static_cache(mllm: MLLM) -> Any:
    return StaticCache(config=mllm.text_config, max_cache_len=128)


def offloaded_cache(mllm: MLLM) -> Any:
    return DynamicCache(config=mllm.text_config, offloading=True)


@pytest.mark.parametrize(("make", "reason"), [(static_cache, "static"), (offloaded_cache, "offloaded")])
def test_caches_that_are_refused_by_name(make: Any, reason: str) -> None:
    mllm = model("llava")
    with FixedExit(1)(mllm), pytest.raises(UnsupportedError, match=reason):
        mllm.model(**batch_of(mllm, (1,)), past_key_values=make(mllm))


class FakeQuantizedLayer(QuantizedLayer):
    """What optimum-quanto and HQQ subclass."""

    def _quantize(self, tensor: Tensor, axis: int = 0) -> Tensor:
        return tensor

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def test_a_quantised_cache_is_refused_by_name() -> None:
    mllm = model("llava")
    cache = Cache(layers=[FakeQuantizedLayer() for _ in range(LAYERS)])
    with FixedExit(1)(mllm), pytest.raises(UnsupportedError, match="quantised"):
        mllm.model(**batch_of(mllm, (1,)), past_key_values=cache)


@pytest.mark.parametrize("kind", ["mamba", "hybrid"])
def test_layers_with_an_unknown_running_state_are_refused_by_name(kind: str) -> None:
    mllm = copy.deepcopy(model("llava"))
    mllm.text_config = copy.deepcopy(mllm.text_config)
    mllm.text_config.layer_types = ["full_attention", kind, "full_attention", kind]
    with pytest.raises(UnsupportedError, match=kind), FixedExit(1)(mllm):
        pass


def test_inputs_that_hide_the_visual_tokens_are_refused() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1,))
    ends_with_image = torch.tensor([[5, 6, *[IMAGE_TOKEN] * 16]])
    with FixedExit(1)(mllm):
        with pytest.raises(UnsupportedError, match="input_ids"):
            mllm.model(inputs_embeds=torch.zeros(1, 3, mllm.hidden_size))
        with pytest.raises(UnsupportedError, match="ends with a visual token"):
            mllm.model(input_ids=ends_with_image, pixel_values=batch["pixel_values"])
        with pytest.raises(UnsupportedError, match="outside"):
            mllm.decoder(inputs_embeds=torch.zeros(1, 3, mllm.hidden_size))


@torch.no_grad()
def test_a_cache_stays_with_the_policy_that_filled_it() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1,))
    step = {
        "input_ids": torch.tensor([[7]]),
        "attention_mask": torch.ones(1, batch["input_ids"].shape[1] + 1, dtype=torch.long),
    }
    with FixedExit(1)(mllm):
        filled = mllm.model(**batch).past_key_values
    plain = mllm.model(**batch).past_key_values
    with pytest.raises(RuntimeError, match="same `with policy"):
        mllm.model(**step, past_key_values=copy.deepcopy(filled))
    with FixedExit(1)(mllm), pytest.raises(UnsupportedError, match="no policy"):
        mllm.model(**step, past_key_values=plain)
    with FixedExit(2)(mllm), pytest.raises(UnsupportedError, match=r"FixedExit\(layer=1\)"):
        mllm.model(**step, past_key_values=copy.deepcopy(filled))
    with FixedExit(1)(mllm):
        mllm.model(**step, past_key_values=copy.deepcopy(filled))
        with pytest.raises(UnsupportedError, match="images"):
            mllm.model(**batch, past_key_values=filled)


@torch.no_grad()
def test_a_cache_can_be_emptied_and_used_again() -> None:
    mllm = model("gemma3")
    batch = batch_of(mllm, (1, 1))
    cache = DynamicCache(config=mllm.text_config)
    for layer in (1, 3, LAYERS):
        cache.reset()
        with FixedExit(layer)(mllm):
            logits = mllm.model(**batch, past_key_values=cache).logits[:, -1]
        expected = masked_forward(mllm, batch, layer).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)
        assert [isinstance(each, KeptLayer) for each in cache.layers] == [index >= layer for index in range(LAYERS)]
