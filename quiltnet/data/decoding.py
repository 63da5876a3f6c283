"""Bytes -> RGB pixels, and the one exception that says a stored sample is broken."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

JPEG_MAGIC = b"\xff\xd8\xff"

# Pillow's own default bound (a quarter of a GiB as RGB), checked on the header: 20,000 x 20,000 black pixels
# are a PNG of a few hundred kilobytes, and 1.2 GB once decoded.
MAX_PIXELS = 89_478_485


class BrokenSample(Exception):
    """A stored sample that cannot be used.

    Attributes:
        reason: one of empty_image, not_an_image, broken_image, too_many_pixels, no_image, no_caption,
            unreadable_json, truncated_tar.
        key: the sample's key, where the one who raises knows it.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason, key)
        self.reason = reason
        self.key = key

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


def decode_image(data: bytes) -> np.ndarray:
    """``(H, W, 3)`` uint8 RGB: the pixels of ``decode_pil``, for a JPEG in two thirds of its time.

    EXIF orientation is ignored, as open_clip does.

    Raises:
        BrokenSample: as ``decode_pil``.
    """
    if data.startswith(JPEG_MAGIC):
        # What simplejpeg will not have (CMYK, warnings of libjpeg, a missing end marker) is left to Pillow's
        # verdict, so that both decoders take and refuse the same files.
        with suppress(ValueError):
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in ("YCbCr", "Gray") and height * width <= MAX_PIXELS:
                return simplejpeg.decode_jpeg(data, "RGB")
    return np.array(decode_pil(data))


def decode_pil(data: bytes) -> Image.Image:
    """The whole image, decoded by Pillow and converted to RGB.

    Raises:
        BrokenSample: empty_image, not_an_image, too_many_pixels (judged by the header, before any pixel is
            decoded), or broken_image, which includes every truncated file that lost pixels.
    """
    if not data:
        raise BrokenSample("empty_image")
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise BrokenSample("too_many_pixels")
        return image.convert("RGB")
    except BrokenSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenSample("too_many_pixels") from error
    except UnidentifiedImageError as error:
        raise BrokenSample("not_an_image") from error
    except Exception as error:  # a damaged file makes Pillow's plug-ins raise a dozen types
        raise BrokenSample("broken_image") from error


def find_defect(data: bytes) -> str | None:
    """Why ``data`` is no usable image, or None; found by decoding all of it."""
    try:
        decode_image(data)
    except BrokenSample as error:
        return error.reason
    return None
