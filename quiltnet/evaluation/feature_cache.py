"""Features of whole sets on disk, named by everything they depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quiltnet.whole_files import as_any_file, whole_file


class FeatureCache:
    """One safetensors file a set, model, transform and precision: a key is a hash of all of these.

    Args:
        folder: made where it does not exist. Nothing is ever deleted from it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def load(self, key: str) -> tuple[Tensor, list[Any]] | None:
        """Features (N, D) and what belongs to them; None where there is nothing, or no whole file."""
        try:
            with safe_open(self._file(key), framework="pt") as file:
                return file.get_tensor("features"), json.loads(file.get_tensor("rest").numpy().tobytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def save(self, key: str, features: Tensor, rest: list[Any]) -> None:
        """The file appears under its name when it is whole. ``rest``: JSON types, or tuples of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # As bytes and not as metadata, of which safetensors takes no more than 100 MB.
        text = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
        with whole_file(self._file(key)) as unfinished:
            save_file({"features": features.contiguous(), "rest": text}, unfinished)
            as_any_file(unfinished)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
