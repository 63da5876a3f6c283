"""TorchScript archives, the form of OpenAI's own files: told from other files, and their tensors read."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip archive of a scripted or traced model."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The archive's tensors by name, float16 as float32. It holds code too, of which only what loading needs is run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated, the files are of 2021
        tensors = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
