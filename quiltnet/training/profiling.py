"""Where the time of a step goes: a trace of a few steps, and a table of their stages."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from quiltnet.distributed import is_main
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.flops import peak_memory_gib

STAGES = ("data", "forward", "loss", "backward", "clip", "optimizer")  # as the engine marks them: quiltnet.forward, …
ROWS = (*STAGES, "sync", "other", "idle")
_WINDOW = "quiltnet.traced"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of kineto's events
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Spans = list[tuple[float, float]]  # start and end, microseconds; ascending and apart once joined


@dataclass(frozen=True)
class StepTimes:
    """Of the steps of a trace. Host rows add up to the time that passed, and so do device rows.

    ``sync`` is what nothing else hides: on the host, waits for the device and for gloo; on the device, NCCL's kernels
    while no other kernel runs. ``other`` lies outside the stages (callbacks, Python); ``idle`` is a device that has
    nothing to do.

    Attributes:
        host: milliseconds a step, by row.
        device: the same; empty where there is no CUDA device.
    """

    steps: int
    host: Mapping[str, float]
    device: Mapping[str, float]

    @property
    def step_ms(self) -> float:
        return sum(self.host.values())

    def table(self) -> str:
        """A line a row: milliseconds a step and share."""
        titles = ["host", *(["device"] if self.device else [])]
        lines = [f"{'ms a step':10}" + "".join(f"{title:>12}{'share':>8}" for title in titles)]
        for row in ROWS:
            columns = [self.host, *([self.device] if self.device else [])]
            if any(row in column for column in columns):
                lines.append(f"{row:10}" + "".join(_cells(column.get(row), self.step_ms) for column in columns))
        lines.append(f"{'step':10}" + _cells(self.step_ms, self.step_ms) * len(titles))
        return "\n".join(line.rstrip() for line in lines)


class Profile(Callback):
    """Traces some steps of rank 0 with torch.profiler, then tells where their time went.

    ``trace.json`` is for chrome://tracing or ui.perfetto.dev, ``table.txt`` is what is printed. Tracing costs time
    itself, a few microseconds an operation, so small models look slower than they are.

    Args:
        folder: of the two files.
        skip: steps before, at least 1: the first ones allocate, compile, and wait for the loader to start.
        steps: traced; fewer where the run ends before.
    """

    def __init__(self, folder: Path, *, skip: int = 3, steps: int = 5) -> None:
        self.folder = folder
        self.skip = skip
        self.steps = steps

    def fit_start(self, state: TrainState) -> None:
        self._done = 0
        self._profiler: Any = None

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        if not is_main():
            return
        self._done += 1
        if self._done == self.skip:
            self._start(state.accelerator.device)
        elif self._done == self.skip + self.steps:
            self._finish(state)

    def fit_end(self, state: TrainState) -> None:
        if self._profiler is not None:
            self._finish(state)
        if is_main() and self._done <= self.skip:
            print(
                f"nothing was profiled: the run ended after {self._done} steps, and the first {self.skip} are left "
                f"out; give it total_samples={(self.skip + self.steps) * state.global_batch_size}"
            )

    def _start(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profiler = profile(activities=activities)
        self._profiler.start()
        _wait_for(device)
        self._window = record_function(_WINDOW)
        self._window.__enter__()

    def _finish(self, state: TrainState) -> None:
        steps = self._done - self.skip
        device = state.accelerator.device
        _wait_for(device)
        self._window.__exit__(None, None, None)
        self._profiler.stop()
        if steps:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace = self.folder / "trace.json"
            self._profiler.export_chrome_trace(str(trace))
            times = step_times(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], steps)
            report = _report(times, state.global_batch_size, device)
            (self.folder / "table.txt").write_text(f"{report}\n", encoding="utf-8")
            print(f"{report}\ntrace: {trace}", flush=True)
        self._profiler = None


def step_times(events: Iterable[Mapping[str, Any]], steps: int) -> StepTimes:
    """The table of a chrome trace as torch.profiler writes it, over what ``Profile`` has marked in it."""
    by_category: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            by_category[event.get("cat", "")].append(event)
    marks = [event for event in by_category["user_annotation"] if event["name"].startswith("quiltnet.")]
    window_mark = next(event for event in marks if event["name"] == _WINDOW)
    window = _spans([window_mark])
    stages = {row: _within(_spans(e for e in marks if e["name"] == f"quiltnet.{row}"), window) for row in STAGES}
    waits = _within(_host_waits(by_category, window_mark["tid"]), window)
    host = {row: _length(_without(spans, waits)) for row, spans in stages.items()}
    host["sync"] = _length(waits)
    host["other"] = _length(window) - sum(host.values())
    device = _device_times(by_category, stages, window)
    return StepTimes(
        steps,
        {row: us / 1000 / steps for row, us in host.items()},
        {row: us / 1000 / steps for row, us in device.items()},
    )


def _host_waits(by_category: Mapping[str, list[Mapping[str, Any]]], thread: Any) -> Spans:
    """When the training thread stood still for others."""
    waits = [
        event
        for category in _LAUNCHES
        for event in by_category[category]
        if event["tid"] == thread and ("Synchronize" in event["name"] or event["name"] == "cudaMemcpy")
    ]
    # gloo works on threads of its own; what it does while this one computes costs nothing.
    gloo = [event for event in by_category["user_annotation"] if event["name"].startswith("gloo:")]
    own = [
        event for event in by_category["cpu_op"] if event["tid"] == thread and not event["name"].startswith("c10d::")
    ]
    return _joined([*_spans(waits), *_without(_spans(gloo), _spans(own))])


def _device_times(
    by_category: Mapping[str, list[Mapping[str, Any]]], stages: Mapping[str, Spans], window: Spans
) -> dict[str, float]:
    """A kernel belongs to the stage in which it was launched, from whatever thread."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for category in _LAUNCHES
        for event in by_category[category]
        if "correlation" in event.get("args", {})
    }
    marks = sorted((start, end, row) for row, spans in stages.items() for start, end in spans)
    starts = [start for start, _, _ in marks]
    kernels: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in (event for category in _ON_DEVICE for event in by_category[category]):
        at = launched.get(event.get("args", {}).get("correlation"), event["ts"])
        mark = marks[max(bisect_right(starts, at) - 1, 0)] if marks else None
        row = mark[2] if mark is not None and mark[0] <= at <= mark[1] else "other"
        kernels["sync" if "nccl" in event["name"].lower() else row].append(event)
    if not kernels:
        return {}
    # Where streams overlap, the moment belongs to the step's own work before copies of the next batch, and before NCCL.
    times, taken = {}, []
    for row in ("forward", "loss", "backward", "clip", "optimizer", "other", "data", "sync"):
        spans = _within(_spans(kernels[row]), window)
        times[row] = _length(_without(spans, taken))
        taken = _joined([*taken, *spans])
    return {**times, "idle": _length(window) - sum(times.values())}


def _spans(events: Iterable[Mapping[str, Any]]) -> Spans:
    return _joined([(event["ts"], event["ts"] + event["dur"]) for event in events])


def _joined(spans: Iterable[tuple[float, float]]) -> Spans:
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _without(spans: Spans, others: Spans) -> Spans:
    """What of ``spans`` lies outside ``others``; both joined."""
    rest: Spans = []
    first = 0
    for start, end in spans:
        while first < len(others) and others[first][1] <= start:
            first += 1
        number = first
        while number < len(others) and others[number][0] < end:
            if others[number][0] > start:
                rest.append((start, others[number][0]))
            start = max(start, others[number][1])
            number += 1
        if start < end:
            rest.append((start, end))
    return rest


def _within(spans: Spans, others: Spans) -> Spans:
    return _without(spans, _without(spans, others))


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def _cells(value: float | None, whole: float) -> str:
    return f"{'':20}" if value is None else f"{value:12.2f}{value / whole:8.1%}"


def _report(times: StepTimes, global_batch_size: int, device: torch.device) -> str:
    rate = global_batch_size / times.step_ms * 1000
    lines = [
        f"traced {times.steps} step(s) of {global_batch_size} pairs: {rate:.1f} pairs/s",
        times.table(),
        f"peak memory {peak_memory_gib(device):.2f} GiB{_memory_detail(device)}",
    ]
    return "\n".join(lines)


def _memory_detail(device: torch.device) -> str:
    if device.type != "cuda":
        return " of this process, without its loader's"
    return f" allocated, {torch.cuda.max_memory_reserved(device) / 2**30:.2f} GiB reserved from the device"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
