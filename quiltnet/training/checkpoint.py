"""Checkpoints: whole, atomic, found again.

``checkpoints/samples-000051200/`` holds ``model.safetensors`` (open_clip's names, loads as it is) and
``train_state.pt`` (optimiser, clock, random generators; tensors and plain values only, read with ``weights_only``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quiltnet.errors import UserError

WEIGHTS_NAME = "model.safetensors"
STATE_NAME = "train_state.pt"
_PREFIX = "samples-"
_UNFINISHED = ".unfinished-"


def save_checkpoint(root: Path, state: dict[str, Any], *, keep: int | None = None) -> Path:
    """Write one checkpoint under a temporary name and rename it: whatever kills us, no half checkpoint is ever found.

    Args:
        state: ``TrainState.state_dict()``.
        keep: delete all but the newest ``keep``.
    """
    target = checkpoint_path(root, state["samples_seen"])
    unfinished = root / f"{_UNFINISHED}{target.name}"
    for leftover in root.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state["weights"].items()}
    save_file(weights, unfinished / WEIGHTS_NAME)
    torch.save({name: value for name, value in state.items() if name != "weights"}, unfinished / STATE_NAME)
    for path in (unfinished / WEIGHTS_NAME, unfinished / STATE_NAME, unfinished):
        _fsync(path)
    if target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    _fsync(root)
    for old in list_checkpoints(root)[: -keep if keep else 0]:
        shutil.rmtree(old)
    return target


def checkpoint_path(root: Path, samples_seen: int) -> Path:
    """Where the checkpoint of that moment lies, or would."""
    return root / f"{_PREFIX}{samples_seen:012d}"


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` was given, on the CPU; ``load_state_dict`` moves it to where it belongs."""
    if not (folder / STATE_NAME).is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {STATE_NAME}")
    state = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
    return {"weights": load_file(folder / WEIGHTS_NAME), **state}


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def latest_checkpoint(root: Path) -> Path | None:
    """The newest finished checkpoint under ``root``, if there is one."""
    return next(reversed(list_checkpoints(root)), None)


def forget_after(root: Path, samples_seen: int) -> None:
    """Delete checkpoints that lie after ``samples_seen``: a run that goes on from there leaves their course."""
    for checkpoint in list_checkpoints(root):
        if int(checkpoint.name.removeprefix(_PREFIX)) > samples_seen:
            shutil.rmtree(checkpoint)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
