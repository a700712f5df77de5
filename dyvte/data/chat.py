"""Conversations: turns of text, images and videos in the form of transformers' chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyvte.data.video import MAX_FRAMES, read_video
from dyvte.errors import ModelError

Chat = Sequence[Mapping[str, Any]]
"""Messages `{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "..."}]}`.

A `{"type": "video", "video": film}` is a list of frames, an array [frames, height, width, 3], or a file name.
"""


@dataclass
class SplitChat:
    """A conversation without its media, and the media in their order.

    `messages` are as `apply_chat_template` takes them, with placeholders; each of `videos` is a list of frames, or an
    array [frames, height, width, 3].
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


def split_chat(chat: Chat, max_frames: int = MAX_FRAMES) -> SplitChat:
    """Take the media out of a conversation; files of videos are read (`dyvte.data.video.read_video`).

    Example:
        >>> asked = {"role": "user", "content": [{"type": "image", "image": 7}, {"type": "text", "text": "?"}]}
        >>> found = split_chat([asked])
        >>> found.messages, found.images
        ([{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': '?'}]}], [7])
    """
    found = SplitChat()
    for message in chat:
        parts = message["content"]
        content = []
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            kind = part.get("type")
            if kind == "text":
                content.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                found.images.append(part["image"])
                content.append({"type": kind})
            elif kind == "video":
                film = part["video"]
                found.videos.append(read_video(film, max_frames) if isinstance(film, (str, Path)) else film)
                content.append({"type": kind})
            else:
                raise ModelError(f"a message holds {kind!r}; a conversation is made of text, image and video")
        found.messages.append({"role": message["role"], "content": content})
    return found
