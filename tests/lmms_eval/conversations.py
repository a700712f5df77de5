"""The conversations of the tasks of `make test-lmms-eval`: each function is the task of its name."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

Content = list[dict[str, Any]]


def _shown(content: bytes) -> dict[str, Any]:
    return {"type": "image", "url": Image.open(io.BytesIO(content))}


def _said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _turn(role: str, *content: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def one_image(doc: dict[str, Any]) -> Content:
    """An image and a question."""
    return [_turn("user", _shown(doc["image"]), _said(doc["question"]))]


def two_turns(doc: dict[str, Any]) -> Content:
    """A turn about another image, its answer, and the question."""
    earlier = _turn("user", _shown(doc["other"]), _said(doc["question"]))
    return [earlier, _turn("assistant", _said(doc["answer"])), *one_image(doc)]


def two_images(doc: dict[str, Any]) -> Content:
    """Two images with text between them, in one turn."""
    return [_turn("user", _shown(doc["other"]), _said("and"), _shown(doc["image"]), _said(doc["question"]))]


def one_broken(doc: dict[str, Any]) -> Content:
    """An image and a question; the first document's image is none."""
    if doc["number"]:
        return one_image(doc)
    return [_turn("user", {"type": "image", "url": "data:image/png;base64,AAAA"}, _said(doc["question"]))]


def no_visual(doc: dict[str, Any]) -> list[Any]:
    """What lmms-eval asks of tasks for models without conversations."""
    return []
