from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from quiltnet.data.worker_pool import available_cores, map_tasks
from quiltnet.errors import UserError
from tests.conftest import ROOT


def double(number: int) -> int:
    return 2 * number


def leave(number: int) -> int:
    os._exit(number)


@pytest.mark.slow
def test_results_come_in_order_from_any_number_of_processes():
    assert list(map_tasks(double, range(9), 0)) == list(map_tasks(double, range(9), 2)) == list(range(0, 18, 2))
    assert list(map_tasks(double, [], 2)) == []
    with pytest.raises(UserError, match=r"a worker process was killed, .* repeat the command with fewer --workers"):
        list(map_tasks(leave, [3], 2))


def test_cores_are_those_that_may_be_used(monkeypatch):
    assert available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()


SLOW = """
import sys, time
from pathlib import Path
from quiltnet.data.worker_pool import map_tasks

def write_late(name):
    Path(name).write_text("begun")
    time.sleep(60)
    Path(name).write_text("late")

if __name__ == "__main__":
    list(map_tasks(write_late, sys.argv[1:], 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path, signal_number):
    """One that is left behind would write into what the successor writes."""
    (tmp_path / "slow.py").write_text(SLOW)
    names = [tmp_path / "one", tmp_path / "two"]
    command = [sys.executable, str(tmp_path / "slow.py"), *map(str, names)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not all(map(Path.exists, names)):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(parent.pid).children()
    if signal_number == signal.SIGINT:
        os.killpg(parent.pid, signal_number)  # as a terminal does
    else:
        parent.send_signal(signal_number)
    parent.wait(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert [path.read_text() for path in names] == ["begun", "begun"]
