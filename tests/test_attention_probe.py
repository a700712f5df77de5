"""AttentionProbe: exact, invisible to the model, leaves nothing behind."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE_TOKEN, build, random_batch, with_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForImageTextToText, Gemma2Config, LlavaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte import AttentionProbe, FixedExit
from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.instrument.attention import MEASURES
from dyvte.instrument.role_attention import ENTROPIES, Geometry, Groups, allowed_pairs, role_sums, score_rows
from dyvte.layout import ROLES, TokenLayout
from dyvte.loading import wrap
from dyvte.mllm import MLLM

EXACT_MASS, EXACT_ENTROPY = 1e-5, 1e-4


@torch.no_grad()
def eager_maps(mllm: MLLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """What users pay for today: maps [B, L, H, N, N] and the pairs [B, L, N, N] that the masks allow."""
    masks: list[Tensor] = []

    def remember(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in mllm.attentions]
    mllm.model.set_attn_implementation("eager")
    try:
        maps = torch.stack(mllm.model(**batch, output_attentions=True, use_cache=False).attentions, dim=1)
    finally:
        mllm.model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    allowed = torch.stack([mask.expand(maps.shape[0], 1, -1, -1)[:, 0] == 0 for mask in masks], dim=1)
    return maps, allowed


def reference(maps: Tensor, allowed: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """The definitions, one sample and layer at a time, in float64."""
    shape = batch, num_layers, _ = maps.shape[:3]
    out = {name: torch.full((*shape, 4, 4), torch.nan, dtype=torch.float64) for name in MEASURES}
    out |= {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in ENTROPIES}
    for b in range(batch):
        sink = int(layout.first_token[b])
        for layer in range(num_layers):
            full, pairs = maps[b, layer].double(), allowed[b, layer]  # [H, N, N] and [N, N]
            for suffix in ("", "_no_sink"):
                p, may = full.clone(), pairs.clone()
                if suffix:
                    p[:, :, sink], may[:, sink] = 0, False
                for a in range(4):
                    queries = (layout.roles[b] == a) & may.any(1)
                    for c in range(4):
                        keys = layout.roles[b] == c
                        if suffix:
                            keys[sink] = False
                        if not queries.any() or not keys.any():
                            continue
                        mass = p[:, queries][:, :, keys].sum(2)
                        count = may[queries][:, keys].sum(1)
                        uniform = (count / may[queries].sum(1)).mean()
                        ratio = mass.sum(1) / p[:, queries].sum((1, 2))  # of sums: with the sink each query gives 1
                        out["mass" + suffix][b, layer, :, a, c] = ratio
                        out["mean_score" + suffix][b, layer, :, a, c] = ratio * queries.sum() / count.sum()
                        out["enrichment" + suffix][b, layer, :, a, c] = ratio / uniform
            question = layout.text_status_positions[b]
            rows, may = full[:, question], pairs[question]
            out["total_entropy"][b, layer] = torch.special.entr(rows).sum(2).mean(1)
            for suffix in ("", "_no_sink"):
                text = layout.text[b].clone()
                if suffix:
                    text[sink] = False
                restricted = rows[:, :, text] / rows[:, :, text].sum(2, keepdim=True)
                entropy, count = torch.special.entr(restricted).sum(2), may[:, text].sum(1)
                out["text_entropy" + suffix][b, layer] = entropy[:, count > 0].mean(1)
                normalised = (entropy / count.log())[:, count > 1].mean(1)
                out["text_entropy_normalised" + suffix][b, layer] = normalised
    return out


MODELS: dict[str, MLLM] = {}


def model_of(family: str) -> MLLM:
    if family not in MODELS:
        MODELS[family] = FAMILIES[family](num_layers=2)
    return MODELS[family]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    num_images=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    padding_side=st.sampled_from(["left", "right"]),
    answer_length=st.integers(0, 3),
    system_length=st.integers(0, 4),
)
def test_equals_eager_attention_maps(
    family: str, seed: int, num_images: list[int], padding_side: str, answer_length: int, system_length: int
) -> None:
    mllm = model_of(family)
    batch = random_batch(
        mllm,
        torch.Generator().manual_seed(seed),
        num_images=num_images,
        padding_side=padding_side,
        system_length=system_length,
    )
    layout = with_answer(mllm, batch, answer_length)
    with torch.no_grad(), AttentionProbe(mllm, layout=layout, maps=True) as probe:
        mllm.model(**batch)
    stats = probe.stats
    maps, allowed = eager_maps(mllm, batch)
    expected = reference(maps, allowed, layout)
    for name, value in expected.items():
        found = getattr(stats, name).double()
        if name in MEASURES:
            assert torch.equal(found.isnan(), value.isnan()), name
        tolerance = EXACT_MASS if name in MEASURES else EXACT_ENTROPY
        torch.testing.assert_close(found, value, atol=tolerance, rtol=1e-5, equal_nan=True)
    real = ~layout.padding
    torch.testing.assert_close(
        stats.maps.transpose(1, 2)[real], maps.mean(2).transpose(1, 2)[real], atol=EXACT_MASS, rtol=0
    )
    row = torch.arange(len(num_images))
    torch.testing.assert_close(
        stats.received_last, maps.permute(0, 3, 1, 2, 4)[row, layout.last_prompt], atol=EXACT_MASS, rtol=0
    )
    for b in range(len(num_images)):
        torch.testing.assert_close(
            stats.received_instruction[b],
            maps[b][:, :, layout.instruction[b]].mean(2),
            atol=EXACT_MASS,
            rtol=0,
            equal_nan=True,
        )


# ------------------------------------------------------------- the model does not notice


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_bit_identical(family: str, attn_implementation: str) -> None:
    mllm = build(family, num_layers=2, attn_implementation=attn_implementation)
    for padding_side in ("left", "right"):
        batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 2, 0), padding_side)
        with torch.no_grad():
            plain = mllm.model(**batch, output_hidden_states=True)
            with AttentionProbe(mllm, maps=True) as probe:
                probed = mllm.model(**batch, output_hidden_states=True)
        assert torch.equal(plain.logits, probed.logits)
        for before, after in zip(plain.hidden_states, probed.hidden_states, strict=True):
            assert torch.equal(before, after)
        assert len(probe.history) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_models_give_the_same_statistics(family: str) -> None:
    stats = []
    for attn_implementation in ("sdpa", "eager"):
        mllm = build(family, num_layers=2, attn_implementation=attn_implementation)
        batch = random_batch(mllm, torch.Generator().manual_seed(0), (2, 1), "left")
        with AttentionProbe(mllm) as probe, torch.no_grad():
            mllm.model(**batch)
        stats.append(probe.stats.to_frame(by_head=True))
    torch.testing.assert_close(
        torch.tensor(stats[0].to_numpy()), torch.tensor(stats[1].to_numpy()), atol=1e-4, rtol=1e-4, equal_nan=True
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_unchanged_and_gives_one_prefill(family: str) -> None:
    mllm = model_of(family)
    batch = random_batch(mllm, torch.Generator().manual_seed(3), (1, 0, 2), "right")
    plain = mllm.generate(batch, max_new_tokens=5)
    with AttentionProbe(mllm) as alone, torch.no_grad():
        mllm.model(**batch.left_padded())
    with AttentionProbe(mllm) as probe:
        assert mllm.generate(batch, max_new_tokens=5) == plain
    assert len(probe.history) == 1
    torch.testing.assert_close(probe.stats.mass[:, :, :, :3], alone.stats.mass[:, :, :, :3], equal_nan=True)


# ------------------------------------------------------------------ nothing stays behind


def attention_functions(mllm: MLLM) -> list[Any]:
    modules = {type(module).__module__ for module in mllm.attentions}
    return [ALL_ATTENTION_FUNCTIONS["sdpa"], *(sys.modules[name].eager_attention_forward for name in sorted(modules))]


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_leaves_nothing_behind_on_any_way_out(attn_implementation: str) -> None:
    mllm = build("llava", num_layers=2, attn_implementation=attn_implementation)
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    before = attention_functions(mllm), hooks_of(mllm.model)

    def untouched() -> bool:
        overridden = "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping
        return before == (attention_functions(mllm), hooks_of(mllm.model)) and not overridden

    assert untouched()

    with AttentionProbe(mllm):
        assert not untouched()
    assert untouched()
    with pytest.raises(ZeroDivisionError), AttentionProbe(mllm):
        raise ZeroDivisionError
    assert untouched()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = mllm.layers[1].register_forward_hook(fail)
    probe = AttentionProbe(mllm)
    with probe:
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            mllm.model(**batch)
        assert probe.history == []  # an unfinished pass is no measurement
        handle.remove()
        with torch.no_grad():
            mllm.model(**batch)
        assert len(probe.history) == 1
    assert untouched()


def test_probes_nest_and_end_in_any_order() -> None:
    mllm = model_of("llava")
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    outer, inner = AttentionProbe(mllm), AttentionProbe(mllm)
    with torch.no_grad():
        outer.__enter__()
        mllm.model(**batch)
        inner.__enter__()
        mllm.model(**batch)
        outer.__exit__(None, None, None)
        mllm.model(**batch)
        inner.__exit__(None, None, None)
        mllm.model(**batch)
    assert (len(outer.history), len(inner.history)) == (2, 2)
    assert torch.equal(outer.stats.text_entropy, inner.stats.text_entropy)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa


def test_a_probe_is_not_entered_twice() -> None:
    probe = AttentionProbe(model_of("llava"))
    with probe, pytest.raises(RuntimeError, match="active already"), probe:
        pass


def test_other_models_and_copies_are_not_seen() -> None:
    mllm, other = model_of("llava"), FAMILIES["llava"](num_layers=2)
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    with AttentionProbe(mllm) as probe, torch.no_grad():
        clone = copy.deepcopy(mllm.model)
        clone(**batch)
        other.model(**batch)
    assert probe.history == []
    with torch.no_grad():
        clone(**batch)


# --------------------------------------------------------------------------- refusals


def test_needs_token_ids() -> None:
    mllm = model_of("llava")
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    embeddings = mllm.model.get_input_embeddings()(batch["input_ids"])
    with AttentionProbe(mllm), torch.no_grad():
        with pytest.raises(UnsupportedError, match="pass input_ids"):
            mllm.model(inputs_embeds=embeddings)
        with pytest.raises(UnsupportedError, match=r"outside of LlavaForConditionalGeneration\.forward"):
            mllm.decoder(inputs_embeds=embeddings)


def test_refuses_a_layer_that_it_cannot_see() -> None:
    mllm = FAMILIES["llava"](num_layers=3)
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    blind = mllm.attentions[1]
    forward = blind.forward
    blind.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)  # type: ignore
    with AttentionProbe(mllm), torch.no_grad(), pytest.raises(UnsupportedError, match="nothing of decoder layer 1"):
        mllm.model(**batch)
    blind.forward = forward


def test_refuses_a_layout_of_another_shape() -> None:
    mllm = model_of("llava")
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    layout = TokenLayout(batch.layout.roles[:, 1:])
    with AttentionProbe(mllm, layout=layout), torch.no_grad(), pytest.raises(ValueError, match="layout is for inputs"):
        mllm.model(**batch)


def test_refuses_to_measure_under_an_exit() -> None:
    mllm = model_of("llava")
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    with AttentionProbe(mllm), FixedExit(layer=1)(mllm), pytest.raises(UnsupportedError, match="a policy or a sweep"):
        mllm.model(**batch)


def test_stats_before_any_prefill() -> None:
    with pytest.raises(RuntimeError, match="no prefill yet"):
        _ = AttentionProbe(model_of("llava")).stats


# ----------------------------------------------------------------------- other attention


def test_soft_capped_attention() -> None:
    """Gemma 2 caps its scores and runs eager; its own maps are the reference."""
    config = build("llava").model.config
    text = Gemma2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_logit_softcapping=2.0,
        pad_token_id=0,
    )
    model = AutoModelForImageTextToText.from_config(
        LlavaConfig(text_config=text, vision_config=config.vision_config, image_token_index=IMAGE_TOKEN),
        attn_implementation="eager",
    )
    mllm = wrap(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    batch = random_batch(mllm, torch.Generator().manual_seed(0))
    with AttentionProbe(mllm) as probe, torch.no_grad():
        maps = torch.stack(mllm.model(**batch, output_attentions=True).attentions, dim=1)
    layout = batch.layout
    for row in range(2):
        mass = maps[row][:, :, layout.instruction[row]][..., layout.visual[row]].sum(-1).mean(-1)
        torch.testing.assert_close(probe.stats.mass[row, :, :, 2, 1], mass, atol=EXACT_MASS, rtol=0)


def test_scores_are_computed_in_float32_for_half_precision_models() -> None:
    mllm = FAMILIES["llava"](num_layers=2)
    mllm.model.to(torch.bfloat16)
    batch = mllm.batch(**random_batch(mllm, torch.Generator().manual_seed(0)))
    with AttentionProbe(mllm) as probe, torch.no_grad():
        mllm.model(**batch)
    total = probe.stats.mass.nansum(-1)
    present = ~probe.stats.mass.isnan().all(-1)
    torch.testing.assert_close(total[present], torch.ones_like(total[present]), atol=1e-5, rtol=0)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    window=st.none() | st.integers(1, 8),
    causal=st.booleans(),
    softcap=st.none() | st.floats(0.5, 5),
)
def test_flash_attention_masks(seed: int, window: int | None, causal: bool, softcap: float | None) -> None:
    """Flash attention gets a padding mask, a flag and a window instead of a mask of pairs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 3, (2, 12), generator=generator)
    padding = torch.arange(12) < torch.tensor([12, 9])[:, None]
    layout = TokenLayout.from_input_ids(ids, padding, [1])
    query, key = torch.randn(2, 2, 4, 12, 8, generator=generator)
    allowed, bias = allowed_pairs(padding, 12, causal, window, query.device)
    assert allowed is not None
    assert bias is None
    geometry = Geometry.of(Groups.of(layout), allowed, None, num_heads=4)
    sums = role_sums(score_rows(query, key[:, :2], 0.5, softcap, geometry), geometry, 4)

    scores = query @ key[:, :2].repeat_interleave(2, dim=1).transpose(2, 3) * 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for q in range(12):
        for k in range(12):
            outside = (causal and k > q) or (window is not None and q - k >= window)
            hidden = ~padding[:, k] | outside
            scores[:, :, q, k] = torch.where(hidden[:, None], -torch.inf, scores[:, :, q, k])
    attention = scores.softmax(-1).nan_to_num(0.0)  # padding queries see nothing
    visual = layout.visual.float()
    expected = torch.einsum("bq,bhqk,bk->bh", visual, attention, visual)
    torch.testing.assert_close(sums.probability[:, :, 1, 1], expected, atol=1e-4, rtol=1e-4)
    # Here the sink may be a visual token; then it is none of the text keys.
    of_text = attention * layout.text[:, None, None]
    entropy = torch.special.entr(of_text / of_text.sum(-1, keepdim=True).clamp_min(1e-30)).sum(-1)
    expected = torch.einsum("bq,bhq->bh", layout.text_status_positions.float(), entropy)
    torch.testing.assert_close(sums.entropy[:, :, 1], expected, atol=1e-4, rtol=1e-4)


def test_additive_masks_keep_their_bias() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2, 0] = -1.5
    mask = mask.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
    allowed, bias = allowed_pairs(mask, 4, True, None, mask.device)
    assert allowed is not None
    assert bias is not None
    assert torch.equal(allowed[0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert bias[0, 0].nonzero().tolist() == [[2, 0]]


# ------------------------------------------------------------------------------- tables


def test_frame_is_the_mean_over_heads_of_the_head_frame() -> None:
    mllm = model_of("qwen2_5_vl")
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 2))
    with AttentionProbe(mllm) as probe, torch.no_grad():
        mllm.model(**batch)
    stats = probe.stats
    frame, by_head = stats.to_frame(), stats.to_frame(by_head=True)
    assert len(frame) == 2 * mllm.num_layers
    assert len(by_head) == 2 * mllm.num_layers * mllm.num_heads
    means = by_head.drop(columns="head").groupby(["sample", "layer"], as_index=False).mean()
    for column in frame.columns:
        if "_no_sink" not in column or "entropy" in column:  # those without the sink are ratios of sums: see below
            assert frame[column].to_numpy() == pytest.approx(means[column].to_numpy(), rel=1e-5, nan_ok=True), column
    by_hand = (stats.cross_queries[..., 3, 1] * stats.not_on_sink[..., 4]).sum(-1) / stats.not_on_sink[..., 4].sum(-1)
    assert frame["cross_mass_no_sink"].to_numpy() == pytest.approx(by_hand.flatten().numpy(), rel=1e-5)
    for query in ROLES:  # what is not on the sink is on one of the roles
        masses = frame[[f"mass_no_sink_{query}_{key}" for key in ROLES]].sum(axis=1, min_count=1).dropna()
        assert masses.to_numpy() == pytest.approx(1.0, abs=1e-5)
    assert frame["cross_mass"][0] == pytest.approx(stats.mass[0, 0, :, 2, 1].mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="unknown curve"):
        stats.curve("sideways")


def test_a_head_that_looks_at_the_sink_counts_as_little_as_it_looks_elsewhere() -> None:
    layout = TokenLayout.from_input_ids(torch.tensor([[2, 1, 1, 2, 2, 2]]), None, [1])
    geometry = Geometry.of(Groups.of(layout), None, None, num_heads=2)
    rows = torch.zeros(1, 2, 6, 6)
    rows[:, 0, 3:, 0], rows[:, 0, 3:, 1] = 0.99, 0.01  # asleep: all but nothing on the sink, the rest on the image
    rows[:, 1, 3:, 3] = 1.0  # awake, and looks at the text
    sums = role_sums(lambda block: rows[:, :, block.rows, block.columns], geometry, 2)
    of_instruction = sums.probability_no_sink[0, :, 2]  # [H, R]
    assert float(of_instruction[:, 1].sum() / of_instruction.sum()) == pytest.approx(
        0.01 / 1.01
    )  # the mean of renormalised heads would say a half


def test_roles_without_tokens_are_nan() -> None:
    mllm = model_of("llava")
    batch = random_batch(mllm, torch.Generator().manual_seed(0), (1, 0))
    with AttentionProbe(mllm) as probe, torch.no_grad():
        mllm.model(**batch)
    absent = probe.stats.mass.isnan().all(dim=(1, 2))
    present = [[1, 1, 1, 0], [0, 0, 1, 0]]  # roles of the two rows, in the order of ROLES
    expected = [[[not (a and b) for b in row] for a in row] for row in present]
    assert absent.tolist() == expected


def test_statistics_without_the_sink_stay_exact_where_the_sink_takes_nearly_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.from_input_ids(torch.tensor([[2, 2, 1, 1, 1, 1, 2, 2, 2]]), None, [1])
    query, key = torch.randn(2, 1, 2, 9, 8, generator=generator)
    query[..., 0], key[..., 0] = 1.0, 0.0
    key[:, :, 0, 0] = 14.0  # leaves the other keys about 1e-5 of the attention
    geometry = Geometry.of(Groups.of(layout), None, None, num_heads=2)
    sums = role_sums(score_rows(query, key, 1.0, None, geometry), geometry, 2)

    scores = (query.double() @ key.double().transpose(2, 3)).masked_fill(
        ~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf
    )
    assert scores.softmax(-1)[..., 2:6, 0].mean() > 0.999
    without = scores[..., 1:].softmax(-1)
    rows = scores.softmax(-1)[:, :, 2:6, 1:]  # of visual queries
    expected = rows[..., 1:5].sum((2, 3)) / rows.sum((2, 3))
    found = sums.probability_no_sink[:, :, 1]
    torch.testing.assert_close((found[..., 1] / found.sum(-1)).double(), expected, atol=1e-5, rtol=1e-5)
    text = torch.cat([without[:, :, 6:, :1], without[:, :, 6:, 5:]], dim=-1)
    entropy = torch.special.entr(text / text.sum(-1, keepdim=True)).sum(-1).sum(-1)
    torch.testing.assert_close(sums.entropy[:, :, 3].double(), entropy, atol=1e-5, rtol=1e-5)
