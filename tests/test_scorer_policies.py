"""Methods that rank visual tokens: the policies' matrix for each, and the numbers that their papers' rules give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from leftovers import pristine
from naive import with_generated
from policy_properties import (
    check_it_changes_prompts_with_an_image_only,
    check_rows_do_not_depend_on_their_batch_or_padding,
    in_turn,
)
from test_policies import (
    EXACT,
    LAYERS,
    batch_of,
    generate,
    generated_plainly,
    kept_under,
    model,
    with_keys_hidden,
)
from torch import Tensor, tensor

import dyvte
from dyvte.cost.measure import kv_cache_bytes
from dyvte.errors import ConfigError, UnsupportedError
from dyvte.policies.base import Policy
from dyvte.policies.pruning.cdpruner import CDPruner
from dyvte.policies.pruning.gprune import GPrune
from dyvte.policies.scorer import ScorerPolicy, VisualTokens, number_kept, top
from dyvte.policies.vision.fastervlm import FasterVLM
from dyvte.policies.vision.fopru import FoPru
from dyvte.policies.vision.hired import HiRED
from dyvte.policies.vision.holov import HoloV
from dyvte.policies.vision.prumerge import PruMerge, PruMergePlus
from dyvte.policies.vision.sparsity_similarity import SparsityMeetsSimilarity
from dyvte.policies.vision.tiles import shared_out, tiles
from dyvte.policies.vision.todre import ToDRE
from dyvte.policies.vision.visionzip import VisionZip
from dyvte.policies.vision.vispruner import VisPruner
from dyvte.policies.vision.vscan import VScan
from dyvte.policies.vision.vtc_cls import VTCCLS

FAMILIES = ("llava", "llava_next", "internvl", "qwen2_5_vl", "gemma3")


@dataclass
class Longest(ScorerPolicy):
    """Test method: the states of largest norm."""

    layer: int = 0

    def stages(self, mllm: Any) -> dict[int, float]:
        return {self.layer: self.keep}

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.hidden.norm(dim=-1)


DROPPING: dict[str, Callable[[], Policy]] = {
    "longest": lambda: Longest(keep=0.5),
    "longest_after_2": lambda: Longest(keep=0.5, layer=2),
    "fastervlm": lambda: FasterVLM(keep=0.5),
    "vtc_cls": lambda: VTCCLS(keep=0.5),
    "fopru": lambda: FoPru(keep=0.5),
    "fopru_row": lambda: FoPru(keep=0.5, by="row"),
    "vispruner": lambda: VisPruner(keep=0.5),
    "similarity_knee": lambda: SparsityMeetsSimilarity(),
    "similarity": lambda: SparsityMeetsSimilarity(keep=0.75),
    "cdpruner": lambda: CDPruner(keep=0.5),
    "todre": lambda: ToDRE(keep=0.5),
    "gprune": lambda: GPrune(keep=0.5),
    "holov": lambda: HoloV(keep=0.5),
    "hired": lambda: HiRED(keep=0.5),
    "himap": lambda: dyvte.HiMAP(keep=0.6),
    "sgl": lambda: dyvte.SGL(keep=0.5),
    "dart": lambda: dyvte.DART(keep=0.5, layer=1, image_pivots=1, text_pivots=2),
    "feather": lambda: dyvte.FEATHER(keep=0.6),
    "topv": lambda: dyvte.TopV(keep=0.5, recovered=0.3),
    "vscan_decoder": lambda: dyvte.VScanDecoder(keep=0.5),
}
"""Methods that leave positions out and change nothing else, by what they are configured as."""

MERGING: dict[str, Callable[[], Policy]] = {
    "sparsevlm": lambda: dyvte.SparseVLM(keep=0.5),
    "visionzip": lambda: VisionZip(keep=0.5, contextual=0.5),
    "vscan": lambda: VScan(keep=0.5),
    "prumerge_plus": lambda: PruMergePlus(keep=0.5),
    "prumerge_outliers": lambda: PruMerge(neighbours=2),
    "prumerge": lambda: PruMerge(keep=0.5, neighbours=2),
    "prunevid": lambda: dyvte.PruneVid(layer=2),
}
"""Methods that change the states of what stays."""

METHODS = {**DROPPING, **MERGING}


# -------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DROPPING)
def test_equals_the_full_model_with_the_dropped_keys_hidden(name: str, family: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm)
    logits, kept = kept_under(DROPPING[name](), mllm, batch)
    text = batch.layout.text
    torch.testing.assert_close(logits[text], with_keys_hidden(mllm, batch, kept)[text], atol=EXACT, rtol=0)
    assert kept[:, text].all(), "text never leaves"
    left = (kept[-1] & batch.layout.visual).sum(1)
    assert (left[:2] < batch.layout.visual.sum(1)[:2]).all()
    assert (left[:2] > 0).all()


@pytest.mark.parametrize(("name", "family"), [*in_turn(DROPPING, FAMILIES), *itertools.product(MERGING, FAMILIES)])
def test_generated_tokens_attend_to_what_stayed_and_the_cache_is_smaller(name: str, family: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm)
    plain = generated_plainly(family)
    with METHODS[name]()(mllm):
        cached = generate(mllm, batch)
    logits, prompt = torch.stack(cached.logits, dim=1), batch["input_ids"].shape[1]
    if name in DROPPING:
        _, kept = kept_under(METHODS[name](), mllm, batch)
        new_ids = cached.sequences[:, prompt:]
        kept = torch.cat([kept, torch.ones(LAYERS, *new_ids.shape, dtype=torch.bool)], dim=2)
        expected = with_keys_hidden(mllm, with_generated(mllm, batch, new_ids), kept)[:, prompt - 1 : -1]
        torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)
    else:
        with METHODS[name]()(mllm):
            first = mllm.model(**batch).logits[:, -1]
        torch.testing.assert_close(logits[:, 0], first, atol=EXACT, rtol=0)
    if family != "gemma3":  # layers with a sliding window store little anyway
        assert kv_cache_bytes(cached.past_key_values) < kv_cache_bytes(plain.past_key_values)
    assert pristine(mllm)
    assert "get_image_features" not in mllm.model.base_model.__dict__
    after = generate(mllm, batch, max_new_tokens=2)
    assert torch.equal(torch.stack(plain.logits[:2]), torch.stack(after.logits)), "the model is as it was"


@pytest.mark.parametrize("name", METHODS)
def test_rows_do_not_depend_on_their_batch_or_padding(name: str) -> None:
    check_rows_do_not_depend_on_their_batch_or_padding(METHODS[name], model("llava"))


@pytest.mark.parametrize("name", METHODS)
def test_it_changes_prompts_with_an_image_only(name: str) -> None:
    check_it_changes_prompts_with_an_image_only(METHODS[name], model("llava"))


# ----------------------------------------------------------------- budgets and positions


@pytest.mark.parametrize(
    ("keep", "size", "number"), [(0.5, 9, 5), (0.25, 16, 4), (4, 16, 4), (20, 16, 16), (1.0, 7, 7)]
)
def test_a_budget_is_a_share_or_a_number(keep: float, size: int, number: int) -> None:
    assert number_kept(keep, size) == number


def test_every_image_has_its_own_budget() -> None:
    mllm = model("llava")
    batch = batch_of(mllm)
    for keep, left in ((0.25, [4, 8, 0]), (3, [3, 6, 0])):
        _, kept = kept_under(Longest(keep=keep), mllm, batch)
        assert (kept[0] & batch.layout.visual).sum(1).tolist() == left


@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_contiguous_positions_are_those_of_a_prompt_without_the_dropped_tokens(family: str, side: str) -> None:
    mllm = model(family)
    batch = batch_of(mllm, (1, 2, 0), side)
    policy = Longest(keep=0.5, positions="contiguous")
    logits, kept = kept_under(policy, mllm, batch)
    seen: list[Tensor] = []
    handle = mllm.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    mllm.model(**batch)
    handle.remove()
    with policy(mllm):
        generated = generate(mllm, batch.left_padded())
    steps = torch.stack(generated.logits, dim=1)
    for row in range(3):
        stay = kept[0, row]
        short = mllm.model(inputs_embeds=seen[0][row : row + 1, stay]).logits[0]
        text = batch.layout.text[row, stay]
        torch.testing.assert_close(logits[row, stay][text], short[text], atol=EXACT, rtol=0)
        new = mllm.model.get_input_embeddings()(generated.sequences[row, batch["input_ids"].shape[1] :])
        longer = mllm.model(inputs_embeds=torch.cat([seen[0][row, stay], new])[None]).logits[0]
        torch.testing.assert_close(steps[row], longer[-len(new) - 1 : -1], atol=EXACT, rtol=0)
    assert not mllm.decoder.rotary_emb._forward_pre_hooks


def test_contiguous_positions_are_refused_where_they_have_no_exact_meaning() -> None:
    for family, reason in (("qwen2_5_vl", "position axes"), ("gemma3", "sliding windows")):
        with pytest.raises(UnsupportedError, match=reason), Longest(positions="contiguous")(model(family)):
            pass
    with pytest.raises(ConfigError, match="before layer 0"), Longest(positions="contiguous", layer=1)(model("llava")):
        pass
    with pytest.raises(ConfigError, match="kept, contiguous"), Longest(positions="new")(model("llava")):
        pass


def test_wrong_settings_are_refused() -> None:
    for keep in (1.5, -0.1, -3, True, None):
        with pytest.raises(ConfigError, match="share"):
            Longest(keep=keep)
    with pytest.raises(ConfigError, match=r"0[.][.]3"), Longest(layer=4)(model("llava")):
        pass


@torch.no_grad()
def test_a_tower_that_did_not_run_or_ran_for_another_batch_is_refused() -> None:
    mllm = model("llava")
    batch, other = batch_of(mllm, (1,)), batch_of(mllm, (1,), system_length=5)
    output = mllm.model.base_model.get_image_features(batch["pixel_values"])
    plain = {name: value for name, value in other.items() if name != "pixel_values"}
    with FasterVLM()(mllm):
        with pytest.raises(UnsupportedError, match="did not run"):
            mllm.model(**plain, mm_encoder_outputs={"image": output})
        mllm.model(**batch)
        with pytest.raises(UnsupportedError, match="did not run"):
            mllm.model(**plain, mm_encoder_outputs={"image": output})


# ---------------------------------------------------------------------- shared pieces


def test_top_takes_the_earlier_of_equals() -> None:
    assert top(tensor([1.0, 3.0, 3.0, 2.0]), 1).tolist() == [False, True, False, False]
    assert top(tensor([1.0, 3.0]), 5).all()


def test_tiles_share_a_budget_by_size_and_separators_have_none() -> None:
    view = tensor([7, 7, 7, 7, -1, 8, 8, -1, 9])
    assert [(inside.tolist(), quota) for inside, quota in tiles(view, 3)] == [([0, 1, 2, 3], 2), ([5, 6], 1)]
    assert sum(quota for _, quota in tiles(view, 99)) == 7


def test_a_number_is_shared_out_by_weights_and_room() -> None:
    plenty = tensor([99] * 4)
    weights = tensor([0.5, 0.3, 0.15, 0.05])
    assert shared_out(6, weights, plenty) == [4, 2, 0, 0]
    assert shared_out(10, weights, plenty) == [6, 3, 1, 0]
    assert sum(shared_out(10, weights, tensor([4] * 4))) == 10
    assert shared_out(10, weights, tensor([4] * 4))[0] == 4
    assert shared_out(5, tensor([0.0, 0.0]), tensor([2, 2])) == [2, 2]


# ----------------------------------------------------------------- each method's numbers


def picture(**fields: Any) -> VisualTokens:
    """Tokens of one image, made up."""
    count = len(next(iter(value for value in fields.values() if isinstance(value, Tensor))))
    defaults: dict[str, Any] = {
        "layer": 0,
        "hidden": torch.zeros(count, 2),
        "text": torch.zeros(1, 2),
        "text_ids": torch.zeros(1, dtype=torch.long),
        "place": torch.arange(count),
        "size": count,
        "seen": None,
        "text_seen": None,
        "tower": None,
        "mllm": model("llava"),
    }
    return VisualTokens(**{**defaults, **fields})


def kept_of(stay: Tensor) -> list[int]:
    return stay.nonzero().flatten().tolist()
