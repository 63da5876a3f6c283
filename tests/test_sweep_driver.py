"""The driver of a search, with trials that train nothing: small scripts that write metrics.jsonl as a run does."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

optuna = pytest.importorskip("optuna")
pytest.importorskip("plotly")

from quiltnet.cli.search_driver import SearchDriver  # noqa: E402
from quiltnet.cli.search_plan import SearchPlan  # noqa: E402
from quiltnet.cli.search_results import best_trial, list_trials, print_results  # noqa: E402
from quiltnet.cli.search_space import Parameter  # noqa: E402
from quiltnet.cli.search_study import SearchStudy  # noqa: E402
from quiltnet.errors import UserError  # noqa: E402

# argv: folder, x, steps, seconds a step. Goes on where its metrics.jsonl ends, as resume=auto does.
TRIAL = """
import json, os, signal, sys, time
from pathlib import Path
folder, x, steps, pause = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
number = int(folder.name[-3:])
faults = json.loads(os.environ.get("FAULTS", "{}"))
fault = faults.get(str(number))
if fault in ("refused", "refused_ranks"):
    print("error: x must be even\\nuse 2 or 4", file=sys.stderr)
    if fault == "refused":
        sys.exit(2)
    sys.exit("E1128 failed\\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \\n=====")
folder.mkdir(exist_ok=True)
(folder / "config.yaml").write_text(f"total_samples: {10 * steps}")
(folder / "starts").open("a").write(os.environ.get("OMP_NUM_THREADS", "") + "\\n")
path = folder / "metrics.jsonl"
seen = json.loads(path.read_text().splitlines()[-1])["samples_seen"] if path.exists() else -10
with path.open("a") as file:
    for samples in range(seen + 10, 10 * steps + 1, 10):
        if fault == "crash" and samples == 10:
            raise MemoryError("CUDA out of memory")
        if fault == "killed" and samples == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        value = None if fault == "nan" else (x - 3) ** 2 + 1 / (1 + samples)
        line = {"samples_seen": samples} if fault == "silent" else {"samples_seen": samples, "val/loss": value}
        file.write(json.dumps(line) + "\\n")
        file.flush()
        time.sleep(pause)
"""
SLOW = 0.1
FAST = {"poll_s": 0.01, "grace_s": 5.0, "patience_s": 30.0}


def make_plan(place: Path, **changes) -> SearchPlan:
    plan = {"name": "s", "folder": place / "s", "space": {"x": Parameter(0.0, 10.0)}, "monitor": "val/loss"}
    return SearchPlan(**{**plan, "n_trials": 3, **changes})


def fake_trial(plan: SearchPlan, number: int, values: dict, steps: int = 3, pause: float = 0.0) -> list[str]:
    arguments = [str(plan.trial_folder(number)), str(values["x"]), str(steps), str(pause)]
    return [sys.executable, "-I", "-S", "-c", TRIAL, *arguments]


def run(plan: SearchPlan, command=fake_trial, **options) -> dict[int, object]:
    """Outcomes by number."""
    driver = SearchDriver(plan, command, **{**FAST, **options})
    driver.run()
    return {row.number: row for row in list_trials(driver.study)}


def last_value(folder: Path) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"]


def test_outcomes_are_the_last_numbers_of_the_trials(tmp_path):
    plan = make_plan(tmp_path)
    rows = run(plan, partial(fake_trial, pause=0.1))  # seconds are kept to a tenth
    assert [row.state for row in rows.values()] == ["done"] * 3
    for number, row in rows.items():
        assert row.value == last_value(plan.trial_folder(number)) == (row.values["x"] - 3) ** 2 + 1 / 31
        assert row.samples == 30 and row.seconds > 0
    assert len({row.values["x"] for row in rows.values()}) == 3


def test_each_kind_of_failure_is_a_row_with_its_reason(tmp_path, monkeypatch):
    faults = {1: "crash", 2: "killed", 3: "nan", 4: "silent", 5: "refused", 6: "refused_ranks"}
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    rows = run(make_plan(tmp_path, n_trials=8))
    reasons = {number: row.reason for number, row in rows.items() if row.state == "failed"}
    assert reasons == {
        1: "MemoryError: CUDA out of memory",
        2: "ended by SIGKILL, as the system does where memory runs out",
        3: "val/loss is not a number",
        4: "it has logged no val/loss",
        5: "x must be even",
        6: "x must be even",
    }
    assert [rows[number].state for number in (0, 7)] == ["done", "done"]


def test_first_trial_that_is_refused_ends_the_search_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTS", '{"0": "refused"}')
    with pytest.raises(UserError, match=r"trial-000 \(x=.*was refused: x must be even\nuse 2 or 4"):
        run(make_plan(tmp_path, n_trials=20))
    assert not (tmp_path / "s").exists()


def test_poor_trials_are_ended_early(tmp_path):
    """Values are chosen so that each trial is worse than the one before it."""
    plan = make_plan(tmp_path, n_trials=5, first_samples=10, total_samples=90)

    def worse_and_worse(plan, number, values):
        return fake_trial(plan, number, {"x": 3 + number}, steps=9, pause=SLOW)

    rows = run(plan, worse_and_worse)
    assert rows[0].state == "done"
    pruned = [row for row in rows.values() if row.state == "pruned"]
    assert pruned and all(10 <= row.samples < 90 for row in pruned)
    for row in pruned:
        assert row.value == last_value(plan.trial_folder(row.number))
    assert all(row.samples == 90 for row in rows.values() if row.state == "done")


def test_two_at_a_time_share_gpus_and_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    plan = make_plan(tmp_path, n_trials=4, parallel=2, nproc_per_trial=2)
    driver = SearchDriver(plan, fake_trial, gpus=["4", "5", "6", "7"], **FAST)
    environments = [driver._environment(slot) for slot in range(2)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["4,5", "6,7"]
    assert int(environments[0]["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 4)
    driver.run()
    assert {row.state for row in list_trials(driver.study)} == {"done"}


DRIVER = """
import sys
from functools import partial
from pathlib import Path
from tests.test_sweep_driver import FAST, SLOW, SearchDriver, fake_trial, make_plan
plan = make_plan(Path(sys.argv[1]), n_trials=8, parallel=2)
SearchDriver(plan, partial(fake_trial, pause=SLOW), **FAST).run()
"""


def start_driver(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(happened, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happened(), process.communicate()


def samples_of(run: Path) -> list[int]:
    return [json.loads(line)["samples_seen"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_killed_driver_is_followed_by_one_that_ends_with_all_outcomes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAULTS", '{"1": "crash"}')
    plan = make_plan(tmp_path, n_trials=8, parallel=2)
    with start_driver(tmp_path) as driver:
        wait_for((plan.trial_folder(3) / "metrics.jsonl").exists, driver)
        driver.kill()
        driver.communicate()
    with closing(sqlite3.connect(plan.folder / "sweep.db")) as database:
        running = {number for (number,) in database.execute("SELECT number FROM trials WHERE state = 'RUNNING'")}
    assert 3 in running, "the driver was killed too late"

    driver = SearchDriver(plan, fake_trial, **FAST)
    driver.run()
    assert print_results(plan, driver.study)
    rows = list_trials(driver.study)
    assert [row.number for row in rows] == list(range(8))
    assert [row.state for row in rows] == ["done", "failed", *["done"] * 6]
    folders = [plan.trial_folder(row.number) for row in rows]
    starts = [len((folder / "starts").read_text().splitlines()) for folder in folders]
    assert starts[3] == 2, "begun by the one, continued by the other"
    assert all(starts[number] == 1 for number in set(range(8)) - running)
    for folder in folders[2:]:
        assert samples_of(folder) == [0, 10, 20, 30], "no process of the dead driver wrote beside the new one"

    out = capsys.readouterr().out
    assert "MemoryError: CUDA out of memory" in out
    assert f"best: {plan.trial_folder(best_trial(rows, 'minimize').number)}" in out and "quiltnet train x=" in out
    with (plan.folder / "trials.csv").open() as file:
        assert [line["state"] for line in csv.DictReader(file)] == [row.state for row in rows]
    for name in ("importance", "parallel_coordinates"):
        assert (plan.folder / f"{name}.png").is_file() and (plan.folder / f"{name}.html").is_file()


@pytest.mark.slow
def test_two_drivers_share_the_trials(tmp_path):
    plan = make_plan(tmp_path, n_trials=8, parallel=2)
    with start_driver(tmp_path) as first, start_driver(tmp_path) as second:
        told = [driver.communicate()[1] for driver in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], told
    rows = list_trials(SearchStudy(plan))
    assert [row.state for row in rows] == ["done"] * 8
    assert len({row.values["x"] for row in rows}) == 8, "drivers do not draw the same numbers"
    assert sum(text.count("begins") for text in told) == 8, "no trial was run twice"


def test_interrupted_search_goes_on_and_draws_what_it_would_have_drawn(tmp_path):
    straight = run(make_plan(tmp_path / "straight", n_trials=4))
    others = psutil.Process().children()  # what earlier tests left to this process, such as multiprocessing's tracker
    plan = make_plan(tmp_path / "broken", n_trials=4, parallel=2)

    def interrupted(plan, number, values):
        if number == 1:
            raise KeyboardInterrupt
        return fake_trial(plan, number, values, pause=60)

    with pytest.raises(KeyboardInterrupt):
        run(plan, interrupted)
    assert psutil.Process().children() == others, "trials were ended"
    rows = run(replace(plan, parallel=1))
    assert [row.values for row in rows.values()] == [row.values for row in straight.values()]
    assert [row.value for row in rows.values()] == [row.value for row in straight.values()]


def test_more_trials_are_added_to_a_finished_search(tmp_path):
    assert len(run(make_plan(tmp_path, n_trials=2))) == 2
    assert len(run(make_plan(tmp_path, n_trials=3))) == 3


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"space": {"x": Parameter(0.0, 20.0)}}, "search.x: 0.0 to 10.0 then, 0.0 to 20.0 now"),
        ({"space": {"y": Parameter(0.0, 10.0)}}, "search.y: None then, 0.0 to 10.0 now"),
        ({"monitor": "val/recall"}, "monitor: val/loss then, val/recall now"),
        ({"options": ("epochs=3",)}, "epochs: None then, 3 now"),
    ],
)
def test_another_search_in_the_same_place_is_refused(tmp_path, change, difference):
    SearchStudy(make_plan(tmp_path)).close()
    with pytest.raises(UserError, match=difference):
        SearchStudy(make_plan(tmp_path, **change))
    SearchStudy(make_plan(tmp_path, n_trials=9, parallel=4, options=("data.train.workers=2",)))


def test_storage_that_is_locked_by_another_program(tmp_path):
    plan = make_plan(tmp_path)
    SearchStudy(plan).close()
    with closing(sqlite3.connect(plan.folder / "sweep.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"sweep\.db cannot be used: database is locked: another program holds it"):
            SearchStudy(plan, patience_s=0.1)


def test_storage_that_is_no_database(tmp_path):
    plan = make_plan(tmp_path)
    plan.folder.mkdir()
    (plan.folder / "sweep.db").write_bytes(b"this is a text, and no database\n" * 40)
    with pytest.raises(UserError, match="file is not a database: restore it, or choose another run_name"):
        SearchStudy(plan)


@pytest.mark.parametrize("place", [{"folder": Path("/proc/quiltnet/s")}, {"storage": "sqlite:////no/such/folder/s.db"}])
def test_place_that_cannot_be_written(tmp_path, place):
    with pytest.raises(UserError, match="choose another"):
        SearchStudy(make_plan(tmp_path, **place))


def test_storage_that_is_shared_knows_which_folder_a_search_is_of(tmp_path, monkeypatch):
    """Another user's trials of the same name are neither taken over nor shown as one's own."""
    shared = f"sqlite:///{tmp_path}/all.db"
    plan = make_plan(tmp_path / "one", n_trials=1, storage=shared)
    assert len(run(plan)) == 1
    with pytest.raises(
        UserError, match=f"holds a sweep s already, of the folder {tmp_path}/one/s, and this is .*two/s"
    ):
        run(make_plan(tmp_path / "two", n_trials=1, storage=shared))
    assert not (tmp_path / "two/s").exists()
    plan.folder.parent.rename(tmp_path / "moved")
    assert len(run(make_plan(tmp_path / "moved", n_trials=2, storage=shared))) == 2


def test_a_refused_search_leaves_nothing_in_a_storage_that_is_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTS", '{"0": "refused"}')
    plan = make_plan(tmp_path, n_trials=1, storage=f"sqlite:///{tmp_path}/all.db", options=("data=wrong",))
    with pytest.raises(UserError, match="was refused"):
        run(plan)
    monkeypatch.delenv("FAULTS")
    assert run(replace(plan, options=("data=right",)))[0].state == "done"


@pytest.mark.parametrize("name", ["a b", "a?b", "a%20b", "{a}"])
def test_database_lies_in_the_folder_whatever_that_is_called(tmp_path, name):
    plan = make_plan(tmp_path / name)
    SearchStudy(plan).close()
    assert (plan.folder / "sweep.db").is_file() and len(list(tmp_path.iterdir())) == 1


def test_driver_of_a_database_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"No module named 'psycopg.*pip install 'psycopg\[binary\]'"):
        SearchStudy(make_plan(tmp_path, storage="postgresql://user@host/sweeps"))


def test_a_search_that_cannot_be_stored_leaves_no_folder(tmp_path):
    """A corrected command would find another search in its place."""
    plan = make_plan(tmp_path, storage="sqlite:////no/such/folder/s.db")
    with pytest.raises(UserError, match="choose another"):
        SearchDriver(plan)
    assert not plan.folder.exists()
