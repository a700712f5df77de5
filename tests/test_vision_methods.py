"""Methods that look at the vision tower: the numbers that their papers' rules give, worked out by hand or naively."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_policies import batch_of, kept_under, model
from test_scorer_policies import kept_of, picture
from torch import Tensor, tensor

from dyvte.errors import ConfigError
from dyvte.instrument.vision_tower import TowerTokens
from dyvte.policies.pruning.cdpruner import greedy_map
from dyvte.policies.pruning.gprune import GPrune
from dyvte.policies.scorer import top
from dyvte.policies.vision.fastervlm import FasterVLM
from dyvte.policies.vision.fopru import FoPru
from dyvte.policies.vision.hired import HiRED
from dyvte.policies.vision.holov import HoloV, holistic
from dyvte.policies.vision.prumerge import PruMerge, PruMergePlus, outlier_share
from dyvte.policies.vision.sparsity_similarity import SparsityMeetsSimilarity, knee
from dyvte.policies.vision.tiles import shared_out
from dyvte.policies.vision.todre import ToDRE
from dyvte.policies.vision.visionzip import VisionZip
from dyvte.policies.vision.vispruner import VisPruner, thinned_out
from dyvte.policies.vision.vscan import VScan
from dyvte.policies.vision.vtc_cls import VTCCLS

DEPTH = 24
"""Encoder layers of the made-up tower, as many as CLIP ViT-L has."""


def tower_of(count: int, width: int | None = None, **fields: Any) -> TowerTokens:
    """What a tower says about one picture, `width` patches wide; layers may be negative."""
    width = count if width is None else width
    number = torch.arange(count)
    defaults: dict[str, Any] = {
        "view": torch.zeros(count, dtype=torch.long),
        "place": torch.stack([number // width, number % width], dim=1).float(),
        "attentions": {},
        "all_keys": {},
        "states": {},
        "class_queries": {},
        "class_states": {},
        "num_heads": 1,
        "num_layers": DEPTH,
    }
    by_layer = {
        name: {layer % DEPTH: each for layer, each in value.items()} if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return TowerTokens(**{**defaults, **by_layer})


def directions(*degrees: float) -> Tensor:
    angles = torch.deg2rad(tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@torch.no_grad()
def test_fastervlm_keeps_what_the_class_token_attends_to_most() -> None:
    mllm = model("llava", "eager")
    batch = batch_of(mllm, (1, 1))
    output = mllm.model.base_model.get_image_features(batch["pixel_values"], output_attentions=True)
    rows = output.attentions[-2].mean(1)[:, 0, 1:]
    _, kept = kept_under(FasterVLM(keep=5), mllm, batch)
    for row in range(2):
        visual = batch.layout.visual[row]
        assert kept_of(kept[0, row, visual]) == sorted(rows[row].topk(5).indices.tolist())


def test_vtc_cls_sums_upper_layers_without_the_last() -> None:
    rows = {21: [0.10, 0.30, 0.05, 0.20, 0.25, 0.10], 22: [0.25, 0.06, 0.28, 0.12, 0.19, 0.10]}
    tower = tower_of(6, attentions={layer: tensor(row) for layer, row in rows.items()})
    tokens = picture(hidden=torch.zeros(6, 2), tower=tower)
    policy = VTCCLS(keep=3)
    torch.testing.assert_close(policy.score(tokens), tensor([0.35, 0.36, 0.33, 0.32, 0.44, 0.20]))
    assert kept_of(policy.reduce(tokens, 3)[0]) == [0, 1, 4]
    mllm = model("llava")  # of two encoder layers
    assert list(VTCCLS().tower_needs(mllm).attention) == [0]
    with pytest.raises(ConfigError, match="starts at layer 1 and ends at 0"):
        VTCCLS(first=-1).tower_needs(mllm)


def test_fopru_keeps_tokens_or_rows() -> None:
    tower = tower_of(6, width=2, attentions={-2: tensor([0.30, 0.05, 0.10, 0.28, 0.20, 0.02])})
    tokens = picture(hidden=torch.zeros(6, 2), tower=tower)
    assert kept_of(FoPru().choose(tokens, 2)) == [0, 3]
    assert kept_of(FoPru(by="row").choose(tokens, 2)) == [2, 3]
    assert kept_of(FoPru(by="row").choose(tokens, 1)) == [2, 3], "one row at least"
    assert kept_of(FoPru(by="row").choose(tokens, 5)) == [0, 1, 2, 3], "as many as fit whole"
    with pytest.raises(ConfigError, match="'rank' or 'row'"):
        FoPru(by="column")


def test_visionzip_targets_take_in_the_rest() -> None:
    keys = tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.9], [0.2, 1.0]])
    features = tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    tower = tower_of(6, attentions={-2: tensor([0.1, 0.4, 0.05, 0.2, 0.15, 0.1])}, all_keys={-2: keys})
    tokens = picture(hidden=features, tower=tower, mllm=model("internvl"))
    stay, states = VisionZip(contextual=2 / 3).reduce_tile(tokens, 3)
    assert kept_of(stay) == [0, 1, 3]
    assert states is not None
    assert states.flatten().tolist() == [5.0, 2.0, 3.0, 10.0, 5.0, 6.0]


def test_vispruner_thins_the_rest_out() -> None:
    attention = tensor([0.30, 0.02, 0.20, 0.10, 0.08, 0.12, 0.05, 0.13])
    features = directions(0, 10, 20, 90, 95, 45, 170, 52)
    tower = tower_of(8, attentions={-2: attention}, states={-1: features, -2: features})
    tokens = picture(hidden=torch.zeros(8, 2), tower=tower)
    assert kept_of(VisPruner(important=0.34).choose(tokens, 6)) == [0, 1, 2, 4, 5, 6]
    for number in range(1, 9):  # odd, tiny and empty second parts, where the paper's code fails
        assert int(VisPruner().choose(tokens, number).sum()) == number
    pairs = directions(0, 1, 90, 95, 200, 220)  # every even one has its like among the odd ones
    assert thinned_out(torch.arange(6), pairs, 5).sort().values.tolist() == [1, 2, 3, 4, 5]
    assert thinned_out(torch.arange(6), pairs, 4).sort().values.tolist() == [1, 3, 4, 5]


def test_prumerge_takes_outliers_and_merges_by_keys() -> None:
    attention = tensor([0.02, 0.03, 0.02, 0.04, 0.03, 0.30, 0.02, 0.25, 0.03, 0.02, 0.22, 0.02])
    assert outlier_share(attention) == 0.25
    assert outlier_share(tensor([1.0, 2.0, 3.0, 4.0, 7.0])) == 0, "7 is not above 4 + 1.5 * (4 - 2)"
    mllm = model("internvl")  # merges after the projector
    tower = tower_of(12, attentions={-1: attention}, all_keys={-1: directions(*range(0, 120, 10))})
    tokens = picture(hidden=torch.zeros(12, 2), tower=tower, mllm=mllm)
    assert kept_of(PruMerge().choose(tokens, 12)) == [5, 7, 10]
    assert kept_of(PruMergePlus().choose(tokens, 12)) == list(range(12)), "a step of int(int(4) / 3)"
    assert int(PruMergePlus(keep=6).choose(tokens, 6).sum()) == 5, "and the extra token"
    tower = tower_of(
        4, attentions={-1: tensor([0.4, 0.3, 0.2, 0.1])}, all_keys={-1: directions(0, 40, -10, 80)}, num_heads=1
    )
    tokens = picture(hidden=tensor([[1.0], [2.0], [3.0], [4.0]]), tower=tower, mllm=mllm)
    stay, states = PruMerge(keep=3, neighbours=1).reduce_tile(tokens, 3)
    assert states is not None
    assert kept_of(stay) == [0, 1, 2]
    torch.testing.assert_close(states[:3, 0], tensor([1.6, 2.4, 1.0]))


def test_prumerge_without_class_token_goes_by_attention_received() -> None:
    attention = tensor([0.1, 0.6, 0.3])
    tokens = picture(hidden=torch.zeros(3, 2), tower=tower_of(3, attentions={-1: attention}))
    assert torch.equal(PruMerge().score(tokens), attention)


def test_hired_gives_tiles_what_the_full_view_says() -> None:
    """Five views of 16; the first holds 4, 2, 1 and 1 of its eight most attended patches in its four strips."""
    low = torch.zeros(80)
    low[[0, 1, 2, 3, 4, 5, 8, 12]] = 1.0
    high = torch.rand(80, generator=torch.Generator().manual_seed(0))
    view = torch.arange(5).repeat_interleave(16)
    tower = tower_of(80, view=view, attentions={0: low, -2: high})
    tokens = picture(hidden=torch.zeros(80, 2), tower=tower)
    stay = HiRED().choose(tokens, 16)
    assert [int(stay[view == each].sum()) for each in range(5)] == [8, 4, 2, 1, 1]
    for each in range(5):
        inside = high[view == each]
        assert set(inside[stay[view == each]].tolist()) == set(
            inside.topk(int(stay[view == each].sum())).values.tolist()
        )
    assert int(HiRED().choose(tokens, 80).sum()) == 80
    one = picture(hidden=torch.zeros(16, 2), tower=tower_of(16, attentions={0: low[:16], -2: high[:16]}))
    assert kept_of(HiRED().choose(one, 5)) == sorted(high[:16].topk(5).indices.tolist())


def test_holov_scores_attention_and_variety() -> None:
    attention, features = tensor([2.0, 1.0, 3.0]), tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(holistic(attention, features, 0.09), tensor([2.27, 1.27, 3.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(holistic(attention / 1000, features, 0.09) * 1000, holistic(attention, features, 0.09))


@given(st.integers(2, 8), st.integers(0, 2**16))
def test_holov_takes_the_variance_of_each_row_about_the_mean_of_the_others(count: int, seed: int) -> None:
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    attention = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1))
    unit = features / features.norm(dim=1, keepdim=True)
    variance = []
    for i in range(count):
        row = [float(unit[i] @ unit[j]) if i != j else 0.0 for j in range(count)]
        mean = sum(row) / (count - 1)
        variance.append(sum((value - mean) ** 2 for value in row) / (count - 1))
    scale = float(attention.mean()) / (sum(variance) / count + 1e-6)
    expected = attention + 0.09 * tensor(variance) * scale
    torch.testing.assert_close(holistic(attention, features, 0.09), expected, atol=1e-5, rtol=1e-4)


def test_holov_keeps_the_most_attended_of_every_strip() -> None:
    attention = torch.rand(12, generator=torch.Generator().manual_seed(0)) + tensor([5.0, 2.0, 0.0]).repeat_interleave(
        4
    )
    features = torch.ones(12, 2)  # no variety
    tokens = picture(hidden=features, tower=tower_of(12, attentions={-2: attention}))
    stay = HoloV(strips=3).choose(tokens, 8)
    weights = attention.view(3, 4).mean(1)
    quotas = shared_out(8, weights, tensor([4, 4, 4]))
    assert quotas[0] == 4, "a strip that has no room leaves the rest to the others"
    for part, quota in zip(range(3), quotas, strict=True):
        inside = stay.view(3, 4)[part]
        assert kept_of(inside) == sorted(attention.view(3, 4)[part].topk(quota).indices.tolist())


def test_gprune_scores_what_flows_to_a_token() -> None:
    tokens = picture(hidden=tensor([[2.0, 0.0], [1.8, 0.2], [0.0, 1.0], [0.6, 0.8]]))
    torch.testing.assert_close(GPrune().score(tokens), tensor([0.635, 0.635, 0.5, 0.25]), atol=5e-4, rtol=0)
    assert kept_of(GPrune().choose(tokens, 2)) == [0, 1]


@given(st.integers(1, 8), st.integers(0, 2**16))
def test_gprune_is_five_powers_of_the_transition_matrix(count: int, seed: int) -> None:
    hidden = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    unit = hidden / hidden.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    weight = torch.where(cosine >= 0.5, (cosine / 0.03).exp(), 0.0).double()
    power = torch.linalg.matrix_power(weight / weight.sum(1, keepdim=True), 5)
    expected = torch.stack([sum(hidden[i].norm() * power[i, j] for i in range(count)) for j in range(count)])
    expected = expected / (cosine >= 0.5).sum(1)
    torch.testing.assert_close(GPrune().score(picture(hidden=hidden)).double(), expected, atol=1e-4, rtol=1e-3)


def test_vscan_keeps_locally_and_globally_and_merges_the_rest() -> None:
    """24 x 24 patches, 100 of them: three in each of 16 windows, the rest by the upper layer."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.rand(576, generator=generator), torch.rand(576, generator=generator)
    tower = tower_of(576, width=24, attentions={5: low, -2: high})
    tokens = picture(hidden=torch.randn(576, 3, generator=generator), tower=tower)
    policy = VScan(local_layer=5)
    stay = policy.choose(tokens, 100)
    blocks = low.view(4, 6, 4, 6).transpose(1, 2).reshape(16, 36)
    local = torch.zeros(16, 36, dtype=torch.bool).scatter_(1, blocks.topk(3, dim=1).indices, True)
    local = local.view(4, 4, 6, 6).transpose(1, 2).reshape(576)
    expected = local | top(high.masked_fill(local, -1), 100 - 48)
    assert torch.equal(stay, expected)
    hidden = tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.2], [0.1, 0.9]])
    attention = tensor([0.9, 0.8, 0.1, 0.1])
    tower = tower_of(4, attentions={5: attention, -2: attention})
    stay, states = policy.reduce_tile(picture(hidden=hidden, tower=tower), 2)
    assert states is not None
    torch.testing.assert_close(states[stay], tensor([[0.9, 0.1], [0.05, 0.95]]))


def test_the_knee_is_farthest_below_the_chord() -> None:
    assert knee(tensor([0.9, 0.6, 0.3, 0.2, 0.15, 0.1])) == 2
    assert knee(tensor([0.15, 0.9, 0.2, 0.6, 0.1, 0.3])) == 2
    assert knee(torch.ones(5)) in range(5)


def test_similarity_to_the_class_token_then_to_the_text() -> None:
    features = directions(*torch.rad2deg(tensor([0.9, 0.6, 0.3, 0.2, 0.15, 0.1]).acos()).tolist())
    tower = tower_of(
        6, states={-1: features, -2: features}, class_states={-1: tensor([[5.0, 0.0]]), -2: tensor([[5.0, 0.0]])}
    )
    tokens = picture(hidden=directions(0, 60, 90, 30, 180, 10), tower=tower, text=tensor([[1.0, 0.0], [3.0, 0.0]]))
    policy = SparsityMeetsSimilarity()
    torch.testing.assert_close(policy.score(tokens), tensor([0.9, 0.6, 0.3, 0.2, 0.15, 0.1]))
    assert kept_of(policy.choose(tokens, 6)) == [0, 1, 2]
    assert kept_of(SparsityMeetsSimilarity(keep=4).choose(tokens, 4)) == [0, 1, 2, 3]
    assert kept_of(policy.choose(replace(tokens, layer=2), 6)) == [0, 3, 5]


def test_todre_adds_what_resembles_the_chosen_least() -> None:
    attention = tensor([0.9, 0.1, 0.1, 0.1, 0.1])
    tokens = picture(hidden=directions(0, 5, 90, 170, 100), tower=tower_of(5, attentions={-1: attention}))
    assert kept_of(ToDRE().choose(tokens, 2)) == [0, 3]
    assert kept_of(ToDRE().choose(tokens, 3)) == [0, 1, 3]


def test_cdpruner_weighs_relevance_and_diversity() -> None:
    relevance, features = tensor([1.0, 0.9, 0.4, 0.6]), tensor([[1.0, 0.0], [0.98, 0.199], [0.0, 1.0], [0.7, 0.714]])
    assert greedy_map(relevance[:, None] * features, 2).tolist() == [0, 3]


@given(st.integers(2, 7), st.integers(2, 9), st.integers(0, 2**16))
def test_the_greedy_set_has_the_largest_determinant_of_every_next_one(count: int, width: int, seed: int) -> None:
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    number = min(count, width)
    chosen = greedy_map(vectors, number).tolist()
    assert len(set(chosen)) == number
    for step in range(number):
        gains = {
            other: float(torch.linalg.det(vectors[[*chosen[:step], other]] @ vectors[[*chosen[:step], other]].T))
            for other in range(count)
            if other not in chosen[:step]
        }
        assert gains[chosen[step]] == pytest.approx(max(gains.values()), rel=1e-6)
    assert len(set(greedy_map(vectors[:, :1], count).tolist())) == count, "more than the space has dimensions"
