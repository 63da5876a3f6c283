"""Image files are opened here and nowhere else: by decoders that are named, and no larger than memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image

# Pillow's own default bound (a quarter of a GiB as RGB), checked on the header: 20,000 x 20,000 black pixels
# are a PNG of a few hundred kilobytes, and 1.2 GB once decoded. Pillow itself only warns up to twice as many.
MAX_PIXELS = 89_478_485

# Pillow goes by a file's content, whatever its name, and has forty formats. Its EPS decoder starts Ghostscript, which
# runs the program that such a file is; others are seldom used and little looked after.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def open_image(file: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read, its pixels not yet.

    Raises:
        PIL.UnidentifiedImageError: it is none of ``FORMATS``.
        PIL.Image.DecompressionBombError: its header claims more than ``max_pixels``.
        OSError: it cannot be read.
    """
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        image.close()
        raise Image.DecompressionBombError(f"its header claims {size} pixels, more than {max_pixels:,}")
    return image
