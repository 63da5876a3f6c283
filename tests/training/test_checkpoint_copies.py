"""Copies are complete or not there, whatever the network does; training does not wait for them."""

from __future__ import annotations

import logging
import shutil
import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from quiltnet.errors import UserError
from quiltnet.training.checkpoint import check_checkpoint, save_checkpoint
from quiltnet.training.checkpoint_copies import CheckpointCopies, check_copies_url
from tests.training.test_checkpoint import state

PAUSE_S = 0.001


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


def copied(bucket) -> list[str]:
    return sorted(path.removeprefix("/bucket/run/") for path in bucket.find("/bucket"))


def test_a_run_is_copied_and_its_copy_is_valid(tmp_path, bucket):
    run, back = tmp_path / "run", tmp_path / "back"
    folder = save_checkpoint(run / "checkpoints", state(8))
    (run / "model/tower").mkdir(parents=True)
    (run / "model/tower/config.json").write_text("{}")
    (run / "config.yaml").write_text("seed: 1")
    copies = CheckpointCopies(run, "memory://bucket/run/")
    for path in (run / "config.yaml", run / "model", folder):
        copies.copy(path)
    assert copies.finish(30) == []
    inner = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    expected = [f"checkpoints/{folder.name}/{name}" for name in inner] + ["config.yaml", "model/tower/config.json"]
    assert copied(bucket) == expected
    bucket.get(f"/bucket/run/checkpoints/{folder.name}", str(back), recursive=True)
    assert check_checkpoint(back) is None


def test_to_a_folder(tmp_path):
    folder = save_checkpoint(tmp_path / "run", state(8))
    copies = CheckpointCopies(tmp_path / "run", f"file://{tmp_path}/there")
    copies.copy(folder)
    assert copies.finish(30) == [] and check_checkpoint(tmp_path / "there" / folder.name) is None
    copies.remove(folder)
    assert copies.finish(30) == [] and not (tmp_path / "there" / folder.name).exists()


class Failing:
    """Uploads of a network that fails at the given calls, counted from 0; names of what was tried."""

    def __init__(self, monkeypatch, fails) -> None:
        self.tried: list[str] = []
        self._fails = fails
        put_file, pipe_file = MemoryFileSystem.put_file, MemoryFileSystem.pipe_file

        def put(files, local, remote, **options):
            self._try(remote)
            return put_file(files, local, remote, **options)

        def pipe(files, remote, value, **options):
            self._try(remote)
            return pipe_file(files, remote, value, **options)

        monkeypatch.setattr(MemoryFileSystem, "put_file", put)
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe)

    def _try(self, remote: str) -> None:
        self.tried.append(remote.rpartition("/")[2])
        if self._fails(len(self.tried) - 1):
            raise ConnectionError("the network is down")


def test_a_failure_is_tried_again_and_the_manifest_comes_last(tmp_path, bucket, monkeypatch):
    network = Failing(monkeypatch, lambda call: call in {1, 4})
    copies = CheckpointCopies(tmp_path, "memory://bucket/run", pause_s=PAUSE_S)
    copies.copy(save_checkpoint(tmp_path, state(8)))
    assert copies.finish(30) == []
    files = ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert network.tried == [*files[:2], *files, *files, "manifest.json"]
    copies.copy(tmp_path / "samples-000000000008")
    assert copies.finish(30) == [] and len(network.tried) == 9, "what is there is not copied again"


def test_one_that_is_saved_anew_while_it_is_copied_is_copied_anew(tmp_path, bucket, monkeypatch):
    """Its files are as long as before; the manifest of the new ones must not come to stand beside the old."""
    folder, put_file = save_checkpoint(tmp_path, state(8)), MemoryFileSystem.put_file
    copies, replaced = CheckpointCopies(tmp_path, "memory://bucket/run", pause_s=PAUSE_S), []

    def put(files, local, remote, **options):
        put_file(files, local, remote, **options)
        if remote.endswith("state.json") and not replaced:
            replaced.append(save_checkpoint(tmp_path, state(8)))
            copies.copy(folder)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    copies.copy(folder)
    assert copies.finish(30) == [] and replaced
    bucket.get(f"/bucket/run/{folder.name}", str(tmp_path / "back"), recursive=True)
    assert check_checkpoint(tmp_path / "back") is None
    assert (tmp_path / "back/manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_closed_it_ends_with_the_file_that_is_under_way(tmp_path, bucket, monkeypatch):
    begun, go_on, put_file = threading.Event(), threading.Event(), MemoryFileSystem.put_file

    def put(files, local, remote, **options):
        begun.set()
        assert go_on.wait(60)
        put_file(files, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    copies = CheckpointCopies(tmp_path, "memory://bucket/run")
    for samples_seen in (8, 16):
        copies.copy(save_checkpoint(tmp_path, state(samples_seen)))
    assert begun.wait(60)
    threading.Timer(0.1, go_on.set).start()
    copies.close()
    assert copied(bucket) == ["samples-000000000008/model.safetensors"]
    assert "checkpoint copies" not in {thread.name for thread in threading.enumerate()}


def test_what_comes_while_its_thread_is_ending_is_copied_too(tmp_path, bucket):
    class EndsSlowly(CheckpointCopies):
        def _work(self):
            super()._work()
            time.sleep(0.3)

    copies = EndsSlowly(tmp_path, "memory://bucket/run")
    for samples_seen in (8, 16):
        copies.copy(save_checkpoint(tmp_path, state(samples_seen)))
        assert copies.finish(5) == []
        time.sleep(0.1)
    assert len(copied(bucket)) == 8


def test_what_cannot_be_copied_is_given_up_and_never_half_valid(tmp_path, bucket, monkeypatch, caplog):
    Failing(monkeypatch, lambda call: call == 2 or call > 3)
    copies = CheckpointCopies(tmp_path, "memory://bucket/run", attempts=2, pause_s=PAUSE_S)
    folders = [save_checkpoint(tmp_path, state(samples_seen)) for samples_seen in (8, 16)]
    for folder in folders:
        copies.copy(folder)
    assert copies.finish(30) == folders
    assert not any(path.endswith("manifest.json") for path in copied(bucket))
    assert caplog.text.count("the network is down") == 2 and "training goes on" in caplog.text


def test_one_of_the_same_name_is_replaced_its_manifest_first(tmp_path, bucket, monkeypatch):
    copies = CheckpointCopies(tmp_path, "memory://bucket/run", attempts=1)
    copies.copy(save_checkpoint(tmp_path, state(8)))
    assert copies.finish(30) == []
    folder = save_checkpoint(tmp_path, state(8, monitored={"metric": "m", "value": 1.0}))
    Failing(monkeypatch, lambda call: call == 1)
    copies.copy(folder)
    assert copies.finish(30) == [folder]
    assert not any(path.endswith("manifest.json") for path in copied(bucket))


def test_one_that_is_gone_before_its_turn_leaves_nothing(tmp_path, bucket, caplog):
    folder = save_checkpoint(tmp_path, state(8))
    copies = CheckpointCopies(tmp_path, "memory://bucket/run", pause_s=PAUSE_S)
    shutil.rmtree(folder)
    copies.copy(folder)
    assert copies.finish(30) == [] and copied(bucket) == [] and not caplog.records


def test_a_network_that_hangs_is_not_waited_for(tmp_path, bucket, monkeypatch):
    hanging, folder = threading.Event(), save_checkpoint(tmp_path, state(8))
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *_, **__: hanging.wait(60))
    copies = CheckpointCopies(tmp_path, "memory://bucket/run")
    copies.copy(folder)
    assert copies.finish(0.05) == [folder]
    hanging.set()


def test_places_that_do_not_exist_are_refused_early(caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(UserError, match="copy_checkpoints_to=nowhere://x: Protocol not known: nowhere"):
        check_copies_url("nowhere://x")
    check_copies_url("memory://bucket")
