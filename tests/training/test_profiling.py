from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from quiltnet.training.profiling import Profile, step_times

MAIN, OTHER = 1, 2


def event(category: str, name: str, start: float, end: float, thread: int = MAIN, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": args}


def mark(name: str, start: float, end: float) -> dict[str, Any]:
    return event("user_annotation", f"quiltnet.{name}", start, end)


def milliseconds(**rows: float) -> Any:
    """Of a trace in which a step takes 1 ms, the rest being zero."""
    return pytest.approx({"data": 0, "forward": 0, "loss": 0, "backward": 0, "clip": 0, "optimizer": 0} | rows)


STEP = [
    mark("traced", 0, 2000),
    mark("data", -50, 200),  # begins before the window
    mark("forward", 200, 800),
    mark("loss", 800, 1000),
    mark("backward", 1000, 1800),
]


def test_rows_add_up_to_the_step():
    times = step_times(STEP, steps=2)
    assert times.step_ms == pytest.approx(1.0) and times.device == {}
    assert times.host == milliseconds(data=0.1, forward=0.3, loss=0.1, backward=0.4, sync=0, other=0.1)


def test_gloo_is_waited_for_only_where_nothing_is_computed():
    events = [
        *STEP,
        event("user_annotation", "gloo:all_gather", 820, 1010, OTHER),
        event("cpu_op", "c10d::allgather_", 820, 830),
        event("user_annotation", "gloo:all_reduce", 1100, 1700, OTHER),
        event("cpu_op", "autograd::engine::evaluate_function", 1010, 1500),
        event("cpu_op", "aten::mm", 1200, 1400),
    ]
    times = step_times(events, steps=2)
    assert times.host["sync"] == pytest.approx((190 + 200) / 2000)
    assert times.host["loss"] == pytest.approx((200 - 180) / 2000)
    assert times.host["backward"] == pytest.approx((800 - 210) / 2000)
    assert times.step_ms == pytest.approx(1.0)


def test_kernels_belong_to_the_stage_that_launched_them():
    """The device runs behind the host; a copy of the next batch and NCCL hide behind kernels of the step."""
    launches = [(250, 1), (850, 2), (1100, 3), (100, 4), (1200, 5), (1900, 6)]
    kernels = [
        ("kernel", "gemm", 300, 900, 1),
        ("kernel", "softmax", 900, 1000, 2),
        ("kernel", "gemm", 1000, 1600, 3),
        ("gpu_memcpy", "Memcpy HtoD", 800, 950, 4),
        ("kernel", "ncclDevKernel_AllReduce", 1500, 1900, 5),
        ("gpu_memset", "Memset", 1950, 1960, 6),
    ]
    events = [
        *STEP,
        *(event("cuda_runtime", "cudaLaunchKernel", at, at + 5, OTHER, correlation=n) for at, n in launches),
        *(event(category, name, start, end, 7, correlation=n) for category, name, start, end, n in kernels),
        event("cuda_runtime", "cudaDeviceSynchronize", 1910, 2000),
        event("gpu_user_annotation", "quiltnet.forward", 300, 900, 7),
    ]
    times = step_times(events, steps=2)
    expected = milliseconds(forward=0.3, loss=0.05, backward=0.3, sync=0.15, other=0.005, idle=0.195)
    assert times.device == expected
    assert times.host["sync"] == pytest.approx(0.045) and times.step_ms == pytest.approx(1.0)
    table = times.table().splitlines()
    assert table[0].split() == ["ms", "a", "step", "host", "share", "device", "share"]
    assert table[2].split() == ["forward", "0.30", "30.0%", "0.30", "30.0%"]
    assert table[-2].split() == ["idle", "0.20", "19.5%"] and table[-1].split()[0] == "step"


def state() -> Any:
    return SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), global_batch_size=8)


def run(profile: Profile, steps: int) -> None:
    profile.fit_start(state())
    for _ in range(steps):
        with record_function("quiltnet.forward"):
            torch.ones(300, 300) @ torch.ones(300, 300)
        profile.step_end(state(), None, {})
    profile.fit_end(state())


def test_steps_are_traced_in_the_middle_of_a_run(tmp_path, capsys):
    run(Profile(tmp_path / "profile", skip=2, steps=3), steps=7)
    names = [event.get("name") for event in json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]]
    assert names.count("quiltnet.forward") == 3
    told = capsys.readouterr().out
    assert told.startswith((tmp_path / "profile/table.txt").read_text())
    assert "traced 3 step(s) of 8 pairs" in told and "peak memory" in told
    rows = {line.split()[0]: float(line.split()[1]) for line in told.splitlines()[2:11]}
    assert rows["forward"] > 0 and rows["step"] == pytest.approx(sum(rows.values()) - rows["step"], abs=0.05)


def test_a_short_run_tells_what_it_has(tmp_path, capsys):
    run(Profile(tmp_path / "some", skip=2, steps=3), steps=3)
    assert "traced 1 step(s) of 8 pairs" in capsys.readouterr().out
    run(Profile(tmp_path / "none", skip=2, steps=3), steps=2)
    assert "nothing was profiled: the run ended after 2 steps" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
