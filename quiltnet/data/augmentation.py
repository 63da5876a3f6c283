"""Random colour on the device: what is drawn in a loader's worker, applied to a whole batch at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from quiltnet.data.stain import hed_jitter, macenko_normalize, reinhard_normalize
from quiltnet.errors import UserError

NORMALIZERS = {"macenko": macenko_normalize, "reinhard": reinhard_normalize}
COLOR_JITTER = ("brightness", "contrast", "saturation", "hue")  # in the order in which they are applied

# Rows at a time: a 224-pixel row is 0.6 MB in float32, and stain normalisation holds some ten of them. What fits a
# CPU's cache is done there in half of the time (benchmarks/stain.py).
CHUNK_SIZE, CPU_CHUNK_SIZE = 64, 2

GREY = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with torchvision's digits


class DeviceAugment:
    """Stain normalisation, colour jitter and HED jitter of a batch, in this order; all off by default.

    The numbers of a sample are drawn from its own generator (``draw``, in the worker), so that its pixels are the
    same whatever the batch, rank or worker. Pickles, and holds no tensor.

    Args:
        color_jitter: strength of brightness, contrast, saturation and hue, as torchvision's ColorJitter takes
            them: factors between 1 - strength (at least 0) and 1 + strength; hue turned by at most its strength
            (0.5 is half the circle) either way.
        color_jitter_probability: share of the samples that are jittered.
        hed_jitter: strength s: each of haematoxylin, eosin and DAB is multiplied by 1 - s to 1 + s, and -s to s
            is added, in natural optical density. Tellez et al. 2019 call 0.05 light and 0.2 strong.
        hed_jitter_probability: likewise.
        stain_normalization: ``macenko`` or ``reinhard``, of every sample, to the references in ``stain``.

    Attributes:
        draws: P, numbers drawn for a sample: 4 if there is colour jitter, and 6 if there is HED jitter.
    """

    def __init__(
        self,
        *,
        color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
        color_jitter_probability: float = 1.0,
        hed_jitter: float = 0.0,
        hed_jitter_probability: float = 1.0,
        stain_normalization: str | None = None,
    ) -> None:
        if len(color_jitter) != len(COLOR_JITTER):
            raise UserError(f"color_jitter={color_jitter}; give four strengths: {', '.join(COLOR_JITTER)}")
        for name, strength in zip(COLOR_JITTER, color_jitter, strict=True):
            _check_between(f"color_jitter's {name}", strength, 0.5 if name == "hue" else math.inf)
        _check_between("color_jitter_probability", color_jitter_probability, 1)
        _check_between("hed_jitter", hed_jitter, 1)
        _check_between("hed_jitter_probability", hed_jitter_probability, 1)
        if stain_normalization not in (None, *NORMALIZERS):
            known = ", ".join(NORMALIZERS)
            raise UserError(f"stain_normalization={stain_normalization!r} is not known; use {known}, or null for none")
        self.color_jitter = tuple(float(strength) for strength in color_jitter)
        self.color_jitter_probability = color_jitter_probability
        self.hed_jitter = float(hed_jitter)
        self.hed_jitter_probability = hed_jitter_probability
        self.stain_normalization = stain_normalization
        self.draws = 4 * any(self.color_jitter) + 6 * bool(self.hed_jitter)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """``(P,)`` float32 for one sample; of one that is left alone, the numbers that change nothing.

        Drawn in this order: whether colours are jittered, brightness, contrast, saturation, hue; whether stains
        are, three factors, three shifts. What is off draws nothing; a strength of 0 within colour jitter does.
        """
        drawn = []
        if any(self.color_jitter):
            is_jittered = rng.random() < self.color_jitter_probability
            *strengths, hue = self.color_jitter
            factors = [rng.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
            factors.append(rng.uniform(-hue, hue))
            drawn += factors if is_jittered else [1, 1, 1, 0]
        if self.hed_jitter:
            is_jittered = rng.random() < self.hed_jitter_probability
            shifts = rng.uniform(-self.hed_jitter, self.hed_jitter, 6)
            shifts[:3] += 1
            drawn += list(shifts) if is_jittered else [1, 1, 1, 0, 0, 0]
        return np.array(drawn, np.float32)

    def __call__(self, image: Tensor, draws: Tensor) -> Tensor:
        """``(B, 3, H, W)`` uint8 -> the same, on the same device; ``image`` itself if all is off.

        draws: (B, P) float32, a row of ``draw`` for each image; any device.
        """
        if not self.draws and self.stain_normalization is None:
            return image
        draws = draws.to(image.device, non_blocking=True)
        rows = CPU_CHUNK_SIZE if image.device.type == "cpu" else CHUNK_SIZE
        chunks = zip(image.split(rows), draws.split(rows), strict=True)
        return torch.cat([self._augment(some, drawn) for some, drawn in chunks])

    def _augment(self, image: Tensor, draws: Tensor) -> Tensor:
        pixels = image.to(torch.float32) / 255
        if self.stain_normalization is not None:
            pixels = NORMALIZERS[self.stain_normalization](pixels)
        if any(self.color_jitter):
            pixels = jitter_color(pixels, draws[:, :4])
        if self.hed_jitter:
            pixels = hed_jitter(pixels, draws[:, -6:-3], draws[:, -3:])
        return (pixels * 255).round_().to(torch.uint8)


def jitter_color(image: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of ``(B, 3, H, W)`` in [0, 1], as torchvision adjusts them.

    factors: (B, 4); 1, 1, 1, 0 change nothing. A grey pixel is weighted 0.2989 R + 0.587 G + 0.114 B.
    """
    brightness, contrast, saturation, hue = (factor[:, None, None, None] for factor in factors.unbind(-1))
    image = (image * brightness).clamp(0, 1)
    # Summed in float64, so that the order of the sum, which may depend on the batch, does not show.
    dtype = torch.float32 if image.device.type == "mps" else torch.float64
    mean = _grey(image).mean((1, 2, 3), keepdim=True, dtype=dtype).to(image.dtype)
    image = _blend(image, mean, contrast)
    image = _blend(image, _grey(image), saturation)
    return _turn_hue(image, hue)


def _blend(image: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    return (image * ratio + other * (1 - ratio)).clamp(0, 1)


def _grey(image: Tensor) -> Tensor:
    red, green, blue = image.split(1, dim=1)
    return red * GREY[0] + green * GREY[1] + blue * GREY[2]


def _turn_hue(image: Tensor, turns: Tensor) -> Tensor:
    """Hue moved by ``turns`` of the circle, in HSV."""
    red, green, blue = image.split(1, dim=1)
    largest, smallest = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    spread = largest - smallest
    some = torch.where(spread > 0, spread, 1)
    sixths = torch.where(
        largest == red,
        (green - blue) / some,
        torch.where(largest == green, (blue - red) / some + 2, (red - green) / some + 4),
    )
    channel = torch.tensor([5.0, 3.0, 1.0], dtype=image.dtype, device=image.device)[:, None, None]
    place = (channel + sixths + 6 * turns).remainder(6)
    return largest - spread * torch.minimum(place, 4 - place).clamp(0, 1)


def _check_between(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise UserError(f"{name}={value} must be a number from 0 to {most}; 0 turns it off")
