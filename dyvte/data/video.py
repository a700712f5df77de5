"""Frames of a video: of a file, through transformers' own readers, or of a list of frames."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.data.reading import short_name
from dyvte.errors import BrokenSample, ConfigError

READERS = {"torchcodec": "torchcodec", "av": "pyav"}
"""Packages that decode videos, the one that is asked first in front, and what transformers calls each."""


def read_video(video: str | Path | Sequence[Any], most: int, where: str = "video") -> Any:
    """Frames of a video, at most `most` of them, evenly spread from the first to the last.

    Args:
        video: a file, or its frames: pictures, or an array [frames, height, width, 3].
        most: the most frames to take.
        where: what the video belongs to, for errors.

    Returns:
        Of a file an array [frames, height, width, 3], of frames a list of them.

    Raises:
        ConfigError: `most` is below 1, or there is a file to read and no package to decode it.
        BrokenSample: there is no such file, it has no frames, or they cannot be read.

    Example:
        >>> read_video(list("abcdefg"), 3)
        ['a', 'd', 'g']
    """
    if most < 1:
        raise ConfigError(f"{most} frames of a video are asked for; give 1 or more")
    if not isinstance(video, (str, Path)):
        if not len(video):
            raise BrokenSample(where, "the video has no frames")
        return [video[index] for index in _spread(len(video), most)]
    name = short_name(str(video))
    if not Path(video).is_file():
        raise BrokenSample(where, f"video {name!r} not found")
    reader = next((called for package, called in READERS.items() if importlib.util.find_spec(package)), None)
    if reader is None:
        raise ConfigError(
            f"{where}: video {name!r} needs a package that decodes videos: pip install av (or torchcodec), or give its "
            "frames as a list of pictures"
        )

    from transformers.video_utils import load_video  # only for files: it looks for every decoder there is

    def indices(metadata: Any, **_: Any) -> list[int]:
        return _spread(metadata.total_num_frames, most)

    try:
        return load_video(str(video), backend=reader, sample_indices_fn=indices)[0]
    except Exception as error:  # decoders raise errors of their own
        raise BrokenSample(where, f"video {name!r} is unreadable ({' '.join(str(error).split())})") from error


def _spread(number: int, most: int) -> list[int]:
    return [round(index) for index in np.linspace(0, number - 1, min(number, most))]
