"""A run that is killed again and again, beside one that is not: do they end with the same weights, bit for bit?

.venv/bin/python benchmarks/kill.py [--kills 30] [--ranks 2] [--seed 0]

Each kill -9 hits all processes of the run at once, at a random moment: some steps after the last start, or while a
checkpoint is being written. After each, every checkpoint that is left is either found damaged or has the weights of the
unbroken run at that moment; then the run is started again with resume=auto. Nothing is deleted but by the run itself.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors import safe_open

from quiltnet.training.checkpoint import check_checkpoint, list_checkpoints, samples_of

ROOT = Path(__file__).parents[1]
BATCH = 12
STEPS_A_CHECKPOINT = 2
PATIENCE_S = 400


@dataclass(frozen=True)
class Kill:
    """What a kill left behind.

    Attributes:
        saving: whether a checkpoint was being written.
        saved: samples of the newest checkpoint that is valid; 0 without one.
        damaged: checkpoints that are not valid, and are passed over.
    """

    saving: bool
    saved: int
    damaged: int


def options(shards: Path, folder: Path, name: str, steps: int) -> list[str]:
    """Of a run of ``steps`` steps of `tiny` with dropout, whose random state a checkpoint must restore."""
    return [
        "model=tiny",
        "+model.image.patch_dropout=0.5",
        f"data.train.shards={shards}/train",
        "data.train.workers=0",
        f"run_name={name}",
        f"output_dir={folder}/outputs",
        f"global_batch_size={BATCH}",
        f"total_samples={steps * BATCH}",
        f"callbacks.checkpoint_every_samples={STEPS_A_CHECKPOINT * BATCH}",
        f"callbacks.log_every_samples={BATCH}",
        "optim.lr=1e-3",
    ]


def start(arguments: Sequence[str], ranks: int, log: Path) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "train.py"), *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A run's processes; torchrun gives each rank a session of its own."""
    leader = psutil.Process(process.pid)
    return [leader, *leader.children(recursive=True)]


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the whole family, all at once as far as that goes."""
    hit = family(process)
    for member in hit:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(timeout=60)
    psutil.wait_procs(hit, timeout=60)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it has; raises RuntimeError where the run has ended before, or takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run ended with {process.poll()} too soon, or hangs:\n{log.read_text()[-4000:]}")
        time.sleep(0.002)


def kill_once(arguments: Sequence[str], run: Path, ranks: int, chance: random.Random, log: Path) -> bool:
    """Start the run and kill it at a random moment; whether it was writing a checkpoint then."""
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    before = _saved(checkpoints)
    process = start(arguments, ranks, log)
    try:
        # Past the checkpoint that it has gone on from, so that the run gets to its end.
        wait_for(lambda: _saved(checkpoints) > before, process, log)
        if chance.random() < 0.5:
            wait_for(lambda: any(checkpoints.glob(".*samples-*")), process, log)
            time.sleep(chance.uniform(0, 0.01))
        else:
            lines = _lines(metrics) + chance.randrange(3)
            wait_for(lambda: _lines(metrics) >= lines, process, log)
            time.sleep(chance.uniform(0, 0.3))
    finally:
        kill(process)
    return any(checkpoints.glob(".*samples-*"))


def compare(run: Path, unbroken: Path) -> tuple[int, int]:
    """The newest valid checkpoint's samples, and how many are damaged.

    Raises:
        AssertionError: a checkpoint that is valid has other weights than the unbroken run's.
    """
    found = list_checkpoints(run / "checkpoints")
    valid = [folder for folder in found if check_checkpoint(folder) is None]
    for folder in valid:
        assert same_weights(folder, unbroken / "checkpoints" / folder.name), f"{folder} has wrong weights"
    return max(map(samples_of, valid), default=0), len(found) - len(valid)


def same_weights(checkpoint: Path, other: Path) -> bool:
    with safe_open(checkpoint / "model.safetensors", "pt") as a, safe_open(other / "model.safetensors", "pt") as b:
        names = sorted(a.keys())
        return names == sorted(b.keys()) and all(a.get_tensor(name).equal(b.get_tensor(name)) for name in names)


def kill_and_go_on(shards: Path, folder: Path, unbroken: Path, *, kills: int, steps: int, ranks: int, seed: int):
    """Yield what each kill left behind; afterwards the run is complete.

    Args:
        unbroken: directory of the same run, of ``steps`` steps, that was never killed and kept all checkpoints.
    """
    chance, run, log = random.Random(seed), folder / "outputs" / "killed", folder / "killed.log"
    arguments = [*options(shards, folder, run.name, steps), "resume=auto"]
    for _ in range(kills):
        saving = kill_once(arguments, run, ranks, chance, log)
        yield Kill(saving, *compare(run, unbroken))
    last = start(arguments, ranks, log)
    if last.wait(timeout=PATIENCE_S) != 0:
        raise RuntimeError(log.read_text()[-4000:])
    compare(run, unbroken)


def steps_for(kills: int) -> int:
    """Enough that no run ends before it is killed: each goes on for two checkpoints and a few steps at most."""
    return kills * (2 * STEPS_A_CHECKPOINT + 4) + 4


def _saved(checkpoints: Path) -> int:
    return max(map(samples_of, list_checkpoints(checkpoints)), default=0)


def _lines(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from quiltnet.cli.shard import Format, shard

    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder, steps = Path(name), steps_for(given.kills)
        shards = folder / "set"
        shard(out=shards, format=Format.synthetic, samples=60, size=48, samples_per_shard=13)
        whole = [*options(shards, folder, "unbroken", steps), "callbacks.keep_checkpoints=1000000"]
        if start(whole, given.ranks, folder / "unbroken.log").wait() != 0:
            sys.exit((folder / "unbroken.log").read_text()[-4000:])
        unbroken, found = folder / "outputs" / "unbroken", []
        for number, kill in enumerate(
            kill_and_go_on(
                shards, folder, unbroken, kills=given.kills, steps=steps, ranks=given.ranks, seed=given.seed
            ),
            start=1,
        ):
            found.append(kill)
            print(f"kill {number}: {kill}", flush=True)
        final = f"checkpoints/samples-{steps * BATCH:012d}"
        same = same_weights(folder / "outputs/killed" / final, unbroken / final)
    print(
        f"| {given.kills} kill -9 in a row within one run of {steps} steps on {given.ranks} ranks "
        f"| {sum(kill.saving for kill in found)} while a checkpoint was being written; "
        f"{sum(kill.damaged for kill in found)} damaged checkpoints passed over, 0 valid ones wrong; "
        f"final weights {'bit-identical' if same else 'DIFFERENT'} | {(time.monotonic() - begun) / 60:.0f} min |"
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
