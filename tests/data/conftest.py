"""Small shard sets with images that can be told apart."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quiltnet.data.decoding import find_defect
from quiltnet.data.image_files import ImageFolder
from quiltnet.data.pairs import PairRow
from quiltnet.data.row_table import ListedRows
from quiltnet.data.shards import write_shards


def draw_image(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Smooth colours with sharp edges, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.paste(tuple(int(c) for c in rng.integers(0, 256, 3)), (width // 3, height // 3, width // 2, height // 2))
    return image


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """``make_shards(n)`` packs n drawn images with two captions each, and gives the folder of the split."""

    def make(count: int, *, samples_per_shard: int = 7, name: str = "set") -> Path:
        images = tmp_path / f"{name}-images"
        images.mkdir()
        rows = []
        for number in range(count):
            path = f"tile{number:03d}.jpg"
            (images / path).write_bytes(encode(draw_image(number)))
            rows += [PairRow(0, path, f"{text} {number}", "train", path) for text in ("first of", "second of")]
        write_shards(
            ListedRows(rows),
            tmp_path / name,
            name="test",
            source={},
            images=ImageFolder(images),
            check_image=find_defect,
            samples_per_shard=samples_per_shard,
        )
        return tmp_path / name / "train"

    return make
