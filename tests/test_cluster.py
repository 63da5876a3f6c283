"""Training on several nodes by a Slurm script, and sweeps by a cluster's launcher. There is no cluster: stand-ins for
Slurm's commands start the nodes on this machine, and submitit's local executor the jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import environment, train_well
from tests.conftest import ROOT

TOTAL = 240
SCRIPTS = sorted((ROOT / "examples/slurm").glob("*.sbatch"))

# Two nodes; like srun it ends as the worst of them. scancel signals its tasks, scontrol prints what it is asked.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
echo $first $second > "$TASKS"
wait $first; worst=$?
wait $second; status=$?
exit $((status > worst ? status : worst))
"""
SCANCEL = """#!/bin/bash
[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID.0" ]] && kill -TERM $(cat "$TASKS")
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf '127.0.0.1\\nsecond\\n'; else echo "$*" > "$REQUEUED"; fi
"""


def options(shards: Path, folder: Path, name: str, *more: str) -> list[str]:
    return [
        "model=tiny",
        "evaluator=[val_pairs]",
        f"data.train.shards={shards}/train",
        f"data.val.shards={shards}/val",
        "data.train.workers=0",
        f"run_name={name}",
        f"output_dir={folder}/outputs",
        "global_batch_size=12",
        f"total_samples={TOTAL}",
        "callbacks.checkpoint_every_samples=24",
        "callbacks.log_every_samples=12",
        *more,
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/samples-{TOTAL:012d}/model.safetensors")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """Environment of a job of two nodes with one GPU each, as its script finds it."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    facts = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "two", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "1"}
    job = {f"SLURM_{key}": value for key, value in facts.items()}
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    files = {"REQUEUED": str(tmp_path / "requeued"), "TASKS": str(tmp_path / "tasks")}
    return {**environment(), **job, **files, "SLURM_CPUS_PER_TASK": "1", "PATH": path}


def start(script: str, arguments: list[str], job: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", f"examples/slurm/{script}", *arguments],
        cwd=ROOT,
        env=job,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(happened, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert happened(), process.communicate()[0] if process.poll() is not None else "four minutes have passed"


@pytest.mark.slow
def test_two_nodes_requeued_equal_one_node_unbroken(drawn_shards, tmp_path, slurm):
    arguments = options(drawn_shards, tmp_path, "nodes")
    run = tmp_path / "outputs/nodes"
    job = start("train.sbatch", arguments, slurm)
    try:
        wait_for(lambda: len(list((run / "checkpoints").glob("samples-*"))) == 2, job)
        job.send_signal(signal.SIGUSR1)  # --signal=B: to the script alone
        printed = job.communicate(timeout=240)[0]  # until the last process has closed it
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)
    assert job.returncode == 75, printed
    assert "stopped by SIGTERM after" in printed
    assert Path(slurm["REQUEUED"]).read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]
    assert printed.count("2 process(es) on cpu") == 1, "one rank of all nodes tells"
    assert not (run / f"checkpoints/samples-{TOTAL:012d}").exists(), "the run was not interrupted"

    again = start("train.sbatch", arguments, slurm)
    printed = again.communicate(timeout=300)[0]
    assert again.returncode == 0, printed
    assert "continues" in printed
    train_well(tmp_path, *options(drawn_shards, tmp_path, "node"), ranks=2)
    torch.testing.assert_close(weights(run), weights(tmp_path / "outputs/node"), rtol=0, atol=0)
    assert losses(run) == losses(tmp_path / "outputs/node")
    assert len(losses(run)) == TOTAL // 12


def test_script_starts_an_agent_a_node_and_ends_as_they_do(tmp_path, slurm):
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/bash\necho "$@"\nexit 3\n')
    python.chmod(0o755)
    job = start("train.sbatch", ["run_name=nodes", "data.train.shards='a-{0..1}.tar'"], slurm)
    agents = job.communicate(timeout=120)[0].splitlines()
    assert job.returncode == 3
    assert len(agents) == 2 and agents[0] == agents[1]
    assert f"--rdzv-endpoint=127.0.0.1:{10000 + os.getpid() % 20000} " in agents[0]
    assert agents[0].endswith(" train.py resume=auto run_name=nodes data.train.shards='a-{0..1}.tar'")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="needs hydra-submitit-launcher")
def test_submitit_runs_a_trial_a_process(drawn_shards, tmp_path):
    arguments = options(drawn_shards, tmp_path, "rates", "total_samples=24", "optim.lr=1e-3,1e-4")
    printed = train_well(tmp_path, "-m", "launcher=submitit_local", *arguments)
    assert "trial-000" in printed and "trial-001" in printed, "a table ends the sweep"
    trials = [tmp_path / f"outputs/rates/trial-{number:03d}" for number in range(2)]
    assert [json.loads((trial / "results.json").read_text())["samples_seen"] for trial in trials] == [24, 24]
    rates = [(trial / "parameter_groups.txt").read_text() for trial in trials]
    assert "0.001 " in rates[0] and "0.0001 " in rates[1]
    assert len(list((tmp_path / "outputs/rates/.submitit").glob("*/*_result.pkl"))) == 2
