"""Where numbers go: a JSONL file always; the console; TensorBoard and Weights & Biases when asked.

A logger has ``log(metrics, samples_seen)`` and ``close()``, and lives on rank 0 only. Those that a config names are
made, and refuse what they cannot do, before the run directory exists; ``start`` opens them in it.

What leaves the machine has no secrets in it, and, unless the run was given ``share_samples=true``, numbers only: no
captions, no tiles, no names of files.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, TextIO

import wandb

from quiltnet.errors import UserError
from quiltnet.redaction import hide_places, redact_config
from quiltnet.whole_files import write_whole

Metrics = Mapping[str, float]


class Logger(Protocol):
    def log(self, metrics: Metrics, samples_seen: int) -> None: ...

    def close(self) -> None: ...


class JsonlLogger:
    """``metrics.jsonl``: one line a call, flushed, ``samples_seen`` first. The record that all others copy.

    On a resumed run the lines after the checkpoint are cut off: those samples are about to be seen again.
    """

    def __init__(self, path: Path, resumed_at: int | None = None) -> None:
        if resumed_at is not None:
            cut_after(path, resumed_at)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics, samples_seen: int) -> None:
        # JSON knows no NaN; a diverged loss is written as null and stays readable everywhere.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"samples_seen": samples_seen, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbLogger:
    """Weights & Biases. Every call is one history row, drawn over ``samples_seen``.

    Args:
        group: None: the sweep, of a run that is called ``sweep/trial``.
        name: None: the run's.
    """

    def __init__(
        self,
        project: str = "quiltnet",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        mode: str = "online",
    ) -> None:
        if mode not in ("online", "offline"):
            raise UserError(f"logger.wandb.mode={mode!r}: choose 'online' or 'offline'")
        if mode == "online" and not wandb.login(prompt=False):
            raise UserError(
                "logger=[wandb] needs a login: run `wandb login`, set WANDB_API_KEY, or log offline with "
                "logger.wandb.mode=offline and `wandb sync` later"
            )
        self._name = name
        self._group = group
        self._options = {"project": project, "entity": entity, "mode": mode}

    def start(self, directory: Path, name: str, config: Mapping[str, Any], resumed_at: int | None = None) -> None:
        """One W&B run for a run and its continuations: its id lies in the run directory."""
        id_file = directory / "wandb_id.txt"
        if resumed_at is None or not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        name = self._name or name
        self._run = wandb.init(
            dir=directory,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            name=name,
            group=self._group or name.rpartition("/")[0] or None,
            config=shown_config(config),
            # Of itself it would send the command line, the repository's URL and the folder's name.
            settings=wandb.Settings(
                silent=True, console="off", x_disable_meta=True, disable_git=True, disable_code=True
            ),
            **self._options,
        )
        self._shares_samples = shares_samples(config)
        self._run.define_metric("*", step_metric="samples_seen")

    def log(self, metrics: Metrics, samples_seen: int) -> None:
        shown = metrics if self._shares_samples else only_numbers(metrics)
        self._run.log({"samples_seen": samples_seen, **shown})

    def close(self) -> None:
        self._run.finish()


class TensorBoardLogger:
    """TensorBoard event files; the step axis is ``samples_seen``."""

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("logger=[tensorboard] needs the package: pip install tensorboard")

    def start(self, directory: Path, name: str, config: Mapping[str, Any], resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)
        self._writer.add_text(f"{name}/config", f"```json\n{json.dumps(shown_config(config), indent=2)}\n```")

    def log(self, metrics: Metrics, samples_seen: int) -> None:
        for name, value in only_numbers(metrics).items():
            self._writer.add_scalar(name, value, samples_seen)

    def close(self) -> None:
        self._writer.close()


class ConsoleLogger:
    """What a person watches: a progress bar on a terminal, plain lines elsewhere (a Slurm log)."""

    def __init__(self, total_samples: int, started_at: int = 0, stream: TextIO | None = None) -> None:
        self._total = total_samples
        self._started_at = started_at
        self._start = time.perf_counter()
        self._stream = stream or sys.stderr
        self._bar = self._start_bar() if self._stream.isatty() else None

    def log(self, metrics: Metrics, samples_seen: int) -> None:
        if "train/loss" not in metrics:
            self._print_by_prefix(metrics)
            return
        parts = [
            f"loss {metrics['train/loss']:.4f}",
            f"scale {metrics['train/logit_scale']:.2f}",
            f"lr {metrics['train/learning_rate']:.2e}",
            f"{metrics['train/samples_per_s']:.1f} samples/s",
            f"data wait {metrics['data/wait_share']:.0%}",
        ]
        if self._bar is not None:
            self._bar.update(self._task, completed=samples_seen, facts="  ".join(parts))
            return
        parts.append(f"ETA {_clock(self._remaining_s(samples_seen))}")
        self._print(f"{samples_seen:>{len(str(self._total))}}/{self._total}  " + "  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _start_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=Console(file=self._stream))
        self._task = bar.add_task("train", total=self._total, completed=self._started_at, facts="")
        bar.start()
        return bar

    def _print_by_prefix(self, metrics: Metrics) -> None:
        """One line an evaluator: its name, then what it measured."""
        lines: dict[str, list[str]] = {}
        for name, value in metrics.items():
            prefix, _, metric = name.partition("/")
            lines.setdefault(prefix, []).append(f"{metric} {value:.4g}")
        for prefix, values in lines.items():
            self._print(f"  {prefix}  {'  '.join(values)}")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def _remaining_s(self, samples_seen: int) -> float:
        rate = (samples_seen - self._started_at) / (time.perf_counter() - self._start)
        return (self._total - samples_seen) / rate


class LoggerGroup:
    """Several loggers as one; empty on every rank but the main one."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = list(loggers)

    def log(self, metrics: Metrics, samples_seen: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, samples_seen)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def shares_samples(config: Mapping[str, Any]) -> bool:
    """Whether a run's captions, tiles and names of files may be shown to others."""
    return config.get("share_samples") is True


def shown_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What others may see of a run's config."""
    redacted = redact_config(config)
    return redacted if shares_samples(config) else hide_places(redacted)


def only_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Without whatever is an image, a text or a table."""
    return {name: value for name, value in metrics.items() if isinstance(value, Real)}


def logged_lines(path: Path) -> list[dict[str, Any]]:
    """Of a JSONL file of this run's own; none where there is no file."""
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def cut_after(path: Path, samples_seen: int) -> None:
    """Drop the lines of a JSONL file that lie after ``samples_seen``, and a last line that was cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["samples_seen"] > samples_seen:
            break
        kept.append(line)
    write_whole(path, "".join(kept))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
