"""LLaVA with the projector `mlp_downsample` of VILA 1.5, which transformers has no model for.

Four neighbouring patches become one visual token: their features are joined, normalised and projected by an MLP
(VILA, arXiv 2312.07533; 27 x 27 patches of SigLIP become 14 x 14 tokens). Importing this module makes the model known
to `AutoModelForImageTextToText`; `dyvte.load` does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration


def join_neighbours(features: Tensor) -> Tensor:
    """Join each square of 2 x 2 patches to one: [images, side ** 2, size] -> [images, ceil(side / 2) ** 2, 4 * size].

    Patches are in order row by row; an odd side gets a last row and column of zeros. As VILA orders them: squares
    column by column, and within a square upper left, upper right, lower left, lower right.
    """
    images, count, size = features.shape
    side = math.isqrt(count)
    if side**2 != count:
        raise ValueError(f"mlp_downsample needs a square of patches, got {count}")
    grid = features.reshape(images, side, side, size)
    if side % 2:
        grid = nn.functional.pad(grid, (0, 0, 0, 1, 0, 1))
    half = (side + 1) // 2
    squares = grid.reshape(images, half, 2, half, 2, size)  # row, upper or lower, column, left or right
    return squares.permute(0, 3, 1, 2, 4, 5).reshape(images, half**2, 4 * size)


class DownsampleProjector(nn.Module):
    """LayerNorm and two linear layers over 2 x 2 joined patches."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        joined, hidden = 4 * config.vision_config.hidden_size, config.text_config.hidden_size
        self.layer_norm = nn.LayerNorm(joined)
        self.linear_1 = nn.Linear(joined, hidden)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, image_features: Tensor) -> Tensor:
        """[images, patches, size of a feature] -> [images, tokens, hidden size of the decoder]."""
        joined: Tensor = self.layer_norm(join_neighbours(image_features))
        return self.linear_2(self.act(self.linear_1(joined)))


class LlavaDownsampleConfig(LlavaConfig):
    """Like `LlavaConfig`; `image_seq_length` counts the tokens after downsampling."""

    model_type = "llava_downsample"


class LlavaDownsampleForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with a `DownsampleProjector`."""

    config_class = LlavaDownsampleConfig
    config: LlavaDownsampleConfig

    def __init__(self, config: LlavaDownsampleConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = DownsampleProjector(config).to(torch.get_default_dtype())
        self.post_init()


AutoConfig.register(LlavaDownsampleConfig.model_type, LlavaDownsampleConfig, exist_ok=True)
AutoModelForImageTextToText.register(LlavaDownsampleConfig, LlavaDownsampleForConditionalGeneration, exist_ok=True)
