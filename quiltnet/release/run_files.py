"""What a run left in its directory, read back: for the card, the report and whoever compares runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quiltnet.errors import UserError
from quiltnet.whole_files import write_whole

CONFIG_NAME = "config.yaml"
ENVIRONMENT_NAME = "environment.json"
METRICS_NAME = "metrics.jsonl"
QUARANTINE_NAME = "quarantine.jsonl"
RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class RunFiles:
    """A run directory's files.

    Attributes:
        config: the resolved configuration, everything in samples.
        environment: command, code revision, packages, hardware, and under ``data`` what the shards are.
        results: the first and last numbers and the newest outcomes; empty where nothing was evaluated.
        metrics: the lines of the log, oldest first; each has ``samples_seen``.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def samples_seen(self) -> int:
        """Of the newest line of the log; 0 before the first."""
        return self.metrics[-1]["samples_seen"] if self.metrics else 0

    @property
    def is_finished(self) -> bool:
        return self.samples_seen >= (self.config.get("total_samples") or float("inf"))

    def broken_samples(self) -> dict[str, int]:
        """Reason -> samples that could not be used, from the quarantine list."""
        counts: dict[str, int] = {}
        for row in _read_lines(self.path / QUARANTINE_NAME):
            counts[row["reason"]] = counts.get(row["reason"], 0) + row.get("samples", 1)
        return counts


def read_run(path: str | Path) -> RunFiles:
    """Raises UserError where ``path`` is not the directory of a run, or one of its files is damaged."""
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path} is no run directory: it has no {CONFIG_NAME}; give one such as outputs/first_try")
    return RunFiles(
        path,
        _read_config(path / CONFIG_NAME),
        read_json(path / ENVIRONMENT_NAME),
        read_json(path / RESULTS_NAME),
        _read_lines(path / METRICS_NAME),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises UserError where it holds something else than a JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, "no JSON object")
    return content


def add_changes(results: Path, changes: Mapping[str, tuple[float, float, float]]) -> None:
    """Write into a run's results what training changed, under ``changes``: (value, low, high) by evaluator/metric.

    One that has an end that is not finite is left out, as JSON cannot say it.

    The intervals are those of paired differences, which need every resample and cannot be had from ``start`` and
    ``last``. A later evaluation writes the file anew, without them.
    """
    finite = {name: list(change) for name, change in changes.items() if all(map(math.isfinite, change))}
    content = {**read_json(results), "changes": finite}
    write_whole(results, json.dumps(content, indent=2) + "\n")


def by_metric(outcomes: Mapping[str, Mapping[str, Any]], part: str) -> dict[str, Any]:
    """``scores`` or ``intervals`` of a run's outcomes, by ``evaluator/metric``."""
    found = outcomes.items()
    return {f"{name}/{metric}": value for name, of in found for metric, value in of.get(part, {}).items()}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined with dots; an empty mapping is a value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(flattened(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    if not isinstance(config, dict):
        raise _damaged(path, "no mapping")
    return config


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # one that is being written has no end yet
        rows = [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise _damaged(path, error) from error
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("samples_seen"), int):
            raise _damaged(path, f"a line without samples_seen: {json.dumps(row)[:80]}")
    return rows


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path} cannot be read ({why}); `quiltnet check run {path.parent}` says what else is damaged")
