"""Methods inside the decoder: the numbers that their papers' rules give, worked out by hand or naively."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_policies import batch_of, kept_under, model, with_keys_hidden
from test_scorer_policies import kept_of, picture
from torch import Tensor, nn, tensor

import dyvte
from dyvte.cost.flops import prefill_flops
from dyvte.errors import ConfigError, UnsupportedError
from dyvte.instrument.hooks import Selection
from dyvte.policies.attention_policy import LayerAttention
from dyvte.policies.decoder.aim import walk
from dyvte.policies.decoder.dart import least_alike
from dyvte.policies.decoder.feather import grid_places
from dyvte.policies.decoder.sparsevlm import raters
from dyvte.policies.decoder.stages import in_proportion, projection_of
from dyvte.policies.decoder.topv import importance
from dyvte.policies.decoder.yopo import within_window
from dyvte.policies.merging.density_peaks import density_peaks
from dyvte.policies.registry import methods
from dyvte.policies.scorer import top


def directions(*degrees: float) -> Tensor:
    angles = torch.deg2rad(tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@torch.no_grad()
def eager_maps(mllm: Any, batch: Any) -> Tensor:
    """[L, B, N, N] attention of the unchanged model, mean over heads."""
    return torch.stack(mllm.model(**batch, output_attentions=True).attentions).mean(2)


# ------------------------------------------------------------------------- shared pieces


def test_layers_in_another_depth() -> None:
    assert in_proportion([3, 7, 16], 32, 32) == [3, 7, 16]
    assert in_proportion([3, 7, 16], 32, 40) == [4, 9, 20]
    assert in_proportion([3, 7, 16], 32, 4) == [1, 2, 3]
    with pytest.raises(ConfigError, match="2 in ascending order"), dyvte.HiMAP(layers=[2])(model("llava")):
        pass
    with pytest.raises(ConfigError, match="ascending"), dyvte.FEATHER(layers=[0, 1])(model("llava")):
        pass
    with pytest.raises(ConfigError, match="share"):
        dyvte.HiMAP(keep=3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_received_attention_is_the_sum_over_rows_of_the_mean_map(attention: str) -> None:
    mllm, eager = model("llava", attention), model("llava", "eager")
    batch = batch_of(mllm)
    maps, found = eager_maps(eager, batch), {}

    class Look(dyvte.AttentionPolicy):
        def watched_layers(self, mllm: Any) -> tuple[int, ...]:
            return (1,)

        def see(self, layer: int, prefill: dyvte.Prefill, attention: LayerAttention) -> None:
            for name in ("text_status_positions", "visual"):
                found[name] = attention.received(getattr(prefill.layout, name))

        def before_layer(self, layer: int, prefill: dyvte.Prefill) -> None:
            pass

    with Look()(mllm):
        mllm.model(**batch)
    for name, values in found.items():
        rows = getattr(batch.layout, name).float()
        expected = (rows[:, None] @ maps[1])[:, 0]
        kept = ~batch.layout.padding
        torch.testing.assert_close(values[kept], expected[kept], atol=1e-5, rtol=0)


def test_projections_made_at_once_are_refused() -> None:
    class Fused(nn.Module):
        qkv = nn.Linear(2, 6)

    class Model:
        def attention_of(self, layer: int) -> nn.Module:
            return Fused()

    with pytest.raises(UnsupportedError, match="no q_proj"):
        projection_of(Model(), 0, "q_proj")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- HiMAP


def test_himap_adds_up_the_rows_of_the_text_then_of_the_image() -> None:
    text = tensor([[0.10, 0.06, 0.20, 0.05, 0.16, 0.02], [0.05, 0.20, 0.10, 0.02, 0.10, 0.03]])
    tokens = picture(hidden=torch.zeros(6, 2), seen=text.sum(0))
    torch.testing.assert_close(tokens.received, tensor([0.15, 0.26, 0.30, 0.07, 0.26, 0.05]))
    assert kept_of(dyvte.HiMAP().choose(tokens, 3)) == [1, 2, 4]
    image = tensor([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [0.25, 0.15, 0.5]])
    left = picture(hidden=torch.zeros(3, 2), seen=image.sum(0), place=tensor([1, 2, 4]), size=6)
    torch.testing.assert_close(left.received, tensor([1.15, 0.55, 0.50]))
    assert left.place[dyvte.HiMAP().choose(left, 1)].tolist() == [1]


@torch.no_grad()
def test_himap_asks_the_text_after_the_image_first() -> None:
    mllm = model("llava", "eager")
    batch = batch_of(mllm, (1, 1))
    scores = (batch.layout.text_status_positions.float()[:, None] @ eager_maps(mllm, batch)[0])[:, 0]
    _, kept = kept_under(dyvte.HiMAP(), mllm, batch)
    for row in range(2):
        visual = batch.layout.visual[row]
        assert kept_of(kept[1, row, visual]) == sorted(scores[row, visual].topk(8).indices.tolist())
        assert int(kept[2, row, visual].sum()) == 2


# ---------------------------------------------------------------------------------- SGL


def test_sgl_adds_up_the_rows_of_the_text_and_of_the_answer() -> None:
    prompt = tensor([[0.30, 0.05, 0.10, 0.20], [0.10, 0.15, 0.25, 0.05]])
    step = tensor([0.02, 0.30, 0.05, 0.10])
    tokens = picture(hidden=torch.zeros(4, 2), seen=prompt.sum(0) + step)
    torch.testing.assert_close(tokens.received, tensor([0.42, 0.50, 0.40, 0.35]))
    assert kept_of(dyvte.SGL().choose(tokens, 2)) == [0, 1]


@torch.no_grad()
def test_sgl_without_a_guide_adds_up_the_own_layers_before_it() -> None:
    mllm = model("llava", "eager")
    batch = batch_of(mllm, (1, 1))
    rows = batch.layout.text_status_positions.float()[:, None]
    scores = (rows @ eager_maps(mllm, batch)[:3].sum(0))[:, 0]
    _, kept = kept_under(dyvte.SGL(keep=0.5, layers=[3]), mllm, batch)
    for row, visual in enumerate(batch.layout.visual):
        assert kept[2, row, visual].all()
        assert kept_of(kept[3, row, visual]) == sorted(scores[row, visual].topk(8).indices.tolist())


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "gemma3"])
@torch.no_grad()
def test_sgl_asks_the_guide_for_the_rows_of_prompt_and_answer(family: str) -> None:
    mllm, guide = model(family), FAMILIES[family](7, num_layers=2, attn_implementation="eager")
    batch = batch_of(mllm, (1, 0, 1))
    new = guide.generate_ids(batch, max_new_tokens=3)
    ids = torch.full((3, max(map(len, new))), -100)
    for row, answer in enumerate(new):
        ids[row, : len(answer)] = tensor(answer)
    answered = guide.append_answers(batch, ids)
    rows = answered.layout.text_status_positions | answered.layout.answer
    for row, answer in enumerate(new):
        rows[row, batch["input_ids"].shape[1] + len(answer) - 1] = False  # never was an input
    scores = (rows.float()[:, None] @ eager_maps(guide, answered).sum(0))[:, 0]
    policy = dyvte.SGL(keep=0.5, layers=[1], guide=guide, answer_tokens=3)
    _, kept = kept_under(policy, mllm, batch)
    for row in (0, 2):
        visual = batch.layout.visual[row]
        best = scores[row, answered.layout.visual[row]].topk(round(0.5 * int(visual.sum()) + 0.01)).indices
        assert kept_of(kept[1, row, visual]) == sorted(best.tolist())
    with policy(mllm):
        assert len(mllm.generate_ids(batch, max_new_tokens=2)) == 3


@torch.no_grad()
def test_sgl_refuses_a_guide_with_other_visual_tokens() -> None:
    mllm = model("llava")
    other = FAMILIES["llava"](7, num_layers=1)
    other.visual_token_ids = [other.visual_token_ids[0] + 1]
    with pytest.raises(UnsupportedError, match="other visual tokens"), dyvte.SGL(guide=other)(mllm):
        mllm.model(**batch_of(mllm, (1,)))


# ---------------------------------------------------------------------------- SparseVLM


def test_raters_are_the_words_that_look_at_the_image() -> None:
    embeddings = tensor([[[1.0, 0], [0, 1], [1, 1], [1, 0], [0, 0.5], [2, 0]]])
    visual = tensor([[True] * 3 + [False] * 3])
    shares = (embeddings[0, :3] @ embeddings[0, 3:].T).softmax(-1).mean(0)
    torch.testing.assert_close(shares, tensor([0.2500, 0.2274, 0.5226]), atol=1e-4, rtol=0)
    assert raters(embeddings, visual, ~visual).nonzero().tolist() == [[0, 5]]
    assert raters(embeddings[:, :4], visual[:, :4], ~visual[:, :4]).sum() == 1, "a single word rates"


def test_density_peaks_of_points_on_a_line() -> None:
    points = tensor([0.0, 1, 3, 10, 11.5, 14])[:, None]
    centres, belongs = density_peaks(points, 3, 3)
    assert centres.tolist() == [1, 4, 0]
    means = [float(points[belongs == cluster].mean()) for cluster in range(3)]
    assert means == pytest.approx([2.0, 11.8333, 0.0], abs=1e-4)


def test_sparsevlm_leaves_the_published_counts_and_recycles_within_them() -> None:
    mllm = model("llava")
    published = {64: [66, 30, 17], 96: [238, 48, 26], 128: [303, 110, 36], 192: [300, 200, 110]}  # LLaVA-1.5, of 576
    for number, counts in published.items():
        assert [round(576 * share) for share in dyvte.SparseVLM(keep=number / 576).budgets()] == counts
    seen = torch.arange(20.0)
    hidden = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    stay, states = dyvte.SparseVLM().reduce(picture(hidden=hidden, seen=seen, mllm=mllm), 8)
    assert int(stay.sum()) == 8
    assert stay[13:].all()
    assert states is not None
    (centre,) = kept_of(stay[:13])
    assert torch.equal(states[13:], hidden[13:])
    assert not torch.equal(states[centre], hidden[centre])
    torch.testing.assert_close(states[centre], hidden[8:13].mean(0))
    all_stay, nothing = dyvte.SparseVLM().reduce(picture(hidden=hidden, seen=seen), 20)
    assert all_stay.all()
    assert nothing is None


# --------------------------------------------------------------------------------- DART


def test_dart_adds_what_is_least_like_each_pivot() -> None:
    states = directions(0, 90, 80, 10, 45, -30)
    pivot = torch.zeros(6, dtype=torch.bool)
    pivot[1] = True
    assert kept_of(least_alike(states, pivot, [1], directions(0), 3)) == [1, 2, 5]
    for number in range(1, 7):
        assert int(least_alike(states, pivot, [1], directions(0), number).sum()) == number


@torch.no_grad()
def test_dart_takes_its_pivots_by_the_keys() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1,))
    seen: list[Tensor] = []
    handle = mllm.attentions[0].k_proj.register_forward_hook(lambda module, args, output: seen.append(output))  # type: ignore[union-attr,operator]
    mllm.model(**batch)
    handle.remove()
    _, kept = kept_under(dyvte.DART(layer=1, keep=4), mllm, batch)
    visual = batch.layout.visual[0]
    norm = seen[0].abs().sum(-1)[0, visual]
    assert kept_of(kept[1, 0, visual]) == sorted(norm.topk(4).indices.tolist()), "pivots alone fill the budget"


# ------------------------------------------------------------------------------ FEATHER


def test_feather_keeps_a_grid_beside_the_highest() -> None:
    scores = tensor([0.1, 0.5, 0.2, 0.05, 0.3, 0.15])  # a grid of 2 rows and 3 columns
    assert kept_of(top(scores, 3)) == [1, 2, 4]
    grid = tensor([True, False, True, False, False, False])  # of stride 2
    assert kept_of(top(scores + 2 * grid, 4)) == [0, 1, 2, 4]
    assert kept_of(grid_places(torch.arange(25), 25, 3)) == [0, 3, 15, 18]
    assert kept_of(grid_places(torch.arange(20), 20, 3)) == [0, 9, 18]
    assert int(grid_places(torch.arange(729), 729, 3).sum()) == 81
    first, second = (round(729 * share) for share in dyvte.FEATHER().budgets())
    assert (first, second) == (275, 25)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_feather_ranks_by_attention_as_if_all_stood_at_one_place(family: str) -> None:
    mllm = model(family, "eager")
    batch = batch_of(mllm, (1,))
    rotary: Any = mllm.decoder.rotary_emb
    still = rotary.register_forward_hook(lambda module, args, found: (torch.ones_like(found[0]), 0 * found[1]))
    maps = mllm.model(**batch, output_attentions=True).attentions[0]
    still.remove()
    visual = batch.layout.visual[0]
    image = maps[0, :, int(batch.layout.last_prompt[0]), visual]
    scores = (image / image.sum(1, keepdim=True)).mean(0)
    found: list[Tensor] = []

    class Look(dyvte.FEATHER):
        def choose(self, tokens: Any, number: int) -> Tensor:
            found.append(tokens.received)
            return super().choose(tokens, number)

    with Look(layers=[1, 2])(mllm):
        mllm.model(**batch)
    torch.testing.assert_close(found[0], scores, atol=1e-5, rtol=1e-3)


# -------------------------------------------------------------------------------- TopV


def test_topv_weighs_what_a_plan_brings_to_each_token() -> None:
    g = torch.Generator().manual_seed(0)
    inputs, outputs = torch.randn(9, 4, generator=g), torch.randn(9, 4, generator=g)
    found = importance(inputs, outputs, torch.arange(9), 9)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5), "every token gives a ninth"
    assert (found > 0).all()
    same = importance(inputs, 3 * outputs, torch.arange(9), 9)
    torch.testing.assert_close(found, same, atol=1e-5, rtol=0)  # lengths do not matter
    tokens = picture(hidden=outputs, earlier=inputs)
    stay = dyvte.TopV(recovered=0.0).choose(tokens, 4)
    assert kept_of(stay) == sorted(found.topk(4).indices.tolist())
    assert int(dyvte.TopV(recovered=0.5).choose(tokens, 4).sum()) == 4


# -------------------------------------------------------------------------------- AIM


@torch.no_grad()
def test_aim_walks_along_the_attention() -> None:
    """Against the maps of the eager model; one step by hand is the last lines."""
    mllm = model("llava", "eager")
    batch = batch_of(mllm, (1,))
    maps = mllm.model(**batch, output_attentions=True).attentions[1][0]
    sharp = (maps.log() / 0.1).softmax(-1)
    at = torch.full((maps.shape[0], 1, maps.shape[1]), 1 / maps.shape[1])
    for _ in range(5):
        at = at @ sharp
    expected = at[:, 0].square().mean(0).sqrt()
    found: list[Tensor] = []

    class Look(dyvte.AttentionPolicy):
        def watched_layers(self, mllm: Any) -> tuple[int, ...]:
            return (1,)

        def see(self, layer: int, prefill: dyvte.Prefill, attention: LayerAttention) -> None:
            found.append(walk(attention, 5, 0.1)[0])

        def before_layer(self, layer: int, prefill: dyvte.Prefill) -> None:
            pass

    for attention in ("eager", "sdpa"):
        with Look()(model("llava", attention)):
            model("llava", attention).model(**batch)
        torch.testing.assert_close(found[-1], expected, atol=1e-4, rtol=0)
    step = torch.full((1, 3), 1 / 3) @ tensor([[1.0, 0, 0], [0.7311, 0.2689, 0], [0.6652, 0.2447, 0.09]])
    torch.testing.assert_close(step[0], tensor([0.7988, 0.1712, 0.0300]), atol=1e-4, rtol=0)


def test_aim_leaves_an_eighth_less_every_layer() -> None:
    class Deep:
        num_layers = 28

    stages = dyvte.AIM().stages(Deep())  # type: ignore[arg-type]
    assert list(stages) == list(range(15, 23))
    assert [stages[layer] for layer in (15, 16, 22)] == [0.875, 0.75, 0.0]


# -------------------------------------------------------------------------------- YOPO


def test_a_window_on_the_grid() -> None:
    visual = tensor([[False] + [True] * 9 + [False]])
    everything = Selection(torch.arange(1), torch.arange(11)[None], None)
    seen = within_window(visual, everything, radius=1)[0]
    assert kept_of(seen[1, 1:10]) == [0, 1, 3, 4]
    assert seen[0].all()
    assert seen[10].all()
    assert seen[:, [0, 10]].all()


@torch.no_grad()
def test_yopo_is_the_exit_where_the_window_is_as_large_as_the_image() -> None:
    mllm = model("llava")
    batch = batch_of(mllm)
    with dyvte.YOPO(keep=0.5, window=99)(mllm) as run:
        logits = mllm.model(**batch).logits
        assert run.exit_layers.tolist() == [2, 2, 0]
    with dyvte.FixedExit(2)(mllm):
        exit_alone = mllm.model(**batch).logits
    text = batch.layout.text
    torch.testing.assert_close(logits[text], exit_alone[text], atol=1e-4, rtol=0)
    with dyvte.YOPO(keep=0.5, window=1)(mllm):
        assert (mllm.model(**batch).logits[:2, -1] - logits[:2, -1]).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="odd"):
        dyvte.YOPO(window=4)


# ------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("name", ["HiMAP", "SGL", "SparseVLM", "DART", "FEATHER", "VScanDecoder", "TopV", "AIM"])
@torch.no_grad()
def test_what_ranking_takes_is_in_total_and_not_in_decoder_flops(name: str) -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1,))
    policy = getattr(dyvte, name)()
    full = prefill_flops(mllm, batch)
    with policy(mllm):
        count = prefill_flops(mllm, batch)
    assert count.decoder < full.decoder
    assert count.total - count.decoder > full.total - full.decoder


# ---------------------------------------------------------------------------------- docs

PAGE = (Path(__file__).parents[1] / "docs" / "methods_decoder.md").read_text()


@pytest.mark.parametrize(("form", "left"), [("mask", [8, 16]), ("score", [8, 16]), ("merge", [8, 16])])
@torch.no_grad()
def test_methods_of_your_own_run_as_the_page_has_them(form: str, left: list[int]) -> None:
    code = PAGE.partition(f"<!-- {form} -->")[2].partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, f"docs/methods_decoder.md, {form}", "exec"), scope)
    (policy,) = (each for each in scope.values() if isinstance(each, type) and issubclass(each, dyvte.ScorerPolicy))
    mllm = model("llava")
    batch = batch_of(mllm)
    logits, kept = kept_under(policy(keep=0.5), mllm, batch)
    assert (kept[-1] & batch.layout.visual).sum(1).tolist() == [*left, 0]
    text = batch.layout.text
    hidden = with_keys_hidden(mllm, batch, kept)
    assert (form == "merge") != torch.allclose(logits[text], hidden[text], atol=1e-4)


def test_the_table_says_of_each_method_where_it_is_from() -> None:
    rows = {name: line for line in PAGE.splitlines() for name in re.findall(r"^\| \[`(\w+)`\]", line)}
    here = [each for each in methods().values() if each.__module__.startswith("dyvte.policies.decoder.")]
    assert rows.keys() >= {each.__name__ for each in here}
    for method in methods().values():
        if method.__name__ in rows:
            row = rows[method.__name__]
            assert f"](../{method.__module__.replace('.', '/')}.py)" in row
            assert f"https://arxiv.org/abs/{method.source.paper})" in row
            assert not method.source.code or f"https://github.com/{method.source.code})" in row
            assert all(need in row for need in method.needs)
