"""Methods for videos: what they keep, by hand and naively; the policies' matrix on videos; what decoding sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from leftovers import pristine
from naive import with_generated
from policy_properties import EXACT, check_rows_do_not_depend_on_their_batch_or_padding
from test_policies import batch_of, generate, kept_under, model, with_keys_hidden
from test_video import VIDEO_FAMILIES, steps_for, video_batch
from torch import Tensor, tensor

import dyvte
from analysis.measuring.methods import policy_at
from dyvte.batch import Batch
from dyvte.errors import ConfigError, UnsupportedError
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy
from dyvte.policies.method import Calibration
from dyvte.policies.video.clips import clips
from dyvte.policies.video.dycoke import repeats
from dyvte.policies.video.prunevid import PruneVid, similarity_over_time, stretches

LAYERS = 4
METHODS: dict[str, Callable[[], Policy]] = {
    "dycoke": lambda: dyvte.DyCoke(layer=2, repeated=0.5, decoded=0.4),
    "prunevid": lambda: dyvte.PruneVid(layer=2, static=0.05, segments=0.7),
}


def directions(*degrees: float) -> Tensor:
    angles = torch.deg2rad(tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


# ------------------------------------------------------------------------------- frames


def test_frames_of_one_size_that_follow_each_other_are_a_clip() -> None:
    frames = tensor([[-1, 0, 0, -1, 1, 1, 2, -1], [-1] * 8, [0, 1, 1, 2, 2, 3, 3, -1]])
    found = [(row, places.tolist()) for row, places in clips(frames)]
    assert found == [(0, [[1, 2], [4, 5]]), (0, [[6]]), (2, [[0]]), (2, [[1, 2], [3, 4], [5, 6]])]


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@torch.no_grad()
def test_a_policy_knows_the_frames_while_the_prefill_runs(family: str) -> None:
    mllm = model(family)
    batch, frames = video_batch(mllm, steps_for(family))
    found: list[Any] = []

    class Look(Policy):
        def before_layer(self, layer: int, prefill: dyvte.Prefill) -> None:
            found.append(prefill.frames.tolist())

    with Look()(mllm) as run:
        mllm.model(**batch)
        generate(mllm, batch, max_new_tokens=1)  # encodes the video before it calls the model
    assert found == [frames] * 2 * LAYERS
    assert run.prefill is not None
    assert not run.prefill.inputs, "pixels are let go of"


# ------------------------------------------------------------------------------- DyCoke


def test_dycoke_keeps_what_is_least_like_an_earlier_frame() -> None:
    first, second, third, fourth = (0, 0, 0, 0), (10, 50, 30, 5), (80, 20, 45, 40), (80, 90, 60, 41)
    frames = torch.stack([directions(*each) for each in (first, second, third, fourth, first, second)])
    stay = [row.nonzero().flatten().tolist() for row in ~repeats(frames, 0.5)]
    assert stay == [[0, 1, 2, 3], [1, 2], [0, 2], [1, 2], [0, 1, 2, 3], [1, 2]]
    for share, left in ((0.3, 58), (0.7, 137)):  # of 196, in the code
        many = torch.randn(2, 196, 3, generator=torch.Generator().manual_seed(0))
        assert (~repeats(many, share)).sum(1).tolist() == [196, left]


@torch.no_grad()
def test_dycoke_leaves_a_still_image_as_it_is_until_tokens_are_generated() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1, 0))
    with dyvte.DyCoke(layer=2)(mllm):
        assert torch.equal(mllm.model(**batch).logits, mllm.model(**batch).logits)
        few = generate(mllm, batch).logits
    plain = generate(mllm, batch).logits
    torch.testing.assert_close(few[0], plain[0], atol=EXACT, rtol=0)
    assert (few[1][0] - plain[1][0]).abs().max() > EXACT
    torch.testing.assert_close(few[1][1], plain[1][1], atol=EXACT, rtol=0)


def hidden_from_generated(
    policy: Policy, mllm: MLLM, batch: Batch, new_ids: Tensor, of_step: Callable[[Tensor, Tensor], dict[int, Tensor]]
) -> Tensor:
    """Logits of the new tokens by the full-length eager model, where each of them has keys of its own.

    `of_step(maps, kept)` says by layer which positions [B, N] of the prompt a step's token sees, from its attention
    [L, B, N] and from what the prefill kept [L, B, N].
    """
    _, kept = kept_under(policy, mllm, batch)
    prompt, new = batch["input_ids"].shape[1], new_ids.shape[1]
    longer = with_generated(mllm, batch, new_ids)
    seen = torch.cat([kept, torch.ones(LAYERS, *new_ids.shape, dtype=torch.bool)], dim=2)
    seen = seen[:, :, None].expand(-1, -1, prompt + new, -1).clone()  # [L, B, query, key]
    for step in range(prompt, prompt + new - 1):
        maps: list[Tensor] = []

        def look(module: Any, args: Any, output: Any, maps: list[Tensor] = maps) -> None:
            maps.append(output[1].mean(1))

        handles = [each.register_forward_hook(look) for each in mllm.attentions if each is not None]
        with_keys_hidden(mllm, longer, seen)
        for handle in handles:
            handle.remove()
        for layer, positions in of_step(torch.stack(maps)[:, :, step, :prompt], kept).items():
            seen[layer, :, step, :prompt] &= positions
    return with_keys_hidden(mllm, longer, seen)[:, prompt - 1 : -1]


@pytest.mark.parametrize(
    ("family", "similar"), [("llava", -1.0), ("llava", 0.97), ("gemma3", 1.01), ("qwen2_5_vl", 0.97)]
)
@torch.no_grad()
def test_dycoke_decodes_on_the_keys_that_the_layer_before_attends_to(family: str, similar: float) -> None:
    """Keys are chosen anew when the row of attention has changed: never, sometimes, always."""
    mllm = model(family, "eager")
    batch = video_batch(mllm, (3, 2))[0] if family == "qwen2_5_vl" else batch_of(mllm, (2, 3, 0))
    policy = dyvte.DyCoke(layer=2, repeated=0.4, decoded=0.3, similar=similar)
    with policy(mllm):
        found = generate(mllm, batch)
    with policy(model(family)):
        fast = generate(model(family), batch)
    logits = torch.stack(found.logits, dim=1)
    torch.testing.assert_close(torch.stack(fast.logits, dim=1), logits, atol=EXACT, rtol=0)
    last: list[Tensor] = []

    def of_step(maps: Tensor, kept: Tensor) -> dict[int, Tensor]:
        visual = kept[1] & batch.layout.visual
        row = maps[1] * visual
        if last:
            same = torch.cosine_similarity(row, last[-1], dim=1) >= similar
            row = torch.where(same[:, None], last[-1], row)
        last.append(row)
        sees = ~visual
        for each in range(len(row)):
            best = row[each].masked_fill(~visual[each], -1).topk(int(visual[each].sum() * 0.3)).indices
            sees[each, best] = True
        return {2: sees, 3: sees}

    new_ids = found.sequences[:, batch["input_ids"].shape[1] :]
    expected = hidden_from_generated(policy, mllm, batch, new_ids, of_step)
    torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)
    assert pristine(mllm)


# ----------------------------------------------------------------------------- PruneVid


def test_prunevid_averages_what_stands_still() -> None:
    frames = torch.stack([torch.stack([tensor([2.0, 0.0]), each]) for each in tensor([[1.0, 0], [0.8, 0.6], [0, 1]])])
    torch.testing.assert_close(similarity_over_time(frames), tensor([1.0, 0.46667]), atol=1e-4, rtol=0)
    assert similarity_over_time(frames[:1]).isnan().all()
    states, stay, group = PruneVid(segments=0.34).merged(frames * tensor([1.0, 2.0, 3.0])[:, None, None])
    assert stay.tolist() == [[True, True], [False, True], [False, True]]
    assert group.tolist() == [[1, 0]] * 3
    torch.testing.assert_close(states[0, 0], tensor([4.0, 0.0]))
    torch.testing.assert_close(states[1, 1], tensor([1.6, 1.2]))


@pytest.mark.parametrize("seed", range(3))
def test_similarity_over_time_is_the_mean_of_pairs(seed: int) -> None:
    frames = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(seed))
    pairs = [torch.cosine_similarity(frames[one], frames[other], dim=1) for one, other in combinations(range(4), 2)]
    torch.testing.assert_close(similarity_over_time(frames), torch.stack(pairs).mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("labels", "segments"),
    [
        ([0, 0, 0, 1, 0, 1, 1], [(0, 5), (5, 7)]),
        ([0], [(0, 1)]),
        ([0, 1, 2], [(0, 3)]),
        ([1, 0, 0, 2, 2, 2], [(0, 3), (3, 6)]),  # the first frame has a neighbour behind it only
        ([0, 0, 1, 2, 2], [(0, 3), (3, 5)]),  # of equal neighbours the one before
        ([0, 0, 1, 1, 0, 0], [(0, 2), (2, 4), (4, 6)]),  # two longest stretches of one cluster
        ([0, 0, 2, 1, 1, 1], [(0, 2), (2, 6)]),
        ([0, 0, 0, 1, 0, 0], [(0, 6)]),
    ],
)
def test_segments_are_stretches_of_a_cluster(labels: list[int], segments: list[tuple[int, int]]) -> None:
    assert stretches(labels) == segments


def naive_clusters(tokens: Tensor, number: int, neighbours: int) -> tuple[list[int], list[int]]:
    """Centres and the cluster of each token, by the definition of DPC-KNN."""
    apart = [[float((one - other).square().mean().sqrt()) for other in tokens] for one in tokens]
    density = [math.exp(-sum(d**2 for d in sorted(row)[:neighbours]) / neighbours) for row in apart]
    peak = [
        own * min((d for d, other in zip(row, density, strict=True) if other > own), default=max(row))
        for own, row in zip(density, apart, strict=True)
    ]
    centres = sorted(range(len(peak)), key=lambda index: -peak[index])[:number]
    return centres, [min(range(number), key=lambda each: row[centres[each]]) for row in apart]


@pytest.mark.parametrize("size", [14, 15, 21])
def test_prunevid_clusters_the_tokens_of_a_frame_to_half(size: int) -> None:
    frame = torch.randn(size, 6, generator=torch.Generator().manual_seed(size))
    states, stay, _ = PruneVid().merged(frame[None])
    if size == 14:
        assert stay.all(), "so few are left as they are"
        return
    centres, belongs = naive_clusters(frame, size // 2, 7)
    assert stay[0].nonzero().flatten().tolist() == sorted(centres)
    for each, centre in enumerate(centres):
        members = [index for index, cluster in enumerate(belongs) if cluster == each]
        torch.testing.assert_close(states[0, centre], frame[members].mean(0))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_prunevid_selects_by_attention_without_places_and_order(family: str) -> None:
    """In every group those that some text token attends to most, all keys being seen by all."""
    mllm = model(family, "eager")
    batch = batch_of(mllm, (1, 3))
    policy = dyvte.PruneVid(layer=2, static=0.05, segments=0.7)
    with policy(mllm) as run:
        mllm.model(**batch)
    assert run.prefill is not None
    _, kept = kept_under(policy, mllm, batch)
    group, states = run.prefill.state[id(policy), "group"], []
    of_clips = [
        set(group[row][places].flatten().tolist()) for row, places in clips(dyvte.frame_numbers(mllm, batch)) if row
    ]
    assert all(one.isdisjoint(other) for one, other in combinations(of_clips, 2))
    assert len(of_clips) == (2 if family == "qwen2_5_vl" else 1), "images of two sizes there"
    handle = mllm.attentions[1].register_forward_pre_hook(  # type: ignore[union-attr]
        lambda module, args, kwargs: states.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with policy(mllm):
        mllm.model(**batch)
    handle.remove()
    attention: Any = mllm.attentions[1]
    for row in range(2):
        at = kept[1, row].nonzero().flatten()
        own = states[0][row, : len(at)]
        query, key = (
            norm(projection(own).view(len(at), -1, attention.head_dim)).repeat_interleave(times, dim=1)
            for projection, norm, times in (
                (attention.q_proj, getattr(attention, "q_norm", lambda each: each), 1),
                (attention.k_proj, getattr(attention, "k_norm", lambda each: each), attention.num_key_value_groups),
            )
        )
        maps = (torch.einsum("qhd,khd->hqk", query, key) * attention.scaling).softmax(-1)
        score = maps[:, batch.layout.text_status_positions[row, at]].amax((0, 1))
        stayed = set(kept[2, row].nonzero().flatten().tolist())
        for each in group[row, at].unique().tolist():
            members = [index for index, position in enumerate(at.tolist()) if group[row, position] == each]
            if each >= 0:
                number = max(1, int(0.4 * len(members) + 0.5))
                best = sorted(members, key=lambda index: -float(score[index]))[:number]
                assert {int(at[index]) for index in best} == stayed & {int(at[index]) for index in members}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_generated_tokens_do_not_see_what_prunevid_took_out_later(attention: str) -> None:
    mllm = model("llava", attention)
    batch = batch_of(mllm, (2, 1, 0))
    policy = dyvte.PruneVid(layer=2, segments=1.0, static=1.0)  # nothing is averaged over time
    policy.clustered = 1.0
    with policy(mllm):
        found = generate(mllm, batch)
    new_ids = found.sequences[:, batch["input_ids"].shape[1] :]
    expected = (
        hidden_from_generated(policy, mllm, batch, new_ids, lambda maps, kept: {0: kept[2], 1: kept[2]})
        if attention == "eager"
        else torch.stack(generate_eager(policy, batch).logits, dim=1)
    )
    torch.testing.assert_close(torch.stack(found.logits, dim=1), expected, atol=EXACT, rtol=0)


def generate_eager(policy: Policy, batch: Any) -> Any:
    mllm = model("llava", "eager")
    with policy(mllm):
        return generate(mllm, batch)


# --------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_videos_of_every_family(name: str, family: str) -> None:
    """Tokens leave, rows answer as they do alone, and nothing stays on the model."""
    mllm = model(family)
    batch, _ = video_batch(mllm, steps_for(family))
    plain = generate(mllm, batch, max_new_tokens=3)
    with METHODS[name]()(mllm) as run:
        together = generate(mllm, batch, max_new_tokens=3)
        assert run.prefill is not None
        left = (run.prefill.kept & batch.layout.visual).sum(1)
        assert (left < batch.layout.visual.sum(1)).all()
        assert (left > 0).all()
        for row in range(2) if family != "qwen3_vl" else ():
            alone = generate(mllm, batch[[row]], max_new_tokens=3)
            for one, other in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(one[0], other[row], atol=EXACT, rtol=0)
    assert pristine(mllm)
    after = generate(mllm, batch, max_new_tokens=3)
    assert torch.equal(torch.stack(after.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_5_vl", "gemma3"])
def test_dycoke_compares_the_images_of_a_prompt(family: str) -> None:
    mllm = model(family)
    with METHODS["dycoke"]()(mllm) as run:
        generate(mllm, batch_of(mllm, (2, 3, 0)), max_new_tokens=2)
    assert run.prefill is not None
    if family in ("llava", "internvl", "gemma3"):  # the others have images of several sizes
        assert run.prefill.has_visual.tolist() == [True, True, False]
        assert not run.prefill.kept[:2].equal(~run.prefill.layout.padding[:2])


def test_rows_do_not_depend_on_their_batch_or_padding() -> None:
    """PruneVid is in the matrix of methods for images as well."""
    check_rows_do_not_depend_on_their_batch_or_padding(METHODS["dycoke"], model("llava"))


@torch.no_grad()
def test_keys_are_hidden_from_the_rows_of_their_prefill_only() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1, 1))
    with dyvte.PruneVid(layer=2)(mllm):
        cache = mllm.model(**batch, use_cache=True).past_key_values
    step = {"input_ids": torch.full((2, 1), 5), "past_key_values": cache}
    with dyvte.PruneVid(layer=2)(mllm), pytest.raises(UnsupportedError, match="block of that prefill"):
        mllm.model(**step)


def test_comparisons_take_them_as_published() -> None:
    mllm = model("llava")
    calibration = Calibration(mllm, [batch_of(mllm, (1,))])
    for method in (dyvte.DyCoke, dyvte.PruneVid):
        assert policy_at(method.name, None, calibration) == method()
        assert policy_at(method.name, 0.5, calibration) is None


def test_settings_out_of_range_are_refused() -> None:
    mllm = model("llava")
    for make in (
        partial(dyvte.DyCoke, repeated=1.5),
        partial(dyvte.DyCoke, decoded=-1),
        partial(dyvte.PruneVid, selected=0),
        partial(dyvte.PruneVid, clustered=2),
    ):
        with pytest.raises(ConfigError, match="share"):
            make()
    for policy in (dyvte.DyCoke(layer=0), dyvte.DyCoke(layer=LAYERS), dyvte.PruneVid(layer=LAYERS)):
        with pytest.raises(ConfigError, match=r"layer must be 1..3"), policy(mllm):
            pass
