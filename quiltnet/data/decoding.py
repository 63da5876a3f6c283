"""Bytes -> RGB pixels, and the one exception that says a stored sample is broken."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from quiltnet.image_opening import MAX_PIXELS, open_image

JPEG_MAGIC = b"\xff\xd8\xff"
NPY_MAGIC = b"\x93NUMPY"

# What turns a picture upright, by its EXIF orientation (2 to 8; Exif 2.32, section 4.6.4).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What simplejpeg raises of a file that it will not have; KeyError: a way of subsampling that it does not know.
UNFIT = (ValueError, KeyError)


class BrokenSample(Exception):
    """A stored sample that cannot be used.

    Attributes:
        reason: one of empty_image, not_an_image, broken_image, too_many_pixels, unknown_pixel_range, no_image,
            several_images, no_caption, unreadable_json, truncated_tar, unreadable_shard.
        key: the sample's key, where the one who raises knows it.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason, key)
        self.reason = reason
        self.key = key

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


def decode_image(data: bytes, *, apply_exif: bool = False) -> np.ndarray:
    """``(H, W, 3)`` uint8 RGB for training: the pixels of ``decode_pil``, for a JPEG in two thirds of its time.

    One thing is not as ``decode_pil`` (and open_clip) has it: 16-bit grey is scaled to 8 bits, where Pillow's
    conversion clips all above 255 to white. Stored pixels (a ``.npy`` of (H, W, 3) uint8) are handed out without
    a copy, read-only.

    Args:
        data: a file of one of ``image_opening.FORMATS``, or a ``.npy``; of several frames or pages, the first.
        apply_exif: turn the image as its EXIF orientation says. By default that is ignored, as open_clip does.

    Raises:
        BrokenSample: as ``decode_pil``; unknown_pixel_range for 32-bit integers and floats, of which nobody knows
            what is white.
    """
    if data.startswith(NPY_MAGIC):
        return _stored_pixels(data)
    if jpeg_size(data) is not None:
        # What simplejpeg will not have (warnings of libjpeg, a missing end marker) is left to Pillow's verdict,
        # so that both decoders take and refuse the same files.
        with suppress(*UNFIT):
            return _upright_pixels(simplejpeg.decode_jpeg(data, "RGB"), data, apply_exif)
    with _blame():
        return _upright_pixels(_eight_bits(_open(data)), data, apply_exif)


def decode_pil(data: bytes, *, apply_exif: bool = False) -> Image.Image:
    """The whole image, decoded by Pillow and converted to RGB by it, as in open_clip's transforms.

    Raises:
        BrokenSample: empty_image, not_an_image, too_many_pixels (judged by the header, before any pixel is
            decoded), or broken_image, which includes every truncated file that lost pixels.
    """
    if data.startswith(NPY_MAGIC):
        return Image.fromarray(_stored_pixels(data))
    with _blame():
        image = _open(data).convert("RGB")
    turn = UPRIGHT.get(read_orientation(data)) if apply_exif else None
    return image if turn is None else image.transpose(turn)


def decode_half(data: bytes, height: int, width: int) -> np.ndarray | None:
    """A JPEG at half its size, ``(ceil(height / 2), ceil(width / 2), 3)`` uint8, by the scaled inverse DCT.

    None where it must be decoded as ``decode_image`` does. height, width: as ``jpeg_size`` says.
    """
    half_height, half_width = (height + 1) // 2, (width + 1) // 2
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=half_height, min_width=half_width, min_factor=2)
    except UNFIT:
        return None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) by the header of a JPEG that libjpeg decodes to RGB; None for all other files, CMYK too."""
    if not data.startswith(JPEG_MAGIC):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except UNFIT:
        return None
    return (height, width) if colorspace in ("YCbCr", "Gray") and height * width <= MAX_PIXELS else None


def read_orientation(data: bytes) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 as well where there is none, or none that can be read."""
    if data.startswith(NPY_MAGIC):
        return 1
    try:
        stated = open_image(io.BytesIO(data), MAX_PIXELS).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata of good pixels; of damaged pixels the decoder tells
        return 1
    return stated if stated in UPRIGHT else 1


def find_defect(data: bytes) -> str | None:
    """Why ``data`` is no usable image, or None; found by decoding all of it."""
    try:
        decode_image(data)
    except BrokenSample as error:
        return error.reason
    return None


def _open(data: bytes) -> Image.Image:
    """Header read, pixels not yet."""
    if not data:
        raise BrokenSample("empty_image")
    return open_image(io.BytesIO(data), MAX_PIXELS)


@contextmanager
def _blame() -> Iterator[None]:
    """What Pillow raises -> BrokenSample with its reason."""
    try:
        yield
    except BrokenSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenSample("too_many_pixels") from error
    except UnidentifiedImageError as error:
        raise BrokenSample("not_an_image") from error
    except Exception as error:  # a damaged file makes Pillow's plug-ins raise a dozen types
        raise BrokenSample("broken_image") from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """``(H, W, 3)`` uint8 of any mode; 16-bit grey by v / 257, so that white stays white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # "I": Pillow 10
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BrokenSample("unknown_pixel_range")
    return np.array(image.convert("RGB"))


def _upright_pixels(pixels: np.ndarray, data: bytes, apply_exif: bool) -> np.ndarray:
    turn = UPRIGHT.get(read_orientation(data)) if apply_exif else None
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _stored_pixels(data: bytes) -> np.ndarray:
    """The array of a ``.npy``, over the same memory. Nothing is unpickled: any dtype but uint8 is refused."""
    start = 10 + int.from_bytes(data[8:10], "little")
    shape = _npy_shape(data[:start])
    if shape is None or len(data) - start != shape[0] * shape[1] * 3:
        raise BrokenSample("broken_image")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise BrokenSample("too_many_pixels")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


@lru_cache(maxsize=256)  # the images of a prepared set share few sizes, and parsing takes longer than resizing a row
def _npy_shape(header: bytes) -> tuple[int, int, int] | None:
    """Shape by the header of a format 1.0 file, or None if it is not one of (H, W, 3) uint8 in C order."""
    stream = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            return None
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # a damaged header makes numpy's parser raise a handful of types
        return None
    is_image = len(shape) == 3 and shape[2] == 3 and min(shape) > 0
    return shape if is_image and dtype == np.uint8 and not is_fortran else None
