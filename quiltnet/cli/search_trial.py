"""One trial of a search: a process of its own, followed through the metrics.jsonl that it writes."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quiltnet.errors import UserError
from quiltnet.release.run_files import CONFIG_NAME

# A trial that is told to end has this long; torchrun takes up to 30 s of it to end its processes.
GRACE_S = 45.0
# Of a log, what is looked through for the reason of a failure.
_TAIL_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Interrupt)\b.*)", re.MULTILINE)


class Metrics:
    """One metric of a ``metrics.jsonl`` that a run is writing."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._file: tuple[int, int] = (0, 0)  # which one, and how far it was read
        self.samples_seen = 0

    def new_values(self) -> list[tuple[int, float]]:
        """``(samples_seen, value)`` of whole lines that were written since the last call; NaN where it was none.

        What precedes training is left out. A run that goes on shortens its file first; it is read anew then.
        """
        values = []
        for line in self._new_lines():
            self.samples_seen = max(self.samples_seen, line["samples_seen"])
            if self._name in line and line["samples_seen"] > 0:
                value = line[self._name]
                values.append((line["samples_seen"], math.nan if value is None else float(value)))
        return values

    def _new_lines(self) -> Iterator[Mapping[str, Any]]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            status = os.fstat(file.fileno())
            which, start = self._file
            if which != status.st_ino or status.st_size < start:
                start = 0
            file.seek(start)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file = (status.st_ino, start + len(whole))
        yield from map(json.loads, whole.splitlines())


class TrialProcess:
    """A trial's process, which leads a session: a Ctrl-C at the driver does not reach it.

    Args:
        log: file that its output is added to.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                    preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
                )
            except OSError as error:
                raise UserError(f"{command[0]} cannot be started ({error})") from error
        self._kill_at = math.inf

    @property
    def identity(self) -> dict[str, Any]:
        """What finds the process again, and no other that got its number later."""
        import psutil

        try:
            began = psutil.Process(self._process.pid).create_time()
        except psutil.NoSuchProcess:
            began = 0.0
        return {"host": socket.gethostname(), "pid": self._process.pid, "began": began}

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it. One that has not ended in time is killed."""
        if time.monotonic() > self._kill_at:
            self.kill()
        return self._process.poll()

    def end(self, grace_s: float = GRACE_S) -> None:
        """Ask it to end; ``exit_code`` tells when it has."""
        if self._kill_at == math.inf:
            self._kill_at = time.monotonic() + grace_s
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:  # its number may be another's as soon as it has ended
            _signal(self._process.pid, number)

    def user_mistake(self) -> str | None:
        """The message, where ``quiltnet train`` has refused its options."""
        begins = "error: "
        output = self._output()
        # torchrun ends with a code and a long report of its own.
        by_torchrun = self._process.returncode == 1 and "ChildFailedError" in output
        lines = output.splitlines()
        at = max((number for number, line in enumerate(lines) if line.startswith(begins)), default=None)
        if at is None or not (by_torchrun or self._process.returncode == 2):
            return None
        message = lines[at : at + 1] if by_torchrun else lines[at:]
        return "\n".join(message).removeprefix(begins).strip()

    def failure(self) -> str:
        """Why it ended, in a line."""
        output = self._output()
        code = self._process.returncode
        if code < 0:
            hint = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{hint}"
        if mistake := self.user_mistake():
            return mistake.splitlines()[0]
        raised = _EXCEPTION.findall(output)
        last = raised[-1] if raised else next((line for line in reversed(output.splitlines()) if line.strip()), "")
        return last.strip() or f"exit code {code}, without a word"

    def _output(self) -> str:
        with self._log.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(self._log_start, size - _TAIL_BYTES))
            return file.read().decode(errors="replace")


def planned_samples(folder: Path) -> int | None:
    """How many samples the run in ``folder`` will see; None before it has said so."""
    try:
        return yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("total_samples")
    except FileNotFoundError:
        return None


def end_left_behind(identity: Mapping[str, Any], grace_s: float = GRACE_S) -> None:
    """End the process of a trial whose driver has died, so that another may take its folder; on this machine."""
    import psutil

    if identity["host"] != socket.gethostname():
        return
    try:
        leader = psutil.Process(identity["pid"])
        if abs(leader.create_time() - identity["began"]) > 2:
            return
        family = [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    _signal(leader.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=grace_s)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive)


def _end_with_parent() -> Callable[[], None]:
    """For a child between fork and exec: SIGTERM when the driver dies, on whichever machine that happens."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl  # found before the fork: little is safe after it
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(leader: int, number: signal.Signals) -> None:
    """To a process and all of its session; nothing where they have ended."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return
