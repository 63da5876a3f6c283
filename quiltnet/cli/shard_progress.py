"""How far packing, preparing and embedding are: a bar on a terminal, a line every ten seconds in a log; Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY_S = 10.0


class Bar:
    """A bar for each stage; texts stay above it."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = None

    def stage(self, words: str, total: int | None) -> None:
        if self._task is None:
            self._progress.start()
        else:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(words, total=total)

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """A line for each stage that takes long, and one every ten seconds."""

    def __init__(self) -> None:
        self._words, self._total = "", None
        self._done, self._began, self._spoke = 0, 0.0, 0.0

    def stage(self, words: str, total: int | None) -> None:
        self._words, self._total, self._done = words, total, 0
        self._began = self._spoke = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._spoke >= LINE_EVERY_S:
            self._spoke = now
            of_all = f" of {self._total:,}" if self._total is not None else ""
            self.say(f"{self._words}: {self._done:,}{of_all}, {self._done / (now - self._began):,.0f}/s")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""


def watch_progress() -> Bar | Lines:
    """What suits standard error."""
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines()


@contextmanager
def continued_by_the_same_command(out: Path) -> Iterator[None]:
    """Ctrl-C ends with a message of what there is to go on with, in place of a shard set at ``out``."""
    try:
        yield
    except KeyboardInterrupt:
        kept = out.with_name(f"{out.name}.partial")
        goes_on = f"; what is done is in {kept}, and the same command continues" if kept.exists() else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
        raise SystemExit(130) from None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")
