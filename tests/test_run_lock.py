"""One run a directory; a restart by torchrun goes on in its own, and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from quiltnet.cli.run_lock import go_on_after_restart, own, run_lock
from quiltnet.errors import UserError
from tests.commands import environment

HOLD = """
import sys
from pathlib import Path
from quiltnet.cli import run_lock
with run_lock.run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_another_process_is_refused_until_the_first_is_dead(tmp_path):
    path = tmp_path / "outputs" / "first"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another run \(process {holder.pid} on .*\) is at work in .*first"):
            with run_lock(path, patience_s=0.1):
                pytest.fail("two runs share a directory")
        assert json.loads((path.parent / ".first.lock").read_text())["pid"] == holder.pid, "the holder's name stays"
    finally:
        holder.kill()
        holder.wait()
    with run_lock(path, patience_s=5):
        assert json.loads((path.parent / ".first.lock").read_text())["pid"] == os.getpid()


def test_a_lock_ends_with_its_run(tmp_path):
    for _ in range(2):
        with run_lock(tmp_path / "first", patience_s=0.1):
            pass
    with run_lock(tmp_path / "first"), run_lock(tmp_path / "second", patience_s=0.1):
        pass


def test_a_directory_has_one_lock_whatever_links_lead_to_it(tmp_path):
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/run")
    with run_lock(tmp_path / "disk/run"), pytest.raises(UserError, match="another run"):
        with run_lock(tmp_path / "link", patience_s=0.1):
            pytest.fail("two runs share a directory")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), run_lock(tmp_path / "file" / "run"):
        pytest.fail("there is no such place")


def after_restart(path, monkeypatch, *, count: str, job: str, **options):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    cfg = OmegaConf.create({"resume": None, "overwrite": True, **options})
    with run_lock(path):
        go_on_after_restart(cfg, path)
    return cfg.resume, cfg.overwrite


@pytest.mark.parametrize("has_saved", [True, False])
def test_a_restart_goes_on_in_the_directory_of_its_own_job(tmp_path, monkeypatch, has_saved):
    path = tmp_path / "first"
    (path / "checkpoints/samples-000000000008" if has_saved else path).mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    with run_lock(path):
        own(path)
    # An older run's directory is not gone on with, though its checkpoints are there.
    assert after_restart(path, monkeypatch, count="1", job="another") == (None, True)
    assert after_restart(path, monkeypatch, count="0", job="mine") == (None, True)
    assert path.exists()
    if has_saved:
        assert after_restart(path, monkeypatch, count="1", job="mine") == ("auto", False)
        assert path.exists()
    else:
        given = after_restart(path, monkeypatch, count="1", job="mine", resume="other/checkpoint", overwrite=False)
        assert given == ("other/checkpoint", False)
        assert not path.exists(), "begins anew, from what it was given"
