"""Two models without training, and pairs without files, that evaluators can be checked on by thought."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
WORDS = 1000
CONTEXT_LENGTH = 12


def word_id(word: str) -> int:
    return zlib.crc32(word.encode()) % (WORDS - 1) + 1  # 0 pads


class ToyModel:
    """Linear towers with random weights; what it says depends on every pixel and every word."""

    device = torch.device("cpu")
    logit_scale = torch.tensor(10.0)

    def __init__(self, width: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image_weights = torch.randn(3 * 8 * 8, width, generator=generator)
        self.text_weights = torch.randn(WORDS, width, generator=generator)
        self.encoded: list[int] = []  # batch sizes, in the order of the calls

    def transform(self, image: Image.Image) -> Tensor:
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float() / 255

    def tokenize(self, captions: list[str]) -> Tensor:
        text = torch.zeros(len(captions), CONTEXT_LENGTH, dtype=torch.int64)
        for row, caption in zip(text, captions, strict=True):
            ids = [word_id(word) for word in caption.split()]
            row[: len(ids)] = torch.tensor(ids)
        return text

    def encode_image(self, image: Tensor, *, projected: bool = True) -> Tensor:
        self.encoded.append(len(image))
        return F.normalize(image.flatten(1) @ self.image_weights, dim=-1) if projected else image.flatten(1)[:, :24]

    def encode_text(self, text: Tensor) -> Tensor:
        self.encoded.append(len(text))
        return F.normalize((self.text_weights[text] * (text != 0)[..., None]).sum(dim=1), dim=-1)

    def describe(self) -> dict[str, Any]:
        return {"toy": type(self).__name__}


class ColourModel(ToyModel):
    """Sees the mean colour of an image and reads colour words: it is never wrong about plain tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.text_weights = torch.zeros(WORDS, 3)
        for word, colour in COLOURS.items():
            self.text_weights[word_id(word)] = torch.tensor(colour)

    def encode_image(self, image: Tensor, *, projected: bool = True) -> Tensor:
        return F.normalize(image.mean(dim=(2, 3)), dim=-1)


class BrokenModel(ToyModel):
    """Every feature is the same number: 1 as in a collapse, NaN as after a divergence."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def encode_image(self, image: Tensor, *, projected: bool = True) -> Tensor:
        return F.normalize(torch.full((len(image), 16), self.value), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        return F.normalize(torch.full((len(text), 16), self.value), dim=-1)


def noise_tile(seed: int, colour: str | None = None, size: int = 8) -> np.ndarray:
    """(H, W, 3) uint8: noise, or noise in one channel."""
    noise = np.random.default_rng(seed).integers(100, 256, (size, size, 3))
    weight = np.ones(3) if colour is None else np.array(COLOURS[colour])
    return (noise * weight).astype(np.uint8)


@dataclass
class DrawnPairs:
    """(image, captions, image_id) from memory."""

    samples: list[tuple[np.ndarray, list[str], str]]
    split: str = "val"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str], str]:
        image, captions, image_id = self.samples[index]
        return Image.fromarray(image), captions, image_id

    def content(self) -> list[str]:
        return [f"{zlib.crc32(image.tobytes())} {captions} {image_id}" for image, captions, image_id in self.samples]


def many_to_many_pairs(count: int, seed: int = 0) -> DrawnPairs:
    """Images with one to three captions of a small stock: captions, and some images, come several times."""
    rng = np.random.default_rng(seed)
    stock = [f"finding {number} in tissue" for number in range(count // 2)]
    samples = []
    for index in range(count):
        image = index if index % 5 else max(index - 5, 0)  # every fifth row shows an earlier image again
        captions = rng.choice(stock, size=rng.integers(1, 4), replace=False).tolist()
        samples.append((noise_tile(image), captions, f"image-{image}"))
    return DrawnPairs(samples)
