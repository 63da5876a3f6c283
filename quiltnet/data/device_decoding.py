"""Training images decoded by the device: JPEG files and crop boxes -> a uint8 batch.

Loader workers read, draw and check headers (``TrainTransform.plan``); torchvision's nvJPEG decodes, and crops are
resized as matrix products over many images at once. Tested on the CPU; not yet run on a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
import torch
import torchvision
from torch import Tensor

from quiltnet.data.decoding import BrokenSample, decode_image
from quiltnet.data.transforms import Box, EncodedTile, Framing, starts_vertically, turn

# Images resized at a time: 64 of 512 pixels are 200 MB in float32, as much again between the passes.
CHUNK_SIZE = 64

SUPPORT = {"bicubic": 2, "bilinear": 1}  # pixels on either side, at scale 1


@dataclass(frozen=True)
class JoinedTiles:
    """A batch in one piece of memory, for the way from worker to trainer.

    As tensors of their own, B files would take B file descriptors.

    Attributes:
        data: (bytes,) uint8, all files and pixels one after another.
        lengths: bytes of each.
        framings: of each file; the shape (3, H, W) of what is pixels already.
    """

    data: Tensor
    lengths: list[int]
    framings: list[Framing | tuple[int, int, int]]

    @classmethod
    def join(cls, tiles: Sequence[EncodedTile | Tensor]) -> JoinedTiles:
        parts = [tile.data if isinstance(tile, EncodedTile) else tile.flatten() for tile in tiles]
        framings = [tile.framing if isinstance(tile, EncodedTile) else tuple(tile.shape) for tile in tiles]
        return cls(torch.cat(parts), [len(part) for part in parts], framings)

    def split(self) -> list[EncodedTile | Tensor]:
        """What was joined, over the same memory."""
        return [
            EncodedTile(part, framing) if isinstance(framing, Framing) else part.view(framing)
            for part, framing in zip(self.data.split(self.lengths), self.framings, strict=True)
        ]

    def pin_memory(self) -> JoinedTiles:
        """Called by DataLoader."""
        return replace(self, data=self.data.pin_memory())


class DeviceDecoder:
    """Tiles as ``TrainTransform.plan`` hands them over -> (B, 3, H, W) uint8 on a device.

    On the CPU the result is that of ``decode=exact`` to 1 level of 255. nvJPEG has its own way of enlarging chroma,
    and may fill in what a truncated file lacks.

    Args:
        device: ``cuda``, or ``cpu`` for tests.
        image_size: side of the tile in pixels, or (height, width); the transform's.
        interpolation: the transform's.
    """

    def __init__(
        self, device: torch.device | str, image_size: int | tuple[int, int], *, interpolation: str = "bicubic"
    ) -> None:
        self.device = torch.device(device)
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        self.height, self.width = size
        self.interpolation = interpolation

    def __call__(self, tiles: Sequence[EncodedTile | Tensor]) -> tuple[Tensor, list[int]]:
        """The batch, and the places in it whose file turned out to be broken: these are black."""
        batch = torch.zeros((len(tiles), 3, self.height, self.width), dtype=torch.uint8, device=self.device)
        encoded = [place for place, tile in enumerate(tiles) if isinstance(tile, EncodedTile)]
        for place, tile in enumerate(tiles):
            if isinstance(tile, Tensor):
                batch[place] = tile.to(self.device, non_blocking=True)
        images = dict(zip(encoded, self._decode([tiles[place] for place in encoded]), strict=True))
        groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
        for place, image in images.items():
            if image is not None:
                columns_first = starts_vertically(tiles[place].framing.box, self.height, self.width)
                groups[(*image.shape[-2:], columns_first)].append(place)
        for (_, _, columns_first), places in groups.items():
            for some in (places[at : at + CHUNK_SIZE] for at in range(0, len(places), CHUNK_SIZE)):
                framings = [tiles[place].framing for place in some]
                pixels = self._resize(torch.stack([images[place] for place in some]), framings, columns_first)
                batch[torch.tensor(some, device=self.device)] = _turn_all(pixels, framings)
        return batch, [place for place, image in images.items() if image is None]

    def _decode(self, tiles: list[EncodedTile]) -> list[Tensor | None]:
        """``(3, height, width)`` uint8 of each; None where the file is broken."""
        images = self._decode_some([tile.data for tile in tiles]) if tiles else []
        return [
            image if image is not None and _holds(image, tile.framing.box) else None
            for tile, image in zip(tiles, images, strict=True)
        ]

    def _decode_some(self, files: list[Tensor]) -> list[Tensor | None]:
        """One file that the device will not have fails the whole list: it is found by halving the list."""
        try:
            return _decode_jpegs(files, self.device)
        except RuntimeError:
            if len(files) == 1:
                return [self._decode_alone(files[0])]
        half = len(files) // 2
        return self._decode_some(files[:half]) + self._decode_some(files[half:])

    def _decode_alone(self, data: Tensor) -> Tensor | None:
        try:
            pixels = decode_image(data.numpy().tobytes())
        except BrokenSample:
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1).to(self.device)

    def _resize(self, images: Tensor, framings: list[Framing], columns_first: bool) -> Tensor:
        """Boxes of ``(n, 3, height, width)`` -> (n, 3, H, W) float, rounded after each pass as Pillow does."""
        height, width = images.shape[-2:]
        top, left, box_height, box_width = torch.tensor(
            [framing.box for framing in framings], dtype=torch.float64, device=self.device
        ).unbind(-1)
        support = SUPPORT[self.interpolation]
        down = resample_weights(top, box_height, height, self.height, support)[:, None]  # (n, 1, H, height)
        across = resample_weights(left, box_width, width, self.width, support)[:, None]  # (n, 1, W, width)
        pixels = images.to(torch.float32)
        if columns_first:
            return _round(_round(down @ pixels) @ across.mT).to(torch.uint8)
        return _round(down @ _round(pixels @ across.mT)).to(torch.uint8)


def resample_weights(start: Tensor, length: Tensor, size: int, out_size: int, support: int) -> Tensor:
    """Weights ``(n, out_size, size)`` float32 by which Pillow's antialiased filters resize parts of a line.

    start, length: (n,) float64, of the part in pixels, within a line of ``size``. support: 2 is bicubic (a=-0.5), 1
    bilinear. Pixels outside of the part have no weight.
    """
    scale = (length / out_size)[:, None, None]
    stretch = scale.clamp(min=1)
    centre = (torch.arange(out_size, device=start.device)[:, None] + 0.5) * scale  # (n, out_size, 1)
    place = torch.arange(size, device=start.device) - start[:, None, None]  # (n, 1, size)
    first = (centre - support * stretch + 0.5).floor().clamp(min=0)
    last = torch.minimum((centre + support * stretch + 0.5).floor(), length[:, None, None])
    distance = ((place - centre + 0.5) / stretch).abs()
    weights = _bicubic(distance) if support == 2 else (1 - distance).clamp(min=0)
    weights = torch.where((place >= first) & (place < last), weights, 0)
    return (weights / weights.sum(-1, keepdim=True)).to(torch.float32)


def device_decoder_reason() -> str | None:
    """Why the device cannot decode, in words for the user; None if it can, which is tried out."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    probe = torch.from_numpy(np.frombuffer(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), np.uint8).copy())
    try:
        _decode_jpegs([probe], "cuda")
    except (RuntimeError, AttributeError) as error:  # torchvision 0.29 announces that its decoders will be removed
        first_line = str(error).partition("\n")[0]
        return f"torchvision {torchvision.__version__} cannot decode on this device ({first_line})"
    return None


def _decode_jpegs(files: list[Tensor], device: torch.device | str) -> list[Tensor]:
    return torchvision.io.decode_jpeg(files, mode=torchvision.io.ImageReadMode.RGB, device=device)


def _bicubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0))


def _round(pixels: Tensor) -> Tensor:
    return pixels.add_(0.5).floor_().clamp_(0, 255)


def _turn_all(pixels: Tensor, framings: list[Framing]) -> Tensor:
    """Each as drawn; those that are drawn alike at once."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for number, framing in enumerate(framings):
        alike[framing[1:]].append(number)
    turned = torch.empty_like(pixels)
    for numbers in alike.values():
        rows = torch.tensor(numbers, device=pixels.device)
        turned[rows] = turn(pixels[rows], framings[numbers[0]])
    return turned


def _holds(image: Tensor, box: Box) -> bool:
    top, left, height, width = box
    return top + height <= image.shape[-2] and left + width <= image.shape[-1]
