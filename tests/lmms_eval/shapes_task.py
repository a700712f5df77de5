"""What the tasks in shapes_small.yaml and shapes_pairs.yaml need beside their columns."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def picture(content: bytes) -> Image.Image:
    """An image stored as PNG bytes."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of a question."""
    return [picture(doc["image"])]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn about another image, its answer, and the question."""

    def turn(role: str, text: str, *images: bytes) -> dict[str, Any]:
        shown = [{"type": "image", "url": picture(each)} for each in images]
        return {"role": role, "content": [*shown, {"type": "text", "text": text}]}

    earlier = [turn("user", doc["question"], doc["other"]), turn("assistant", doc["answer"])]
    return [*earlier, turn("user", doc["question"], doc["image"])]
