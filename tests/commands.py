"""Training as a user starts it: real processes, in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def train_command(*options: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, str(ROOT / "train.py"), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(folder: Path, *options: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Train in ``folder``; whoever calls looks at the return code."""
    command = train_command(*options, ranks=ranks)
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


def train_well(folder: Path, *options: str, ranks: int = 1) -> str:
    done = train(folder, *options, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
