"""Drawn tiles as image files."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from tests.evaluation.toy import noise_tile


def save_tile(path: Path, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise_tile(seed)).convert(mode).save(path)


def encoded_tile(seed: int = 0) -> bytes:
    """A png."""
    file = io.BytesIO()
    Image.fromarray(noise_tile(seed)).save(file, "PNG")
    return file.getvalue()
