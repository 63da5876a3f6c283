"""Stopping anywhere and going on equals never stopping, bit for bit; ranks and workers change nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import environment, train_command, train_well

TOTAL = 384  # 7.1 epochs of 54 samples: batches straddle epochs


def options(shards: Path, output_dir: Path, name: str, *more: str) -> list[str]:
    return [
        "model=tiny",
        "+model.image.patch_dropout=0.5",  # draws from the random generator that a checkpoint must restore
        "evaluator=[val_pairs]",
        f"data.train.shards={shards}/train",
        f"data.val.shards={shards}/val",
        f"run_name={name}",
        f"output_dir={output_dir}",
        "global_batch_size=12",
        f"total_samples={TOTAL}",
        "callbacks.checkpoint_every_samples=24",
        "callbacks.evaluate_every_samples=96",
        "callbacks.log_every_samples=12",
        "optim.lr=1e-3",
        *more,
    ]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    (newest,) = sorted((folder / "outputs" / name / "checkpoints").glob("samples-*"))[-1:]
    assert newest.name == f"samples-{TOTAL:012d}"
    return load_file(newest / "model.safetensors")


def start_and_kill(folder: Path, arguments: list[str], ranks: int, run: Path) -> None:
    """kill -9 the run's processes, all at once, when an eighth of it is saved."""
    process = subprocess.Popen(
        train_command(*arguments, ranks=ranks),
        cwd=folder,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        saved = [path for path in (run / "checkpoints").glob("samples-*") if int(path.name[8:]) >= TOTAL // 8]
        if saved:
            break
        time.sleep(0.02)
    # Ranks are in sessions of their own; the place of this run is on the command line of each, and on no other.
    subprocess.run(["pkill", "-9", "-f", f"output_dir={run.parent}"], check=False)
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "more"), [(1, []), (2, []), (3, ["deterministic=true"])], ids=["1", "2", "3"])
def test_killed_and_resumed_equals_unbroken(drawn_shards, tmp_path, ranks, more):
    unbroken = options(drawn_shards, tmp_path / "outputs", "unbroken", "data.train.workers=0", *more)
    train_well(tmp_path, *unbroken, ranks=ranks)
    broken = options(drawn_shards, tmp_path / "outputs", "broken", "resume=auto", *more)
    run = tmp_path / "outputs" / "broken"
    start_and_kill(tmp_path, [*broken, "data.train.workers=2"], ranks, run)
    saved = max(int(path.name[8:]) for path in (run / "checkpoints").glob("samples-*"))
    assert TOTAL // 8 <= saved < TOTAL, "the run was not killed in its middle"
    assert "continues" in train_well(tmp_path, *broken, "data.train.workers=1", ranks=ranks)
    torch.testing.assert_close(weights(tmp_path, "broken"), weights(tmp_path, "unbroken"), rtol=0, atol=0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["samples_seen"] for line in lines if "train/loss" in line]
    assert steps == list(range(12, TOTAL + 1, 12)), "each step is logged once"
    expected = [json.loads(line) for line in (tmp_path / "outputs/unbroken/metrics.jsonl").read_text().splitlines()]
    losses = [[line["val_pairs/loss"] for line in run if "val_pairs/loss" in line] for run in (lines, expected)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_ranks_and_uneven_shards_train_the_same_model(drawn_shards, tmp_path):
    for ranks in (1, 2, 3):
        arguments = options(drawn_shards, tmp_path / "outputs", f"ranks{ranks}", "model.image.patch_dropout=0")
        train_well(tmp_path, *arguments, "data.train.workers=1", ranks=ranks)
    one = weights(tmp_path, "ranks1")
    for ranks in (2, 3):
        # 32 steps of Adam amplify the last bits of different sums.
        torch.testing.assert_close(weights(tmp_path, f"ranks{ranks}"), one, rtol=1e-3, atol=1e-4)
    results = [json.loads((tmp_path / f"outputs/ranks{n}/results.json").read_text())["start"] for n in (1, 2, 3)]
    assert results[1] == pytest.approx(results[0], abs=1e-6)
    assert results[2] == pytest.approx(results[0], abs=1e-6)


@pytest.mark.slow
def test_saved_on_two_ranks_goes_on_on_one_and_on_three(drawn_shards, tmp_path):
    def start(output_dir: str, ranks: int, total: int, *more: str) -> str:
        given = options(drawn_shards, tmp_path / output_dir / "outputs", "run", "model.image.patch_dropout=0", *more)
        return train_well(tmp_path, *given, f"total_samples={total}", "data.train.workers=1", ranks=ranks)

    start("two", 2, 48)
    for ranks in (1, 3):
        shutil.copytree(tmp_path / "two", tmp_path / f"on{ranks}")
        said = start(f"on{ranks}", ranks, TOTAL, "resume=auto", "allow_changes=true")
        assert "samples-000000000048" in said and f"{ranks} process(es)" in said
    one = weights(tmp_path / "on1", "run")
    torch.testing.assert_close(weights(tmp_path / "on3", "run"), one, rtol=1e-3, atol=1e-4)
