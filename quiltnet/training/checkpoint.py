"""Checkpoints: whole, atomic, checked, found again.

``checkpoints/samples-000051200/`` holds

- ``model.safetensors``: the weights, under open_clip's names; loads as it is,
- ``average.safetensors``: the same of the averaged weights, in a run that keeps them,
- ``optimizer.safetensors``: the optimiser's tensors, ``state/<parameter>/<key>``,
- ``state.json``: all else that moves: the clock, which is the position of loader and schedule too, the optimiser's
  settings, the gradient scaler, the random generators of each rank, the monitored metric,
- ``manifest.json``: size and SHA-256 of each of these.

Nothing in it is pickled.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.training.checkpoint_manifest import check_files, write_manifest
from quiltnet.training.random_state import random_states_as_text, random_states_from_text
from quiltnet.training.tensor_tree import join_tensors, split_tensors
from quiltnet.whole_files import as_any_file

log = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
AVERAGE_NAME = "average.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
REQUIRED_NAMES = (WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME)

_PREFIX = "samples-"
_WEIGHTS_FILES = {"weights": WEIGHTS_NAME, "average": AVERAGE_NAME}
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"


def save_checkpoint(root: Path, state: dict[str, Any]) -> Path:
    """Write one checkpoint under a temporary name and rename it: whatever kills us, no half checkpoint is ever found.

    Args:
        state: ``TrainState.state_dict()``, and whatever else of plain values shall be kept.

    Raises:
        OSError: it could not be written; nothing of it is left, and the other checkpoints are as they were.
    """
    target = checkpoint_path(root, state["samples_seen"])
    put_back_replaced(root)
    for leftover in (*root.glob(f"{_UNFINISHED}*"), *root.glob(f"{_REPLACED}*")):
        delete_folder(leftover)
    unfinished = root / f"{_UNFINISHED}{target.name}"
    try:
        unfinished.mkdir(parents=True)
        _write_files(unfinished, state)
        _take_place(unfinished, target)
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        put_back_replaced(root)
        raise
    return target


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` was given, on the CPU; ``load_state_dict`` moves it to where it belongs.

    Raises:
        UserError: it is no checkpoint, or not as it was saved: all checksums are compared first.
    """
    if why := check_checkpoint(folder):
        raise UserError(f"{folder} is not a valid checkpoint: {why}")
    plain = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    weights = {part: _load_tensors(folder / name) for part, name in _WEIGHTS_FILES.items() if (folder / name).is_file()}
    optimizer = join_tensors(plain.pop("optimizer"), _load_tensors(folder / OPTIMIZER_NAME))
    return {**weights, **plain, "optimizer": optimizer, "random": random_states_from_text(plain["random"])}


def shapes_and_trained(folder: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of the weights by name, and names of the parameters that were trained; no tensor is read."""
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
    groups = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))["optimizer"]["param_groups"]
    return shapes, {name for group in groups for name in group["params"]}


def check_checkpoint(folder: Path, contents: Collection[str] | None = None) -> str | None:
    """Why a checkpoint is not valid; None where it is.

    Args:
        contents: names of files to read and to compare by their checksums; all by default, which takes about a second
            a GB where the processor computes SHA-256 itself. Names and sizes are compared in any case.
    """
    return check_files(folder, REQUIRED_NAMES, contents)


def checkpoint_path(root: Path, samples_seen: int) -> Path:
    """Where the checkpoint of that moment lies, or would."""
    return root / f"{_PREFIX}{samples_seen:012d}"


def samples_of(folder: Path) -> int:
    """The moment that a checkpoint's folder is named for."""
    return int(folder.name.removeprefix(_PREFIX))


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, valid or not, oldest first."""
    named = [path for path in root.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted((path for path in named if path.is_dir()), key=samples_of)


def newest_valid(root: Path, contents: Collection[str] | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is as it was saved, and the newer ones with why they are not.

    Args:
        contents: as of ``check_checkpoint``.
    """
    passed_over: list[tuple[Path, str]] = []
    for folder in reversed(list_checkpoints(root)):
        why = check_checkpoint(folder, contents)
        if why is None:
            return folder, passed_over
        passed_over.append((folder, why))
    return None, passed_over


def latest_checkpoint(root: Path, contents: Collection[str] = (WEIGHTS_NAME,)) -> Path | None:
    """The newest checkpoint to take weights from, if there is one; a line says which newer ones are damaged.

    Args:
        contents: as of ``check_checkpoint``; the optimiser's file, two thirds of a checkpoint, is not read.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    folder, passed_over = newest_valid(root, contents)
    if folder is None and passed_over:
        raise UserError(f"no checkpoint in {root} is valid: {reasons(passed_over)}")
    for damaged, why in passed_over:
        log.warning("%s is passed over: %s", damaged, why)
    return folder


def best_checkpoint(root: Path) -> Path | None:
    """The checkpoint whose monitored metric is best, and the earliest of several; None where none was measured."""
    found = merits(list_checkpoints(root))
    return max(found, key=found.__getitem__, default=None)


def merits(checkpoints: Sequence[Path], metric: str | None = None) -> dict[Path, float]:
    """How good those are whose metric was measured: more is better.

    Damaged ones are left out, as far as sizes and ``state.json`` tell.

    Args:
        checkpoints: oldest first; the answer has their order.
        metric: by default the one that the newest of them was measured by.
    """
    whole = [folder for folder in checkpoints if check_checkpoint(folder, (STATE_NAME,)) is None]
    monitored = {folder: json.loads((folder / STATE_NAME).read_text("utf-8")).get("monitored") for folder in whole}
    measured = {folder: of for folder, of in monitored.items() if of is not None and not math.isnan(of["value"])}
    if not measured:
        return {}
    metric = metric or next(reversed(measured.values()))["metric"]
    return {
        folder: -of["value"] if of["lower_is_better"] else of["value"]
        for folder, of in measured.items()
        if of["metric"] == metric
    }


def reasons(passed_over: Sequence[tuple[Path, str]]) -> str:
    """What ``newest_valid`` says of those that it passes over, in a line."""
    return "; ".join(f"{folder.name}: {why}" for folder, why in passed_over)


def forget_after(root: Path, samples_seen: int) -> None:
    """Delete valid checkpoints that lie after ``samples_seen``: a run that goes on from there leaves their course.

    Damaged ones stay, for whoever wants to look at them, until the run writes or passes their place.
    """
    for checkpoint in list_checkpoints(root):
        if samples_of(checkpoint) > samples_seen and check_checkpoint(checkpoint) is None:
            shutil.rmtree(checkpoint)


def delete_folder(folder: Path) -> bool:
    """Whether it could be deleted; if not, a line says why.

    Someone has protected it, or reads a file in it, which NFS keeps until then. What was just saved is no worse for it.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be deleted, and stays (%s)", folder, error)
        return False
    return True


def put_back_replaced(root: Path) -> None:
    """Give a checkpoint its name again whose replacement ended between two renames."""
    for replaced in root.glob(f"{_REPLACED}*"):
        target = root / replaced.name.removeprefix(_REPLACED)
        if not target.exists():
            replaced.rename(target)


def _write_files(folder: Path, state: dict[str, Any]) -> None:
    for part, name in _WEIGHTS_FILES.items():
        if part in state:
            _save_tensors(state[part], folder / name)
    optimizer, tensors = split_tensors(state["optimizer"])
    _save_tensors(tensors, folder / OPTIMIZER_NAME)
    plain = {name: value for name, value in state.items() if name not in _WEIGHTS_FILES}
    plain.update(optimizer=optimizer, random=random_states_as_text(state["random"]))
    (folder / STATE_NAME).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    write_manifest(folder)
    for path in (*folder.iterdir(), folder):
        _fsync(path)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        as_any_file(path)
    except SafetensorError as error:  # its word for a full disk as well
        raise OSError(f"{path.name}: {error}") from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    # Copied, since safetensors maps the file into memory, and retention on another host may delete it.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _take_place(unfinished: Path, target: Path) -> None:
    """Rename, and put aside what has the name already; no moment is without one of the two."""
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    if target.exists():
        target.rename(replaced)
    unfinished.rename(target)
    _fsync(target.parent)
    if replaced.exists():
        delete_folder(replaced)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
