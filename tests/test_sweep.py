"""exit_sweep: what one run per exit gives, from one pass, in every family."""

from __future__ import annotations

import functools
from functools import cache

import pytest
import torch
from families import EOS, FAMILIES, IMAGE_TOKEN, PAD, VOCABULARY, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import masked_forward
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    GemmaConfig,
    PaliGemmaConfig,
    SiglipVisionConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte import FixedExit, exit_sweep
from dyvte.batch import Batch
from dyvte.errors import ModelError, UnsupportedError
from dyvte.instrument.states import STATUS_PARTS, status_weights, text_status, token_status
from dyvte.instrument.sweep import ENTROPIES, ExitSweep, greedy_answer_ids
from dyvte.layout import TokenLayout
from dyvte.loading import wrap
from dyvte.mllm import MLLM

EXACT = 1e-4
LAYERS = 4


@cache
def model(family: str, attention: str = "sdpa") -> MLLM:
    return FAMILIES[family](0, num_layers=LAYERS, attn_implementation=attention)


def batch_of(mllm: MLLM, images: tuple[int, ...] = (1, 2, 0), side: str = "left", seed: int = 1) -> Batch:
    return random_batch(mllm, torch.Generator().manual_seed(seed), images, side)


def random_answers(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(3, 99, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return answers.masked_fill(torch.arange(length) >= lengths, -100)


@torch.no_grad()
def one_run_per_exit(mllm: MLLM, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
    """The fields of a sweep from L + 1 runs under FixedExit on the whole teacher-forced sequence."""
    whole = mllm.append_answers(batch, answers)
    rows = torch.arange(len(answers))[:, None]
    valid = answers != -100
    positions = (whole.layout.last_prompt[:, None] + torch.arange(answers.shape[1])).clamp(
        max=whole.layout.roles.shape[1] - 1
    )
    logits, argmax, nll = [], [], []
    for layer in range(mllm.num_layers + 1):
        with FixedExit(layer)(mllm):
            scores = mllm.model(**whole).logits[rows, positions]
            logits.append(mllm.model(**batch).logits[rows[:, 0], batch.layout.last_prompt])
        argmax.append(scores.argmax(-1).masked_fill(~valid, -100))
        token = -scores.log_softmax(-1).gather(-1, answers.clamp(min=0)[..., None])[..., 0]
        nll.append(token.masked_fill(~valid, torch.nan))
    token_argmax = torch.stack(argmax, 1)
    return {
        "logits": torch.stack(logits, 1),
        "token_argmax": token_argmax,
        "token_agree": (token_argmax == answers[:, None]) & valid[:, None],
        "agree": ((token_argmax == answers[:, None]) | ~valid[:, None]).all(-1),
        "token_nll": torch.stack(nll, 1),
        "nll": torch.stack(nll, 1).nanmean(-1),
    }


def assert_same(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    if expected.is_floating_point():
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, equal_nan=True)
    else:
        assert torch.equal(found, expected)


def assert_same_sweep(found: ExitSweep, expected: ExitSweep) -> None:
    for name in ExitSweep.__dataclass_fields__:
        assert_same(getattr(found, name), getattr(expected, name))


# ----------------------------------------------------------------- against one run per exit


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(
    images=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    attention=st.sampled_from(["sdpa", "eager"]),
    answer_length=st.integers(1, 4),
    branch_tokens=st.sampled_from([None, 1, 30]),
    seed=st.integers(0, 99),
)
def test_equals_one_run_per_exit(
    family: str,
    images: list[int],
    side: str,
    attention: str,
    answer_length: int,
    branch_tokens: int | None,
    seed: int,
) -> None:
    mllm = model(family, attention)
    batch = batch_of(mllm, tuple(images), side, seed)
    answers = random_answers(len(images), answer_length, seed)
    sweep = exit_sweep(mllm, batch, answers, branch_tokens=branch_tokens)
    for name, expected in one_run_per_exit(mllm, batch, answers).items():
        assert_same(getattr(sweep, name), expected)


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_text_status_is_that_of_a_plain_forward(family: str, side: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm, (2, 1, 0), side)
    states: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, output: states.append(output)) for layer in mllm.layers]
    mllm.model(**batch)
    for handle in handles:
        handle.remove()
    expected = torch.stack([text_status(each, batch.layout) for each in states], 1)
    assert_same(exit_sweep(mllm, batch).text_status, expected, 1e-5)
    weights = status_weights(batch.layout, STATUS_PARTS)
    expected = torch.stack([token_status(each, weights) for each in states], 1)
    if family != "qwen3_vl":  # DeepStack adds to visual positions after the layer
        assert_same(exit_sweep(mllm, batch, status_parts=STATUS_PARTS).text_status, expected, 1e-5)


def _keep_output(states: list[Tensor], module: torch.nn.Module, args: object, output: Tensor) -> None:
    states.append(output)


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_status_under_an_exit_is_that_of_a_model_with_masked_visual_keys(family: str, side: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm, (2, 1, 0), side)
    exits = [2, 0, LAYERS]
    found = exit_sweep(mllm, batch, status_of_exits=exits).exit_status
    assert found.shape == (3, 3, LAYERS, 2 * mllm.hidden_size)
    for place, exit_layer in enumerate(exits):
        states: list[Tensor] = []
        look = functools.partial(_keep_output, states)
        handles = [each.register_forward_hook(look) for each in mllm.layers]
        masked_forward(mllm, batch, exit_layer)
        for handle in handles:
            handle.remove()
        assert_same(found[:, place], torch.stack([text_status(each, batch.layout) for each in states], 1))
    assert exit_sweep(mllm, batch).exit_status.shape == (3, 0, LAYERS, 2 * mllm.hidden_size)
    with pytest.raises(ValueError, match="give exit layers in 0"):
        exit_sweep(mllm, batch, status_of_exits=[LAYERS + 1])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(max_examples=1)
@given(seed=st.integers(0, 99), side=st.sampled_from(["left", "right"]))
def test_entropies_are_those_of_attention_maps(family: str, attention: str, seed: int, side: str) -> None:
    eager = model(family, "eager")
    batch = batch_of(eager, (1, 2, 0), side, seed)
    sweep = exit_sweep(model(family, attention), batch)
    found = torch.stack([getattr(sweep, name) for name in ENTROPIES], -1)
    expected = torch.full_like(found, torch.nan)
    for exit_layer in range(LAYERS + 1):
        maps = masked_forward(eager, batch, exit_layer, keep_maps=True).maps
        entropies = naive_entropies(eager, maps.double(), batch.layout)
        first = exit_layer % (LAYERS + 1) if exit_layer < LAYERS else 0
        expected[:, exit_layer, first:] = entropies[:, first:].float()
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0, equal_nan=True)


def naive_entropies(mllm: MLLM, maps: Tensor, layout: TokenLayout) -> Tensor:
    """[B, L, 4] by the definitions, from maps [B, L, H, N, N]."""
    result = torch.full((*maps.shape[:2], 4), torch.nan, dtype=maps.dtype)
    position = torch.arange(maps.shape[-1])
    for row in range(len(maps)):
        for layer in range(maps.shape[1]):
            per_query: list[list[Tensor]] = [[], [], [], []]
            for query in layout.text_status_positions[row].nonzero().flatten():
                seen = layout.text[row] & (position <= query)
                kinds = getattr(mllm.text_config, "layer_types", None)
                if kinds and kinds[layer] == "sliding_attention":
                    seen = seen & (position > query - mllm.text_config.sliding_window)
                for variant, keys in enumerate((seen, seen & (position != layout.first_token[row]))):
                    if not keys.any():
                        continue
                    chosen = maps[row, layer, :, query, keys]
                    chosen = chosen / chosen.sum(-1, keepdim=True)
                    entropy = torch.special.entr(chosen).sum(-1).mean()
                    per_query[2 * variant].append(entropy)
                    if keys.sum() > 1:
                        per_query[2 * variant + 1].append(entropy / keys.sum().double().log())
            result[row, layer] = torch.stack([torch.stack(values).mean() for values in per_query])
    return result


def test_without_answers_the_next_token_is_compared() -> None:
    mllm = model("llava")
    sweep = exit_sweep(mllm, batch_of(mllm), entropy=False)
    full = sweep.logits[:, -1].argmax(-1)
    assert torch.equal(sweep.answer_ids, full[:, None])
    assert torch.equal(sweep.agree, sweep.logits.argmax(-1) == full[:, None])
    assert_same(sweep.nll, -sweep.logits.log_softmax(-1)[torch.arange(3), :, full])
    assert sweep.text_entropy.isnan().all()


def test_answers_inside_the_batch_are_scored() -> None:
    mllm = model("qwen2_5_vl")
    batch, answers = batch_of(mllm, (1, 1, 0), "right"), random_answers(3, 3)
    assert_same_sweep(exit_sweep(mllm, mllm.append_answers(batch, answers)), exit_sweep(mllm, batch, answers))


def test_agreement_says_whether_greedy_decoding_gives_the_same_answer() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1, 1, 1), seed=5)
    # Make the end token likely, so that answers end early at different lengths.
    answers = greedy_answer_ids(mllm, batch, max_new_tokens=4)
    sweep = exit_sweep(mllm, batch, answers)
    seen = set()
    for layer in range(LAYERS + 1):
        with FixedExit(layer)(mllm):
            under_exit = greedy_answer_ids(mllm, batch, max_new_tokens=4)
        for row in range(3):
            same = under_exit[row].tolist() == answers[row].tolist()
            assert bool(sweep.agree[row, layer]) == same
            seen.add(same)
    assert sweep.agree[:, -1].all()
    assert seen == {True, False}


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_batch_equals_its_rows_one_by_one(family: str) -> None:
    mllm = model(family)
    batch, answers = batch_of(mllm, (1, 1)), random_answers(2, 2)
    together = exit_sweep(mllm, batch, answers)
    for row in range(2):
        kept = ~batch.layout.padding[row]
        inputs = {}
        for name, value in batch.items():
            of_tokens = value.shape == batch["input_ids"].shape
            inputs[name] = value[row : row + 1, kept] if of_tokens else value[row : row + 1]
        alone = exit_sweep(mllm, mllm.batch(**inputs), answers[row : row + 1])
        for name in ExitSweep.__dataclass_fields__:
            assert_same(getattr(together, name)[row], getattr(alone, name)[0])


# ------------------------------------------------------------------------ shared images


def same_image_batch(mllm: MLLM, images: tuple[int, ...], side: str) -> Batch:
    """A row for every entry of `images`; equal numbers show the same (number of) images; 0 is a row without."""
    generator = torch.Generator().manual_seed(0)
    rows, pixels = [], []
    for number in images:
        of_image = random_batch(
            mllm, torch.Generator().manual_seed(number), (min(number, 2),), "right", question_length=1
        )
        question = torch.randint(3, 99, (int(torch.randint(2, 6, (), generator=generator)),), generator=generator)
        rows.append(torch.cat([of_image["input_ids"][0], question]))
        pixels.append({name: value for name, value in of_image.items() if value.shape != of_image["input_ids"].shape})
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), PAD)
    for row, ids in enumerate(rows):
        input_ids[row, slice(length - len(ids), None) if side == "left" else slice(len(ids))] = ids
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
    for name in next(each for each in pixels if each):
        values = [each[name] for each in pixels if each]
        if mllm.model.config.model_type == "idefics3":
            most = max(value.shape[1] for value in values)
            blank = torch.zeros_like(values[0][:, :1])
            values = [each.get(name, blank[:, :0]) for each in pixels]
            values = [torch.cat([each, *[blank] * (most - each.shape[1])], dim=1) for each in values]
        inputs[name] = torch.cat(values)
    marks = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
    if mllm.model.config.model_type in marks:
        inputs[marks[mllm.model.config.model_type]] = (input_ids == IMAGE_TOKEN).int()
    return mllm.batch(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_may_share_the_pass_over_their_image(family: str, side: str) -> None:
    mllm = model(family)
    images = (2, 1, 0, 2, 2, 1)
    batch, answers = same_image_batch(mllm, images, side), random_answers(len(images), 3)
    shared = exit_sweep(mllm, batch, answers, shared_image=images, status_parts=STATUS_PARTS)
    apart = exit_sweep(mllm, batch, answers, status_parts=STATUS_PARTS)
    if family == "qwen3_vl":  # DeepStack's additions after a layer belong to the next layer's input
        half = shared.text_status.shape[-1] // 2
        shared.text_status, apart.text_status = shared.text_status[..., :half], apart.text_status[..., :half]
    assert_same_sweep(shared, apart)


def test_a_shared_image_is_run_once() -> None:
    mllm = model("llava")
    batch = same_image_batch(mllm, (1,) * 6, "left")
    tokens: list[int] = []
    handle = mllm.layers[0].mlp.register_forward_hook(
        lambda module, args, output: tokens.append(output[..., 0].numel())
    )
    exit_sweep(mllm, batch, entropy=False)
    apart = tokens[0]
    tokens.clear()
    exit_sweep(mllm, batch, shared_image=[0] * 6, entropy=False)
    handle.remove()
    prefix = int(batch.right_padded().layout.visual[0].nonzero().max()) + 1
    assert apart == batch["input_ids"].numel()
    assert tokens[0] == prefix
    assert sum(tokens[:2]) < apart / 2


def test_rows_that_do_not_share_an_image_are_refused() -> None:
    mllm = model("llava")
    batch = same_image_batch(mllm, (1, 1, 2), "left")
    with pytest.raises(ValueError, match=r"rows 0 and 2 .* prompts differ"):
        exit_sweep(mllm, batch, shared_image=[0, 0, 0])
    other = Batch({**batch, "pixel_values": batch["pixel_values"].flip(0)}, batch.layout)
    with pytest.raises(ValueError, match=r"rows 0 and 1 .* visual tokens differ"):
        exit_sweep(mllm, other, shared_image=[0, 0, 1])
    with pytest.raises(ValueError, match="2 entries for 3 rows"):
        exit_sweep(mllm, batch, shared_image=[0, 0])


# --------------------------------------------------------------------------- prefix-LM


@cache
def paligemma(attention: str = "sdpa") -> MLLM:
    """All tokens of the prompt see each other, in both directions."""
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        text_config=GemmaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=PAD,
            eos_token_id=EOS,
        ).to_dict(),
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            vision_use_head=False,
        ).to_dict(),
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return wrap(model)


def paligemma_batch(mllm: MLLM, question_lengths: tuple[int, ...], same_image: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in question_lengths:
        text = torch.randint(3, 99, (length,), generator=generator)
        rows.append(torch.cat([torch.tensor([5, 6, *[IMAGE_TOKEN] * 4]), text]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")
    count = 1 if same_image else len(rows)
    return mllm.batch(
        input_ids=ids,
        attention_mask=(ids != PAD).long(),
        token_type_ids=torch.zeros_like(ids),
        pixel_values=torch.randn(count, 3, 8, 8, generator=generator).expand(len(rows), -1, -1, -1),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefix_lm_attention_is_noticed(attention: str) -> None:
    mllm = paligemma(attention)
    batch, answers = paligemma_batch(mllm, (5, 3), same_image=True), random_answers(2, 3)
    expected = one_run_per_exit(mllm, batch, answers)
    # The image sees the question here, so nothing can be shared; text before the image sees the image.
    for sweep in (exit_sweep(mllm, batch, answers), exit_sweep(mllm, batch, answers, shared_image=[0, 0])):
        for name, value in expected.items():
            assert_same(getattr(sweep, name), value)
    gap = (expected["logits"][:, 0] - masked_forward(mllm, batch, 0).logits[:, -1]).abs().max()
    assert gap < EXACT


def test_prefix_lm_answers_are_causal() -> None:
    """The first token of a teacher-forced answer must not see the second."""
    mllm = paligemma()
    batch = paligemma_batch(mllm, (4,))
    first, second = (exit_sweep(mllm, batch, torch.tensor([[7, last, 9]])) for last in (8, 50))
    assert_same(first.token_nll[:, :, 0], second.token_nll[:, :, 0], 1e-6)
    assert not torch.allclose(first.token_nll[:, :, 2], second.token_nll[:, :, 2], atol=EXACT)


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (torch.tensor([[5, 6], [-100, -100], [5, -100]]), "answer of row 1 is empty"),
        (torch.tensor([[5, 6], [-100, 7], [5, -100]]), "padded on the right"),
        (torch.tensor([[5, 6, 7], [5, -100, 7], [5, -100, -100]]), "padded on the right"),
        (torch.tensor([[5, 6]]), r"must be \[3, A\]"),
    ],
)
def test_answers_that_do_not_fit(answers: Tensor, reason: str) -> None:
    mllm = model("llava")
    with pytest.raises(ValueError, match=reason):
        exit_sweep(mllm, batch_of(mllm), answers)


def test_answers_given_twice() -> None:
    mllm = model("llava")
    batch = mllm.append_answers(batch_of(mllm), random_answers(3, 2))
    with pytest.raises(ValueError, match="holds answers already"):
        exit_sweep(mllm, batch, random_answers(3, 2))


def test_nan_logits_are_named() -> None:
    mllm = FAMILIES["llava"](1)
    batch = batch_of(mllm, (1, 1))
    with torch.no_grad():
        mllm.model.get_input_embeddings().weight[int(batch["input_ids"][1, -1])] = torch.nan
    with pytest.raises(ModelError, match="row 1 under exit 0"):
        exit_sweep(mllm, batch)


@pytest.mark.filterwarnings("error")
def test_leaves_nothing_behind_and_runs_outside_of_policies_only() -> None:
    mllm = model("llava")
    batch = batch_of(mllm)
    with FixedExit(1)(mllm), pytest.raises(UnsupportedError, match="outside"):
        exit_sweep(mllm, batch)
    with pytest.raises(RuntimeError):
        exit_sweep(mllm, Batch({**batch, "pixel_values": batch["pixel_values"][:, :2]}, batch.layout))
    exit_sweep(mllm, batch)
    assert not any("forward" in layer.__dict__ for layer in mllm.layers)
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
