"""Images from a browser: their size is checked before they are decoded, and nothing is written to disk."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image

from dyvte.data.reading import read_image
from dyvte.errors import BrokenSample, ConfigError

WHERE = "upload"


def read_upload(data_url: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """The image in a `data:` address, as RGB.

    Args:
        data_url: `data:image/png;base64,...` as a browser's FileReader makes it.
        max_bytes: of the file.
        max_pixels: width times height, read from the header: a small file may unpack to gigabytes.

    Raises:
        ConfigError: it is too large, no image, or damaged.
    """
    head, _, content = data_url.partition(",")
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
        return read_image(raw, "upload", WHERE)
    except BrokenSample as error:
        raise ConfigError(str(error)) from error


def data_address(image: Image.Image) -> str:
    """A picture as a PNG `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
