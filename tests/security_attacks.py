"""Files that do harm to whoever trusts them. The harm is a file that appears: ``marker``."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Bomb:
    """Whoever unpickles it makes the folder ``marker``."""

    marker: Path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def raw_pickle(marker: Path) -> bytes:
    return pickle.dumps({"state_dict": Bomb(marker)}, protocol=2)  # the one that torch writes


def torch_zip(marker: Path) -> bytes:
    """As ``torch.save`` writes today."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"weight": Bomb(marker)}}, buffer)
    return buffer.getvalue()


def torch_legacy(marker: Path) -> bytes:
    """As ``torch.save`` wrote before 1.6: pickles one after another."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"weight": Bomb(marker)}}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def npy(marker: Path) -> bytes:
    """An array of objects, which numpy stores as a pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npz(file: Path, marker: Path, *names: str) -> Path:
    np.savez(file, **{name: np.array([Bomb(marker)], dtype=object) for name in names})
    return file


def png_bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A whole PNG by its header, of 10.8 GB once decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb(jpeg: bytes, side: int = 60_000) -> bytes:
    """The same data under a frame header that claims another size."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", side, side) + jpeg[frame + 9 :]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(x) run\n%%EOF\n"
