"""``quiltnet sweep`` as a user starts it, with real trainings; and how it ends."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tests.commands import environment

pytest.importorskip("optuna")
pytest.importorskip("plotly")

from quiltnet.cli.search import sweep
from quiltnet.cli.search_driver import SearchDriver
from quiltnet.cli.search_results import print_results
from quiltnet.cli.search_study import SearchStudy
from tests.test_sweep_config import BASE
from tests.test_sweep_driver import make_plan


@pytest.mark.slow
def test_three_trainings_two_at_a_time(drawn_shards, tmp_path):
    options = [
        "sweep=optuna", "n_trials=3", "parallel=2", "run_name=rates", "model=tiny", "evaluator=[val_pairs]",
        f"data.train.shards={drawn_shards}/train", f"data.val.shards={drawn_shards}/val", "data.train.workers=0",
        "global_batch_size=8", "total_samples=16", "schedule.warmup_samples=8",
    ]  # fmt: skip
    command = [sys.executable, "-m", "quiltnet.cli.app", "sweep", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no trial can be pruned" in done.stderr
    folder = tmp_path / "outputs/rates"
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["state"], row["samples"]) for row in rows] == [("done", "16")] * 3
    for number, row in enumerate(rows):
        run = folder / f"trial-{number:03d}"
        last = json.loads((run / "results.json").read_text())["last"]
        assert float(row["val_pairs/loss"]) == last["val_pairs/loss"]
        cfg = OmegaConf.load(run / "config.yaml")
        assert (cfg.optim.lr, cfg.optim.weight_decay) == (float(row["optim.lr"]), float(row["optim.weight_decay"]))
        assert (folder / f"trial-{number:03d}.log").read_text().rstrip().endswith(f"outputs/rates/trial-{number:03d}")
    best = min(rows, key=lambda row: float(row["val_pairs/loss"]))
    again = shlex.split(done.stdout.splitlines()[-1])
    assert again[:2] == ["quiltnet", "train"] and f"optim.lr={best['optim.lr']}" in again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_sweep_says_how_to_go_on(number, work, monkeypatch, capsys):
    monkeypatch.setattr(SearchDriver, "run", lambda self: os.kill(os.getpid(), number))
    before = signal.signal(
        number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    )  # of nohup
    try:
        with pytest.raises(SystemExit) as exit_:
            sweep([*BASE, "total_samples=16"])
    finally:
        signal.signal(number, before)
    assert exit_.value.code == 130
    assert "  quiltnet sweep sweep=optuna run_name=rates model=tiny" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_fewer_than_two_completed_trials_are_no_picture(tmp_path, capsys):
    plan = make_plan(tmp_path)
    study = SearchStudy(plan)
    assert not print_results(plan, study)
    assert "no trial was completed" in capsys.readouterr().err
    study.finish(study.claim(), "COMPLETE", 2.5, "")
    assert print_results(plan, study)
    told = capsys.readouterr()
    assert "pictures need two completed trials; there are 1" in told.err and "trial-000, val/loss 2.5" in told.out
    assert not list(plan.folder.glob("*.png"))


def test_help_needs_no_options(capsys):
    sweep(["--help"])
    assert "sweep=optuna n_trials=20" in capsys.readouterr().out
