"""Coarser images: blocks of the visual grid become one token."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.errors import UnsupportedError
from dyvte.mllm import MLLM
from dyvte.policies.base import Policy, PolicyRun, Prefill
from dyvte.policies.method import Source
from dyvte.policies.token_scores import check_square, images, place_in_image


def block_of(place: Tensor, size: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """[B, N] block of its image that a visual token belongs to (else -1), and whether it is the block's first token.

    Args:
        place, size: of `place_in_image`; sizes are square numbers.
        block: side of a block in tokens; blocks at the right and lower edge may be smaller.
    """
    side = size.sqrt().round().long().clamp(min=1)
    row, column = place.div(side, rounding_mode="floor"), place % side
    blocks = -side.div(-block, rounding_mode="floor")
    number = row.div(block, rounding_mode="floor") * blocks + column.div(block, rounding_mode="floor")
    inside = place >= 0
    return torch.where(inside, number, -1), inside & (row % block == 0) & (column % block == 0)


def average_blocks(features: Tensor, image: Tensor, block: Tensor) -> Tensor:
    """Mean of the features [B, N, d] over each block of each image (both [B, N], -1 for none), at every position."""
    same = (
        (image[:, :, None] == image[:, None, :]) & (block[:, :, None] == block[:, None, :]) & (block >= 0)[:, :, None]
    )
    weights = same.to(features.dtype)
    return weights @ features / weights.sum(-1, keepdim=True).clamp(min=1)


@dataclass
class AveragePool(Policy):
    """Average blocks of the visual grid before the decoder; the mean takes the place of the block's first token.

    Attributes:
        block: side of a block in tokens; `block ** 2` tokens become one.

    Example:
        >>> with dyvte.AveragePool(block=2)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        36
    """

    name = "average_pool"
    label = "average pool"
    source = Source()
    needs = ("square grid",)
    acts = "thins"
    by_place = True
    meets_budgets = False

    block: int = 2

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"{type(self).__name__}: block must be 1 or more, got {self.block}")

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Pool the decoder's input embeddings."""
        if layer == 0:
            block, first = self._blocks(prefill)
            pooled = average_blocks(prefill.hidden, images(prefill.layout.visual), block)
            prefill.hidden = torch.where((block >= 0)[:, :, None], pooled, prefill.hidden)
            prefill.drop(~first)

    def _blocks(self, prefill: Prefill) -> tuple[Tensor, Tensor]:
        place, size = place_in_image(prefill.layout.visual)
        check_square(type(self).__name__, size)
        return block_of(place, size.double(), self.block)


@dataclass
class DownsampleImage(AveragePool):
    """Show the vision tower a coarser image, and the decoder one token for each of its larger patches.

    The image is averaged over `block x block` pixels and brought back to the size that the tower needs, so it holds no
    more than a smaller image would; of every block of tokens, which now see the same, the first one stays. The decoder
    saves what it would with a smaller image, the vision tower does not.

    Example:
        >>> with dyvte.DownsampleImage(block=2)(mllm) as run:
        ...     logits = mllm(**batch).logits
        >>> int((run.prefill.kept & run.prefill.layout.visual)[0].sum())
        36
    """

    name = "downsample_image"
    label = "coarser image"
    source = Source()

    def hooks(self, mllm: MLLM, run: PolicyRun) -> AbstractContextManager[None]:
        """Coarsen the pixels of every call."""
        owner = mllm.model
        names = list(inspect.signature(owner.forward).parameters)

        def coarsen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module is not owner:
                return None
            inputs = dict(zip(names, args, strict=False)) | kwargs
            pixels = inputs.get("pixel_values")
            if pixels is None:
                return None
            return (), {**inputs, "pixel_values": self._coarser(pixels)}

        return owner.register_forward_pre_hook(coarsen, with_kwargs=True)

    def _coarser(self, pixels: Tensor) -> Tensor:
        if pixels.ndim < 4:
            raise UnsupportedError(
                f"DownsampleImage needs pixel_values [..., channels, height, width], got shape {tuple(pixels.shape)}"
            )
        flat = pixels.flatten(0, -4)
        small = nn.functional.interpolate(flat, scale_factor=1 / self.block, mode="area")
        return nn.functional.interpolate(small, size=flat.shape[-2:], mode="bilinear").view_as(pixels)

    def before_layer(self, layer: int, prefill: Prefill) -> None:
        """Keep one token a block."""
        if layer == 0:
            prefill.drop(~self._blocks(prefill)[1])
