"""Which frame of a video is looked at, layer by layer: means over videos, and a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..bands import ImageBootstrap, keyed_array, mean_band


def summarise_frames(table: pd.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    """Mean share of each frame in each layer, over the videos of the most common number of frames.

    Args:
        table: a row per sample, layer and frame: `id`, `image_id`, `frames` (how many its video has), `share`.
        draws: of the bootstrap over videos.

    Returns:
        `num_samples` and `num_videos` that are counted, `left_out` samples of videos of another length; `share` [L, F].
    """
    samples = table.drop_duplicates("id")
    count = int(samples["frames"].mode().min())
    chosen = samples[samples["frames"] == count]
    shares = keyed_array(table, "share", chosen["id"], "layer", "frame")[:, :, :count]  # [n, L, F]
    videos = ImageBootstrap(chosen["image_id"].to_numpy(), draws, seed)
    found = {
        "frames": count,
        "num_samples": len(chosen),
        "num_videos": videos.num_images,
        "left_out": len(samples) - len(chosen),
        "share": mean_band(shares, videos).to_dict(),
    }
    return found | {"in_words": frames_in_words(found)}


def frames_in_words(found: dict[str, Any]) -> str:
    """Which frame gets most in which layer, against its even share.

    Example:
        >>> frames_in_words({"frames": 2, "num_videos": 9, "share": {"mean": [[0.5, 0.5], [0.25, 0.75]]}})
        'of 2 frames, frame 2 gets 75% of the attention on the video in layer 1 (evenly: 50%; n = 9 videos)'
    """
    mean = np.array(found["share"]["mean"], dtype=float)
    layer, frame = np.unravel_index(int(np.nanargmax(mean)), mean.shape)
    return (
        f"of {found['frames']} frames, frame {frame + 1} gets {mean[layer, frame]:.0%} of the attention on the video "
        f"in layer {layer} (evenly: {1 / found['frames']:.0%}; n = {found['num_videos']} videos)"
    )
