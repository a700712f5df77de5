"""Pictures and videos of conversations that another evaluation tool hands over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from dyvte.data.reading import find_image, read_image, to_rgb, without_placeholders
from dyvte.data.video import read_video
from dyvte.errors import ConfigError


def read_chat(messages: Sequence[Any], where: str, max_num_frames: int) -> list[dict[str, Any]]:
    """Messages of a task in the form of `dyvte.data.chat.Chat`, their pictures and videos read.

    Raises:
        ConfigError: sound, or a picture of a kind that nobody knows.
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
                content.append({"type": "video", "video": read_video(part["url"], max_num_frames, where)})
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
