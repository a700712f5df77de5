"""Which visual tokens show the objects that an answer rests on, where the data know it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.data import Dataset, Sample
from dyvte.instrument.views import view
from dyvte.mllm import MLLM
from dyvte.testbed.world import GRID

TARGET = "target"
"""Entry of a sample's metadata: cells (row, column) of the drawn scene's grid, those of the objects on the way."""

LOOKED_AT = 16
"""Samples that are read to see whether the data know."""


def knows_targets(dataset: Dataset) -> bool:
    """Whether the data say which objects their answers rest on; the first samples are looked at."""
    for number, sample in enumerate(dataset.readable()):
        if sample.metadata.get(TARGET):
            return True
        if number >= LOOKED_AT:
            break
    return False


def target_keys(mllm: MLLM, batch: Batch, samples: Sequence[Sample], seed: int) -> tuple[Tensor, Tensor]:
    """Visual tokens of the objects that each answer rests on, and as many others of the same image, drawn at random.

    Returns:
        Two masks [B, N]. Rows are empty where the data name no object, where tokens have no place in the image, and
        where the objects cover more than half of it.
    """
    objects, others = (torch.zeros_like(batch.layout.visual) for _ in range(2))
    for row, sample in enumerate(samples):
        cells = sample.metadata.get(TARGET)
        place = view(mllm, batch[row : row + 1]) if cells else None
        if place is None:
            continue
        positions = batch.layout.visual[row].nonzero().flatten()
        number = place.arrange(torch.arange(len(positions)))
        patch_rows, patch_columns = (torch.arange(size) * GRID // size for size in number.shape)
        cell = patch_rows[:, None] * GRID + patch_columns
        named = [int(r) * GRID + int(c) for r, c in cells or ()]
        inside = torch.isin(cell, torch.tensor(named))
        of_objects, elsewhere = number[inside], number[~inside].numpy()
        if len(of_objects) > len(elsewhere):
            continue
        generator = np.random.default_rng([seed, zlib.crc32(f"{sample.id} patches".encode())])
        drawn = torch.from_numpy(generator.choice(elsewhere, size=len(of_objects), replace=False))
        objects[row, positions[of_objects]] = True
        others[row, positions[drawn]] = True
    return objects, others
