"""The vision tower as it is seen: against its own attention maps and features, and its output unchanged."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte.errors import UnsupportedError
from dyvte.instrument.vision_patches import PATCHES
from dyvte.instrument.vision_tower import ImageMemory, TowerNeeds, TowerTokens, VisionTower, remember_images
from dyvte.loading import wrap
from dyvte.mllm import MLLM

SEEN = sorted(set(PATCHES) & set(FAMILIES))
ALL = TowerNeeds(attention=(0, -1), keys=(0, -1), features=(0, -1))
WITH_CLASS_TOKEN = ("llava", "llava_next", "internvl")
PLAIN = ("llava", "llava_next", "llava_onevision", "internvl", "gemma3", "mistral3", "idefics3")
TILED = ("idefics3", "smolvlm")
OF_SQUARES = ("internvl", "gemma3", "mistral3", "idefics3")
"""Families whose small models make a token of 2 x 2 patches."""


@cache
def model(family: str, attention: str = "sdpa") -> MLLM:
    return FAMILIES[family](0, num_layers=2, attn_implementation=attention)


def inputs_of(mllm: MLLM, images: tuple[int, ...] = (1, 2, 0)) -> dict[str, Any]:
    batch = random_batch(mllm, torch.Generator().manual_seed(3), images)
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
    return {name: batch[name] for name in names if name in batch}


@torch.no_grad()
def seen(mllm: MLLM, inputs: dict[str, Any], needs: TowerNeeds = ALL) -> tuple[TowerTokens, Tensor]:
    with VisionTower(mllm).watch(needs) as watch:
        output = mllm.model.base_model.get_image_features(**inputs)
    assert watch.tokens is not None
    return watch.tokens, torch.cat(list(output.pooler_output))


@pytest.mark.parametrize("family", SEEN)
@torch.no_grad()
def test_the_tower_is_unchanged_bit_for_bit_and_nothing_stays_on_it(family: str) -> None:
    mllm = model(family)
    batch = random_batch(mllm, torch.Generator().manual_seed(3), (1, 2, 0))
    plain = mllm.model(**batch).logits
    hooks = [len(module._forward_hooks) for module in VisionTower(mllm).layers]  # transformers has some of its own
    with VisionTower(mllm).watch(ALL) as watch:
        assert torch.equal(mllm.model(**batch).logits, plain)
    assert watch.tokens is not None
    assert len(watch.tokens.view) == int(batch.layout.visual.sum())
    assert "get_image_features" not in mllm.model.base_model.__dict__
    assert hooks == [len(module._forward_hooks) for module in VisionTower(mllm).layers]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_attention_is_that_of_the_eager_maps(family: str, attention: str) -> None:
    """Mapped by hand: the row of the class token or the mean row, then the patches of every token."""
    mllm = model(family, attention)
    inputs = inputs_of(mllm)
    tokens, _ = seen(mllm, inputs)
    eager = model(family, "eager")
    output = eager.model.base_model.get_image_features(**inputs, output_attentions=True)
    for layer in (0, -1):
        maps = output.attentions[layer].mean(1)  # [views, queries, keys]
        if family == "mistral3":  # pictures in one sequence
            maps = torch.stack([maps[0, at : at + 16, at : at + 16] for at in range(0, maps.shape[1], 16)])
        values = maps[:, 0, 1:] if family in WITH_CLASS_TOKEN else maps.mean(1)
        got = tokens.attention(layer)
        expected = [row[list(members)].mean() for row in values for members in patches_of(family, values.shape[1])]
        if family in ("llava_next", "llava_onevision"):
            # every token's value is one of its view's, each used once at most, and the base views are complete
            for view in range(len(values)):
                mine = got[tokens.view == view].sort().values
                nearest = (values[view][None, :] - mine[:, None]).abs().min(1).values
                assert nearest.max() < 1e-6
        else:
            torch.testing.assert_close(got, torch.stack(expected), atol=1e-6, rtol=1e-5)


def patches_of(family: str, number: int) -> list[tuple[int, ...]]:
    """The patches of every token of a view, in the order of the tokens."""
    side = round(number**0.5)
    return squares(side, side, 2 if family in OF_SQUARES else 1)


def squares(height: int, width: int, block: int) -> list[tuple[int, ...]]:
    """The patches of every whole square of a grid."""
    corners = [(r, c) for r in range(0, height - block + 1, block) for c in range(0, width - block + 1, block)]
    return [tuple((r + i) * width + c + j for i in range(block) for j in range(block)) for r, c in corners]


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@torch.no_grad()
def test_features_through_the_projector_are_the_visual_tokens(family: str) -> None:
    """Where a token is one patch: its features, projected, are what the decoder gets, tiles, cutting and all."""
    mllm = model(family)
    tokens, expected = seen(mllm, inputs_of(mllm), TowerNeeds(features=(-1, -2)))
    layer = -1 if mllm.model.config.vision_feature_layer == -1 else -2
    projected = mllm.model.base_model.multi_modal_projector(tokens.features(layer))
    inside = tokens.view >= 0
    torch.testing.assert_close(projected[inside], expected[inside], atol=1e-5, rtol=1e-4)
    newline = getattr(mllm.model.base_model, "image_newline", None)
    if newline is not None:
        assert (~inside).any()
        torch.testing.assert_close(expected[~inside], newline.expand((~inside).sum(), -1))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", *OF_SQUARES])
@torch.no_grad()
def test_a_change_in_one_patch_of_a_token_moves_that_token(family: str) -> None:
    """Windows reorder patches inside of the tower, mergers take several: the token that changes is the token told."""
    mllm = model(family)
    tower = VisionTower(mllm)
    inputs = inputs_of(mllm, (1, 1))
    needs = TowerNeeds(features=(-1,))
    before, plain = seen(mllm, inputs, needs)
    start = 1 if tower.has_class_token else 0
    for patch in (start, start + 2, start + 5, start + 10):

        def bump(module: Any, args: Any, output: Any, patch: int = patch) -> Any:
            changed = (output[0] if isinstance(output, tuple) else output).contiguous().clone()
            flat = changed.view(-1, changed.shape[-1])
            flat[patch] += torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(5))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = tower.layers[-1].register_forward_hook(bump)
        after, changed = seen(mllm, inputs, needs)
        handle.remove()
        moved = (changed - plain).abs().amax(1) > 1e-6
        assert int(moved.sum()) == 1
        assert torch.equal(moved, (after.features(-1) - before.features(-1)).abs().amax(1) > 1e-6)


@torch.no_grad()
def test_windows_are_softmaxed_apart() -> None:
    """In a windowed layer what the patches of a window receive sums to one, over the image to the number of windows."""
    mllm = model("qwen2_5_vl")
    inputs = {
        "pixel_values": torch.randn(64, 12, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    tokens, _ = seen(mllm, inputs)
    unit = 4
    windows = (8 * 2 // 8) ** 2  # the window is 8 pixels wide, a patch 2
    assert float(tokens.attention(0).sum() * unit) == pytest.approx(windows, abs=1e-4)
    assert float(tokens.attention(1).sum() * unit) == pytest.approx(1, abs=1e-4)


SIDES = st.integers(1, 5)


@cache
def small(kind: str, attention: str) -> MLLM:
    """Models beside `FAMILIES`: SmolVLM, and LLaVA with Pixtral's tower."""
    if kind in FAMILIES:
        return model(kind, attention)
    base = FAMILIES["idefics3" if kind == "smolvlm" else "mistral3"]().model.config.to_dict()
    tower = {**base["vision_config"], "model_type": "smolvlm_vision"} if kind == "smolvlm" else base["vision_config"]
    family = kind.partition(" ")[0]
    changes = {"model_type": family, "vision_config": tower, "vision_feature_select_strategy": "full"}
    config = CONFIG_MAPPING[family](**{**base, **changes})
    torch.manual_seed(0)
    return wrap(AutoModelForImageTextToText.from_config(config, attn_implementation=attention))


@settings(max_examples=6)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), st.sampled_from(["mistral3", "llava of Pixtral"]))
@torch.no_grad()
def test_pictures_of_any_size_in_one_sequence_are_apart(sizes: list[tuple[int, int]], kind: str) -> None:
    """Pixtral's tower: attention, views and places against the eager maps, block by block."""
    block = 2 if kind == "mistral3" else 1
    if kind == "mistral3":  # transformers takes no batch of a single token
        sizes = [(max(height, block), max(width, 2 * block)) for height, width in sizes]
    pixels = torch.randn(len(sizes), 3, 10, 10, generator=torch.Generator().manual_seed(len(sizes)))
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes) * 2}  # a patch is two pixels wide
    tokens, _ = seen(small(kind, "sdpa"), inputs)
    eager = small(kind, "eager").model.base_model.get_image_features(**inputs, output_attentions=True)
    start, rows = 0, []
    for view, (height, width) in enumerate(sizes):
        inside = slice(start, start := start + height * width)
        received = eager.attentions[-1][0, :, inside, inside].mean((0, 1))
        for members in squares(height, width, block):
            place = divmod(members[0], width)
            middle = (block - 1) / 2
            rows.append([view, place[0] + middle, place[1] + middle, float(received[list(members)].mean())])
    expected = torch.tensor(rows)
    assert torch.equal(torch.column_stack([tokens.view, tokens.place]), expected[:, :3])
    torch.testing.assert_close(tokens.attention(-1), expected[:, 3], atol=1e-6, rtol=1e-5)


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=4), st.sampled_from(TILED))
@torch.no_grad()
def test_padding_of_a_tile_neither_attends_nor_is_attended_to(real: list[tuple[int, int]], kind: str) -> None:
    """Idefics3 and SmolVLM: a row of one tile, a row of the others; each tile has pixels in its upper left part."""
    pixels, mask = torch.zeros(2, len(real) - 1, 3, 8, 8), torch.zeros(2, len(real) - 1, 8, 8, dtype=torch.bool)
    for at, (height, width) in zip([(0, 0), *((1, tile) for tile in range(len(real) - 1))], real, strict=True):
        pixels[at] = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(at[1]))
        mask[at][: 2 * height, : 2 * width] = True
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask}
    tokens, _ = seen(small(kind, "sdpa"), inputs)
    maps = small(kind, "eager").model.base_model.get_image_features(**inputs, output_attentions=True).attentions[0]
    expected = []
    for view, (height, width) in enumerate(real):
        inside = [row * 4 + column for row in range(height) for column in range(width)]
        received = torch.zeros(16)
        received[inside] = maps[view].mean(0)[inside][:, inside].mean(0)
        expected += [received[list(members)].mean() for members in squares(4, 4, 2)]
    torch.testing.assert_close(tokens.attention(0), torch.stack(expected), atol=1e-6, rtol=1e-5)
    assert tokens.view.tolist() == [view for view in range(len(real)) for _ in range(4)]


@torch.no_grad()
def test_packed_sequences_whose_bounds_are_not_in_a_mask_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = model("mistral3")

    def packed(module: Any, query: Tensor, *args: Any, cu_seq_lens_q: Tensor | None = None, **kwargs: Any) -> Any:
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", packed)
    monkeypatch.setattr(mllm.model.base_model.vision_tower.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(UnsupportedError, match="cu_seq_lens_q in PixtralAttention"):
        seen(mllm, inputs_of(mllm))


@torch.no_grad()
def test_the_class_tokens_query_and_the_keys_give_its_row_up_to_its_own_column() -> None:
    mllm = model("llava")
    tokens, _ = seen(mllm, inputs_of(mllm))
    views, heads = int(tokens.view.max()) + 1, tokens.num_heads
    maps = (
        model("llava", "eager")
        .model.base_model.get_image_features(**inputs_of(mllm), output_attentions=True)
        .attentions[0]
    )  # [views, heads, queries, keys]
    query = tokens.of_class_token(tokens.class_queries, 0)
    query, keys = (each.unflatten(-1, (heads, -1)) for each in (query, tokens.keys(0)))
    rows = ((query * keys).sum(-1) * keys.shape[-1] ** -0.5).view(views, -1, heads).softmax(1).transpose(1, 2)
    expected = maps[:, :, 0, 1:] / maps[:, :, 0, 1:].sum(-1, keepdim=True)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    assert tokens.mean_keys(0).shape == (len(tokens.view), keys.shape[-1])
    torch.testing.assert_close(tokens.class_query_attention(0).view(views, -1).sum(1), torch.ones(views))


@pytest.mark.parametrize("family", SEEN)
@torch.no_grad()
def test_the_place_of_a_token_is_where_its_patches_are(family: str) -> None:
    mllm = model(family)
    tokens, _ = seen(mllm, inputs_of(mllm))
    inside = tokens.view >= 0
    assert (tokens.place[~inside] == -1).all()
    block = 2 if family in OF_SQUARES or family.startswith("qwen") else 1
    if family.startswith("qwen"):
        expected = [
            (row * block + 0.5, column * block + 0.5)
            for _, height, width in inputs_of(mllm)["image_grid_thw"].tolist()
            for row in range(height // block)
            for column in range(width // block)
        ]
        assert tokens.place.tolist() == [list(place) for place in expected]
    for view in tokens.view[inside].unique():
        row, column = tokens.place[tokens.view == view].unbind(1)
        if not family.startswith("qwen"):  # raster order, every place once
            assert ((row.diff() > 0) | ((row.diff() == 0) & (column.diff() == block))).all()
            assert ((row - (block - 1) / 2) % block == 0).all()


@torch.no_grad()
def test_the_class_token_of_a_token_is_that_of_its_view() -> None:
    mllm = model("llava")
    tokens, _ = seen(mllm, inputs_of(mllm))
    states = mllm.model.base_model.get_image_features(**inputs_of(mllm), output_hidden_states=True).hidden_states
    expected = states[-1][:, :1].expand(-1, 16, -1).flatten(0, 1)
    torch.testing.assert_close(tokens.of_class_token(tokens.class_states, -1), expected)


def test_what_is_not_mapped_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(PATCHES, "gemma3")
        with pytest.raises(UnsupportedError, match="'gemma3' is not mapped"):
            VisionTower(model("gemma3"))
    tower = VisionTower(model("llava"))
    with pytest.raises(UnsupportedError, match="no layer 7"), tower.watch(TowerNeeds(attention=(7,))):
        pass
    inputs = inputs_of(model("llava"))
    with pytest.raises(UnsupportedError, match="'full'"), tower.watch(ALL):
        model("llava").model.base_model.get_image_features(**inputs, vision_feature_select_strategy="full")
    tokens, _ = seen(model("gemma3"), inputs_of(model("gemma3")))
    with pytest.raises(UnsupportedError, match="no class token"):
        tokens.class_query_attention(0)


@pytest.mark.parametrize("family", SEEN)
@torch.no_grad()
def test_images_are_encoded_once_and_what_is_seen_of_the_tower_is_the_same(family: str) -> None:
    mllm = model(family)
    batches = [random_batch(mllm, torch.Generator().manual_seed(seed), (1, 2, 0)) for seed in (3, 4)]
    tower, runs = VisionTower(mllm), []

    def results() -> list[Any]:
        found = []
        for batch in batches:
            for needs in (ALL, None, TowerNeeds(features=(0,)), ALL, None):
                with tower.watch(needs) if needs else nullcontext() as watch:
                    found.append(mllm.model(**batch).logits)
                    if watch is not None:
                        kept = (watch.tokens.attentions, watch.tokens.all_keys, watch.tokens.states)
                        found += [value for values in kept for value in values.values()]
        return found

    plain = results()
    with tower.layers[0].register_forward_hook(lambda *_: runs.append(1)):
        once = mllm.model(**batches[0]).logits
        (a_run, runs[:]) = (len(runs), [])
        with remember_images(mllm, ImageMemory(2**30)):
            remembered = results()
            assert len(runs) == 2 * 3 * a_run  # two batches, three kinds of looking
            with torch.enable_grad():
                mllm.model(**batches[0])
            assert len(runs) == 7 * a_run
        with remember_images(mllm, ImageMemory(0)):
            assert torch.equal(mllm.model(**batches[0]).logits, once)
            assert torch.equal(mllm.model(**batches[0]).logits, once)
        assert len(runs) == 9 * a_run
    assert all(map(torch.equal, plain, remembered))
    assert "get_image_features" not in mllm.model.base_model.__dict__
