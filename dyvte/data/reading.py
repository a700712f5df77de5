"""Reading what a record holds: one set of readers for every data set, `dyvte.generate` and the lmms-eval plug-in.

What cannot be used raises a `BrokenSample`, which names file and line and costs that one sample.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dyvte.errors import BrokenSample

PLACEHOLDERS = (
    *("<image>", "<im_start>", "<im_end>", "<im_patch>", "<image_placeholder>"),  # LLaVA and its forks
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),  # Qwen-VL
    *("<|begin_of_image|>", "<|end_of_image|>", "<|image|>"),  # GLM-V, Phi, Llama
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),  # Gemma 3
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),  # Pixtral, Mistral
    *("<fake_token_around_image>", "<global-img>"),  # Idefics, SmolVLM
    "<IMG_CONTEXT>",  # InternVL
)
"""Where a data set says the image goes. Every model's own chat template puts it there instead."""

VIDEO_PLACEHOLDERS = ("<video>", "<|video_pad|>")
"""Where a data set says the video goes."""

OTHER_MEDIA = ("<audio>", "<|audio_pad|>", "<speech>")

_PLACEHOLDER = re.compile(
    "|".join([r"</?img>(?=<IMG_CONTEXT>)", r"(?<=<IMG_CONTEXT>)</img>", *map(re.escape, PLACEHOLDERS)])
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_DATA_URL = re.compile(r"data:[\w/+.-]*(?:;[\w=.-]+)*;base64,", re.IGNORECASE)
_BASE64_OF_IMAGES = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk0", "Qk1")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_LONGEST_NAME = 80


def read_text(value: Any, what: str, where: str) -> str:
    """A text that tokenizers and tables can hold, as it is: without half of a character (a lone surrogate).

    `what` is what an error calls it: `question`, `answer`, ...
    """
    if not isinstance(value, str):
        raise BrokenSample(where, f"the {what} is {type(value).__name__}, not text")
    if found := _SURROGATE.search(value):
        code = f"U+{ord(found[0]):04X}"
        raise BrokenSample(where, f"the {what} holds half of a character (lone surrogate {code} at {found.start()})")
    return value


def without_placeholders(text: str) -> str:
    """A text without what stands for its images in it (`PLACEHOLDERS`)."""
    return _PLACEHOLDER.sub("", text)


def read_question(value: Any, where: str, about_video: bool = False) -> str:
    """The question without image placeholders (`PLACEHOLDERS`) and outer space, in one about a video without its, too.

    Example:
        >>> read_question("<image> What is it?", "questions.jsonl line 1")
        'What is it?'
    """
    text = read_text(value, "question", where)
    if found := next((each for each in OTHER_MEDIA if each in text), None):
        raise BrokenSample(where, f"the question is about {found}; images and videos are supported, not sound")
    if found := next((each for each in VIDEO_PLACEHOLDERS if each in text and not about_video), None):
        raise BrokenSample(where, f"the question is about {found}, and no video is named (key or column 'video')")
    for placeholder in VIDEO_PLACEHOLDERS:
        text = text.replace(placeholder, "")
    text = without_placeholders(text).strip()
    if not text:
        raise BrokenSample(where, "the question is empty")
    return text


def read_answers(value: Any, where: str, names: Sequence[str] | None = None) -> list[str]:
    """Reference answers in any of the forms that data sets give them; gaps are left out.

    Text, numbers, lists and lists of lists of them; `{"answer": ...}` of VQA and `{"text": [...]}` of SQuAD, one or a
    list, or the dict of lists that `datasets` makes of them. With `names`, whole numbers stand for classes
    (`datasets.ClassLabel`).
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, Mapping):
        key = next((each for each in ("answer", "text", "answers", "value") if each in value), None)
        if key is None:
            raise BrokenSample(where, f"the answer is a record of {', '.join(map(str, value)) or 'nothing'}, not text")
        return read_answers(value[key], where, names)
    if isinstance(value, (list, tuple)):
        return [answer for each in value for answer in read_answers(each, where, names)]
    if isinstance(value, int) and names is not None:
        return [names[value]] if 0 <= value < len(names) else []  # -1 is a test set's hidden label
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with a gap is read as 1.0
    if not isinstance(value, (str, int, float)):
        raise BrokenSample(where, f"the answer is {type(value).__name__}, not text")
    text = read_text(str(value), "answer", where)
    return [text] if text.strip() else []


def most_frequent(answers: Sequence[str]) -> str | None:
    """The answer that most annotators gave, the first of several; None where there is none."""
    return Counter(answers).most_common(1)[0][0] if answers else None


def read_image(source: Path | bytes, name: str, where: str, like: str = "datasets") -> Image.Image:
    """Decode a file, or its content, completely, as RGB; `name` is what an error calls it."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return to_rgb(image, like)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = "not an image that Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BrokenSample(where, f"image {short_name(name)!r} is unreadable ({' '.join(reason.split())})") from error


def to_rgb(image: Image.Image, like: str = "datasets") -> Image.Image:
    """An image as RGB.

    16-bit grey is scaled to 8 bits, where `convert` alone would clip it to white. What differs between loaders:

    - `datasets`: turned upright by its EXIF orientation, as `datasets` and `transformers` load it; transparent pixels
      are put on white, as Qwen-VL's own loader does.
    - `llava`: neither turned nor put on white, as LLaVA's own `Image.open(file).convert("RGB")`.

    Raises:
        ValueError: 32-bit or floating-point pixels, whose black and white nobody has said.
    """
    if image.mode.startswith("I;16"):
        orientation = image.getexif()
        image = Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
        image.getexif().update(orientation)
    elif image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels, whose black and white are not known; save it with 8 or 16 bits")
    if like == "llava":
        return image.convert("RGB")
    image = _upright(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


def short_name(name: str) -> str:
    """A file name that fits into an error: printable, and the middle of a long one left out."""
    shown = "".join(each if each.isprintable() else "?" for each in name)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:50]}...{shown[-20:]}"


def find_image(
    name: str,
    folder: Path | None,
    where: str,
    allow_outside: bool = False,
    also: Iterable[Path] = (),
    what: str = "image",
) -> Path | bytes:
    """The file that a record names, or the content of a data URL or of base64.

    Args:
        name: as the record has it.
        folder: that names are relative to; None for the current one.
        where: file and line of the sample.
        allow_outside: whether the name may lead out of the folder (`data.allow_outside`).
        also: other folders that it may lead to.
        what: `image` or `video`: what an error calls it.
    """
    if (content := _embedded(name)) is not None:
        return content
    if _ADDRESS.match(name):
        raise BrokenSample(where, f"{what} {short_name(name)!r} is an address; download it and name the file")
    base = Path() if folder is None else folder
    path = base / name
    roots = map(_absolute, (base, *also))
    if not allow_outside and not any(_absolute(path).is_relative_to(root) for root in roots):
        raise BrokenSample(
            where,
            f"{what} {short_name(name)!r} lies outside of {base}/ (set data.image_folder, or data.allow_outside=true)",
        )
    try:
        there = path.is_file()
    except (OSError, ValueError):  # too long a name, a zero byte
        there = False
    if not there:
        under = f" under {folder}/" if folder is not None else ""
        raise BrokenSample(where, f"{what} {short_name(name)!r} not found{under} (set data.image_folder)")
    return path


def _absolute(path: Path) -> Path:
    """Without `..`; links are not followed, those inside of a folder are its owner's."""
    return Path(os.path.normpath(Path.cwd() / path))


def _embedded(name: str) -> bytes | None:
    """The bytes of a data URL, or of base64 that starts as a PNG, JPEG, GIF, WebP or BMP file does."""
    if header := _DATA_URL.match(name):
        name = name[header.end() :]
    elif not name.startswith(_BASE64_OF_IMAGES) or len(name) < 64 or "." in name:
        return None
    try:
        return base64.b64decode("".join(name.split()), validate=True)
    except (binascii.Error, ValueError):
        return b"" if header else None
