"""Several gloo processes on one CPU, for the tests of everything that communicates."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, by the process that all ranks are forked from: each would need seconds for them.
multiprocessing.set_forkserver_preload(["quiltnet.model.assembly", "quiltnet.training.engine", "tests.model.towers"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``world_size`` ranks; it must be importable (module level)."""
    with tempfile.TemporaryDirectory() as folder:
        job = (world_size, folder, dict(os.environ), function, args)
        mp.start_processes(_entry, job, nprocs=world_size, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _entry(
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    # What torchrun would set: accelerate reads the environment, the group itself meets in a file (no port to be taken).
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{Path(folder)}/store", rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
