"""One image made ready for fast reading, and how far its pixels are from those of the original."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from quiltnet.data.decoding import JPEG_MAGIC, decode_image, read_orientation
from quiltnet.errors import UserError

MIN_SIZE = 32
VIEW_SIZE = 224  # pixels a side of what both are compared at


class PreparedImage(NamedTuple):
    """size: (height, width). is_lossless: its pixels are those of the original."""

    extension: str
    data: bytes
    size: tuple[int, int]
    is_lossless: bool


@dataclass(frozen=True)
class PreparedForm:
    """What images become: no larger than needed, and quick to decode.

    Attributes:
        size: of the shorter side in pixels; nothing is enlarged.
        quality: of JPEG, 1 to 100, without chroma subsampling; None keeps pixels as they are, in a ``.npy`` of
            (H, W, 3) uint8.
        apply_exif: turn images as their EXIF orientation says; it is ignored otherwise, and gone once encoded.
    """

    size: int = 256
    quality: int | None = 95
    apply_exif: bool = False

    def __post_init__(self) -> None:
        if self.size < MIN_SIZE:
            raise UserError(f"--size {self.size} is the shorter side in pixels; give {MIN_SIZE} at least")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--jpeg {self.quality} is a JPEG quality, between 1 and 100")

    def describe(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "format": "raw" if self.quality is None else "jpeg",
            "quality": self.quality,
            "exif": "apply" if self.apply_exif else "ignore",
        }

    def prepare(self, data: bytes) -> PreparedImage:
        """A JPEG that is small enough stays as it is, byte for byte.

        Raises:
            BrokenSample: as ``decode_image``.
        """
        pixels = decode_image(data, apply_exif=self.apply_exif)
        height, width = pixels.shape[:2]
        is_small = min(height, width) <= self.size
        is_upright = not self.apply_exif or read_orientation(data) == 1
        if is_small and is_upright and self.quality is not None and data.startswith(JPEG_MAGIC):
            return PreparedImage("jpg", data, (height, width), True)
        pixels = _channels_last(_shrink(_channels_first(pixels), self.size))
        if self.quality is None:
            buffer = io.BytesIO()
            np.save(buffer, pixels, allow_pickle=False)
            return PreparedImage("npy", buffer.getvalue(), pixels.shape[:2], is_small)
        # 4:4:4: subsampled colour would lose what the smaller image has just been given.
        return PreparedImage("jpg", simplejpeg.encode_jpeg(pixels, self.quality, "RGB", "444"), pixels.shape[:2], False)

    def error_levels(self, original: bytes, prepared: bytes) -> np.ndarray:
        """(256,) int64: how many values of the 224-pixel view differ by so many levels of 255."""
        one = _view(decode_image(original, apply_exif=self.apply_exif))
        other = _view(decode_image(prepared))
        return np.bincount((one.int() - other.int()).abs().flatten().numpy(), minlength=256)


def summarise_error(levels: np.ndarray, samples: int) -> dict[str, float | int | None]:
    """mean_abs, p99 and max in levels of 255, and psnr_db of all values at once (None where all are equal)."""
    total = int(levels.sum())
    if not total:
        return {"mean_abs": None, "p99": None, "max": None, "psnr_db": None, "samples": 0}
    steps = np.arange(256)
    mean_square = float((levels * steps**2).sum() / total)
    return {
        "mean_abs": round(float((levels * steps).sum() / total), 4),
        "p99": int(np.searchsorted(np.cumsum(levels), 0.99 * total)),
        "max": int(np.flatnonzero(levels)[-1]),
        "psnr_db": round(10 * math.log10(255**2 / mean_square), 2) if mean_square else None,
        "samples": samples,
    }


def _view(pixels: np.ndarray) -> Tensor:
    """(3, 224, 224): the shorter side to 224 and the central square, as evaluation looks at an image."""
    image = _channels_first(pixels)
    height, width = image.shape[1:]
    scale = VIEW_SIZE / min(height, width)
    sides = [max(VIEW_SIZE, round(height * scale)), max(VIEW_SIZE, round(width * scale))]
    return F.center_crop(F.resize(image, sides, InterpolationMode.BICUBIC, antialias=True), [VIEW_SIZE, VIEW_SIZE])


def _shrink(image: Tensor, size: int) -> Tensor:
    """The shorter side becomes ``size`` where it is longer; the aspect is kept to the pixel."""
    height, width = image.shape[1:]
    if min(height, width) <= size:
        return image
    sides = [
        size if side == min(height, width) else round(side * size / min(height, width)) for side in (height, width)
    ]
    return F.resize(image, sides, InterpolationMode.BICUBIC, antialias=True)


def _channels_first(pixels: np.ndarray) -> Tensor:
    # Stored pixels are read-only, of which torch warns; nothing here writes to them.
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)


def _channels_last(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
