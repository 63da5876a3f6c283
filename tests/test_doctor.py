from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from quiltnet.cli import self_test
from quiltnet.cli.doctor import FLOPS_OF_B32, advise_on_machine, advise_on_rates, doctor
from quiltnet.cli.machine import cgroup_limits
from quiltnet.cli.self_test import Outcome, run_self_test

app = typer.Typer()
app.command()(doctor)

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.1, "capability": "9.0", "bf16": True}


def machine(devices: list[dict[str, Any]] | None = None, tools: Any = (), **limits: Any) -> dict[str, Any]:
    """Nothing to be said of it, unless the test says otherwise."""
    usual = {
        "cores": 16, "cores_of_container": None, "memory_gib": 128.0, "memory_of_container_gib": None,
        "shared_memory_free_gib": 64.0, "file_descriptors": 65536, "file_descriptors_at_most": 1048576,
    }  # fmt: skip
    usual_tools = {"gloo": True, "NCCL": True, "compiler": "/usr/bin/c++", "HF_HUB_OFFLINE": None}
    return {"devices": devices or [], "limits": usual | limits, "tools": usual_tools | dict(tools)}


def test_facts_without_the_self_test():
    result = CliRunner().invoke(app, ["--quick", "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["self_test"] == [] and told["advice"]
    assert {"torch", "triton", "simplejpeg", "NCCL", "python"} <= told["machine"]["versions"].keys()
    assert told["machine"]["limits"]["cores"] >= 1 and told["machine"]["tools"]["gloo"] is True


def test_facts_as_a_table():
    result = CliRunner().invoke(app, ["--quick"])
    assert result.exit_code == 0
    assert "open_clip_torch" in result.stdout and "file descriptors" in result.stdout


def test_a_failed_test_ends_with_one_line(monkeypatch):
    def broken() -> tuple[str, dict[str, float]]:
        raise OSError("a traceback\n\nno route to host\n")

    monkeypatch.setattr(self_test, "self_tests", lambda: {"first": broken, "second": lambda: ("well", {})})
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 1
    assert "self-test failed: first" in result.stderr and "Traceback" not in result.stderr
    first, second = json.loads(result.stdout)["self_test"]
    assert (first["passed"], first["detail"]) == (False, "OSError: no route to host")
    assert second["passed"] and second["detail"] == "well"


def test_a_good_machine_needs_little_advice():
    assert list(advise_on_machine(machine([H100]))) == ["precision=bf16 is the precision to train in on this device"]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (machine(file_descriptors=1024), "file descriptors: 1024 a process"),
        (machine(file_descriptors=1024, file_descriptors_at_most=2048), "`ulimit -n 2048`"),
        (machine(shared_memory_free_gib=0.06), "start the container with --shm-size=8g"),
        (machine(cores_of_container=2.5), "may use 2.5 of the 16 cores"),
        (machine(memory_of_container_gib=8.0), "may use 8.0 of 128.0 GiB"),
        (machine(tools={"compiler": None}), "placement.compile=true needs one"),
        (machine(tools={"HF_HUB_OFFLINE": "1"}), "must be on this disk"),
        (machine([H100, H100], tools={"NCCL": False}), "this torch has no NCCL"),
        (machine([H100, H100]), "torchrun --nproc-per-node 2"),
        (machine([H100 | {"bf16": False}]), "precision=fp16"),
        (machine(tools={"gloo": False}), "this torch has no gloo"),
    ],
)
def test_advice_on_the_machine(facts, words):
    assert any(words in sentence for sentence in advise_on_machine(facts))


def test_advice_on_workers():
    figures = {"images_per_s_a_core": 700.0, "tflops_per_s": 400.0}
    first, *more = advise_on_rates(machine([H100]), figures)
    assert "takes about 9.07e+03 pairs/s" in first and "data.train.workers=13" in first and not more
    _, second = advise_on_rates(machine([H100] * 2), figures)
    assert "2 device(s) would want 26 cores for the loader, and there are 16" in second
    assert list(advise_on_rates(machine(), {})) == []


def test_what_a_vit_b_32_costs():
    """As test_flops counts towers by hand: blocks, projection, and no gradient of the pixels."""

    def of_tower(tokens: int, width: int) -> int:
        return 12 * (2 * tokens * width * 12 * width + 4 * tokens * tokens * width) + 2 * width * 512

    embedding = 2 * 49 * 3 * 32 * 32 * 768
    assert pytest.approx(3 * (of_tower(50, 768) + of_tower(77, 512)) + 2 * embedding, rel=2e-3) == FLOPS_OF_B32


def test_limits_of_a_container(tmp_path):
    own = tmp_path / "self"
    assert cgroup_limits(tmp_path / "none", own) == (None, None)

    own.write_text("0::/job/step\n")
    (tmp_path / "two/job/step").mkdir(parents=True)
    (tmp_path / "two/job/step/cpu.max").write_text("max 100000\n")
    (tmp_path / "two/job/step/memory.max").write_text("max\n")
    assert cgroup_limits(tmp_path / "two", own) == (None, None)
    (tmp_path / "two/job/cpu.max").write_text("250000 100000\n")
    (tmp_path / "two/memory.max").write_text("8589934592\n")
    assert cgroup_limits(tmp_path / "two", own) == (2.5, 8 * 2**30)

    own.write_text("4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n")
    for name, content in (
        ("memory/box/memory.limit_in_bytes", "4294967296"),
        ("cpu,cpuacct/cpu.cfs_quota_us", "400000"),
        ("cpu,cpuacct/cpu.cfs_period_us", "100000"),
        ("memory/memory.limit_in_bytes", "9223372036854771712"),
    ):
        path = tmp_path / "one" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert cgroup_limits(tmp_path / "one", own) == (4.0, 4 * 2**30)


class Processes:
    """Two that never end, of a terminal that may be interrupted."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.error = error
        self.processes = [self, self]
        self.killed = 0

    def join(self, timeout: float) -> bool:
        if self.error is not None:
            raise self.error
        return False

    def kill(self) -> None:
        self.killed += 1


@pytest.mark.parametrize(("error", "raised"), [(None, self_test._Failed), (KeyboardInterrupt, KeyboardInterrupt)])
def test_processes_do_not_outlive_the_test(monkeypatch, error, raised):
    monkeypatch.setattr(self_test, "_TIMEOUT_S", 0.0)
    processes = Processes(error)
    with pytest.raises(raised):
        self_test._wait_for(processes)
    assert processes.killed == 2


@pytest.mark.slow
def test_this_machine_passes(monkeypatch):
    monkeypatch.setattr(self_test, "_MEASURED_S", 0.2)
    monkeypatch.setattr(self_test, "_DRAWN", 2)
    outcomes: dict[str, Outcome] = {name: run_self_test(name) for name in self_test.self_tests()}
    assert [outcome.detail for outcome in outcomes.values() if not outcome.passed] == []
    figures = outcomes["loader"].figures | outcomes["step"].figures
    assert figures["images_per_s_a_core"] > 1 and figures["pairs_per_s"] > 0.1
    assert list(advise_on_rates(machine(), figures))
