"""Which frames of a prompt are compared with each other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import Tensor


def clips(frames: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Row and positions [T, n] of every clip: frames of a row that follow each other and have n tokens each.

    A still image is a clip of one frame. Images of one size in one prompt are a clip of several, which is how families
    without a video processor are shown a video. `frames` [B, N] are those of `Prefill.frames`.

    Example:
        >>> [(row, places.tolist()) for row, places in clips(torch.tensor([[-1, 0, 0, 1, 1, 2]]))]
        [(0, [[1, 2], [3, 4]]), (0, [[5]])]
    """
    for row, numbers in enumerate(frames):
        places = (numbers >= 0).nonzero().flatten()
        sizes = numbers[places].bincount().tolist()
        for size, run in groupby(sizes):
            taken = size * len(list(run))
            yield row, places[:taken].view(-1, size)
            places = places[taken:]
