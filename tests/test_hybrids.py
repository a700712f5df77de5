"""Models some of whose layers carry a running state: linear attention, state spaces, convolutions.

A batch under exits against each row alone, computed layer by layer on a sequence from which what left is cut out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from families import IDS, IMAGE_TOKEN, VISION_START, VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_knockout import masked, naive_groups
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.modeling_outputs import ModelOutput

import dyvte
from analysis.statistics.bands import ImageBootstrap
from analysis.statistics.stages import stage_verdict
from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.mllm import MLLM

EXACT = 1e-4
WIDTH, LAYERS, NEW_TOKENS = 64, 4, 3
NO_SUCH_TOKEN = 10_000

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # longer than any sequence here, so that `_cut` knows a position from a feature
    "max_position_embeddings": 256,
    **IDS,
}


def _qwen3_5(layers: str) -> Any:
    text = CONFIG_MAPPING["qwen3_5_text"](
        **TEXT,
        num_hidden_layers=len(layers),
        layer_types=[{"a": "full_attention", "s": "linear_attention"}[each] for each in layers],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "partial_rotary_factor": 1.0,
        },
    )
    vision = CONFIG_MAPPING["qwen3_5_vision"](
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=2, out_hidden_size=WIDTH
    )
    return CONFIG_MAPPING["qwen3_5"](
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=VISION_START,
    )


def _lfm2_vl(layers: str) -> Any:
    text = CONFIG_MAPPING["lfm2"](
        **TEXT,
        num_hidden_layers=len(layers),
        layer_types=[{"a": "full_attention", "s": "conv"}[each] for each in layers],
    )
    vision = CONFIG_MAPPING["siglip2_vision_model"](
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=2
    )
    return CONFIG_MAPPING["lfm2_vl"](
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, projector_hidden_size=16
    )


CONFIGS = {"qwen3_5": _qwen3_5, "lfm2_vl": _lfm2_vl}
PATTERNS = ("ssas", "assa", "sasa")
"""Which layers attend (a) and which carry a state (s)."""


@cache
def model(family: str, layers: str = "ssas", attention: str = "sdpa") -> MLLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForImageTextToText.from_config(
            CONFIGS[family](layers), attn_implementation=attention, dtype=torch.float32
        )
        for parameter in made.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return dyvte.wrap(made)


@dataclass(frozen=True)
class Row:
    """A prompt: text, an image (or none), text."""

    before: int
    image: int
    after: int
    seed: int


class Features(tuple[Tensor, ...]):
    """Visual tokens image by image."""


def batch_of(mllm: MLLM, rows: Sequence[Row], side: str = "left") -> Batch:
    """Random ids and visual tokens; the same row is the same in every batch."""
    lines, features = [], []
    for row in rows:
        generator = torch.Generator().manual_seed(row.seed)
        words = torch.randint(3, 100, (row.before + row.after,), generator=generator).tolist()
        image = [VISION_START, *[IMAGE_TOKEN] * row.image] if row.image else []
        lines.append([*words[: row.before], *image, *words[row.before :]])
        if row.image:
            features.append(torch.randn(row.image, WIDTH, generator=generator))
    length = max(map(len, lines))
    padding = [[0] * (length - len(line)) for line in lines]
    pairs = list(zip(lines, padding, strict=True))
    ids = [pad + line if side == "left" else line + pad for line, pad in pairs]
    mask = [pad + [1] * len(line) if side == "left" else [1] * len(line) + pad for line, pad in pairs]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if mllm.model.config.model_type == "qwen3_5":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2 * row.image] for row in rows if row.image])
    if features:
        found = Features(features)
        output = ModelOutput(pooler_output=found, last_hidden_state=found, deepstack_features=[])
        inputs["mm_encoder_outputs"] = {"image": output}
    return mllm.batch(**inputs)


# ------------------------------------------------------------------------- the naive way


def _cut(value: Any, kept: Tensor, length: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_cut(each, kept, length) for each in value)
    for axis in range(value.ndim) if isinstance(value, Tensor) else ():
        if value.shape[axis] == length:
            value = value.index_select(axis, kept)
    return value


@torch.no_grad()
def alone(mllm: MLLM, batch: Batch, leaves: Sequence[int]) -> Tensor:
    """Logits [N, vocab] of one row whose n-th visual token is cut out of the sequence from layer `leaves[n]` on."""
    length = batch.layout.roles.shape[1]
    handles = []

    def shorten(kept: Tensor, whole: list[Tensor], module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        whole.append(args[0] if args else kwargs["hidden_states"])
        return _cut(args, kept, length), {name: _cut(value, kept, length) for name, value in kwargs.items()}

    def lengthen(kept: Tensor, whole: list[Tensor], module: Any, args: Any, output: Any) -> Any:
        states = whole.pop().clone()
        states[:, kept] = output[0] if isinstance(output, tuple) else output
        return (states, *output[1:]) if isinstance(output, tuple) else states

    for index, layer in enumerate(mllm.layers):
        kept = torch.ones(length, dtype=torch.bool)
        kept[batch.layout.visual[0]] = torch.tensor(leaves, dtype=torch.long) > index
        if not kept.all():
            places, whole = kept.nonzero()[:, 0], []
            handles.append(layer.register_forward_pre_hook(partial(shorten, places, whole), with_kwargs=True))
            handles.append(layer.register_forward_hook(partial(lengthen, places, whole)))
    try:
        return mllm.model(**batch, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


rows_strategy = st.lists(
    st.builds(Row, st.integers(1, 5), st.integers(0, 6), st.integers(1, 7), st.integers(0, 99)), min_size=1, max_size=3
)
each_family = pytest.mark.parametrize("family", CONFIGS)


@each_family
@settings(max_examples=8)
@given(
    layers=st.sampled_from(PATTERNS),
    attention=st.sampled_from(["sdpa", "eager"]),
    rows=rows_strategy,
    side=st.sampled_from(["left", "right"]),
    exits=st.lists(st.integers(0, LAYERS), min_size=3, max_size=3),
)
def test_rows_of_a_batch_leave_at_exits_of_their_own(
    family: str, layers: str, attention: str, rows: list[Row], side: str, exits: list[int]
) -> None:
    mllm = model(family, layers, attention)
    batch = batch_of(mllm, rows, side)
    with torch.no_grad(), dyvte.FixedExit(exits[: len(rows)])(mllm):
        found = mllm(**batch).logits[torch.arange(len(rows)), batch.layout.last_prompt]
    for row, k, logits in zip(rows, exits, found, strict=False):
        expected = alone(mllm, batch_of(mllm, [row]), [k] * row.image)[-1]
        torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)


@each_family
@settings(max_examples=6)
@given(
    layers=st.sampled_from(PATTERNS),
    rows=rows_strategy,
    side=st.sampled_from(["left", "right"]),
    tokens=st.sampled_from([None, 1]),
)
def test_sweep(family: str, layers: str, rows: list[Row], side: str, tokens: int | None) -> None:
    mllm = model(family, layers)
    sweep = dyvte.exit_sweep(mllm, batch_of(mllm, rows, side), branch_tokens=tokens)
    attends = torch.tensor([each == "a" for each in layers])
    assert torch.equal(~sweep.text_entropy[0, -1].isnan(), attends)
    for index, row in enumerate(rows):
        for k in range(LAYERS + 1):
            expected = alone(mllm, batch_of(mllm, [row]), [k] * row.image)[-1]
            torch.testing.assert_close(sweep.logits[index, k], expected, atol=EXACT, rtol=0)


@each_family
@pytest.mark.parametrize("k", [0, 1, 2, LAYERS])
def test_generation_is_recomputation(family: str, k: int) -> None:
    """Cached decoding of a batch, against each row's prompt and answer in one forward."""
    mllm, rows = model(family), [Row(2, 4, 3, 0), Row(3, 2, 6, 1), Row(2, 0, 4, 2)]
    batch = batch_of(mllm, rows)
    with dyvte.FixedExit([k, min(k + 1, LAYERS), k])(mllm):
        output = mllm.model.generate(
            **batch,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=NO_SUCH_TOKEN,
            pad_token_id=0,
            suppress_tokens=[IMAGE_TOKEN],
            return_dict_in_generate=True,
            output_logits=True,
        )
    for index, row in enumerate(rows):
        whole = mllm.append_answers(batch_of(mllm, [row]), output.sequences[index : index + 1, -NEW_TOKENS:])
        leaves = [min(k + (index == 1), LAYERS)] * row.image
        expected = alone(mllm, whole, leaves)[-NEW_TOKENS - 1 : -1]
        torch.testing.assert_close(torch.stack(output.logits)[:, index], expected, atol=EXACT, rtol=0)


@dataclass
class LeaveOneByOne(dyvte.Policy):
    """The n-th visual token of every row leaves before layer n."""

    def before_layer(self, layer: int, prefill: Any) -> None:
        visual = prefill.layout.visual
        prefill.drop(visual & (visual.cumsum(1) - 1 == layer))


@each_family
@pytest.mark.parametrize("layers", PATTERNS)
def test_some_tokens_stay(family: str, layers: str) -> None:
    mllm, rows = model(family, layers), [Row(2, 6, 3, 0), Row(3, 2, 6, 1)]
    batch = batch_of(mllm, rows)
    with torch.no_grad(), LeaveOneByOne()(mllm):
        found = mllm(**batch).logits[:, -1]
    for row, logits in zip(rows, found, strict=True):
        expected = alone(mllm, batch_of(mllm, [row]), list(range(row.image)))[-1]
        torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)


# ------------------------------------------------------------------------ looking, cutting


@each_family
def test_probe_is_nan_where_a_layer_does_not_attend(family: str) -> None:
    mllm = model(family, "sasa", "eager")
    batch = batch_of(mllm, [Row(2, 4, 3, 0), Row(3, 2, 6, 1)])
    with torch.no_grad():
        plain = mllm(**batch, output_attentions=True)
        with dyvte.AttentionProbe(mllm) as probe:
            watched = mllm(**batch)
    assert torch.equal(plain.logits, watched.logits)
    assert mllm.attention_layers == [1, 3]
    assert probe.stats.mass[:, [0, 2]].isnan().all()
    assert probe.stats.text_entropy.shape == (2, LAYERS, 4)
    last, visual = batch.layout.last_prompt, batch.layout.visual.float()
    for index, maps in zip([1, 3], plain.attentions, strict=True):
        of_last = maps[torch.arange(2), :, last]
        torch.testing.assert_close(probe.stats.received_last[:, index], of_last, atol=1e-5, rtol=0)
        instruction = (batch.layout.roles == 2).float()
        mass = torch.einsum("bq,bhqk,bk->bh", instruction, maps, visual) / instruction.sum(1, keepdim=True)
        torch.testing.assert_close(probe.stats.mass[:, index, :, 2, 1], mass, atol=1e-5, rtol=0)


@each_family
@settings(max_examples=4)
@given(
    layers=st.sampled_from(PATTERNS),
    rows=rows_strategy,
    side=st.sampled_from(["left", "right"]),
    path=st.sampled_from([("instruction", "visual"), ("last", "question"), ("visual", "visual")]),
    window=st.sampled_from([(0, 2), (1, 4), (0, 4), (1, 2)]),
    tokens=st.sampled_from([None, 1]),
)
def test_knockout_cuts_scores_where_there_are_some(
    family: str,
    layers: str,
    rows: list[Row],
    side: str,
    path: tuple[str, str],
    window: tuple[int, int],
    tokens: int | None,
) -> None:
    mllm = model(family, layers)
    batch = batch_of(mllm, rows, side)
    cut = dyvte.knockout(mllm, batch, paths=[path], windows=[window], branch_tokens=tokens)
    groups = naive_groups(mllm, batch)
    attending = [layer for layer in range(*window) if layers[layer] == "a"]
    expected = masked(mllm, batch, groups[path[0]], groups[path[1]], attending)
    at_end = expected[torch.arange(len(rows)), batch.layout.last_prompt]
    assert cut.logits is not None
    torch.testing.assert_close(cut.logits[:, 0, 0], at_end, atol=EXACT, rtol=0)


def state_layer_flops(mllm: MLLM, n: int) -> int:
    """Operations of a layer that carries a state on n positions, by hand from the sizes in its configuration."""
    config, layer = mllm.text_config, mllm.layers[0]
    mlp = sum(2 * n * each.weight.numel() for each in layer.modules() if type(each).__name__ == "Linear")
    if mllm.model.config.model_type == "lfm2_vl":  # in, out and MLP, and a convolution over n + k - 1 places
        return mlp + 2 * (n + config.conv_L_cache - 1) * WIDTH * config.conv_L_cache
    heads, key, value, chunk = (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        64,
    )
    mixed = 2 * config.linear_num_key_heads * key + heads * value
    kernel = config.linear_conv_kernel_dim
    conv = 2 * (n + kernel - 1) * mixed * kernel
    # Of one chunk: two products of keys with queries and keys, two triangular systems, the old state read twice, the
    # values of the chunk, the new state.
    products = 2 * 2 * chunk**2 * key + chunk**2 * (key + value)
    products += 2 * 2 * chunk * key * value + 2 * chunk**2 * value + 2 * chunk * key * value
    return mlp + conv + heads * -(-n // chunk) * products


@each_family
def test_flops_of_an_exit(family: str) -> None:
    """What leaves is not paid for any more, in layers that attend and in those that carry a state."""
    mllm, row = model(family, "sasa"), Row(2, 6, 3, 0)
    counts = [each.decoder for each in dyvte.exit_flops(mllm, batch_of(mllm, [row]))]
    saved = state_layer_flops(mllm, 2 + 1 + 6 + 3) - state_layer_flops(mllm, 2 + 1 + 3)
    assert counts[1] - counts[0] == counts[3] - counts[2] == saved > 0
    assert counts[2] - counts[1] == counts[4] - counts[3] > 0


def test_stages_are_looked_for_among_the_layers_that_attend() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.1, (60, 15))
    cross = np.repeat([1.0, 0.3, 0.8], 5) * noise
    plain = stage_verdict(cross, np.ones_like(cross), ImageBootstrap(range(60), 200))
    whole = np.full((60, 60), np.nan)
    whole[:, 3::4] = cross  # every fourth layer attends, as in Qwen3.5
    found = stage_verdict(whole, np.where(np.isnan(whole), np.nan, 1.0), ImageBootstrap(range(60), 200))
    assert plain.boundaries is not None
    assert plain.boundaries_ci is not None
    assert found.verdict == plain.verdict == "three_stage"
    assert found.boundaries == [4 * each + 3 for each in plain.boundaries]
    assert found.boundaries_ci == [[4 * each + 3 for each in pair] for pair in plain.boundaries_ci]


def test_padding_that_enters_a_state_is_refused() -> None:
    config = _lfm2_vl("sa")
    config.text_config.conv_bias = True
    mllm = dyvte.wrap(AutoModelForImageTextToText.from_config(config))
    with pytest.raises(UnsupportedError, match="adds a bias at padding"), dyvte.FixedExit(1)(mllm):
        pass


@pytest.mark.parametrize("policy", [dyvte.SkipAttention([0]), dyvte.FastV(layer=1, keep=0.5)])
def test_what_needs_attention_names_the_layers_that_attend(policy: dyvte.Policy) -> None:
    mllm = model("qwen3_5", "sasa")
    with pytest.raises(UnsupportedError, match=r"layer 0 .* does not attend: choose one of layers 1, 3"), policy(mllm):
        pass
