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
from quiltnet.training.checkpoint import latest_checkpoint

CONFIG_NAME = "config.yaml"

# What may differ between a run and its continuation: how it is started and watched, not what it computes.
_MAY_CHANGE = {
    "resume", "overwrite", "output_dir", "run_name", "callbacks", "logger", "evaluator", "monitor", "data_root",
    "deterministic",
}  # fmt: skip


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. ``checkpoint`` is where it continues, if it does."""

    path: Path
    checkpoint: Path | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

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
        return self.path / "model"


def check_run_directory(path: Path, config: Mapping[str, Any], *, resume: str | None, overwrite: bool) -> RunDirectory:
    """Decide whether the run may start there, before anything is written.

    Raises:
        UserError: a used directory that is neither resumed nor overwritten, a continuation whose config differs, a
            directory that cannot be written.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # permissions alone do not tell
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); choose another place: output_dir=/path") from error
    used = path.exists() and any(path.iterdir())
    if resume not in (None, "auto"):
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise UserError(f"resume={resume}: no such checkpoint; resume=auto finds the newest of this run")
        _refuse_changes(checkpoint.parent.parent / CONFIG_NAME, config)
        return RunDirectory(path, checkpoint)
    if not used:
        return RunDirectory(path)
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path} holds files that are not a run's; choose another run_name")
    if overwrite:
        return RunDirectory(path)
    if resume is None:
        raise UserError(
            f"{path} holds an earlier run; continue it with resume=auto, replace it with overwrite=true, "
            "or choose another run_name"
        )
    checkpoint = latest_checkpoint(path / "checkpoints")
    if checkpoint is not None:
        _refuse_changes(path / CONFIG_NAME, config)
    return RunDirectory(path, checkpoint)


def create_run_directory(run: RunDirectory, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Make the directory (empty, unless it continues) and write down config and circumstances."""
    if run.checkpoint is None or run.checkpoint.parent != run.checkpoints:
        shutil.rmtree(run.path, ignore_errors=True)
    run.path.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(dict(config)), run.path / CONFIG_NAME)
    environment = {**describe_environment(), "data": dict(data)}
    (run.path / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def describe_environment() -> dict[str, Any]:
    """Command, code, packages and hardware: what someone needs to tell two runs apart."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
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


def _refuse_changes(saved: Path, config: Mapping[str, Any]) -> None:
    if not saved.is_file():
        raise UserError(f"{saved} is missing: the checkpoint stands outside a run directory")
    before = _flatten({k: v for k, v in OmegaConf.to_container(OmegaConf.load(saved)).items() if k not in _MAY_CHANGE})
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


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
