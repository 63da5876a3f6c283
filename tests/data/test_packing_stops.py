"""Packing that is killed, interrupted or in somebody's way, and goes on."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from quiltnet.data import shards
from quiltnet.data.decoding import find_defect
from quiltnet.data.image_files import ImageFolder
from quiltnet.data.manifest import read_manifest
from quiltnet.data.pairs import PairRow
from quiltnet.data.row_table import ListedRows
from quiltnet.data.shards import write_shards
from quiltnet.data.tables import TableSource
from quiltnet.errors import UserError
from tests.conftest import ROOT
from tests.data.conftest import draw_image, encode

COUNT = 60


@pytest.fixture
def table(tmp_path) -> Path:
    """60 rows of 40 images, some of them missing or damaged, in two splits."""
    images = tmp_path / "images"
    images.mkdir()
    lines = ["image,caption,split"]
    for number in range(COUNT):
        image = number % 40
        if image % 9:
            data = encode(draw_image(image))
            (images / f"{image}.jpg").write_bytes(data[:-50] if image % 11 == 3 else data)
        lines.append(f"{image}.jpg,Caption {number}.,{'val' if image % 5 == 0 else 'train'}")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def source_of(table: Path) -> TableSource:
    return TableSource(table, image_column="image", caption_column="caption", split_column="split")


def pack(table: Path, out: Path, **options):
    defaults = {"name": "test", "source": {}, "check_image": find_defect, "samples_per_shard": 3}
    rows = options.pop("rows", None) or source_of(table)
    return write_shards(rows, out, images=ImageFolder(table.parent / "images"), **{**defaults, **options})


def files(out: Path) -> dict[str, bytes]:
    """All but the indices, whose headers are in no order."""
    kept = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".index")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in kept}


PACKER = """
import sys, time
from pathlib import Path
from quiltnet.data import shards
from quiltnet.data.decoding import find_defect
from quiltnet.data.image_files import ImageFolder
from quiltnet.data.shards import Silent, write_shards
from quiltnet.data.tables import TableSource

def check_slowly(data):
    time.sleep(0.05)
    return find_defect(data)

class Told(Silent):
    def say(self, text):
        print(text, flush=True)

if __name__ == "__main__":
    table, out, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rows = TableSource(table, image_column="image", caption_column="caption", split_column="split")
    write_shards(rows, out, name="test", source={}, images=ImageFolder(table.parent / "images"),
                 check_image=check_slowly, samples_per_shard=3, workers=workers, progress=Told())
"""


def processes_of(script: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        if (process.info["environ"] or {}).get("PACKER_OF_TEST") == str(script):
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "points"), [(0, [0, 2]), (2, [3])])
def test_killed_at_any_point_it_goes_on(table, tmp_path, workers, points):
    script, out, partial = tmp_path / "packer.py", tmp_path / "out", tmp_path / "out.partial"
    script.write_text(PACKER)
    command = [sys.executable, str(script), str(table), str(out), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PACKER_OF_TEST": str(script)}
    rng = np.random.default_rng(workers)
    for done in points:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(partial.glob(".work/journal/*.json"))) < done or not list(partial.glob("*/*.tar*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() and not (partial / "manifest.json").exists()
        while processes_of(script):  # its processes go with it
            assert time.monotonic() < deadline
            time.sleep(0.05)
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "continuing: " in output
    assert not partial.exists()
    pack(table, tmp_path / "unbroken")
    assert files(out) == files(tmp_path / "unbroken")


def stop_after(tars: int):
    """A check_image that interrupts at the first image after so many tars of three."""
    count = 0

    def check(data):
        nonlocal count
        count += 1
        if count > 3 * tars:
            raise KeyboardInterrupt
        return find_defect(data)

    return check


def interrupt(*_):
    raise KeyboardInterrupt


def interrupted(table, out, **options):
    with pytest.raises(KeyboardInterrupt):
        pack(table, out, check_image=stop_after(4), **options)
    return out.with_name(f"{out.name}.partial")


class Told:
    def __init__(self):
        self.said = []

    def stage(self, words, total): ...

    def advance(self, count): ...

    def say(self, text):
        self.said.append(text)


def test_finished_tars_are_not_written_again(table, tmp_path):
    partial = interrupted(table, tmp_path / "out")
    done = {path: path.stat().st_mtime_ns for path in partial.rglob("*.tar")}
    assert len(done) >= 3
    told = Told()
    pack(table, tmp_path / "out", progress=told)
    assert f"continuing: {len(done)} of 14 tars are there" in told.said
    assert {tmp_path / "out" / path.relative_to(partial): time for path, time in done.items()}.items() <= {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")
    }.items()
    pack(table, tmp_path / "unbroken")
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


def test_stopped_when_all_tars_are_there(table, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "_finish", interrupt)
        pack(table, tmp_path / "out")
    told = Told()
    pack(table, tmp_path / "out", workers=2, progress=told)
    assert told.said == ["continuing: 14 of 14 tars are there"]
    pack(table, tmp_path / "unbroken")
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


def test_a_tar_that_has_gone_is_written_again(table, tmp_path):
    partial = interrupted(table, tmp_path / "out")
    first, second, *_ = sorted(partial.rglob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    (partial / "train" / "test-000099.tar").write_bytes(b"of an older plan")
    pack(table, tmp_path / "out")
    pack(table, tmp_path / "unbroken")
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


@pytest.mark.parametrize("change", ["seed", "size", "table", "filter"])
def test_another_request_starts_over(table, tmp_path, change):
    partial = interrupted(table, tmp_path / "out")
    if change == "table":
        table.write_text(table.read_text().replace("Caption 1.", "Caption x."))
    options = {"seed": {"seed": 5}, "size": {"samples_per_shard": 4}, "table": {}, "filter": {"layout": "rows"}}[change]
    told = Told()
    pack(table, tmp_path / "out", progress=told, **options)
    assert any("left by another request or an older table; starting over" in text for text in told.said)
    assert not any("continuing" in text for text in told.said)
    pack(table, tmp_path / "unbroken", **options)
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")
    assert not partial.exists()


def test_rows_that_cannot_be_recognised_leave_nothing(table, tmp_path):
    rows = ListedRows(PairRow(n, f"{n}.jpg", "x", "train", "") for n in range(40))
    partial = interrupted(table, tmp_path / "out", rows=rows)
    assert not partial.exists()


def test_a_mistake_at_the_door_leaves_nothing(table, tmp_path):
    table.write_text("image,caption,split\n1.jpg,x,a b\n")
    with pytest.raises(UserError, match="cannot name a folder"):
        pack(table, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "pairs.csv"}


def test_one_at_a_time(table, tmp_path):
    partial = interrupted(table, tmp_path / "out")
    with open(partial / ".work" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is packing into"):
            pack(table, tmp_path / "out")
    assert list(partial.rglob("*.tar"))
    pack(table, tmp_path / "out")


def test_a_folder_of_somebody_else_is_left_alone(table, tmp_path):
    mine = tmp_path / "out.partial" / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("chapter 1")
    with pytest.raises(UserError, match="is in the way, and not what packing leaves behind"):
        pack(table, tmp_path / "out")
    assert mine.read_text() == "chapter 1"


def test_a_full_disk(table, tmp_path, monkeypatch):
    written = []

    def fail_later(descriptor):
        written.append(descriptor)
        if len(written) > 8:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_later)
        with pytest.raises(UserError, match="the disk is full; make room, and the same command continues"):
            pack(table, tmp_path / "out")
    pack(table, tmp_path / "out")
    pack(table, tmp_path / "unbroken")
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(encode(draw_image(0, 1000, 1000), "PNG"))
    for number in range(1, 100):
        os.link(images / "0.png", images / f"{number}.png")
    (tmp_path / "t.csv").write_text("image_path,caption\n" + "".join(f"{n}.png,Text {n}.\n" for n in range(100)))
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [
        *(sys.executable, "-m", "quiltnet.cli.app", "shard", "--format", "csv", "--table", tmp_path / "t.csv"),
        *("--images", images, "--samples-per-shard", "5", "--workers", "2", "--out", out),
    ]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(partial.glob(".work/journal/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors and "Traceback" not in errors
    assert not out.exists()
    again = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "continuing: " in again.stderr
    totals = read_manifest(out)["totals"]
    assert (totals["samples"], totals["rejected"]) == (100, {})
    assert json.loads((out / "manifest.json").read_text())["totals"]["image_sizes"]["width"]["max"] == 1000


def test_a_target_that_is_used_meanwhile_is_left_alone(table, tmp_path):
    out = tmp_path / "out"

    def somebody_writes_there(data):
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("chapter 1")
        return find_defect(data)

    with pytest.raises(UserError, match="exists already; give another folder"):
        pack(table, out, check_image=somebody_writes_there)
    assert (out / "thesis.tex").read_text() == "chapter 1"
    out.rename(tmp_path / "thesis")
    told = Told()
    pack(table, out, progress=told)
    assert told.said == ["continuing: 14 of 14 tars are there"]


def test_overwriting_leaves_what_is_beside_the_target(table, tmp_path):
    pack(table, tmp_path / "out")
    beside = tmp_path / "out.replaced" / "mine"
    beside.parent.mkdir()
    beside.write_text("mine")
    pack(table, tmp_path / "out", seed=1, overwrite=True)
    assert read_manifest(tmp_path / "out")["seed"] == 1 and beside.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out", "out.replaced", "pairs.csv"}


def test_a_mount_point_is_no_target(table, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(UserError, match=r"out is a mount point, .*; give a folder in it"):
        pack(table, tmp_path / "out")
