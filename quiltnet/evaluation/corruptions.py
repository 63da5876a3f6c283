"""What happens to slides on their way to a model: other stains, blur, compression, another way up.

A corruption turns an RGB image into another of the same size. What it draws at random it draws from the image's index
in its set, so that every model and every run sees the same pixels.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.labelled_set import LabelledSet

ROTATIONS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class Corruption(Protocol):
    def __call__(self, image: Image.Image, index: int) -> Image.Image:
        """RGB image -> RGB image; index: its place in the set."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON types only."""
        ...


@dataclass(frozen=True)
class GaussianBlur:
    """Out of focus. ``radius``: standard deviation in pixels of the image as it lies in the set."""

    radius: float

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise UserError(f"radius={self.radius} of a blur must be above 0, in pixels")

    def __call__(self, image: Image.Image, index: int) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(self.radius))

    def describe(self) -> dict[str, Any]:
        return {"corruption": "gaussian_blur", **asdict(self)}


@dataclass(frozen=True)
class JPEGCompression:
    """Written as JPEG once more, chroma at half the resolution. ``quality``: libjpeg's, 1 to 100."""

    quality: int

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality={self.quality} of a JPEG must be from 1 (worst) to 100")

    def __call__(self, image: Image.Image, index: int) -> Image.Image:
        written = io.BytesIO()
        image.save(written, "JPEG", quality=self.quality, subsampling="4:2:0")
        with Image.open(written) as opened:
            return opened.convert("RGB")

    def describe(self) -> dict[str, Any]:
        return {"corruption": "jpeg", **asdict(self)}


@dataclass(frozen=True)
class Rotation:
    """Turned counter-clockwise by 90, 180 or 270 degrees, which loses no pixel: tissue has no upright position."""

    degrees: int

    def __post_init__(self) -> None:
        if self.degrees not in ROTATIONS:
            raise UserError(f"degrees={self.degrees} of a rotation must be 90, 180 or 270, which lose no pixel")

    def __call__(self, image: Image.Image, index: int) -> Image.Image:
        return image.transpose(ROTATIONS[self.degrees])

    def describe(self) -> dict[str, Any]:
        return {"corruption": "rotation", **asdict(self)}


@dataclass(frozen=True)
class StainJitter:
    """Another laboratory's stains: HED jitter after Tellez et al. 2018, 2019.

    Each of three stains is multiplied by 1 - strength to 1 + strength, and -strength to strength is added. What is
    drawn for an image is the same at every strength but for its size.

    Args:
        jitter: images (B, 3, H, W) float RGB in [0, 1], factors (B, 3), shifts (B, 3) -> images in [0, 1].
        strength: Tellez et al. 2019 call 0.05 light and 0.2 strong.
        seed: of the draws, together with the image's index.
    """

    jitter: Callable[[Tensor, Tensor, Tensor], Tensor]
    strength: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength} of a stain jitter must be above 0 and at most 1")

    def __call__(self, image: Image.Image, index: int) -> Image.Image:
        drawn = np.random.default_rng([self.seed, index]).uniform(-self.strength, self.strength, (2, 3))
        factors, shifts = torch.from_numpy(drawn).float().split(1)  # (1, 3) each
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
        jittered = (self.jitter(pixels, 1 + factors, shifts) * 255).round().to(torch.uint8)
        return Image.fromarray(jittered[0].permute(1, 2, 0).numpy())

    def describe(self) -> dict[str, Any]:
        # A configuration hands in a function as a partial without arguments.
        jitter = self.jitter.func if isinstance(self.jitter, partial) else self.jitter
        jitter = jitter if inspect.isroutine(jitter) else type(jitter)
        name = f"{jitter.__module__}.{jitter.__qualname__}"
        return {"corruption": "stain_jitter", "jitter": name, "strength": self.strength, "seed": self.seed}


class CorruptedImages(Sequence[np.ndarray]):
    """A set's images, each corrupted when it is read: (H, W, 3) uint8. Pickles, if the corruption does.

    Raises:
        UserError: when an image is read that is no readable image.
    """

    def __init__(self, dataset: LabelledSet, corruption: Corruption) -> None:
        self.dataset = dataset
        self.corruption = corruption

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]  # what is drawn for the last image does not depend on how one asks for it
        image, _ = self.dataset[index]
        return np.array(self.corruption(image, index))

    def content(self) -> list[str]:
        """The set's, marked by what the corruption does."""
        effect = _effect(self.corruption)
        return [f"{line} {effect}" for line in self.dataset.content()]


def _effect(corruption: Corruption) -> str:
    """Hash of its description and of what becomes of noise, which is another where the corruption's code changes."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    digest = hashlib.sha256(json.dumps(corruption.describe(), sort_keys=True).encode())
    for index in range(2):
        corrupted = np.array(corruption(Image.fromarray(noise), index))
        digest.update(f"{corrupted.shape}".encode() + corrupted.tobytes())
    return digest.hexdigest()
