"""The training transform: stored bytes -> a randomly cropped uint8 tile."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from quiltnet.data.decoding import decode_image, decode_pil
from quiltnet.errors import UserError

INTERPOLATIONS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
DECODERS = ("fast", "pil")

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class TrainTransform:
    """A random crop, resized to the model's image size; every draw comes from the generator of the call.

    The model normalises, so that a batch crosses to the device as uint8, a quarter of the bytes. Images that
    are not RGB or grey become RGB before they are resized (open_clip resizes first, by nearest neighbour if
    there is a palette).

    Args:
        image_size: side of the tile in pixels, or (height, width).
        scale: smallest and largest share of the image's area in the crop; (0.9, 1.0) is open_clip's.
        ratio: narrowest and widest crop, as width / height.
        horizontal_flip: mirror half of the tiles. A tile has no left, but open_clip does not flip: off by
            default.
        vertical_flip: turn half of the tiles upside down; off by default likewise.
        interpolation: ``bicubic`` or ``bilinear``, with antialiasing.
        decode: ``pil`` gives the pixels of open_clip's transform for the same crop. ``fast`` takes less than half the
            time (benchmarks/decode.py) and rounds otherwise: on real tiles 99.5 % of the values are equal, the rest
            differ by 1 level of 255, and two in a million by 2. (More only in single pixels where hard edges
            meet: Pillow 13 resizes some shapes vertically first, torchvision none.)
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        interpolation: str = "bicubic",
        decode: str = "fast",
    ) -> None:
        _check_choice("interpolation", interpolation, tuple(INTERPOLATIONS))
        _check_choice("decode", decode, DECODERS)
        _check_range("scale", scale, most=1.0)
        _check_range("ratio", ratio, most=math.inf)
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        self.height, self.width = size
        self.scale = tuple(scale)
        self.ratio = tuple(ratio)
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.interpolation = INTERPOLATIONS[interpolation]
        self.decode = decode

    def __call__(self, data: bytes, rng: np.random.Generator) -> Tensor:
        """``(3, H, W)`` uint8. Raises BrokenSample for bytes that are no whole image."""
        image = self._decode(data)
        height, width = F.get_size(image)
        box = draw_crop(height, width, self.scale, self.ratio, rng)
        image = F.resized_crop(image, *box, [self.height, self.width], self.interpolation, antialias=True)
        tile = F.pil_to_tensor(image) if isinstance(image, Image.Image) else image
        flipped = [
            dim
            for dim, may_flip in ((-1, self.horizontal_flip), (-2, self.vertical_flip))
            if may_flip and rng.random() < 0.5
        ]
        return (tile.flip(flipped) if flipped else tile).contiguous()

    def _decode(self, data: bytes) -> Image.Image | Tensor:
        if self.decode == "pil":
            return decode_pil(data)
        return torch.from_numpy(decode_image(data)).permute(2, 0, 1)  # (3, height, width) of the stored image


def draw_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """The box of torchvision's RandomResizedCrop, drawn from ``rng`` in the same order."""
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    return _central_crop(height, width, ratio)


def _central_crop(height: int, width: int, ratio: tuple[float, float]) -> Box:
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r} is not known; use one of {', '.join(allowed)}")


def _check_range(name: str, bounds: tuple[float, float], *, most: float) -> None:
    if not 0 < bounds[0] <= bounds[1] <= most:
        raise UserError(
            f"{name}={tuple(bounds)} must be two numbers above 0 and at most {most}; give the smaller first"
        )
