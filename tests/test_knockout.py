"""dyvte.knockout against full forwards whose masks, keys and values are edited by hand."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from families import FAMILIES, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import paligemma, paligemma_batch, random_answers, same_image_batch
from torch import Tensor

from dyvte import FixedExit, exit_sweep, knockout
from dyvte.batch import Batch
from dyvte.errors import ConfigError, ModelError, UnsupportedError
from dyvte.instrument.causal import GROUPS, Knockout, all_windows, windows_of_width
from dyvte.instrument.causal.branches import STATES_A_TOKEN, Branches
from dyvte.instrument.causal.strands import NOTHING, TRUNK, Tree
from dyvte.mllm import MLLM
from dyvte.model_parts import CACHE_NAMES

EXACT = 1e-4
LAYERS = 4
PATHS = tuple(product(GROUPS, GROUPS))


@cache
def model(family: str, attention: str = "sdpa") -> MLLM:
    return FAMILIES[family](0, num_layers=LAYERS, attn_implementation=attention)


def batch_of(mllm: MLLM, images: tuple[int, ...] = (1, 2, 0), side: str = "left", seed: int = 1) -> Batch:
    return random_batch(mllm, torch.Generator().manual_seed(seed), images, side)


# ------------------------------------------------------------------------- the naive way


def naive_groups(mllm: MLLM, whole: Batch) -> dict[str, Tensor]:
    """By walking through the ids of each row."""
    roles = whole.layout.roles
    groups = {name: torch.zeros_like(roles, dtype=torch.bool) for name in GROUPS}
    for row in range(len(roles)):
        kinds = roles[row].tolist()
        visual = [index for index, role in enumerate(kinds) if role == 1]
        prompt_end = max(index for index, role in enumerate(kinds) if role in (0, 1, 2))
        for index, role in enumerate(kinds):
            if role == -1:
                continue
            if role == 1:
                groups["visual"][row, index] = True
            elif visual and index < visual[0]:
                groups["system"][row, index] = True
            elif index >= prompt_end:
                groups["last"][row, index] = groups["instruction"][row, index] = True
            elif not visual or index > visual[-1]:
                groups["question"][row, index] = groups["instruction"][row, index] = True
    return groups


@torch.no_grad()
def masked(mllm: MLLM, whole: Batch, queries: Tensor, keys: Tensor, layers: list[int]) -> Tensor:
    """Logits [B, N, vocab] of one full forward in which 4-D masks forbid queries -> keys in some layers."""
    rows, length = whole.layout.roles.shape
    cut = queries[:, :, None] & keys[:, None, :] & ~torch.eye(length, dtype=torch.bool)
    handles = []

    def edit(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        mask = mask.expand(rows, 1, length, length).clone()
        mask[cut[:, None]] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    for layer in layers:
        handles.append(mllm.layers[layer].register_forward_pre_hook(edit, with_kwargs=True))
    try:
        return mllm.model(**{**whole, "use_cache": False}).logits
    finally:
        for handle in handles:
            handle.remove()


def in_window(window: tuple[int, int], invert: bool) -> list[int]:
    return [layer for layer in range(LAYERS) if (window[0] <= layer < window[1]) != invert]


def assert_is_naive(
    cut: Knockout, mllm: MLLM, batch: Batch, answers: Tensor, invert: bool, key_sets: dict[str, Tensor] | None = None
) -> None:
    whole = mllm.append_answers(batch, answers)
    groups = naive_groups(mllm, whole)
    for name, members in (key_sets or {}).items():
        groups[name] = torch.zeros_like(groups["last"])
        for row in range(len(members)):
            # the n-th token of a prompt is the n-th token of the row with its answer
            places = (~whole.layout.padding[row]).nonzero().flatten()
            groups[name][row, places[: (~batch.layout.padding[row]).sum()]] = members[row][~batch.layout.padding[row]]
    rows = torch.arange(len(answers))
    position = (whole.layout.last_prompt[:, None] + torch.arange(answers.shape[1])).clamp(
        max=whole.layout.roles.shape[1] - 1
    )
    valid = answers != -100
    for (p, path), (w, window) in product(enumerate(cut.paths), enumerate(cut.windows)):
        logits = masked(mllm, whole, groups[path[0]], groups[path[1]], in_window(window, invert))
        at_answer = logits[rows[:, None], position]
        assert cut.logits is not None
        torch.testing.assert_close(cut.logits[:, p, w], at_answer[:, 0], atol=EXACT, rtol=0, msg=str((path, window)))
        nll = -at_answer.log_softmax(-1).gather(-1, answers.clamp(min=0)[..., None])[..., 0]
        expected = nll.masked_fill(~valid, torch.nan)
        torch.testing.assert_close(cut.token_nll[:, p, w], expected, atol=EXACT, rtol=0, equal_nan=True)
        agree = ((at_answer.argmax(-1) == answers) | ~valid).all(-1)
        assert torch.equal(cut.agree[:, p, w], agree)
        torch.testing.assert_close(cut.nll[:, p, w], expected.nanmean(-1), atol=EXACT, rtol=0)


windows_strategy = st.lists(
    st.tuples(st.integers(0, LAYERS), st.integers(0, LAYERS)).map(lambda pair: (min(pair), max(pair))),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(
    images=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    attention=st.sampled_from(["sdpa", "eager"]),
    answer_length=st.integers(1, 4),
    paths=st.lists(st.sampled_from(PATHS), min_size=1, max_size=3),
    windows=windows_strategy,
    invert=st.booleans(),
    branch_tokens=st.sampled_from([None, 1, 30]),
    seed=st.integers(0, 99),
)
def test_equals_full_forwards_with_edited_masks(
    family: str,
    images: list[int],
    side: str,
    attention: str,
    answer_length: int,
    paths: list[tuple[str, str]],
    windows: list[tuple[int, int]],
    invert: bool,
    branch_tokens: int | None,
    seed: int,
) -> None:
    mllm = model(family, attention)
    batch = batch_of(mllm, tuple(images), side, seed)
    answers = random_answers(len(images), answer_length, seed)
    cut = knockout(mllm, batch, answers, paths, windows, invert, branch_tokens=branch_tokens)
    assert_is_naive(cut, mllm, batch, answers, invert)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_path_in_one_call(family: str, attention: str) -> None:
    """Boolean and additive masks; paths that are carried by different tokens ride in one pass."""
    mllm = model(family, attention)
    batch, answers = batch_of(mllm, (1, 2), "left"), random_answers(2, 2)
    cut = knockout(mllm, batch, answers, PATHS, [(1, 3)])
    assert_is_naive(cut, mllm, batch, answers, invert=False)
    effect = cut.log_probability_change[:, [PATHS.index(("instruction", "visual")), PATHS.index(("visual", "visual"))]]
    assert (effect.abs() > 1e-3).all()  # neither mask was left as it was


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_may_share_the_pass_over_their_image(family: str, side: str) -> None:
    mllm = model(family)
    images = (2, 1, 0, 2, 2, 1)
    batch, answers = same_image_batch(mllm, images, side), random_answers(len(images), 3)
    paths = [("instruction", "visual"), ("last", "question"), ("visual", "visual"), ("visual", "some")]
    some = torch.rand(batch.layout.roles.shape, generator=torch.Generator().manual_seed(0)) < 0.5  # not of the image
    seen = []
    counting = mllm.layers[2].mlp.register_forward_hook(
        lambda module, args, output: seen.append(args[0][..., 0].numel())
    )
    try:
        shared, apart = (
            knockout(mllm, batch, answers, paths, [(0, 2), (2, 3)], key_sets={"some": some}, shared_image=given)
            for given in (images, None)
        )
        assert shared.logits is not None
        torch.testing.assert_close(shared.logits, apart.logits, atol=EXACT, rtol=0)
        torch.testing.assert_close(shared.token_nll, apart.token_nll, atol=EXACT, rtol=0, equal_nan=True)
        tokens = []
        for given in (images, None):
            seen.clear()
            knockout(mllm, batch, answers, [("visual", "visual")], [(0, 2)], shared_image=given)
            tokens.append(sum(seen))
        repeated = sum(batch.layout.visual.sum(1).tolist()) - sum(
            {n: int(m.sum()) for n, m in zip(images, batch.layout.visual, strict=True)}.values()
        )
        assert tokens[0] <= tokens[1] - 2 * repeated  # neither the main pass nor the branch runs an image twice
    finally:
        counting.remove()


@settings(max_examples=6)
@given(
    family=st.sampled_from(["llava", "qwen2_5_vl", "gemma3"]),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_key_sets_are_cut_alone(family: str, side: str, seed: int) -> None:
    mllm = model(family)
    batch, answers = batch_of(mllm, (1, 2), side, seed), random_answers(2, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    members = torch.rand(batch.layout.roles.shape, generator=generator) < 0.4
    sets = {"some": members & ~batch.layout.padding, "patches": members & batch.layout.visual}
    paths = [("instruction", "some"), ("last", "patches")]
    cut = knockout(mllm, batch, answers, paths, [(0, 4), (1, 2)], key_sets=sets)
    assert_is_naive(cut, mllm, batch, answers, invert=False, key_sets=sets)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_entry_by_exit_is_the_exit_sweep_where_entry_is_the_first_layer(family: str) -> None:
    """Row s = 0: the instruction sees the image up to layer k only. Answers beyond the first token share it too."""
    mllm = model(family)
    batch = batch_of(mllm, (1, 1))
    answers = random_answers(2, 3)
    cut = knockout(mllm, batch, answers, windows=[(0, k) for k in range(LAYERS + 1)], invert=True)
    sweep = exit_sweep(mllm, batch, answers, entropy=False)
    torch.testing.assert_close(cut.logits[:, 0], sweep.logits, atol=EXACT, rtol=0)  # type: ignore[index]
    torch.testing.assert_close(cut.token_nll[:, 0], sweep.token_nll, atol=EXACT, rtol=0, equal_nan=True)


# ------------------------------------------------------------------ keys and values replaced


@torch.no_grad()
def replaced(mllm: MLLM, whole: Batch, layers: list[int], mode: str, donors: list[int], queries: Tensor) -> Tensor:
    """Logits of one forward whose `queries` read other keys and values at the visual positions."""
    visual = whole.layout.visual

    class Other:
        """A KV cache that hands out other keys and values than it was given."""

        def get_seq_length(self, *_: Any) -> int:
            return 0

        def update(self, *both: Any, **__: Any) -> list[Tensor]:
            changed = []
            for tensor in both[:2]:
                new = tensor.clone()
                for row, here in enumerate(visual):
                    if mode == "swap":
                        new[row, :, here] = tensor[donors[row]][:, visual[donors[row]]]
                    elif here.any():
                        new[row, :, here] = tensor[row, :, here].mean(1, keepdim=True)
                changed.append(new)
            return changed

    def mix(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        assert not args
        given = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        other = type(module).forward(module, **given, past_key_values=Other())
        return (torch.where(queries[:, :, None], other[0], output[0]), *output[1:])

    handles = [mllm.attentions[layer].register_forward_hook(mix, with_kwargs=True) for layer in layers]
    try:
        return mllm.model(**{**whole, "use_cache": False}).logits
    finally:
        for handle in handles:
            handle.remove()


def alike(batch: Batch) -> bool:
    """Whether the images of rows 0 and 2, different ones, stand at the same places."""
    places = [row[~padding] for row, padding in zip(batch.layout.visual, batch.layout.padding, strict=True)]
    return torch.equal(places[0].nonzero(), places[2].nonzero())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(
    mode=st.sampled_from(["mean", "swap"]),
    query=st.sampled_from(["instruction", "last"]),
    side=st.sampled_from(["left", "right"]),
    attention=st.sampled_from(["sdpa", "eager"]),
    windows=windows_strategy,
)
def test_replaced_keys_and_values(
    family: str, mode: str, query: str, side: str, attention: str, windows: list[tuple[int, int]]
) -> None:
    mllm = model(family, attention)
    donors, answers = [2, 1, 0], random_answers(3, 2)
    batch = next(each for number in range(3, 99) if alike(each := same_image_batch(mllm, (2, 1, number), side)))
    cut = knockout(
        mllm, batch, answers, [(query, "visual")], windows, mode=mode, donors=donors if mode == "swap" else None
    )
    whole = mllm.append_answers(batch, answers)
    group = naive_groups(mllm, whole)[query]
    assert cut.logits is not None
    for index, window in enumerate(windows):
        logits = replaced(mllm, whole, in_window(window, False), mode, donors, group)
        expected = logits[torch.arange(3), whole.layout.last_prompt]
        torch.testing.assert_close(cut.logits[:, 0, index], expected, atol=EXACT, rtol=0)
        if mode == "swap" and window[0] < window[1]:
            assert (cut.logits[:, 0, index] - cut.full_logits)[::2].abs().amax(-1).min() > 1e-3  # another image


# ----------------------------------------------------------------------------- the tree


@pytest.mark.parametrize("path", [("instruction", "visual"), ("visual", "visual")])
def test_branches_hold_no_more_states_than_asked_for(path: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit waits for another pass; one branch always fits."""
    passes: list[tuple[int, int]] = []
    collect = Branches._collect

    def watched(self: Branches) -> None:
        passes.append((sum(each.held for each in self.strands), sum(len(each.branches) for each in self.strands)))
        collect(self)

    monkeypatch.setattr(Branches, "_collect", watched)
    mllm = model("llava")
    batch = batch_of(mllm)
    windows = all_windows(LAYERS)
    most = {}
    for tokens in (1, 4, 10**6):
        passes.clear()
        cut = knockout(mllm, batch, None, [path], windows, branch_tokens=tokens)
        assert all(held <= STATES_A_TOKEN * tokens or number == 1 for held, number in passes)
        assert sum(number for _, number in passes) == len(windows)
        most[tokens] = (cut, len(passes))
    whole, once = most[10**6]
    assert once == 1
    for cut, times in most.values():
        torch.testing.assert_close(cut.token_nll, whole.token_nll, atol=EXACT, rtol=0, equal_nan=True)
        assert cut is whole or times > 1


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])  # the latter adds to states between layers
def test_a_later_pass_starts_where_its_branches_act(family: str) -> None:
    mllm = model(family)
    batch, answers = batch_of(mllm, (1, 2)), random_answers(2, 2)
    ran = [0] * LAYERS

    def counts(layer: int) -> Any:
        def count(*_: Any) -> None:
            ran[layer] += 1

        return mllm.layers[layer].mlp.register_forward_hook(count)

    counting = [counts(layer) for layer in range(LAYERS)]
    try:
        cut = knockout(mllm, batch, answers, [("visual", "visual")], [(3, 4), (0, 2), (2, 3), (1, 3)], branch_tokens=1)
    finally:
        for each in counting:
            each.remove()
    # A pass for each branch; trunk and branch run from the layer on in which the branch acts.
    assert ran == [2 * (layer + 1) for layer in range(LAYERS)]
    assert_is_naive(cut, mllm, batch, answers, invert=False)


@given(
    schedules=st.integers(1, 5).flatmap(
        lambda layers: st.lists(st.lists(st.integers(-1, 1), min_size=layers, max_size=layers), min_size=1, max_size=6)
    )
)
def test_a_tree_holds_every_schedule_once(schedules: list[list[int]]) -> None:
    tree = Tree(schedules)
    for schedule, leaf in zip(schedules, tree.leaves, strict=True):
        node, steps = leaf, []
        for layer in reversed(range(len(schedule))):
            steps.append(NOTHING if node == TRUNK else tree.steps[layer][node])
            node = TRUNK if node == TRUNK else tree.parents[layer][node]
        assert steps[::-1] == schedule
    for layer in range(len(schedules[0])):
        distinct = {tuple(each[: layer + 1]) for each in schedules} - {(NOTHING,) * (layer + 1)}
        assert len(tree.steps[layer]) == len(distinct)


def test_windows() -> None:
    assert windows_of_width(5, 2) == [(0, 2), (1, 3), (2, 4), (3, 5)]
    assert len(all_windows(24)) == 300
    assert len(set(all_windows(24))) == 300
    with pytest.raises(ConfigError, match="7 layers does not fit"):
        windows_of_width(5, 7)


# ------------------------------------------------------------------------- what it returns


def test_empty_windows_and_none_are_the_model_itself() -> None:
    mllm = model("llava")
    batch = batch_of(mllm)
    cut = knockout(mllm, batch, windows=[(2, 2)])
    plain = mllm.model(**batch).logits[torch.arange(3), batch.layout.last_prompt]
    torch.testing.assert_close(cut.full_logits, plain, atol=1e-5, rtol=0)
    assert torch.equal(cut.answer_ids, plain.argmax(-1, keepdim=True))
    assert cut.agree.all()
    assert not cut.log_probability_change.any()
    inverted = knockout(mllm, batch, windows=[(0, LAYERS)], invert=True)
    assert torch.equal(inverted.logits, cut.logits)  # type: ignore[arg-type]


def test_effects_are_those_of_probabilities() -> None:
    mllm = model("llava")
    batch, answers = batch_of(mllm, (1, 2)), random_answers(2, 3)
    cut = knockout(mllm, batch, answers, keep_logits=False)
    assert cut.logits is None
    valid = answers != -100
    probability = (-cut.token_nll).exp()[:, 0, 0].where(valid, 1.0)
    full = (-cut.full_token_nll).exp().where(valid, 1.0)
    expected = probability.prod(-1).log() - full.prod(-1).log()
    torch.testing.assert_close(cut.log_probability_change[:, 0, 0], expected, atol=1e-4, rtol=1e-4)
    relative = 100 * (probability[:, 0] / full[:, 0] - 1)
    torch.testing.assert_close(cut.first_token_change[:, 0, 0], relative, atol=1e-2, rtol=1e-3)


def test_a_tie_is_the_models_own_choice() -> None:
    mllm = model("llava")
    cut = knockout(mllm, batch_of(mllm), windows=[(0, 0)])
    cut.answer_ids = (cut.answer_ids + 1) % 100
    cut.agree = torch.zeros_like(cut.agree)
    assert cut.up_to_ties().agree.all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefix_lm_branches_carry_all_that_sees_the_question(attention: str) -> None:
    mllm = paligemma(attention)
    batch, answers = paligemma_batch(mllm, (5, 3)), random_answers(2, 3)
    paths = [("instruction", "visual"), ("last", "question"), ("visual", "instruction")]
    cut = knockout(mllm, batch, answers, paths, [(0, 2), (1, 4)], shared_image=[0, 1])
    assert_is_naive(cut, mllm, batch, answers, invert=False)
    with pytest.raises(UnsupportedError, match="prefix-LM"):
        knockout(mllm, batch, answers, mode="mean")


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        ({"paths": [("query", "visual")]}, "no query group 'query'"),
        ({"paths": [("last", "answer")]}, "no key group 'answer'"),
        ({"paths": []}, "at least one path"),
        ({"windows": [(0, 5)]}, r"window \[0, 5\) does not fit"),
        ({"windows": [(3, 2)]}, r"window \[3, 2\) does not fit"),
        ({"mode": "zero"}, "mode is 'zero'"),
        ({"mode": "swap"}, "donors"),
        ({"donors": [0, 1, 2]}, "donors"),
        ({"mode": "swap", "donors": [0, 1]}, "donors has 2 entries for 3 rows"),
        ({"mode": "swap", "donors": [1, 0, 2]}, "rows 0 and 1 do not stand at the same places"),
        ({"mode": "swap", "donors": [0, 1, 7]}, "row 2 has donor 7"),
        ({"mode": "mean", "paths": [("question", "visual")]}, "'instruction' or 'last'"),
        ({"mode": "mean", "paths": [("last", "question")]}, "visual keys only"),
        ({"key_sets": {"some": torch.ones(3, 2)}}, "key set 'some' is"),
        ({"shared_image": [0]}, "shared_image has 1 entries"),
    ],
)
def test_refusals_say_what_would_be_right(settings_: dict[str, Any], reason: str) -> None:
    mllm = model("llava")
    with pytest.raises(ConfigError, match=reason) as caught:
        knockout(mllm, batch_of(mllm), **settings_)
    assert "\n" not in str(caught.value)


def test_leaves_nothing_behind_and_runs_outside_of_policies_only() -> None:
    mllm = model("llava")
    batch = batch_of(mllm)
    before = {name: value.clone() for name, value in batch.items()}
    with FixedExit(1)(mllm), pytest.raises(UnsupportedError, match="outside"):
        knockout(mllm, batch)
    knockout(mllm, batch, key_sets={"some": batch.layout.visual}, paths=[("last", "some")])
    assert not any("forward" in layer.__dict__ for layer in mllm.layers)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def test_nan_logits_are_named() -> None:
    mllm = FAMILIES["llava"](1)
    batch = batch_of(mllm, (1, 1))
    with torch.no_grad():
        mllm.model.get_input_embeddings().weight[int(batch["input_ids"][1, -1])] = torch.nan
    with pytest.raises(ModelError, match="row 1"):
        knockout(mllm, batch)
