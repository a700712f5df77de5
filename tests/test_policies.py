"""Every policy through one matrix: exact in every family, cached or not, alone or in a batch, nothing left behind."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, IMAGE_TOKEN, PAD, VIDEO_TOKEN, VISION_END, VISION_START, random_batch
from leftovers import pristine
from naive import with_generated
from policy_properties import (
    check_it_changes_prompts_with_an_image_only,
    check_rows_do_not_depend_on_their_batch_or_padding,
    in_turn,
)
from torch import Tensor

import dyvte
from dyvte.batch import Batch
from dyvte.cost.measure import kv_cache_bytes
from dyvte.errors import ConfigError, DataError, UnsupportedError
from dyvte.gates.module import Gates
from dyvte.instrument.attention import AttentionProbe
from dyvte.instrument.sweep.criteria import kl_to_full
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, Prefill
from dyvte.policies.pruning.fitprune import Recipe, Statistics, fit_recipe
from dyvte.policies.skip_attention import attention_redundancy, greedy_skip_list

EXACT = 1e-4
LAYERS = 4
RECIPE = Recipe(keep=[1.0, 0.75, 0.5, 0.5], alpha=0.1, budget=0.7, cost=0.7, num_samples=2)

DROPPING: dict[str, Callable[[], Policy]] = {
    "fastv": lambda: dyvte.FastV(layer=2, keep=0.5),
    "fastv_first": lambda: dyvte.FastV(layer=1, keep=0.3),
    "pyramid_drop": lambda: dyvte.PyramidDrop(stages=2, keep=0.5),
    "pyramid_drop_4": lambda: dyvte.PyramidDrop(stages=4, keep=0.7),
    "divprune": lambda: dyvte.DivPrune(keep=0.5),
    "random": lambda: dyvte.RandomDrop(keep=0.5, seed=1),
    "random_stratified": lambda: dyvte.RandomDrop(keep=0.5, layer=1, seed=1, stratified=True),
    "uniform": lambda: dyvte.UniformDrop(keep=0.4),
    "fitprune": lambda: dyvte.FitPrune(RECIPE),
    "fastv_fixed_exit": lambda: dyvte.Compose([dyvte.FastV(layer=1, keep=0.5), dyvte.FixedExit(3)]),
    "divprune_fastv": lambda: dyvte.Compose([dyvte.DivPrune(keep=0.8), dyvte.FastV(layer=2, keep=0.4)]),
    "vtw": lambda: dyvte.VTW(layer=2),
    "aim": lambda: dyvte.AIM(keep=0.5),
    "lens_exit": lambda: dyvte.LensExit(threshold=0.1, measure="margin"),
    "todre_exit": lambda: dyvte.ToDREExit(threshold=0.1, layers="all"),
    "visipruner": lambda: dyvte.VisiPruner(loud=2.0, length=0.02, calm=-1.0, first_layer=0),
    "autoprune": lambda: dyvte.AutoPrune(keep=0.7),
}
"""Policies that leave positions out and change nothing else."""

CHANGING: dict[str, Callable[[], Policy]] = {
    "tome": lambda: dyvte.ToMe(keep=0.4),
    "tome_every_layer": lambda: dyvte.ToMe(merges=1),
    "tome_schedule": lambda: dyvte.ToMe(merges=[2, 0, 1, 1]),
    "tome_fastv": lambda: dyvte.Compose([dyvte.ToMe(keep=0.8), dyvte.FastV(layer=2, keep=0.4)]),
    "skip_attention": lambda: dyvte.SkipAttention([0, 2]),
    "skip_attention_fixed_exit": lambda: dyvte.Compose([dyvte.SkipAttention([0, 2, 3]), dyvte.FixedExit(2)]),
}

GRID: dict[str, Callable[[], Policy]] = {
    "average_pool": lambda: dyvte.AveragePool(block=2),
    "downsample_image": lambda: dyvte.DownsampleImage(block=2),
    "yopo": lambda: dyvte.YOPO(keep=0.75, window=3),
}
"""Policies that need a square grid of visual tokens."""

POLICIES = {**DROPPING, **CHANGING, **GRID}
BACKBONES = ("llava", "qwen2_5_vl", "gemma3")
WITHOUT_SQUARE_GRID = ("llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")


@cache
def model(family: str, attention: str = "sdpa") -> MLLM:
    return FAMILIES[family](0, num_layers=LAYERS, attn_implementation=attention)


def batch_of(mllm: MLLM, images: tuple[int, ...] = (1, 2, 0), side: str = "left", **kwargs: Any) -> Batch:
    return random_batch(mllm, torch.Generator().manual_seed(1), images, side, **kwargs)


def generate(mllm: MLLM, batch: Batch, **kwargs: Any) -> Any:
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": [EOS + 1000],
        "pad_token_id": PAD,
        "suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END],
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return mllm.model.generate(**batch, **{**settings, **kwargs})


@cache
def generated_plainly(family: str) -> Any:
    """What the model generates on `batch_of` without a policy."""
    return generate(model(family), batch_of(model(family)))


@dataclass
class Recorder(Policy):
    """Test policy: changes nothing, notes which positions each layer sees."""

    kept: list[Tensor] = field(default_factory=list, repr=False)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        self.kept.append(prefill.kept.clone())


@torch.no_grad()
def kept_under(policy: Policy, mllm: MLLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [B, N, vocab] under a policy and the positions [L, B, N] that it lets every layer see."""
    recorder = Recorder()
    with policy(mllm), recorder(mllm):
        logits = mllm.model(**batch).logits
    return logits, torch.stack(recorder.kept)


@torch.no_grad()
def with_keys_hidden(mllm: MLLM, batch: Batch, kept: Tensor) -> Tensor:
    """Logits of the full-length model in which layer l hides keys outside of `kept[l]`, [B, N] or [B, queries, N]."""
    rows, length = batch.layout.roles.shape

    def hide(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            mask = mask.expand(rows, -1, -1, -1)
            seen = kept[index][:, None] if kept.ndim == 4 else kept[index][:, None, None, :]
            if mask.dtype == torch.bool:
                mask = (mask & seen) | torch.eye(length, dtype=torch.bool)
            else:
                mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(mllm.layers):
            stack.callback(layer.register_forward_pre_hook(hide(index), with_kwargs=True).remove)
        return mllm.model(**{**batch, "use_cache": False}).logits


# -------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DROPPING)
def test_equals_the_full_model_with_the_dropped_keys_hidden(name: str, family: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm)
    logits, kept = kept_under(DROPPING[name](), mllm, batch)
    expected = with_keys_hidden(mllm, batch, kept)
    text = batch.layout.text
    torch.testing.assert_close(logits[text], expected[text], atol=EXACT, rtol=0)
    assert kept[:, text].all(), "text never leaves"
    visual = (kept & batch.layout.visual).sum(2)
    assert (visual[-1, :2] < visual[0, :2]).all() or (visual[0, :2] < batch.layout.visual.sum(1)[:2]).all()


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *in_turn(DROPPING, BACKBONES),
        *itertools.product(CHANGING, BACKBONES),
        *((name, family) for name in GRID for family in BACKBONES if family not in WITHOUT_SQUARE_GRID),
    ],
)
def test_generated_tokens_attend_to_what_stayed_and_the_cache_is_smaller(name: str, family: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm)
    plain = generated_plainly(family)
    with POLICIES[name]()(mllm):
        cached = generate(mllm, batch)
    logits = torch.stack(cached.logits, dim=1)
    prompt = batch["input_ids"].shape[1]
    if name in DROPPING:
        _, kept = kept_under(POLICIES[name](), mllm, batch)
        new_ids = cached.sequences[:, prompt:]
        kept = torch.cat([kept, torch.ones(LAYERS, *new_ids.shape, dtype=torch.bool)], dim=2)
        expected = with_keys_hidden(mllm, with_generated(mllm, batch, new_ids), kept)[:, prompt - 1 : -1]
        torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)
    elif "fastv" not in name:  # without a cache, the last token of every step would rank anew
        with POLICIES[name]()(mllm):
            again = generate(mllm, batch, use_cache=False)
        torch.testing.assert_close(logits, torch.stack(again.logits, dim=1), atol=EXACT, rtol=0)
    if family != "gemma3":  # layers with a sliding window store little anyway
        assert kv_cache_bytes(cached.past_key_values) < kv_cache_bytes(plain.past_key_values)
    assert pristine(mllm)
    after = generate(mllm, batch, max_new_tokens=2)
    assert torch.equal(torch.stack(plain.logits[:2]), torch.stack(after.logits)), "the model is as it was"


@pytest.mark.parametrize("name", POLICIES)
def test_rows_do_not_depend_on_their_batch_or_padding(name: str) -> None:
    check_rows_do_not_depend_on_their_batch_or_padding(POLICIES[name], model("llava"))


@pytest.mark.parametrize("name", POLICIES)
def test_it_changes_prompts_with_an_image_only(name: str) -> None:
    check_it_changes_prompts_with_an_image_only(POLICIES[name], model("llava"), changes_text_too="skip" in name)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_a_deep_copy_made_inside_is_an_ordinary_model(name: str) -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1,))
    plain = mllm.model(**batch).logits
    with POLICIES[name]()(mllm):
        twin = copy.deepcopy(mllm.model)
        assert torch.equal(twin(**batch).logits, plain)
    assert torch.equal(twin(**batch).logits, plain)


@pytest.mark.parametrize("name", ["fastv", "pyramid_drop", "fitprune"])
@torch.no_grad()
def test_eager_attention_ranks_the_same(name: str) -> None:
    batch = batch_of(model("llava"))
    _, kept = kept_under(POLICIES[name](), model("llava"), batch)
    _, kept_eager = kept_under(POLICIES[name](), model("llava", "eager"), batch)
    assert torch.equal(kept, kept_eager)


def test_a_method_cannot_assign_what_is_kept() -> None:
    """The host counts what leaves: a mask that was only assigned would leave nothing out, without a word."""

    class Assigns(Policy):
        def before_layer(self, layer: int, prefill: Prefill) -> None:
            prefill.kept = prefill.kept & ~prefill.layout.visual

    mllm = model("llava")
    with pytest.raises(UnsupportedError, match="drop"), Assigns()(mllm):
        mllm(**batch_of(mllm))


@pytest.mark.parametrize(
    "policy",
    [
        dyvte.FastV(keep=1.0),
        dyvte.PyramidDrop(keep=1.0),
        dyvte.DivPrune(keep=1.0),
        dyvte.RandomDrop(keep=1.0),
        dyvte.RandomDrop(keep=1.0, stratified=True),
        dyvte.UniformDrop(keep=1.0),
        dyvte.ToMe(keep=1.0),
        dyvte.ToMe(merges=0),
        dyvte.AveragePool(block=1),
        dyvte.DownsampleImage(block=1),
        dyvte.SkipAttention([]),
        dyvte.FitPrune(Recipe([1.0] * LAYERS, 0.0, 1.0, 1.0, 1)),
    ],
    ids=lambda policy: type(policy).__name__,
)
@torch.no_grad()
def test_settings_that_leave_all_tokens_change_nothing(policy: Policy) -> None:
    mllm = model("llava")
    batch = batch_of(mllm)
    plain = mllm.model(**batch).logits
    with policy(mllm):
        torch.testing.assert_close(mllm.model(**batch).logits, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["fastv", "divprune", "random", "random_stratified", "uniform", "tome"])
def test_the_share_that_stays_is_what_was_asked_for(name: str) -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1, 1))
    policy = POLICIES[name]()
    _, kept = kept_under(policy, mllm, batch)
    left = (kept[-1] & batch.layout.visual).sum(1)
    assert left.tolist() == [int(count * policy.keep + 0.5) for count in batch.layout.visual.sum(1).tolist()]


# ------------------------------------------------------------------------- each policy


@torch.no_grad()
def test_fastv_keeps_what_the_last_token_attends_to_most() -> None:
    mllm = model("llava", "eager")
    batch = batch_of(mllm, (1, 1))
    with AttentionProbe(mllm) as probe:
        mllm.model(**batch)
    scores = probe.stats.received_last[:, 1].mean(1)  # [B, N], layer index 1, mean over heads
    _, kept = kept_under(dyvte.FastV(layer=2, keep=0.5), mllm, batch)
    for row in range(2):
        visual = batch.layout.visual[row].nonzero().flatten()
        best = scores[row, visual].topk(len(visual) // 2).indices
        assert set(visual[best].tolist()) == set((kept[2, row] & batch.layout.visual[row]).nonzero().flatten().tolist())
    assert kept[:2].equal((~batch.layout.padding).expand(2, -1, -1)), "nothing leaves before layer 2"


@torch.no_grad()
def test_vtw_is_calibrated_by_the_kl_criterion() -> None:
    mllm = model("llava")
    batches = [batch_of(mllm, (1, 1))]
    sweep = dyvte.exit_sweep(mllm, batches[0])
    divergence = kl_to_full(sweep.logits).mean(0)
    eta = float(divergence[2]) * 1.001
    expected = next(k for k in range(1, LAYERS + 1) if divergence[k] <= eta)
    assert dyvte.VTW.calibrate(mllm, batches, eta, start=1) == dyvte.VTW(layer=expected)
    assert dyvte.VTW.calibrate(mllm, batches, eta=-1.0, start=1) == dyvte.VTW(layer=LAYERS)
    with pytest.raises(DataError, match="at least one batch"):
        dyvte.VTW.calibrate(mllm, [], eta)


def test_random_draws_differ_between_seeds_and_repeat() -> None:
    mllm = model("llava")
    batch = batch_of(mllm, (1,))
    for stratified in (False, True):
        draws = [kept_under(dyvte.RandomDrop(0.5, seed=s, stratified=stratified), mllm, batch)[1] for s in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


@torch.no_grad()
def test_a_coarser_image_gives_what_a_coarse_image_gives() -> None:
    """An image that is constant over the blocks loses nothing by down-sampling but tokens."""
    mllm = model("llava")
    batch = batch_of(mllm, (1,))
    seen = []
    handle = mllm.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    with dyvte.DownsampleImage(block=2)(mllm):
        mllm.model(**batch)
    handle.remove()
    pixels = batch["pixel_values"]
    assert seen[0].shape == pixels.shape
    torch.testing.assert_close(seen[0].mean((2, 3)), pixels.mean((2, 3)), atol=0.2, rtol=0)
    assert seen[0].var() < pixels.var()


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_a_grid_that_is_not_square_is_refused(family: str) -> None:
    mllm = model(family)
    with dyvte.AveragePool(2)(mllm), pytest.raises(UnsupportedError, match="square grid"):
        mllm.model(**batch_of(mllm, (1, 1, 1, 1)))
    assert pristine(mllm)


# ---------------------------------------------------------------------------- FitPrune


def test_a_recipe_meets_its_budget_and_a_smaller_budget_prunes_more() -> None:
    mllm = model("llava")
    statistics = Statistics.collect(mllm, [batch_of(mllm, (1, 0, 1)), batch_of(mllm, (2,), "right")])
    assert statistics.received.shape == (3, LAYERS, 2, 32)
    recipes = [fit_recipe(mllm, statistics, budget) for budget in (0.9, 0.7, 0.6)]
    for recipe in recipes:
        assert recipe.cost <= recipe.budget
        assert recipe.keep[0] == 1
        assert sorted(recipe.keep, reverse=True) == recipe.keep
    alphas = [recipe.alpha for recipe in recipes]
    assert alphas == sorted(alphas)
    assert fit_recipe(mllm, statistics, 1.0).keep == [1.0] * LAYERS
    with pytest.raises(ConfigError, match="cannot be met"):
        fit_recipe(mllm, statistics, 0.1)


def test_statistics_are_head_max_means_of_the_attention_maps() -> None:
    mllm = model("llava", "eager")
    batch = batch_of(mllm, (1,))
    with torch.no_grad():
        maps = torch.stack(mllm.model(**batch, output_attentions=True).attentions)[:, 0].amax(1)  # [L, N, N]
    visual, question = batch.layout.visual[0], batch.layout.text_status_positions[0]
    for attention in ("sdpa", "eager"):
        found = Statistics.collect(model("llava", attention), [batch]).received[0]
        torch.testing.assert_close(found[:, 0], maps[:, visual][:, :, visual].mean(1), atol=1e-5, rtol=0)
        torch.testing.assert_close(found[:, 1], maps[:, question][:, :, visual].mean(1), atol=1e-5, rtol=0)


def test_a_recipe_survives_its_file(tmp_path: Any) -> None:
    mllm = model("llava")
    policy = dyvte.FitPrune.fit(mllm, [batch_of(mllm, (1, 1))], budget=0.8)
    assert isinstance(policy.recipe, Recipe)
    policy.recipe.save(tmp_path / "recipe.json")
    assert dyvte.FitPrune(tmp_path / "recipe.json").recipe == policy.recipe
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match="no FitPrune recipe"):
        dyvte.FitPrune(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="3 layers"), dyvte.FitPrune(Recipe([1.0] * 3, 0, 1, 1, 1))(mllm):
        pass


# ------------------------------------------------------------------------ SkipAttention


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("skipped", [(), (1,)])
@torch.no_grad()
def test_one_sweep_equals_one_run_per_layer(family: str, skipped: tuple[int, ...]) -> None:
    mllm = model(family)
    batch = batch_of(mllm)
    table = attention_redundancy(mllm, [batch], skipped).set_index("layer")
    assert list(table.index) == [layer for layer in range(LAYERS) if layer not in skipped]
    rows = torch.arange(3)
    full = mllm.model(**batch).logits[rows, batch.layout.last_prompt]
    for layer in table.index:
        with dyvte.SkipAttention([*skipped, layer])(mllm):
            logits = mllm.model(**batch).logits[rows, batch.layout.last_prompt]
        expected = kl_to_full(torch.stack([logits, full], dim=1))[:, 0].mean()
        assert table.loc[layer, "kl"] == pytest.approx(float(expected), abs=1e-4)
        agreement = (logits.argmax(-1) == full.argmax(-1)).double().mean()
        assert table.loc[layer, "agreement"] == pytest.approx(float(agreement))


def test_the_greedy_list_takes_the_cheapest_first_and_stops_at_its_budget() -> None:
    mllm = model("llava")
    batches = [batch_of(mllm)]
    table = attention_redundancy(mllm, batches)
    everything = greedy_skip_list(mllm, batches, budget=float("inf"))
    assert sorted(everything["layer"]) == list(range(LAYERS))
    assert everything["layer"][0] == table.loc[table["kl"].idxmin(), "layer"]
    assert everything["kl"][0] == pytest.approx(table["kl"].min(), abs=1e-5)
    some = greedy_skip_list(mllm, batches, budget=float(everything["kl"][0]) * 1.01)
    assert list(some["layer"]) == list(everything["layer"][: len(some)])
    assert greedy_skip_list(mllm, batches, budget=-1.0).empty
    assert len(greedy_skip_list(mllm, batches, float("inf"), most=2)) == 2


# -------------------------------------------------------------------------- composition


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (dyvte.FixedExit(1), dyvte.VTW(2)),
        (dyvte.FastV(), dyvte.FastV(layer=3)),
        (dyvte.FitPrune(RECIPE), dyvte.ToMe(keep=0.5)),
        (dyvte.AveragePool(), dyvte.RandomDrop()),
        (dyvte.DownsampleImage(), dyvte.AveragePool()),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_pairs_that_make_no_sense_are_refused(first: Policy, second: Policy) -> None:
    for pair in ([first, second], [second, first]):
        with pytest.raises(UnsupportedError, match="do not compose"):
            dyvte.Compose(pair)


def test_thinning_after_the_exit_is_refused() -> None:
    policy = dyvte.Compose([dyvte.FastV(layer=3), dyvte.FixedExit(2)])
    with pytest.raises(UnsupportedError, match="starts at layer 3"), policy(model("llava")):
        pass
    with pytest.raises(ValueError, match="two policies"):
        dyvte.Compose([dyvte.FastV()])


@torch.no_grad()
def test_fastv_with_gates_thins_first_and_exits_later() -> None:
    mllm = model("llava")
    torch.manual_seed(0)
    gates = Gates(LAYERS, mllm.hidden_size)
    batch = batch_of(mllm, (1, 1))
    composed = dyvte.Compose([dyvte.FastV(layer=1, keep=0.5), dyvte.DynamicExit(gates, threshold=-1.0, min_layer=3)])
    _, kept = kept_under(composed, mllm, batch)
    visual = (kept & batch.layout.visual).sum(2)[:, 0].tolist()
    assert visual == [16, 8, 8, 0]
    with composed(mllm) as run:
        generate(mllm, batch)
        assert run.exit_layers.tolist() == [3, 3]


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: dyvte.FastV(keep=1.5), "0..1"),
        (lambda: dyvte.ToMe(), "either keep"),
        (lambda: dyvte.ToMe(keep=0.5, merges=2), "either keep"),
        (lambda: dyvte.AveragePool(block=0), "1 or more"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Policy], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (dyvte.FastV(layer=0), "1..3"),
        (dyvte.FastV(layer=LAYERS), "1..3"),
        (dyvte.PyramidDrop(stages=LAYERS + 1), "2..4"),
        (dyvte.UniformDrop(layer=LAYERS), "0..3"),
        (dyvte.ToMe(merges=[1, 1]), "one a layer"),
        (dyvte.SkipAttention([LAYERS]), "0..3"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Policy) else each,
)
def test_settings_that_do_not_fit_the_model(policy: Policy, reason: str) -> None:
    mllm = model("llava")
    with pytest.raises(ValueError, match=reason), policy(mllm):
        pass
    assert pristine(mllm)


# ------------------------------------------------------------------------ documentation


def test_the_example_in_the_documentation_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
    code = text.partition("<!-- example -->")[2].partition("```python\n")[2].partition("```")[0]
    assert len(code[code.index("@dataclass") :].rstrip().splitlines()) <= 20
    mllm = model("llava")
    batch = batch_of(mllm, (1, 2))
    scope: dict[str, Any] = {"__name__": __name__, "mllm": mllm, "batch": batch}
    exec(compile(code, "docs/policies.md", "exec"), scope)
    assert len(scope["answers"]) == 2
    logits, kept = kept_under(scope["MostLikeTheQuestion"](layer=2, keep=0.25), mllm, batch)
    assert (kept[2] & batch.layout.visual).sum(1).tolist() == [4, 8]
    text_positions = batch.layout.text
    expected = with_keys_hidden(mllm, batch, kept)
    torch.testing.assert_close(logits[text_positions], expected[text_positions], atol=EXACT, rtol=0)
