"""From the patches of a vision tower to the visual tokens of the decoder, family by family, by the family's own code.

Every function takes values [V, P, c] of the P patches of V views (pictures, tiles), class token left out, and the
arguments of the model's `get_image_features`, and returns [T, c] values of the T visual tokens of the batch in their
order: the mean over the patches of a token. Separators are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from dyvte.errors import UnsupportedError

if TYPE_CHECKING:
    from dyvte.instrument.vision_tower import VisionTower

Arguments = Mapping[str, Any]


def patches_to_tokens(tower: VisionTower, values: Tensor, arguments: Arguments) -> Tensor:
    """Values [V, P, c] of patches as values [T, c] of visual tokens; NaN at separators.

    Raises:
        UnsupportedError: the class token itself is a visual token.
    """
    strategy = arguments.get("vision_feature_select_strategy")
    if strategy is None:
        strategy = getattr(tower.mllm.model.config, "vision_feature_select_strategy", None)
    if tower.has_class_token and strategy == "full":
        raise UnsupportedError(
            "vision_feature_select_strategy='full' makes the class token a visual token; use 'default'"
        )
    return PATCHES[tower.family](tower, values.float(), arguments)


def patch_places(tower: VisionTower, views: int, patches: int, arguments: Arguments) -> Tensor:
    """[V, P, 3] view, row and column of every patch, in the tower's order.

    Views are counted through the batch, in packed sequences (V is 1) as elsewhere.

    Args:
        tower: the tower.
        views, patches: V and P of the tower's states.
        arguments: of `get_image_features`.
    """
    sizes = packed_sizes(tower, arguments)
    if sizes is None:
        side = int(patches**0.5)
        sizes = [(side, side)] * views
    view = torch.arange(len(sizes)).repeat_interleave(torch.tensor([height * width for height, width in sizes]))
    grids = arguments.get("image_grid_thw")
    if grids is None:
        place = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in sizes])
        return torch.cat([view[:, None], place], dim=1).float().view(views, patches, 3)
    unit = tower.tower.spatial_merge_size
    place = get_vision_position_ids(grids, unit)  # merger by merger
    units = torch.cat([view[:, None].to(place.device), place], dim=1).float().unflatten(0, (-1, unit**2))
    if tower.family == "qwen2_5_vl":
        units = units[_window_index(tower, arguments).to(units.device)]
    return units.flatten(0, 1)[None]


def packed_sizes(tower: VisionTower, arguments: Arguments) -> list[tuple[int, int]] | None:
    """Height and width, in patches, of the views that a tower has one after another in one sequence.

    Qwen's towers, where every frame is a view, and Pixtral's. None where each view has a row of its own.
    """
    grids = arguments.get("image_grid_thw")
    if grids is not None:
        return [(height, width) for frames, height, width in grids.tolist() for _ in range(frames)]
    if tower.tower.config.model_type != "pixtral":
        return None
    sizes, pixels, patch = arguments.get("image_sizes"), arguments["pixel_values"], tower.tower.patch_size
    whole = [pixels.shape[-2:]] * len(pixels) if sizes is None else sizes
    return [(int(height) // patch, int(width) // patch) for height, width in whole]


def _one_each(tower: VisionTower, values: Tensor, arguments: Arguments) -> Tensor:
    """LLaVA-1.5 and Pixtral: a patch is a token."""
    return values.flatten(0, 1)


def _packed_tiles(tower: VisionTower, values: Tensor, arguments: Arguments) -> Tensor:
    """LLaVA-NeXT and LLaVA-OneVision: tiles are laid out, cut to the image and get separators."""
    config, owner = tower.mllm.model.config, tower.owner
    sizes = arguments["image_sizes"]
    joint = arguments.get("batch_num_images")
    tiled = [True] * len(sizes) if joint is None else [int(n) == 1 for n in joint for _ in range(int(n))]
    counts = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if tile else 1
        for size, tile in zip(sizes, tiled, strict=True)
    ]
    options: dict[str, Any] = {"image_newline": values.new_full((values.shape[2],), torch.nan)}
    if tower.family == "llava_next":
        options["vision_feature_select_strategy"] = "default" if tower.has_class_token else "full"
    else:
        aspect = arguments.get("vision_aspect_ratio")
        options["vision_aspect_ratio"] = config.vision_aspect_ratio if aspect is None else aspect
    tokens, _ = owner.pack_image_features(torch.split(values, counts), sizes, **options)
    return torch.cat(list(tokens))


def _shuffled_pixels(tower: VisionTower, values: Tensor, arguments: Arguments) -> Tensor:
    """InternVL, Idefics3 and SmolVLM: squares of patches become the channels of one token."""
    patches, channels = values.shape[1:]
    number = torch.arange(patches, device=values.device)
    if tower.family == "internvl":
        side, ratio = int(patches**0.5), tower.mllm.model.config.downsample_ratio
        members = tower.owner.pixel_shuffle(number.view(1, side, side, 1), scale_factor=ratio).flatten(1, 2)[0]
    else:
        connector = tower.owner.connector
        members = connector.pixel_shuffle(number.view(1, patches, 1), connector.scale_factor)[0]
    return values[:, members].mean(2).reshape(-1, channels)  # members: [tokens, patches of a token]


def _pooled(tower: VisionTower, values: Tensor, arguments: Arguments) -> Tensor:
    """Gemma 3: square blocks of patches are averaged."""
    views, patches, channels = values.shape
    side = int(patches**0.5)
    grid = values.transpose(1, 2).reshape(views, channels, side, side)
    return tower.owner.multi_modal_projector.avg_pool(grid).flatten(2).transpose(1, 2).reshape(-1, channels)


def _merged_each(tower: VisionTower, values: Tensor, arguments: Arguments) -> Tensor:
    """Mistral 3: squares of patches of images of any size are merged; rows and columns left over are dropped."""
    sizes, merge = packed_sizes(tower, arguments) or [], tower.mllm.model.config.spatial_merge_size
    images = values[0].split([height * width for height, width in sizes])
    grids = [image.T.unflatten(1, size) for image, size in zip(images, sizes, strict=True)]
    return torch.cat([nn.functional.avg_pool2d(grid, merge).flatten(1).T for grid in grids])


def _merged(tower: VisionTower, values: Tensor, arguments: Arguments) -> Tensor:
    """Qwen2-VL and Qwen3-VL: patches come merger by merger."""
    unit = tower.tower.spatial_merge_size**2
    return values[0].unflatten(0, (-1, unit)).mean(1)


def _windowed(tower: VisionTower, values: Tensor, arguments: Arguments) -> Tensor:
    """Qwen2.5-VL: as `_merged`, in the order of the windows inside of the tower."""
    return _merged(tower, values, arguments)[_window_index(tower, arguments).to(values.device).argsort()]


def _window_index(tower: VisionTower, arguments: Arguments) -> Tensor:
    """[T] which token each unit of the tower's order becomes."""
    if "window_index" in arguments:
        return arguments["window_index"]
    part = tower.tower
    window, _ = get_vision_window_index(
        arguments["image_grid_thw"],
        spatial_merge_size=part.spatial_merge_size,
        window_size=part.window_size,
        patch_size=part.patch_size,
    )
    return window


PATCHES: dict[str, Callable[[VisionTower, Tensor, Arguments], Tensor]] = {
    "llava": _one_each,
    "llava_next": _packed_tiles,
    "llava_onevision": _packed_tiles,
    "internvl": _shuffled_pixels,
    "gemma3": _pooled,
    "idefics3": _shuffled_pixels,
    "smolvlm": _shuffled_pixels,
    "mistral3": _merged_each,
    "qwen2_vl": _merged,
    "qwen2_5_vl": _windowed,
    "qwen3_vl": _merged,
}
"""By model type."""
