"""``quiltnet check run``: whether all that a run has left behind is whole, and what is wrong where it is not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape
from rich.table import Table
from yaml import YAMLError

from quiltnet.cli.run_directory import RunDirectory
from quiltnet.cli.tables import print_table
from quiltnet.errors import UserError, first_line
from quiltnet.release.hub import load_model
from quiltnet.release.run_files import CONFIG_NAME, ENVIRONMENT_NAME
from quiltnet.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint

# What a run cannot be repeated, continued or understood without.
REQUIRED_KEYS = (
    "run_name", "seed", "global_batch_size", "total_samples", "precision", "model", "data.train", "loss", "optim",
    "schedule", "callbacks",
)  # fmt: skip

_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class RunCheck:
    """One thing that was looked at, and what there is to say of it."""

    name: str
    is_well: bool
    detail: str


class _Wrong(Exception):
    """args: what is wrong."""


def check_run(folder: str | Path) -> list[RunCheck]:
    """Look at everything in a run directory.

    Raises:
        UserError: it is none.
    """
    run = RunDirectory(Path(folder).expanduser())
    if not any(path.exists() for path in (run.path / CONFIG_NAME, run.checkpoints, run.metrics)):
        raise UserError(f"{folder} is no run directory: it has neither {CONFIG_NAME} nor checkpoints; give outputs/…")
    looks: list[tuple[str, Callable[[RunDirectory], str]]] = [
        ("config", _look_at_config),
        ("environment", _look_at_environment),
        ("metrics", _look_at_metrics),
        ("results", _look_at_results),
        ("quarantine", _look_at_quarantine),
    ]
    return [*(_look(name, look, run) for name, look in looks), *_look_at_checkpoints(run)]


def print_checks(checks: list[RunCheck]) -> None:
    """A line for each."""
    table = Table("part", "", "what was found")
    for check in checks:
        verdict = "ok" if check.is_well else "wrong"
        table.add_row(escape(check.name), verdict, escape(check.detail), style=None if check.is_well else "bold red")
    print_table(table)


def _look(name: str, look: Callable[[RunDirectory], str], run: RunDirectory) -> RunCheck:
    try:
        return RunCheck(name, True, look(run))
    except _Wrong as wrong:
        return RunCheck(name, False, str(wrong))


def _look_at_config(run: RunDirectory) -> str:
    path = run.path / CONFIG_NAME
    try:
        config = OmegaConf.load(path)
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except FileNotFoundError as error:
        raise _Wrong(f"{path} is missing") from error
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise _Wrong(f"{path} does not resolve: {first_line(error)}") from error
    if not OmegaConf.is_dict(config):
        raise _Wrong(f"{path} holds no keys")
    missing = [key for key in REQUIRED_KEYS if OmegaConf.select(config, key) is None]
    if missing:
        raise _Wrong(f"{path} lacks {', '.join(missing)}")
    return f"resolves, {len(config)} keys"


def _look_at_environment(run: RunDirectory) -> str:
    environment = _read_json(run.path / ENVIRONMENT_NAME)
    if "data" not in environment:
        raise _Wrong(f"{run.path / ENVIRONMENT_NAME} does not say which data the run was trained on")
    return f"git {environment.get('git') or 'unknown'}, {environment.get('time') or 'no time'}"


def _look_at_metrics(run: RunDirectory) -> str:
    lines = _read_lines(run.metrics)
    if not lines:
        raise _Wrong(f"{run.metrics} is empty: nothing was logged yet")
    before = 0
    for number, line in enumerate(lines, start=1):
        samples_seen = line.get("samples_seen")
        if not isinstance(samples_seen, int):
            raise _Wrong(f"line {number} of {run.metrics} has no samples_seen")
        if samples_seen < before:
            raise _Wrong(f"line {number} of {run.metrics} goes back from {before:,} samples to {samples_seen:,}")
        before = samples_seen
    return f"{len(lines):,} lines up to {before:,} samples"


def _look_at_results(run: RunDirectory) -> str:
    if not run.results.exists():
        return "none: no evaluator has run"
    results = _read_json(run.results)
    missing = [key for key in ("samples_seen", "start", "last") if key not in results]
    if missing:
        raise _Wrong(f"{run.results} lacks {', '.join(missing)}")
    if not isinstance(results["last"], dict) or not isinstance(results["samples_seen"], int):
        raise _Wrong(f"{run.results} does not say how many samples gave which metrics")
    return f"{len(results['last'])} metrics at {results['samples_seen']:,} samples"


def _look_at_quarantine(run: RunDirectory) -> str:
    if not run.quarantine.exists():
        return "none: no sample was broken"
    counts: Counter[str] = Counter()
    for number, line in enumerate(_read_lines(run.quarantine), start=1):
        reason, samples = line.get("reason"), line.get("samples", 1)
        if not isinstance(reason, str) or not isinstance(samples, int):
            raise _Wrong(f"line {number} of {run.quarantine} names no reason, or no number of samples")
        counts[reason] += samples
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def _look_at_checkpoints(run: RunDirectory) -> Iterator[RunCheck]:
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        yield RunCheck("checkpoints", False, f"{run.checkpoints} holds no finished checkpoint")
    for checkpoint in checkpoints:
        yield _look(checkpoint.name, lambda _, folder=checkpoint: _look_at_checkpoint(folder), run)
    if checkpoints:
        yield _look("model", lambda _: _look_at_model(checkpoints[-1]), run)


def _look_at_checkpoint(folder: Path) -> str:
    try:
        state = load_checkpoint(folder)
    except UserError as error:
        raise _Wrong(str(error)) from error
    samples_seen = state.get("samples_seen")
    if not isinstance(samples_seen, int) or checkpoint_path(folder.parent, samples_seen) != folder:
        raise _Wrong(f"says samples_seen={samples_seen}, which is not what its folder is named for")
    for part in ("weights", "optimizer"):
        broken = [name for name, tensor in _tensors(state.get(part), "") if not _is_finite(tensor)]
        if broken:
            more = f" and {len(broken) - _NAMED_AT_MOST} more" if len(broken) > _NAMED_AT_MOST else ""
            raise _Wrong(f"{part} not finite: {', '.join(broken[:_NAMED_AT_MOST])}{more}")
    numbers = sum(tensor.numel() for _, tensor in _tensors(state["weights"], ""))
    return f"loads, {numbers:,} weights, all finite"


def _look_at_model(checkpoint: Path) -> str:
    try:
        model = load_model(checkpoint)
    except UserError as error:
        raise _Wrong(str(error)) from error
    return f"{type(model).__name__} is built from the newest checkpoint"


def _tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _tensors(inner, f"{name}.{number}")


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _Wrong(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise _Wrong(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _Wrong(f"{path} holds no object")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file, whole."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _Wrong(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise _Wrong(f"{path} cannot be read: {error}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise _Wrong(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(lines[-1], dict):
            raise _Wrong(f"line {number} of {path} is no object")
    return lines
