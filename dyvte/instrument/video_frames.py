"""Which frame is looked at: the visual tokens of a prompt by frame, and how attention is shared out among frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyvte.batch import Batch
from dyvte.errors import UnsupportedError
from dyvte.mllm import MLLM

NO_FRAME = -1
"""Number of a position that belongs to no frame."""


def frame_numbers(mllm: MLLM, batch: Batch) -> Tensor:
    """The frame of every visual position of a batch.

    A frame is what the vision side makes one block of tokens of: an image, or one step in time of a video. Families
    that merge neighbouring frames (Qwen-VL: two) have one step for these. Steps are told apart by the sizes that come
    with the inputs (`video_grid_thw`, or frames of equal size in `pixel_values_videos`); a token that a family adds
    behind the last frame (LLaVA-OneVision's line break) belongs to none.

    Args:
        mllm: the model.
        batch: its inputs, with images, videos, or both.

    Returns:
        [B, N] numbers that count the frames of a row from 0 in the order of the prompt; -1 elsewhere.

    Raises:
        UnsupportedError: the inputs of the videos do not say how their tokens are divided into frames.

    Example:
        >>> frame_numbers(mllm, batch).amax(1).tolist()  # one image each
        [0, 0]
    """
    ids, visual = batch["input_ids"], batch.layout.visual
    of_video = torch.zeros_like(visual)
    videos = any(batch.get(name) is not None for name in ("video_grid_thw", "pixel_values_videos"))
    if mllm.visual_token_ids and videos:
        of_video = visual & (ids == mllm.visual_token_ids[-1])
    of_image = visual & ~of_video
    before = torch.nn.functional.pad(of_image, (1, 0))[:, :-1]
    block = (of_image & ~before).flatten().cumsum(0).view_as(ids)  # every stretch of an image's tokens is a frame
    steps = torch.tensor(_steps(batch, int(of_video.sum())), dtype=torch.long, device=ids.device)
    block[of_video] = torch.where(steps == NO_FRAME, NO_FRAME, steps + int(block.amax()) + 1)
    numbers = torch.full_like(ids, NO_FRAME)
    for row in range(len(ids)):
        count: dict[int, int] = {}
        places = (visual[row] & (block[row] != NO_FRAME)).nonzero().flatten()
        found = [count.setdefault(each, len(count)) for each in block[row, places].tolist()]
        numbers[row, places] = torch.tensor(found, dtype=ids.dtype, device=ids.device)
    return numbers


def _steps(batch: Batch, tokens: int) -> list[int]:
    """The step in time, counted over all videos, of each of so many tokens of videos; -1 for one of no frame."""
    grids, pixels = batch.get("video_grid_thw"), batch.get("pixel_values_videos")
    if not tokens:
        return []
    if grids is not None:  # [videos, 3] steps, rows and columns of patches, of which some form a token
        patches = int(grids.prod(1).sum())
        sizes = [(steps, height * width * tokens // patches) for steps, height, width in grids.tolist()]
        spare = 0
    elif pixels is not None and pixels.ndim == 5 and tokens % len(pixels) == 0:  # [videos, frames, 3, height, width]
        each, frames = tokens // len(pixels), pixels.shape[1]
        sizes, spare = [(frames, each // frames)] * len(pixels), each % frames
    else:
        raise UnsupportedError("the inputs of the videos do not say how their tokens are divided into frames")
    found: list[int] = []
    done = 0
    for steps, size in sizes:
        found += [done + step for step in range(steps) for _ in range(size)] + [NO_FRAME] * spare
        done += steps
    if len(found) != tokens:
        raise UnsupportedError(f"the videos have {tokens} tokens, but their sizes speak of {len(found)}")
    return found


def frame_grid(batch: Batch, frames: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the visual tokens of a frame, for maps drawn over it.

    Args:
        batch: of one sample, whose video's sizes come with the inputs (`video_grid_thw`) or whose frames are square.
        frames: [N] numbers of its positions, from `frame_numbers`.

    Returns:
        None where the tokens of its frames form no such grid.

    Example:
        >>> from dyvte.layout import TokenLayout
        >>> ids = torch.tensor([[5, 7, 7, 7, 7, 7, 7, 7, 7]])
        >>> batch = Batch({"input_ids": ids}, TokenLayout.from_input_ids(ids, None, [7]))
        >>> frame_grid(batch, torch.tensor([-1, 0, 0, 0, 0, 1, 1, 1, 1]))
        (2, 2)
    """
    sizes = frames[frames != NO_FRAME].bincount()
    if not len(sizes) or not torch.equal(sizes, sizes[:1].expand(len(sizes))):
        return None
    tokens, grid = int(sizes[0]), batch.get("video_grid_thw")
    height, width = (math.isqrt(tokens),) * 2 if grid is None else (int(each) for each in grid[0, 1:])
    merged = math.isqrt(height * width // tokens)  # patches to a side that become one token
    rows, columns = height // max(merged, 1), width // max(merged, 1)
    return (rows, columns) if rows * columns == tokens else None


def frame_shares(received: Tensor, frames: Tensor) -> Tensor:
    """How the attention that goes to the image or video is shared out among its frames, layer by layer.

    The share of frame f is the sum of what its positions receive over the sum of what all frames receive: 1 / F each
    where attention does not tell frames of equal size apart. Heads count by what they give the frames, so that a head
    that looks elsewhere does not add noise.

    Args:
        received: [B, L, H, N] attention that every key receives, as `AttentionStats.received_last` (of the last prompt
            token) and `.received_instruction` have it; NaN in layers that do not attend, and for heads that a layer
            does not have.
        frames: [B, N] from `frame_numbers`.

    Returns:
        [B, L, F] shares, which add to 1 over the frames of a row; NaN for frames that a row does not have, and in
        layers that do not attend.

    Example:
        >>> received = torch.tensor([0.1, 0.2, 0.1, 0.1, 0.5]).view(1, 1, 1, 5)
        >>> frame_shares(received, torch.tensor([[0, 0, 1, 1, -1]]))
        tensor([[[0.6000, 0.4000]]])
    """
    number = int(frames.amax()) + 1
    member = torch.nn.functional.one_hot(frames.to(received.device) + 1, number + 1)[..., 1:]  # [B, N, F]
    attends = received.isfinite().any(-1).any(-1)  # [B, L]
    sums = torch.einsum("bln,bnf->blf", received.nan_to_num().sum(2), member.to(received.dtype))
    shares = sums / sums.sum(-1, keepdim=True)
    there = attends[:, :, None] & member.any(1)[:, None]
    return shares.where(there, torch.nan)
