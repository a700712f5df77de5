"""Which visual token shows which part of the image, for maps drawn over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dyvte.batch import Batch
from dyvte.mllm import MLLM


@dataclass(frozen=True)
class View:
    """The first `rows * columns` visual tokens of a sample cover `image`.

    Attributes:
        rows: patches from top to bottom.
        columns: patches from left to right.
        image: [height, width, 3] from 0 to 1 as the vision tower saw it (after cropping and resizing), None where the
            processor hands over patches instead of an image.
        by_column: visual tokens go down the columns (VILA's `mlp_downsample`), not along the rows.
    """

    rows: int
    columns: int
    image: npt.NDArray[np.float32] | None
    by_column: bool = False

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """A value of every visual token [..., V] as a map [..., rows, columns]."""
        shown = values[..., : self.rows * self.columns]
        if self.by_column:
            return shown.unflatten(-1, (self.columns, self.rows)).transpose(-1, -2)
        return shown.unflatten(-1, (self.rows, self.columns))


def view(mllm: MLLM, batch: Batch) -> View | None:
    """How the visual tokens of a single sample with a single image lie over the image.

    Covers one view of a fixed size (LLaVA-1.5, exported visual tokens), a whole-image view followed by tiles
    (LLaVA-NeXT, LLaVA-OneVision: the tiles are left out), and the patch grids of the Qwen-VL family. None for any other
    arrangement.

    Raises:
        ValueError: the batch holds several samples.
    """
    if len(batch["input_ids"]) != 1:
        raise ValueError(f"view() needs a batch of one sample, got {len(batch['input_ids'])}")
    num_visual = int(batch.layout.visual.sum())
    grid = batch.get("image_grid_thw")
    if grid is not None and len(grid) == 1:
        frames, rows, columns = grid[0].tolist()
        merge = math.isqrt(rows * columns // max(num_visual, 1))  # patches on a side of what becomes one token
        whole = merge and frames == 1 and rows // merge * (columns // merge) == num_visual
        return View(rows // merge, columns // merge, None) if whole else None
    side = math.isqrt(num_visual)
    config = mllm.model.config
    by_column = config.model_type == "llava_downsample" or bool(getattr(config, "visual_tokens_by_column", False))
    if batch.get("mm_encoder_outputs"):
        return View(side, side, None, by_column) if side**2 == num_visual else None
    pixels = batch.get("pixel_values")
    if pixels is None or pixels.shape[0] != 1 or num_visual == 0:
        return None
    if pixels.ndim == 4:
        return View(side, side, _image(mllm, pixels[0]), by_column) if side**2 == num_visual else None
    if pixels.ndim == 5 and config.model_type.startswith("llava"):
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        return View(side, side, _image(mllm, pixels[0, 0])) if side**2 <= num_visual else None
    return None


def _image(mllm: MLLM, pixels: torch.Tensor) -> npt.NDArray[np.float32]:
    """Undo the processor's normalisation of [3, height, width]."""
    processor: Any = getattr(mllm.processor, "image_processor", None)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    image = pixels.detach().float().cpu().permute(1, 2, 0)
    if mean is not None and std is not None:
        image = image * torch.tensor(std) + torch.tensor(mean)
    else:
        image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-9)
    return np.asarray(image.clamp(0, 1).numpy(), dtype=np.float32)
