"""What the task in shapes_small.yaml needs beside its columns."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of a question, stored as PNG bytes."""
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]
