"""Videos: frames of a file, read through transformers' own readers, or of a list of frames."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dyvte.data.reading import short_name
from dyvte.errors import BrokenSample, ConfigError

READERS = {"torchcodec": "torchcodec", "av": "pyav"}
"""Packages that decode videos, the one that is asked first in front, and what transformers calls each."""


MAX_FRAMES = 8
"""Frames that are read of a video where nobody says how many."""


@dataclass(frozen=True)
class Video:
    """What a sample has in place of an image where its question is about a video; `MLLM.encode` takes it as one.

    Its frames are RGB images in the order of time.

    Example:
        >>> Video((Image.new("RGB", (6, 4)), Image.new("RGB", (6, 4)))).size
        (6, 4)
    """

    frames: tuple[Image.Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame, as of an image."""
        return self.frames[0].size

    def tobytes(self) -> bytes:
        """The pixels of all frames, as of an image: equal for equal videos."""
        return b"".join(frame.tobytes() for frame in self.frames)


def video_of(
    value: Any,
    where: str,
    find: Callable[[str], Path | bytes],
    frame: Callable[[Any], Image.Image | None],
    most: int = MAX_FRAMES,
) -> Video:
    """The video that a record holds: the name of a file (or what `datasets` makes of it), or a list of frames.

    Args:
        value: what the record holds.
        where: file and line, or data set and row.
        find: from the name of a file to the file.
        frame: from an entry of a list to its image.
        most: the most frames to take, evenly spread.
    """
    if isinstance(value, (list, tuple)):
        frames = [frame(each) for each in read_video(value, most, where)]
        found = tuple(each for each in frames if each is not None)
        if len(found) < len(frames):
            raise BrokenSample(where, "the video lacks a frame")
        return Video(found)
    name = value.get("path") if isinstance(value, Mapping) else value
    file = find(name) if isinstance(name, str) and name else None
    if not isinstance(file, Path):
        raise BrokenSample(where, "the video is neither the name of a file nor a list of frames")
    return Video(tuple(Image.fromarray(np.asarray(each)) for each in read_video(file, most, where)))


def read_video(
    video: str | Path | Sequence[Any],
    most: int,
    where: str = "video",
    between: tuple[float | None, float | None] = (None, None),
) -> Any:
    """Frames of a video, at most `most` of them, evenly spread from the first to the last.

    Args:
        video: a file, or its frames: pictures, or an array [frames, height, width, 3].
        most: the most frames to take.
        where: what the video belongs to, for errors.
        between: start and end in seconds of the part of a file to take; None is the video's own.

    Returns:
        Of a file an array [frames, height, width, 3], of frames a list of them.

    Raises:
        ConfigError: `most` is below 1, or there is a file to read and no package to decode it.
        BrokenSample: there is no such file, it has no frames there, or they cannot be read.

    Example:
        >>> read_video(list("abcdefg"), 3)
        ['a', 'd', 'g']
    """
    if most < 1:
        raise ConfigError(f"{most} frames of a video are asked for; give 1 or more")
    if not isinstance(video, (str, Path)):
        if not len(video):
            raise BrokenSample(where, "the video has no frames")
        if between != (None, None):
            raise BrokenSample(where, "a part of a video is asked for by time, which frames alone do not tell")
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
        start, end = (None if each is None else each * metadata.fps for each in between)
        first = 0 if start is None else math.ceil(start)
        last = metadata.total_num_frames - 1 if end is None else min(math.floor(end), metadata.total_num_frames - 1)
        if first > last:
            raise ValueError(f"no frame between {between[0]} and {between[1]} seconds")
        return [first + index for index in _spread(last - first + 1, most)]

    try:
        return load_video(str(video), backend=reader, sample_indices_fn=indices)[0]
    except Exception as error:  # decoders raise errors of their own
        raise BrokenSample(where, f"video {name!r} is unreadable ({' '.join(str(error).split())})") from error


def _spread(number: int, most: int) -> list[int]:
    return [round(index) for index in np.linspace(0, number - 1, min(number, most))]
