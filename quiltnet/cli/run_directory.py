"""``outputs/<run_name>/``: what a run leaves behind, and the rules for entering one that exists."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from quiltnet.errors import UserError
from quiltnet.release.hub import CHECKPOINTS_FOLDER, DESCRIPTION_FOLDER
from quiltnet.training.checkpoint import latest_checkpoint

CONFIG_NAME = "config.yaml"
ENVIRONMENT_NAME = "environment.json"

# What may differ between a run and its continuation: how it is started and watched, not what it computes.
_MAY_CHANGE = {
    "resume", "overwrite", "output_dir", "run_name", "callbacks", "logger", "evaluator", "monitor", "data_root",
    "deterministic", "placement", "micro_batch_size", "profile",
}  # fmt: skip


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. ``checkpoint`` is where it continues; ``replaces`` says that what is there goes first."""

    path: Path
    checkpoint: Path | None = None
    replaces: bool = False

    @property
    def continues(self) -> bool:
        """Whether the checkpoint is one of this very run."""
        return self.checkpoint is not None and self.checkpoint.parent == self.checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def model(self) -> Path:
        return self.path / DESCRIPTION_FOLDER


def check_run_directory(
    path: Path, config: Mapping[str, Any], data: Mapping[str, Any], *, resume: str | None, overwrite: bool
) -> RunDirectory:
    """Decide whether the run may start there, before anything is written.

    Raises:
        UserError: a used directory that is neither resumed nor overwritten, a continuation whose configuration or data
            differ, a directory that cannot be written.
    """
    if resume is not None and overwrite:
        raise UserError("resume and overwrite=true contradict each other: one continues the run, the other discards it")
    check_writable(path)
    checkpoint = _named_checkpoint(path, resume)
    if checkpoint is not None:
        _refuse_changes(checkpoint.parent.parent, config, data)
        if checkpoint.parent == path / CHECKPOINTS_FOLDER:
            return RunDirectory(path, checkpoint)
    used = path.exists() and any(path.iterdir())
    if not used:
        return RunDirectory(path, checkpoint)
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path} holds files that are not a run's; choose another run_name")
    if overwrite or resume == "auto":  # auto: a run that was begun, and ended before its first checkpoint
        return RunDirectory(path, replaces=True)
    raise UserError(
        f"{path} holds an earlier run; continue it with resume=auto, replace it with overwrite=true, "
        "or choose another run_name"
    )


def check_writable(path: Path) -> None:
    """Raises UserError if ``path`` could not be written; permissions alone do not tell, so it is tried."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing if existing.is_dir() else existing.parent).cleanup()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); choose another place") from error


def create_run_directory(run: RunDirectory, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Make the directory and write down configuration and circumstances."""
    environment = {**describe_environment(), "data": dict(data)}
    if run.replaces:
        shutil.rmtree(run.path.resolve())
    run.path.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(dict(config)), run.path / CONFIG_NAME)
    (run.path / ENVIRONMENT_NAME).write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def describe_environment() -> dict[str, Any]:
    """Command, code, packages and hardware: what someone needs to tell two runs apart."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted((d.name, d.version) for d in distributions() if d.name)),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _git_revision() -> str | None:
    """Commit of the working directory's repository, ``-dirty`` with uncommitted changes; none outside one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _named_checkpoint(path: Path, resume: str | None) -> Path | None:
    """The checkpoint that ``resume`` means, named as a part of ``path`` where it is one of this run."""
    if resume is None:
        return None
    if resume == "auto":
        return latest_checkpoint(path / CHECKPOINTS_FOLDER)
    checkpoint = Path(resume)
    if not checkpoint.is_dir():
        raise UserError(f"resume={resume}: no such checkpoint; resume=auto finds the newest of this run")
    own = path / CHECKPOINTS_FOLDER / checkpoint.name
    return own if own.exists() and own.samefile(checkpoint) else checkpoint.resolve()


def _refuse_changes(run: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    if not (run / CONFIG_NAME).is_file():
        raise UserError(f"{run / CONFIG_NAME} is missing: the checkpoint stands outside a run directory")
    saved = OmegaConf.to_container(OmegaConf.load(run / CONFIG_NAME))
    before = _flatten({key: value for key, value in saved.items() if key not in _MAY_CHANGE})
    now = _flatten({key: value for key, value in config.items() if key not in _MAY_CHANGE})
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    # Another number of loader processes gives the same stream.
    changed = [key for key in changed if not key.endswith(".workers")]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)} then, {now.get(key)} now" for key in changed[:6])
        raise UserError(
            f"the run cannot continue with another configuration ({shown}); give the options of the first start, "
            "or choose another run_name"
        )
    trained_on, given = json.loads((run / ENVIRONMENT_NAME).read_text(encoding="utf-8"))["data"], dict(data)
    loaders, now_loaders = trained_on.pop("loaders", None), given.pop("loaders", None)  # of streamed shards
    if trained_on != given:
        raise UserError(
            f"the shards are not those that the run began with ({trained_on} then, {given} now); "
            "bring them back, or choose another run_name"
        )
    if loaders != now_loaders:
        print(
            f"note: the shards are streamed, by {loaders} loaders (ranks x workers) when the run began and "
            f"{now_loaders} now: some samples of this epoch will come twice and others not at all",
            file=sys.stderr,
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
