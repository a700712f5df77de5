"""What a browser sends, views as JSON or links and images: nothing in it is trusted, and nothing goes to disk.

What is none of them is a `ConfigError` that says why.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from PIL import Image

from dyvte.data.reading import read_image
from dyvte.errors import BrokenSample, ConfigError

from ..plots.style import data_address

LONGEST_QUESTION = 1000
"""Characters of a question."""

LONGEST_LINK = 4096
"""Characters of a state in a link."""

ANY_LAYER = -1
"""Layer of a view for which none is chosen: with an answer it becomes the one that looks at the image most."""

QUERY_KEY = "view"
"""Name of the state in a link's query."""

IMAGE_KEY = "image"
"""Where the JSON of a view holds an uploaded image."""


@dataclass(frozen=True)
class ViewState:
    """One view of one question. Layers, heads, tokens, rows and columns count from 0.

    Attributes:
        model: its name, so that a view is not taken for that of another model.
        example: number of the example image; None for an uploaded one, which a link does not carry.
        token: the answer's token whose attention is shown.
        head: None for the mean.
        exit_layer: k at which the image leaves; None for the full model.
        method, budget: how patches are thinned out, and at which cost.
        queries, keys: the path that is cut.
        window: layers [s, e) in which it is.
        region: (top, left, bottom, right) of the patches that were drawn around; None without.
    """

    model: str = ""
    example: int | None = None
    question: str = ""
    token: int = 0
    layer: int = 0
    head: int | None = None
    exit_layer: int | None = None
    method: str = "fastv"
    budget: float = 0.5
    queries: str = "instruction"
    keys: str = "visual"
    window: tuple[int, int] | None = None
    region: tuple[int, int, int, int] | None = None

    def to_link(self) -> str:
        """The part of a link behind its `?`: the state as base64url, only what differs from the defaults."""
        changed = {key: value for key, value in asdict(self).items() if value != getattr(ViewState(), key)}
        packed = json.dumps(changed, ensure_ascii=False, separators=(",", ":")).encode()
        return f"{QUERY_KEY}={base64.urlsafe_b64encode(packed).decode().rstrip('=')}"

    @classmethod
    def from_link(cls, value: str) -> ViewState:
        """The state that the query of a link holds (the value behind `view=`).

        Example:
            >>> state = ViewState(question="What is red?", layer=3)
            >>> ViewState.from_link(state.to_link().removeprefix("view=")) == state
            True
        """
        if len(value) > LONGEST_LINK:
            raise ConfigError(f"the link's view has {len(value)} characters, at most {LONGEST_LINK} can be a view")
        try:
            padded = value + "=" * (-len(value) % 4)
            text = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
        except (binascii.Error, ValueError) as error:
            raise ConfigError("the link's view is damaged: it is no base64 text") from error
        return cls.of(_json_object(text))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> ViewState:
        """The state with these values; what is left out is as by default."""
        known = {each.name for each in fields(cls)}
        if unknown := set(content) - known:
            raise ConfigError(f"the view has an unknown key {min(unknown)!r}; known are {', '.join(sorted(known))}")
        return cls(**{key: _checked(key, value) for key, value in content.items()})

    def clipped(self, num_layers: int, num_heads: int, num_tokens: int, rows: int, columns: int) -> ViewState:
        """The nearest state that fits a model and an answer."""
        region = self.region
        if region is not None and (region[2] >= rows or region[3] >= columns):
            region = None
        start, stop = self.window or (0, num_layers)
        stop = min(stop, num_layers)
        return replace(
            self,
            token=min(self.token, num_tokens - 1),
            layer=min(self.layer, num_layers - 1),
            head=None if self.head is None else min(self.head, num_heads - 1),
            exit_layer=None if self.exit_layer is None else min(self.exit_layer, num_layers),
            window=(min(start, stop), stop),
            region=region,
        )


def view_file(state: ViewState, image: Image.Image | None) -> str:
    """A view as JSON, with its image where that is no example."""
    content = asdict(state) | ({} if image is None else {IMAGE_KEY: data_address(image)})
    return json.dumps(content, ensure_ascii=False, indent=1)


def read_view_file(text: str, max_bytes: int, max_pixels: int) -> tuple[ViewState, Image.Image | None]:
    """What `view_file` wrote, under the limits of uploads."""
    content = _json_object(text)
    address = content.pop(IMAGE_KEY, None)
    if address is not None and not isinstance(address, str):
        raise ConfigError(f"the view's {IMAGE_KEY!r} is no data: address")
    image = None if address is None else read_upload(address, max_bytes, max_pixels)
    return ViewState.of(content), image


def read_region(text: str) -> tuple[int, int, int, int] | None:
    """A region as it is typed; None where nothing is.

    Example:
        >>> read_region("0, 1, 2, 3")
        (0, 1, 2, 3)
    """
    if not text.strip():
        return None
    parts = [each.strip() for each in text.split(",")]
    if len(parts) != 4 or not all(each.isascii() and each.isdigit() for each in parts):
        raise ConfigError(f"the region is {text[:40]!r}; give top, left, bottom, right as in 0, 0, 3, 3")
    top, left, bottom, right = map(int, parts)
    return top, left, bottom, right


def read_window(first: int, last: int) -> tuple[int, int]:
    """The window [s, e) of two layers, both of which belong to it."""
    if last < first:
        raise ConfigError(f"from layer {first} to layer {last} is no window: give the first layer first")
    return first, last + 1


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("the view is no JSON") from error
    if not isinstance(found, dict):
        raise ConfigError(f"the view is a JSON {type(found).__name__}, not an object")
    return found


TEXTS, LENGTHS = ("model", "question", "method", "queries", "keys"), {"window": 2, "region": 4}
KINDS = {
    **dict.fromkeys(TEXTS, f"text of up to {LONGEST_QUESTION} characters"),
    **dict.fromkeys(("token", "layer"), "a whole number from 0"),
    **dict.fromkeys(("example", "head", "exit_layer"), "a whole number from 0, or null"),
    "budget": "a number above 0 and up to 1",
    **{key: f"a list of {length} whole numbers in order, or null" for key, length in LENGTHS.items()},
}
"""What the values of a state are, for errors."""


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked(key: str, value: Any) -> Any:
    """A value of a state, or a `ConfigError` with its key."""
    kind = KINDS[key]
    if value is None and kind.endswith("or null"):
        return None
    if key in TEXTS:
        fits = isinstance(value, str) and len(value) <= LONGEST_QUESTION
    elif key in LENGTHS:
        half = LENGTHS[key] // 2
        fits = isinstance(value, list) and len(value) == LENGTHS[key] and all(map(_counts, value))
        fits = fits and all(low <= high for low, high in zip(value[:half], value[half:], strict=True))
    elif key == "budget":
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
    else:
        fits = _counts(value)
    if fits:
        return tuple(value) if key in LENGTHS else float(value) if key == "budget" else value
    raise ConfigError(f"the view's {key!r} is {str(value)[:60]!r}; give {kind}")


def read_upload(address: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """The image in a `data:` address (`data:image/png;base64,...`), as RGB.

    Its width times height is read from the header before it is decoded: a small file may unpack to gigabytes.
    """
    head, _, content = address.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise ConfigError("the upload is no file of a browser (a base64 data: address)")
    if len(content) * 3 // 4 > max_bytes + 2:
        raise ConfigError(f"the file is larger than {max_bytes / 2**20:g} MiB (set upload.max_mib)")
    try:
        raw = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError("the upload is damaged: it is no base64") from error
    try:
        with Image.open(io.BytesIO(raw)) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ConfigError(f"the image has far more than {max_pixels:,} pixels (set upload.max_pixels)") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise ConfigError("the file is no image that Pillow can read: give a PNG, JPEG or WebP") from error
    if width * height > max_pixels:
        raise ConfigError(
            f"the image has {width} x {height} pixels, more than {max_pixels:,} (set upload.max_pixels, or make it "
            "smaller)"
        )
    try:
        return read_image(raw, "upload", "upload")
    except BrokenSample as error:
        raise ConfigError(str(error)) from error
