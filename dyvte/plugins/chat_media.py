"""Pictures and videos of conversations that another evaluation tool hands over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from dyvte.data.reading import find_image, read_image, to_rgb, without_placeholders
from dyvte.data.video import read_video
from dyvte.errors import ConfigError


def read_chat(messages: Sequence[Any], where: str, max_num_frames: int) -> list[dict[str, Any]]:
    """Messages of a task in the form of `dyvte.data.chat.Chat`, their pictures and evenly spread frames of videos read.

    They are in lmms-eval's protocol, whose media are named `url`; a video may have a start and an end in seconds.
    Errors say `where` they are from.
    """
    chat = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": without_placeholders(part["text"])})
            elif part["type"] == "image":
                content.append({"type": "image", "image": _image(part["url"], where)})
            elif part["type"] == "video":
                content.append({"type": "video", "video": _video(part, where, max_num_frames)})
            else:
                raise ConfigError(f"{where}: holds {part['type']}; dyvte answers about text, images and videos")
        chat.append({"role": message["role"], "content": content})
    return chat


def _image(visual: Any, where: str) -> Image.Image:
    """An image of a task as RGB: a picture, a file name, a data URL."""
    if isinstance(visual, Image.Image):
        return to_rgb(visual)
    if not isinstance(visual, str):
        raise ConfigError(f"{where}: shows {type(visual).__name__}; dyvte reads pictures, their files and data URLs")
    return read_image(find_image(visual, None, where, allow_outside=True), visual, where)


def _video(part: Mapping[str, Any], where: str, max_num_frames: int) -> Any:
    """Frames of a video of a task; its start and end stand beside its address, or with it in a record of their own."""
    film, between = part["url"], (part.get("start_time"), part.get("end_time"))
    if isinstance(film, Mapping):
        between = (film.get("video_start"), film.get("video_end"))
        film = film.get("url") or film.get("path")
    if not isinstance(film, (str, Sequence)) and not hasattr(film, "__array__"):
        raise ConfigError(f"{where}: shows {type(film).__name__}; dyvte reads files of videos, and their frames")
    return read_video(film, max_num_frames, where, between)
