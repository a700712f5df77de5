"""AttentionProbe: exact, invisible to the model, leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyvte import AttentionProbe
from dyvte.instrument.attention import MEASURES
from dyvte.layout import TokenLayout
from dyvte.mllm import MLLM, Batch

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
    """The definitions, one sample, layer and head at a time, in float64."""
    batch, num_layers, num_heads, _, _ = maps.shape
    shape = (batch, num_layers, num_heads)
    out = {name: torch.full((*shape, 4, 4), torch.nan, dtype=torch.float64) for name in MEASURES}
    entropies = ("total_entropy", "text_entropy", "text_entropy_normalised", "text_entropy_no_sink")
    out |= {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in entropies}
    for b in range(batch):
        sink = int(layout.first_token[b])
        for layer in range(num_layers):
            for head in range(num_heads):
                full, pairs = maps[b, layer, head].double(), allowed[b, layer].clone()
                for suffix in ("", "_no_sink"):
                    p, may = full.clone(), pairs.clone()
                    if suffix:
                        p[:, sink], may[:, sink] = 0, False
                        p = p / p.sum(1, keepdim=True)
                    for a in range(4):
                        queries = (layout.roles[b] == a) & may.any(1)
                        for c in range(4):
                            keys = layout.roles[b] == c
                            if suffix:
                                keys[sink] = False
                            if not queries.any() or not keys.any():
                                continue
                            mass = p[queries][:, keys].sum(1)
                            count = may[queries][:, keys].sum(1)
                            uniform = (count / may[queries].sum(1)).mean()
                            at = (b, layer, head, a, c)
                            out["mass" + suffix][at] = mass.mean()
                            out["mean_score" + suffix][at] = mass.sum() / count.sum()
                            out["enrichment" + suffix][at] = mass.mean() / uniform
                rows = full[layout.text_status_positions[b]]
                may = pairs[layout.text_status_positions[b]]
                out["total_entropy"][b, layer, head] = torch.special.entr(rows).sum(1).mean()
                text = layout.text[b]
                restricted = rows[:, text] / rows[:, text].sum(1, keepdim=True)
                entropy, count = torch.special.entr(restricted).sum(1), may[:, text].sum(1)
                out["text_entropy"][b, layer, head] = entropy.mean()
                out["text_entropy_normalised"][b, layer, head] = (entropy / count.log())[count > 1].mean()
                text = text.clone()
                text[sink] = False
                restricted = rows[:, text] / rows[:, text].sum(1, keepdim=True)
                entropy, some = torch.special.entr(restricted).sum(1), may[:, text].any(1)
                out["text_entropy_no_sink"][b, layer, head] = entropy[some].mean()
    return out


MODELS: dict[str, MLLM] = {}


def model_of(family: str) -> MLLM:
    if family not in MODELS:
        MODELS[family] = FAMILIES[family](num_layers=2)
    return MODELS[family]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
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
    layout = TokenLayout.from_input_ids(
        batch["input_ids"],
        batch["attention_mask"],
        mllm.visual_token_ids,
        answer_start=batch.layout.last_prompt + 1 - answer_length,
    )
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
        torch.testing.assert_close(
            found, value, atol=tolerance, rtol=1e-5, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )
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
