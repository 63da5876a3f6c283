"""The training transform: stored bytes -> a randomly cropped uint8 tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from quiltnet.data.decoding import decode_half, decode_image, decode_pil, jpeg_size, read_orientation
from quiltnet.errors import UserError

# torch.nn.functional.interpolate calls these, and cannot write into a given row.
RESIZES = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa, "bilinear": torch.ops.aten._upsample_bilinear2d_aa}
RESAMPLINGS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
DECODERS = ("exact", "scaled", "pil", "cuda")
EXIF = ("ignore", "apply")

PILLOW_MAY_START_VERTICALLY = int(PIL.__version__.split(".")[0]) >= 13

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class Framing(NamedTuple):
    """What of an image is shown, and which way up: the box is resized, mirrored, then turned counter-clockwise."""

    box: Box
    mirrored: bool = False
    upside_down: bool = False
    quarter_turns: int = 0


@dataclass(frozen=True)
class EncodedTile:
    """A JPEG that the device is to decode, and what of it is shown. data: (bytes,) uint8."""

    data: Tensor
    framing: Framing


class TrainTransform:
    """A random crop, resized to the model's image size; every draw comes from the generator of the call.

    Draws in this order: crop, horizontal flip, vertical flip, rotation; what is off draws nothing. The model
    normalises, so that a batch crosses to the device as uint8, a quarter of the bytes. Images that are not RGB or
    grey become RGB before they are resized (open_clip resizes first, by nearest neighbour if there is a palette).

    Args:
        image_size: side of the tile in pixels, or (height, width).
        scale: smallest and largest share of the image's area in the crop; (0.9, 1.0) is open_clip's.
        ratio: narrowest and widest crop, as width / height.
        horizontal_flip: mirror half of the tiles. A tile has no left, but open_clip does not flip: off by
            default.
        vertical_flip: turn half of the tiles upside down; off by default likewise.
        right_angle_rotations: turn by 0, 90, 180 or 270 degrees, a quarter of the tiles each; where the tile is
            not square, by 0 or 180. No pixel is interpolated.
        interpolation: ``bicubic`` or ``bilinear``, with antialiasing.
        decode: ``pil`` gives the pixels of open_clip's transform for the same crop. ``exact`` takes a third of the
            time and rounds otherwise: of the values of 512-pixel tiles shrunk to 224, 99.6 % are equal and the
            rest differ by 1 level of 255 (one in 35 million by 2); where a crop is nearly as large as the tile made of
            it, 1 to 3 values in a million differ by 2, since torch's weights have 15 bits and Pillow's 22. ``scaled``
            decodes a JPEG at half its size where its crop is then still as large as the tile, and draws crops on
            even pixels. ``cuda`` is for ``plan``, and ``exact`` otherwise. docs/augmentation.md has the errors.
        exif: ``apply`` turns an image as its EXIF orientation says; ``ignore`` is open_clip's.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        right_angle_rotations: bool = False,
        interpolation: str = "bicubic",
        decode: str = "exact",
        exif: str = "ignore",
    ) -> None:
        _check_choice("interpolation", interpolation, tuple(RESIZES))
        _check_choice("decode", decode, DECODERS)
        _check_choice("exif", exif, EXIF)
        _check_range("scale", scale, most=1.0)
        _check_range("ratio", ratio, most=math.inf)
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        self.height, self.width = size
        self.scale = tuple(scale)
        self.ratio = tuple(ratio)
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.right_angle_rotations = right_angle_rotations
        self.interpolation = interpolation
        self.decode = decode
        self.exif = exif

    def __call__(self, data: bytes, rng: np.random.Generator) -> Tensor:
        """``(3, H, W)`` uint8. Raises BrokenSample for bytes that are no whole image."""
        out = torch.empty((3, self.height, self.width), dtype=torch.uint8)
        self.into(data, rng, out)
        return out

    def into(self, data: bytes, rng: np.random.Generator, out: Tensor) -> None:
        """The same pixels into a row ``(3, H, W)`` of a uint8 batch; fastest where that is ``channels_last``."""
        if self.decode == "pil":
            image, framing = self._frame_pil(data, rng)
        else:
            image, framing = self._frame(data, rng)
        is_upright = not any(framing[1:])
        if isinstance(image, np.ndarray) and is_upright and out.stride() == (1, 3 * self.width, 3):
            self._resize(image, framing.box, out)
            return
        tile = self._resize(image, framing.box) if isinstance(image, np.ndarray) else _tensor_of(image)
        # numpy copies from one layout to the other in half of torch's time
        out.numpy()[...] = (tile if is_upright else turn(tile, framing)).numpy()

    def plan(self, data: bytes, rng: np.random.Generator) -> EncodedTile | Tensor:
        """A JPEG and what to show of it, for DeviceDecoder; of other files, and CMYK, the pixels ``(3, H, W)``.

        Draws and raises as a call does, but that only the header of a JPEG is read.
        """
        size = self._upright_jpeg_size(data)
        if size is None:
            return self(data, rng)
        return EncodedTile(torch.from_numpy(np.frombuffer(data, np.uint8).copy()), self.draw(*size, rng))

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Framing:
        """What is shown of an image of this size."""
        box = draw_crop(height, width, self.scale, self.ratio, rng)
        if self.decode == "scaled":
            box = _even(box)
        mirrored = self.horizontal_flip and rng.random() < 0.5
        upside_down = self.vertical_flip and rng.random() < 0.5
        quarter_turns = 0
        if self.right_angle_rotations:
            quarter_turns = int(rng.integers(4)) if self.height == self.width else 2 * int(rng.integers(2))
        return Framing(box, mirrored, upside_down, quarter_turns)

    def _frame(self, data: bytes, rng: np.random.Generator) -> tuple[np.ndarray, Framing]:
        """Pixels and what to show of them; at half the size where that is wanted and enough."""
        size = self._upright_jpeg_size(data) if self.decode == "scaled" else None
        if size is None:
            image = decode_image(data, apply_exif=self.exif == "apply")
            return image, self.draw(*image.shape[:2], rng)
        framing = self.draw(*size, rng)
        top, left, height, width = framing.box
        if height // 2 >= self.height and width // 2 >= self.width:
            half = decode_half(data, *size)
            if half is not None:
                return half, framing._replace(box=(top // 2, left // 2, height // 2, width // 2))
        return decode_image(data), framing

    def _frame_pil(self, data: bytes, rng: np.random.Generator) -> tuple[Image.Image, Framing]:
        """The resized crop, by Pillow alone."""
        image = decode_pil(data, apply_exif=self.exif == "apply")
        framing = self.draw(image.height, image.width, rng)
        top, left, height, width = framing.box
        crop = image.crop((left, top, left + width, top + height))
        return crop.resize((self.width, self.height), RESAMPLINGS[self.interpolation]), framing

    def _upright_jpeg_size(self, data: bytes) -> tuple[int, int] | None:
        """(height, width) of a JPEG that can be cropped before it is decoded."""
        size = jpeg_size(data)
        return None if size and self.exif == "apply" and read_orientation(data) != 1 else size

    def _resize(self, image: np.ndarray, box: Box, out: Tensor | None = None) -> Tensor:
        """``(3, H, W)`` of a box of ``(height, width, 3)`` uint8; in ``out``, where given."""
        top, left, height, width = box
        crop = image[top : top + height, left : left + width]
        if not crop.flags.writeable:  # torch warns of memory that it must not write to
            crop = crop.copy()
        resize = RESIZES[self.interpolation]
        # One image of (height, width, 3) as torch's channels_last. With the stride that permute() leaves to the batch
        # dimension of size 1, torch would answer in the other layout (pytorch issue 68430), half as fast.
        line = crop.strides[0]
        pixels = torch.from_numpy(crop).as_strided((1, 3, height, width), (height * line, 1, line, 3))
        if starts_vertically(box, self.height, self.width):
            pixels = resize.default(pixels, [self.height, width], False)
        if out is None:
            return resize.default(pixels, [self.height, self.width], False)[0]
        return resize.out(pixels, [self.height, self.width], False, out=out[None])[0]


def starts_vertically(box: Box, height: int, width: int) -> bool:
    """Whether Pillow resizes the box to this size by columns first, and by rows second.

    From release 13 on it does where the height loses more than twice the pixels of the width. Each pass rounds: on
    hard edges the other order is up to 15 levels off.
    """
    return PILLOW_MAY_START_VERTICALLY and box[2] - height > max(0, 2 * (box[3] - width))


def turn(tile: Tensor, framing: Framing) -> Tensor:
    """``(..., H, W)`` mirrored and turned as drawn."""
    flipped = [dim for dim, is_flipped in ((-1, framing.mirrored), (-2, framing.upside_down)) if is_flipped]
    tile = tile.flip(flipped) if flipped else tile
    return torch.rot90(tile, framing.quarter_turns, (-2, -1)) if framing.quarter_turns else tile


def draw_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """The box of torchvision's RandomResizedCrop, drawn from ``rng`` in the same order."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # low + (high - low) * random() is what uniform(low, high) computes, at a third of its time.
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
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


def _even(box: Box) -> Box:
    """The box with offsets and sizes rounded down to multiples of 2, but for a size of 1."""
    top, left, height, width = box
    return top - top % 2, left - left % 2, max(height - height % 2, 1), max(width - width % 2, 1)


def _tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r} is not known; use one of {', '.join(allowed)}")


def _check_range(name: str, bounds: tuple[float, float], *, most: float) -> None:
    if not 0 < bounds[0] <= bounds[1] <= most:
        raise UserError(
            f"{name}={tuple(bounds)} must be two numbers above 0 and at most {most}; give the smaller first"
        )
