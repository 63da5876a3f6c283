"""Whatever ends a run, the next start goes on as if nothing had happened. Real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import kill as killing
from quiltnet.training.checkpoint import check_checkpoint, list_checkpoints, samples_of
from tests.commands import environment
from tests.conftest import ROOT
from tests.signalled_runs import PLACES, TOTAL

KILLS = 8
STEPS = killing.steps_for(KILLS)

pytestmark = pytest.mark.slow


def lines(run: Path, key: str) -> list[tuple[int, float]]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["samples_seen"], line[key]) for line in read if key in line]


@pytest.fixture(scope="module")
def unbroken(drawn_shards, tmp_path_factory) -> Path:
    """A run on two ranks that has kept all its checkpoints."""
    folder = tmp_path_factory.mktemp("unbroken")
    arguments = [*killing.options(drawn_shards, folder, "unbroken", STEPS), "callbacks.keep_checkpoints=1000"]
    process = killing.start(arguments, 2, folder / "log")
    assert process.wait(timeout=killing.PATIENCE_S) == 0, (folder / "log").read_text()
    return folder / "outputs" / "unbroken"


def rank_of(number: int, process: subprocess.Popen[bytes]) -> psutil.Process:
    """A rank of a torchrun, which stands before all that it has started."""
    return next(member for member in killing.family(process)[1:] if member.environ().get("RANK") == str(number))


def final(run: Path) -> Path:
    return run / f"checkpoints/samples-{STEPS * killing.BATCH:012d}"


def test_killed_at_any_moment(drawn_shards, tmp_path, unbroken):
    kills = list(killing.kill_and_go_on(drawn_shards, tmp_path, unbroken, kills=KILLS, steps=STEPS, ranks=2, seed=7))
    assert len(kills) == KILLS
    saved = [kill.saved for kill in kills]
    assert saved == sorted(saved) and saved[0] > 0 and saved[-1] < STEPS * killing.BATCH, "each start went on"
    assert any(kill.saving for kill in kills)
    run = tmp_path / "outputs/killed"
    assert killing.same_weights(final(run), final(unbroken))
    assert lines(run, "train/loss") == lines(unbroken, "train/loss")


def test_torchrun_starts_again_by_itself(drawn_shards, tmp_path, unbroken):
    """overwrite=true is for the first start: the second goes on."""
    run, log = tmp_path / "outputs/restarted", tmp_path / "log"
    arguments = [*killing.options(drawn_shards, tmp_path, "restarted", STEPS), "overwrite=true"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "train.py"), *arguments],
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        killing.wait_for(lambda: len(list_checkpoints(run / "checkpoints")) == 2, process, log)
        rank_of(1, process).send_signal(signal.SIGKILL)
        assert process.wait(timeout=killing.PATIENCE_S) == 0, log.read_text()
    finally:
        if process.poll() is None:
            killing.kill(process)
    assert "restarted begins" in log.read_text() and "continues" in log.read_text()
    assert killing.same_weights(final(run), final(unbroken))


@pytest.mark.parametrize(("place", "waits_at"), [("step", r"\w+"), ("save", "gathering")])
def test_a_rank_that_stands_still_ends_the_run(drawn_shards, tmp_path, place, waits_at):
    log = tmp_path / "log"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.stopped_rank"]
    arguments = [*killing.options(drawn_shards, tmp_path, "hangs", 1000), "callbacks.stall_timeout_s=20"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, place, *arguments],
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        assert process.wait(timeout=killing.PATIENCE_S) == 1, log.read_text()
    finally:
        if process.poll() is None:
            killing.kill(process)
    stalled = rf"stalled: rank 0 is at {waits_at} \(step \d+\) and has not moved for 2\d s"
    assert re.search(stalled, log.read_text()), log.read_text()
    assert "most recent call first" in log.read_text() and re.search(r"exitcode +: 70", log.read_text())


@pytest.fixture(scope="module")
def without_dropout(drawn_shards, tmp_path_factory) -> Path:
    """A short run on two ranks whose ranks draw nothing at random."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = [*few_steps(drawn_shards, folder), "callbacks.keep_checkpoints=1000"]
    process = killing.start(arguments, 2, folder / "log")
    assert process.wait(timeout=killing.PATIENCE_S) == 0, (folder / "log").read_text()
    return folder / "outputs" / "ranks"


def few_steps(shards: Path, folder: Path) -> list[str]:
    return [option for option in killing.options(shards, folder, "ranks", 12) if "dropout" not in option]


@pytest.mark.parametrize("ranks", [1, 3])
def test_goes_on_with_another_number_of_ranks(drawn_shards, tmp_path, without_dropout, ranks):
    run, log = tmp_path / "outputs/ranks", tmp_path / "log"
    shutil.copytree(without_dropout, run)
    for checkpoint in list_checkpoints(run / "checkpoints"):
        if samples_of(checkpoint) > 6 * killing.BATCH:
            shutil.rmtree(checkpoint)
    process = killing.start([*few_steps(drawn_shards, tmp_path), "resume=auto"], ranks, log)
    assert process.wait(timeout=killing.PATIENCE_S) == 0, log.read_text()
    assert "samples-000000000072" in log.read_text()
    found, expected = lines(run, "train/loss"), lines(without_dropout, "train/loss")
    # The same pairs and the same optimiser state, to the rounding of other sums.
    assert [at for at, _ in found] == [at for at, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-3)
    last = f"checkpoints/samples-{12 * killing.BATCH:012d}/model.safetensors"
    torch.testing.assert_close(load_file(run / last), load_file(without_dropout / last), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def signalled(drawn_shards, tmp_path_factory) -> tuple[Path, dict[str, list[int]], str]:
    folder = tmp_path_factory.mktemp("signalled")
    command = [sys.executable, "-m", "tests.signalled_runs", str(drawn_shards), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "outputs", json.loads((folder / "codes.json").read_text()), done.stderr


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_saves_and_the_next_start_goes_on(signalled, place):
    outputs, codes, said = signalled
    assert codes["unbroken"] == [0]
    assert codes[place] == [130 if place == "interrupt" else 75, 0]
    name = "Ctrl-C" if place == "interrupt" else "SIGTERM"
    assert f"stopped by {name} after " in said and f"saved in {outputs / place}; resume=auto goes on" in said
    run, unbroken = outputs / place, outputs / "unbroken"
    assert all(check_checkpoint(folder) is None for folder in list_checkpoints(run / "checkpoints"))
    newest = f"checkpoints/samples-{TOTAL:012d}/model.safetensors"
    torch.testing.assert_close(load_file(run / newest), load_file(unbroken / newest), rtol=0, atol=0)
    for key in ("train/loss", "val_pairs/loss"):
        assert lines(run, key) == lines(unbroken, key)
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, unbroken)]
    del results[1]["changes"]  # of paired answers, of which a later start no longer has those from before training
    assert results[0] == results[1]


def test_the_evaluation_was_cut_short(signalled):
    """Saved at the evaluation's own step, which the next start has measured."""
    outputs, *_ = signalled
    saved = {samples_of(folder) for folder in list_checkpoints(outputs / "evaluation/checkpoints")}
    assert 32 in saved and os.path.exists(outputs / "evaluation/results.json")
