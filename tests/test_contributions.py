"""Contributions: what a role writes into the residual stream, exact against a direct sum from eager maps and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build, random_batch, with_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dyvte import AttentionProbe
from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.layout import ROLES
from dyvte.mllm import MLLM

PROJECTIONS = ("o_proj", "out_proj", "dense")


def projection_of(attention: nn.Module) -> Any:
    return next(getattr(attention, name) for name in PROJECTIONS if hasattr(attention, name))


@torch.no_grad()
def direct(mllm: MLLM, batch: Batch, roles: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one sample, layer, query and role at a time, in float64 from eager maps."""
    residuals: list[Tensor] = []
    values: dict[int, Tensor] = {}
    handles = []
    for index, (layer, attention) in enumerate(zip(mllm.layers, mllm.attentions, strict=True)):
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, args, kwargs: residuals.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        )
        handles.append(
            attention.v_proj.register_forward_hook(lambda m, args, out, index=index: values.__setitem__(index, out))
        )
    mllm.model.set_attn_implementation("eager")
    try:
        maps = torch.stack(mllm.model(**batch, output_attentions=True, use_cache=False).attentions, dim=1).double()
    finally:
        mllm.model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    size, num_layers, heads = maps.shape[:3]
    norm, share = (torch.full((size, num_layers, 4, 4), torch.nan, dtype=torch.float64) for _ in range(2))
    for index in range(num_layers):
        weight = projection_of(mllm.attentions[index]).weight.double()
        value = values[index].double().unflatten(-1, (-1, weight.shape[1] // heads))
        value = value.repeat_interleave(heads // value.shape[2], dim=2)  # [B, N, H, d_v]
        for b in range(size):
            written = []
            for role in range(len(ROLES)):
                keys = roles[b] == role
                mixed = torch.einsum("hqk,khd->qhd", maps[b, index][:, :, keys], value[b, keys])
                written.append(mixed.flatten(1) @ weight.T)
            total = torch.stack(written).sum(0)
            for q in range(len(ROLES)):
                queries = roles[b] == q
                for k in range(len(ROLES)):
                    if queries.any() and (roles[b] == k).any():
                        ratio = written[k].norm(dim=-1) / residuals[index][b].double().norm(dim=-1)
                        norm[b, index, q, k] = ratio[queries].mean()
                        part = (written[k] * total).sum(-1) / total.square().sum(-1)
                        share[b, index, q, k] = part[queries].mean()
    return norm, share


MODELS: dict[str, MLLM] = {}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    num_images=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    padding_side=st.sampled_from(["left", "right"]),
    answer_length=st.integers(0, 3),
)
def test_equal_a_direct_sum(
    family: str, seed: int, num_images: list[int], padding_side: str, answer_length: int
) -> None:
    mllm = MODELS.setdefault(family, FAMILIES[family](num_layers=2))
    batch = random_batch(
        mllm,
        torch.Generator().manual_seed(seed),
        num_images=num_images,
        padding_side=padding_side,
    )
    layout = with_answer(mllm, batch, answer_length)
    norm, share = direct(mllm, batch, layout.roles)
    with torch.no_grad(), AttentionProbe(mllm, layout=layout, contributions=True) as probe:
        probed = mllm.model(**batch, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(probed, mllm.model(**batch, use_cache=False).logits)
    assert probe.stats.contribution_norm is not None
    assert probe.stats.contribution_share is not None
    torch.testing.assert_close(probe.stats.contribution_norm.double(), norm, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(probe.stats.contribution_share.double(), share, atol=1e-4, rtol=1e-4, equal_nan=True)
    present = layout.roles[:, :, None] == torch.arange(4)
    for row, has in enumerate(present.any(1)):
        sums = probe.stats.contribution_share[row][:, has][..., has].sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-4, rtol=0)


class Quantised(nn.Linear):
    """A layer of which only its forward is known, as quantised layers and adapters are."""


@pytest.mark.parametrize("kind", [nn.Linear, Quantised])
def test_a_bias_of_the_projection_belongs_to_nobody(kind: type[nn.Linear]) -> None:
    mllm = build("llava", num_layers=2)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), num_images=[1, 1])
    for attention in mllm.attentions:
        plain = attention.o_proj
        attention.o_proj = kind(plain.in_features, plain.out_features)
        attention.o_proj.weight = plain.weight
    norm, share = direct(mllm, batch, batch.layout.roles)
    with torch.no_grad(), AttentionProbe(mllm, contributions=True) as probe:
        mllm.model(**batch)
    torch.testing.assert_close(probe.stats.contribution_norm.double(), norm, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(probe.stats.contribution_share.double(), share, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_a_gate_before_the_projection_is_refused() -> None:
    mllm = build("llava", num_layers=2)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), num_images=[1])
    projection = mllm.attentions[1].o_proj
    handle = projection.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    refused = pytest.raises(UnsupportedError, match="a gate or a norm stands between")
    with refused, torch.no_grad(), AttentionProbe(mllm, contributions=True):
        mllm.model(**batch)
    handle.remove()


def test_the_table_names_roles() -> None:
    mllm = build("llava", num_layers=2)
    batch = random_batch(mllm, torch.Generator().manual_seed(0), num_images=[1, 2])
    with torch.no_grad(), AttentionProbe(mllm, contributions=True) as probe:
        mllm.model(**batch)
    for by_head in (False, True):
        frame = probe.stats.to_frame(by_head=by_head)
        row = frame.iloc[-1]
        assert row.contribution_norm_instruction_visual == pytest.approx(
            float(probe.stats.contribution_norm[-1, -1, 2, 1])
        )
