"""What this process is at: marked in profiles, and told to whoever watches that it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import record_function


@dataclass(frozen=True)
class Stage:
    """``number`` differs between any two moments between which something moved."""

    name: str
    number: int = 0


_current = Stage("starting")


def current_stage() -> Stage:
    """Of this process's training thread; read by others."""
    return _current


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Mark what is done inside as ``name``, ``quiltnet.<name>`` in a profile; then the stage around it goes on."""
    outer = _current
    _enter(name)
    try:
        with record_function(f"quiltnet.{name}"):
            yield
    finally:
        _enter(outer.name)


def _enter(name: str) -> None:
    global _current
    _current = Stage(name, _current.number + 1)
