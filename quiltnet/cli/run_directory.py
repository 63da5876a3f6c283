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
from quiltnet.redaction import redact_command, redact_config
from quiltnet.release.hub import CHECKPOINTS_FOLDER, DESCRIPTION_FOLDER
from quiltnet.release.run_files import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    METRICS_NAME,
    QUARANTINE_NAME,
    RESULTS_NAME,
    flattened,
)
from quiltnet.training.checkpoint import (
    check_checkpoint,
    list_checkpoints,
    newest_valid,
    put_back_replaced,
    reasons,
)
from quiltnet.whole_files import write_whole

# What may differ between a run and its continuation: how it is started and watched, not what it computes.
_MAY_CHANGE = {
    "resume", "overwrite", "output_dir", "run_name", "callbacks", "logger", "evaluator", "monitor", "data_root",
    "deterministic", "placement", "micro_batch_size", "profile", "allow_changes", "allow_targets", "share_samples",
}  # fmt: skip
# What the state of a checkpoint is made of: not even `allow_changes` lets it differ.
_MUST_NOT_CHANGE = ("optim._target_", "optim.name")
_CHANGES_SHOWN = 6


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
        return self.path / METRICS_NAME

    @property
    def results(self) -> Path:
        return self.path / RESULTS_NAME

    @property
    def quarantine(self) -> Path:
        return self.path / QUARANTINE_NAME

    @property
    def model(self) -> Path:
        return self.path / DESCRIPTION_FOLDER


def check_run_directory(
    path: Path,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    resume: str | None,
    overwrite: bool,
    allow_changes: bool = False,
) -> RunDirectory:
    """Decide whether the run may start there, before anything is written.

    Args:
        allow_changes: say which part of configuration and data differs from that of the run to be continued, and go on.

    Raises:
        UserError: a used directory that is neither resumed nor overwritten, a continuation whose configuration or data
            differ, no valid checkpoint among those that there are, a directory that cannot be written.
    """
    if resume is not None and overwrite:
        raise UserError("resume and overwrite=true contradict each other: one continues the run, the other discards it")
    check_writable(path)
    checkpoint = _named_checkpoint(path, resume)
    if checkpoint is not None:
        _compare_with(checkpoint.parent.parent, config, data, allow_changes)
        if checkpoint.parent == path / CHECKPOINTS_FOLDER:
            return RunDirectory(path, checkpoint)
    used = path.exists() and any(path.iterdir())
    if not used:
        return RunDirectory(path, checkpoint)
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path} holds files that are not a run's; choose another run_name")
    if overwrite or (resume is not None and _ended_before_its_first_checkpoint(path, resume, checkpoint)):
        return RunDirectory(path, checkpoint, replaces=True)
    raise UserError(
        f"{path} holds an earlier run; continue it with resume=auto, replace it with overwrite=true, "
        "or choose another run_name"
    )


def check_out_file(out: Path, *, overwrite: bool) -> None:
    """Raises UserError where a file cannot be written, or would replace another unasked."""
    if out.exists() and not (overwrite and out.is_file()):
        raise UserError(f"{out} exists already; give another --out, or say --overwrite to replace a file")
    check_writable(out)


def check_writable(path: Path) -> None:
    """Raises UserError if ``path`` could not be written; permissions alone do not tell, so it is tried."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing if existing.is_dir() else existing.parent).cleanup()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); choose another place") from error


def create_run_directory(run: RunDirectory, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Make the directory and write down configuration and circumstances.

    Raises:
        UserError: it cannot be written; what a run that goes on had there is as it was.
    """
    environment = {**describe_environment(), "data": dict(data)}
    try:
        if run.replaces:
            delete_run_directory(run.path)
        run.path.resolve().mkdir(parents=True, exist_ok=True)
        # A run whose configuration is cut off, by a kill or a full disk, could never go on.
        write_whole(run.path / CONFIG_NAME, OmegaConf.to_yaml(OmegaConf.create(redact_config(config))))
        write_whole(run.path / ENVIRONMENT_NAME, json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{run.path} cannot be written ({error}); free space, or choose another place") from error


def delete_run_directory(path: Path) -> None:
    """Delete the directory with all that is in it; of a link, what it leads to."""
    shutil.rmtree(path.resolve())


def describe_environment() -> dict[str, Any]:
    """Command, code, packages and hardware: what someone needs to tell two runs apart."""
    return {
        "command": redact_command([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
        return _newest_checkpoint(path / CHECKPOINTS_FOLDER)
    checkpoint = Path(resume)
    if not checkpoint.is_dir():
        raise UserError(f"resume={resume}: no such checkpoint; resume=auto finds the newest of this run")
    if why := check_checkpoint(checkpoint):
        raise UserError(f"resume={resume}: {why}; resume=auto finds the newest valid one of this run")
    own = path / CHECKPOINTS_FOLDER / checkpoint.name
    return own if own.exists() and own.samefile(checkpoint) else checkpoint.resolve()


def _ended_before_its_first_checkpoint(path: Path, resume: str, given: Path | None) -> bool:
    """Whether a used directory holds nothing to go on from, so that the run in it begins again.

    Raises:
        UserError: it had gone on from a checkpoint that is not given now; without it the run would be another.
    """
    if list_checkpoints(path / CHECKPOINTS_FOLDER) or (given is not None and path.resolve() in given.parents):
        return False
    before = OmegaConf.load(path / CONFIG_NAME).get("resume")
    if resume == "auto" and before not in (None, "auto"):
        raise UserError(
            f"the run in {path} began with resume={before} and ended before a checkpoint of its own: say so again, or "
            "overwrite=true to begin without it"
        )
    return True


def _newest_checkpoint(root: Path) -> Path | None:
    """The newest valid one, once it is said why newer ones are none."""
    put_back_replaced(root)
    checkpoint, passed_over = newest_valid(root)
    if checkpoint is None and passed_over:
        raise UserError(
            f"resume=auto: no checkpoint in {root} is valid ({reasons(passed_over)}); remove them to begin anew with "
            "overwrite=true, or choose another run_name"
        )
    for damaged, why in passed_over:
        print(f"note: {damaged} is passed over: {why}", file=sys.stderr)
    return checkpoint


def _compare_with(run: Path, config: Mapping[str, Any], data: Mapping[str, Any], allow_changes: bool) -> None:
    """Refuse, or say, what differs from the run that is continued."""
    if not (run / CONFIG_NAME).is_file():
        raise UserError(f"{run / CONFIG_NAME} is missing: the checkpoint stands outside a run directory")
    before = _compared(OmegaConf.to_container(OmegaConf.load(run / CONFIG_NAME)))
    now = _compared(config)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    shown = [f"{key}: {before.get(key)} then, {now.get(key)} now" for key in changed]
    fixed = [line for key, line in zip(changed, shown, strict=True) if key in _MUST_NOT_CHANGE]
    if fixed:
        raise UserError(
            f"the run cannot continue with another optimiser ({'; '.join(fixed)}): the checkpoint has the state of the "
            f"first; a new run begins with its weights by model=start model.source={run}"
        )
    if changed and not allow_changes:
        more = f"; and {len(shown) - _CHANGES_SHOWN} more" if len(shown) > _CHANGES_SHOWN else ""
        raise UserError(
            f"the run cannot continue with another configuration ({'; '.join(shown[:_CHANGES_SHOWN])}{more}); give the "
            "options of the first start, choose another run_name, or say allow_changes=true if the change is meant"
        )
    for line in shown:
        print(f"note: continues with a change: {line}", file=sys.stderr)
    _compare_data(run, dict(data), allow_changes)


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flattened({key: value for key, value in redact_config(config).items() if key not in _MAY_CHANGE})
    # Another number of loader processes gives the same stream.
    return {key: value for key, value in flat.items() if value != {} and not key.endswith(".workers")}


def _compare_data(run: Path, given: dict[str, Any], allow_changes: bool) -> None:
    trained_on = json.loads((run / ENVIRONMENT_NAME).read_text(encoding="utf-8"))["data"]
    loaders, now_loaders = trained_on.pop("loaders", None), given.pop("loaders", None)  # of streamed shards
    if trained_on != given:
        changed = f"the shards are not those that the run began with ({trained_on} then, {given} now)"
        if not allow_changes:
            raise UserError(f"{changed}; bring them back, or choose another run_name")
        print(f"note: {changed}; the position in the data is taken over as a count of samples", file=sys.stderr)
    if loaders != now_loaders:
        print(
            f"note: the shards are streamed, by {loaders} loaders (ranks x workers) when the run began and "
            f"{now_loaders} now: some samples of this epoch will come twice and others not at all",
            file=sys.stderr,
        )
