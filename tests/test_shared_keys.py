"""Layers that attend to the keys of an earlier layer (Gemma 3n, Gemma 4 E2B and E4B), under policies and the sweep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import masked_forward, with_generated
from test_knockout import masked, naive_groups
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dyvte import AttentionProbe, FixedExit, exit_sweep, knockout, logit_lens
from dyvte.batch import Batch
from dyvte.cost.exit_flops import exit_flops
from dyvte.cost.flops import plan_decoder_flops, prefill_flops
from dyvte.errors import UnsupportedError
from dyvte.gates.labels import plain_status
from dyvte.layout import INSTRUCTION, TokenLayout
from dyvte.loading import wrap
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill
from tests.zoo.specimens import Row, build_model, make_inputs

FAMILIES = ("gemma3n", "gemma4")
LAYERS, WINDOW = 6, 12
EXACT = 1e-4
KINDS = ["sliding_attention", "full_attention"]


@cache
def model(family: str, borrowing: int = 3, attention: str = "sdpa") -> MLLM:
    """Six layers, of which the last `borrowing` have no keys of their own; sliding windows are shorter than prompts."""
    text = {"num_hidden_layers": LAYERS, "layer_types": KINDS * (LAYERS // 2), "num_kv_shared_layers": borrowing}
    if family == "gemma3n":
        text["intermediate_size"] = [96] * LAYERS
    return wrap(build_model(family, attention, text_config=text))


def batch_of(
    mllm: MLLM, images: tuple[int, ...] = (4, 2, 0), seed: int = 0, before: int = 3, only: int | None = None
) -> Batch:
    """Rows with so many visual tokens, padded on the left; or only one of them."""
    generator = torch.Generator().manual_seed(seed)

    def words(number: int) -> list[int]:
        return torch.randint(3, 90, (number,), generator=generator).tolist()

    rows = [Row(words(before + 1), (1, count), words(5 + 2 * row), seed + row) for row, count in enumerate(images)]
    inputs = make_inputs(mllm.model, rows if only is None else rows[only : only + 1])
    features = inputs["mm_encoder_outputs"]["image"].pooler_output
    joint: Any = list(features)
    if mllm.model.config.model_type == "gemma3n":  # stacked, where beam search is to repeat them
        joint = (torch.stack if len({*map(len, features)}) == 1 else torch.cat)(joint)
    return mllm.batch(**{**inputs, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=joint)}})


@dataclass
class Leaving(Policy):
    """Row i loses the visual tokens at every `step`-th position before layer `layers[i]`."""

    layers: tuple[int, ...]
    step: int = 1
    bias: float = 0.0

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Drop, and from then on weigh the keys of images."""
        leaving = torch.tensor(self.layers) == layer
        places = torch.arange(prefill.kept.shape[1]) % self.step == 0
        prefill.drop(leaving[:, None] & places)
        if self.bias and leaving.any():
            prefill.key_bias = self.bias * prefill.layout.visual.float()


def hidden_by(policy: Leaving, batch: Batch) -> Batch:
    """The batch with only those positions as visual that `policy` takes out."""
    places = torch.arange(batch.layout.roles.shape[1]) % policy.step == 0
    stays = batch.layout.visual & ~places
    return Batch(dict(batch), TokenLayout(torch.where(stays, INSTRUCTION, batch.layout.roles)))


def generate(mllm: MLLM, batch: Batch, **kwargs: Any) -> Any:
    """Eight new tokens, so that sliding windows leave the image behind."""
    return mllm.model.generate(
        **batch,
        **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": [1000], "pad_token_id": 0} | kwargs,
        suppress_tokens=list(range(100, mllm.lm_head.weight.shape[0])),
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


policies = st.builds(
    Leaving, st.tuples(*[st.integers(0, LAYERS)] * 3), st.sampled_from([1, 1, 2]), st.sampled_from([0.0, 0.0])
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5)
@given(
    policy=policies,
    borrowing=st.sampled_from([2, 3]),
    images=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4)),
    before=st.integers(0, 4),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_each_row_equals_the_full_model_with_its_keys_masked(
    family: str, attention: str, policy: Leaving, borrowing: int, images: tuple[int, ...], before: int, seed: int
) -> None:
    mllm = model(family, borrowing, attention)
    batch = batch_of(mllm, images, seed, before)
    expected = masked_forward(mllm, hidden_by(policy, batch), list(policy.layers)).logits
    with policy(mllm):
        logits = mllm.model(**batch).logits
    text = batch.layout.text
    close(logits[text], expected[text])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(policy=policies, borrowing=st.sampled_from([2, 3]), bias=st.sampled_from([0.0, 1.5]))
@torch.no_grad()
def test_generation_goes_on_with_the_keys_that_stayed(
    family: str, policy: Leaving, borrowing: int, bias: float
) -> None:
    mllm = model(family, borrowing)
    batch, policy = batch_of(mllm), Leaving(policy.layers, policy.step, bias)
    with policy(mllm):
        cached = generate(mllm, batch)
        again = generate(mllm, batch, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    close(torch.stack(cached.logits), torch.stack(again.logits))
    if bias == 0:
        whole = with_generated(mllm, batch, cached.sequences[:, batch["input_ids"].shape[1] :])
        expected = masked_forward(mllm, hidden_by(policy, whole), list(policy.layers)).logits[:, -9:-1]
        close(torch.stack(cached.logits, 1), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beams_keep_the_keys_of_their_row(family: str) -> None:
    mllm, policy = model(family), Leaving((4, 4, 1, 1))  # transformers repeats rows before the prefill

    def beams(**kwargs: Any) -> Any:
        return generate(mllm, batch_of(mllm, (3, 3)), num_beams=2, **kwargs)

    with policy(mllm):
        cached, again = beams(), beams(use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    close(cached.sequences_scores, again.sequences_scores)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_in_a_batch_equals_the_row_alone(family: str) -> None:
    mllm, images = model(family), (4, 2, 3)
    batch, layers = batch_of(mllm, images), (1, 5, 3)
    with Leaving(layers)(mllm):
        together = mllm.model(**batch).logits
    for row, layer in enumerate(layers):
        alone = batch_of(mllm, images, only=row)
        with FixedExit(layer)(mllm):
            logits = mllm.model(**alone).logits
        text = alone.layout.text[0]
        close(together[row, ~batch.layout.padding[row]][text], logits[0, text])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2)
@given(
    borrowing=st.sampled_from([2, 3]),
    seed=st.integers(0, 99),
    before=st.integers(0, 4),
    at_once=st.sampled_from([None, 1]),
)
@torch.no_grad()
def test_the_sweep_equals_masked_recomputation(
    family: str, attention: str, borrowing: int, seed: int, before: int, at_once: int | None
) -> None:
    mllm = model(family, borrowing, attention)
    batch = batch_of(mllm, (4, 2, 0), seed, before)
    answers = torch.tensor([[5, 6, 7], [8, 9, -100], [10, -100, -100]])
    sweep = exit_sweep(mllm, batch, answers, branch_tokens=at_once, shared_image=[0, 1, 2])
    whole = mllm.append_answers(batch, answers)
    start = batch["input_ids"].shape[1]
    for k in range(LAYERS + 1):
        expected = masked_forward(mllm, whole, k).logits
        close(sweep.logits[:, k], expected[:, start - 1])
        nll = -expected[:, start - 1 : -1].log_softmax(-1).gather(2, answers.clamp(min=0)[..., None])[..., 0]
        valid = answers >= 0
        close(sweep.token_nll[:, k][valid], nll[valid])
    close(sweep.text_status, plain_status(mllm, batch))
    gaps = (sweep.logits[:2, 1:] - sweep.logits[:2, :-1]).abs().amax(-1)
    assert gaps.min() > 10 * EXACT  # every layer, borrowing ones too, sees the image


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_probe_sees_what_eager_attention_gives(family: str) -> None:
    mllm, eager = model(family), model(family, 3, "eager")
    batch = batch_of(mllm)
    expected = masked_forward(eager, batch_of(eager), LAYERS, keep_maps=True).maps.mean(2)
    with AttentionProbe(mllm, maps=True) as probe:
        generate(mllm, batch, max_new_tokens=1)  # Gemma 4 would run its last layers on the last token only
    real = ~batch.layout.padding
    assert probe.stats.maps is not None
    for row in range(len(real)):
        own = real[row]
        close(probe.stats.maps[row][:, own][:, :, own], expected[row][:, own][:, :, own])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_stays_with_its_block_and_can_be_used_again(family: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm, (4, 2))
    step = {
        "input_ids": torch.tensor([[7], [7]]),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1),
    }
    cache = DynamicCache(config=mllm.text_config)
    for layer in (LAYERS - 1, 2, LAYERS):
        cache.reset()
        with FixedExit(layer)(mllm):
            logits = mllm.model(**batch, past_key_values=cache).logits[:, -1]
            close(logits, masked_forward(mllm, batch, layer).logits[:, -1])
        if layer < LAYERS:
            with pytest.raises(RuntimeError, match="same `with policy"):
                mllm.model(**step, past_key_values=cache)
    mllm.model(**step, past_key_values=cache)  # nothing left the model


@pytest.mark.parametrize("layers", [(1, 5, 3), (LAYERS,) * 3], ids=str)
@torch.no_grad()
def test_a_cache_that_knows_no_config_serves_as_well(layers: tuple[int, ...]) -> None:
    mllm = model("gemma4")
    with Leaving(layers)(mllm):
        lazy, made = (generate(mllm, batch_of(mllm), past_key_values=each) for each in (DynamicCache(), None))
    close(torch.stack(lazy.logits), torch.stack(made.logits))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(
    borrowing=st.sampled_from([2, 3]),
    seed=st.integers(0, 99),
    side=st.sampled_from(["left", "right"]),
    path=st.sampled_from([("instruction", "visual"), ("visual", "visual"), ("last", "question"), ("system", "system")]),
    window=st.sampled_from([(1, 4), (3, 6), (4, 6), (2, 3)]),
    invert=st.booleans(),
    at_once=st.sampled_from([None, 1]),
)
@torch.no_grad()
def test_a_cut_equals_a_forward_with_edited_masks(
    family: str,
    borrowing: int,
    seed: int,
    side: str,
    path: tuple[str, str],
    window: tuple[int, int],
    invert: bool,
    at_once: int | None,
) -> None:
    """A layer that borrows keys is cut in its own window, and takes keys as they are in its own branch.

    Two windows part behind a layer that lends: both branches go on with its keys.
    """
    mllm, windows = model(family, borrowing), [(0, 2), (0, 6), window]
    batch = batch_of(mllm, (4, 2, 0), seed)
    batch = batch.right_padded() if side == "right" else batch
    cut = knockout(mllm, batch, paths=[path], windows=windows, invert=invert, branch_tokens=at_once)
    groups = naive_groups(mllm, batch)
    assert cut.logits is not None
    for place, (start, stop) in enumerate(windows):
        layers = [layer for layer in range(LAYERS) if (start <= layer < stop) != invert]
        expected = masked(mllm, batch, groups[path[0]], groups[path[1]], layers)
        close(cut.logits[:, 0, place], expected[torch.arange(3), batch.layout.last_prompt])


@torch.no_grad()
def test_a_cut_of_borrowed_keys_is_felt() -> None:
    """In the layers that borrow alone, too, and where a later pass starts among them."""
    mllm = model("gemma4")
    cut, again = (
        knockout(mllm, batch_of(mllm, (4, 2)), windows=[(3, 6), (5, 6)], shared_image=[0, 1], branch_tokens=tokens)
        for tokens in (None, 1)
    )
    assert cut.logits is not None
    assert again.logits is not None
    assert (cut.logits[:, 0] - cut.full_logits[:, None]).abs().amax(-1).min() > 100 * EXACT
    close(again.logits, cut.logits)


def test_replaced_keys_are_refused_in_one_line() -> None:
    mllm = model("gemma3n")
    with pytest.raises(UnsupportedError, match="layer 3 borrows its keys, so they cannot be replaced"):
        knockout(mllm, batch_of(mllm), windows=[(0, 1)], mode="mean")


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_cost_what_is_planned(family: str) -> None:
    """But for what the decoder does outside of its layers, which is the same under every exit."""
    mllm = model(family)
    batch = batch_of(mllm, (4,))
    text, visual = int(batch.layout.text.sum()), int(batch.layout.visual.sum())
    counted = exit_flops(mllm, batch)
    outside = set()
    for k in range(LAYERS + 1):
        with FixedExit(k)(mllm):
            assert prefill_flops(mllm, batch) == counted[k]
        outside.add(counted[k].decoder - plan_decoder_flops(mllm, [text + visual] * k + [text] * (LAYERS - k)))
    assert len(outside) == 1
    assert counted[LAYERS].decoder > counted[LAYERS - 1].decoder > counted[0].decoder


@torch.no_grad()
def test_the_lens_reads_all_streams() -> None:
    mllm = model("gemma3n")
    batch = batch_of(mllm)
    lens = logit_lens(mllm, batch, positions="last", top=1)
    logits = mllm.model(**batch).logits[:, -1]
    close(lens.probabilities[:, -1, 0, 0], logits.softmax(-1).amax(-1))
