from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quiltnet.data import shard_cache
from quiltnet.data.remote_files import RemoteFile, Unreachable
from quiltnet.data.remote_shards import RemoteShard
from quiltnet.data.remote_sources import Patience
from quiltnet.data.shard_cache import ShardCache
from quiltnet.errors import UserError
from tests.data.http_server import HASTY, QUICK, Fault, Server, serving

DATA = {name: random.Random(name).randbytes(1000) for name in "abcdef"}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.files.update({f"set/{name}.tar": data for name, data in DATA.items()})
        yield server


def shard_of(server: Server, name: str, *, known: bool = True) -> RemoteShard:
    url, data = server.url(f"set/{name}.tar"), DATA[name]
    return RemoteShard(url, 1, hashlib.sha256(data).hexdigest(), len(data)) if known else RemoteShard(url)


def connect(shard: RemoteShard, patience: Patience = QUICK) -> Callable[[], RemoteFile]:
    return lambda: RemoteFile(shard.url, patience)


def read(cache: ShardCache, shard: RemoteShard, patience: Patience = QUICK) -> bytes | None:
    file = cache.open(shard, connect(shard, patience))
    if file is None:
        return None
    with file:
        return file.read()


def names(folder: Path) -> str:
    """The letters of the shards in a cache."""
    return "".join(sorted(path.stem[-1] for path in folder.glob("*.tar")))


def age(folder: Path, letters: str) -> None:
    """Make the shards look as if they had been opened in this order, an hour ago."""
    for place, letter in enumerate(letters):
        (path,) = folder.glob(f"*-{letter}.tar")
        os.utime(path, (time.time() - 3600 + place,) * 2)


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no manifest"])
def test_fetched_once(server, tmp_path, known):
    shard = shard_of(server, "a", known=known)
    for _ in range(3):
        assert read(ShardCache(tmp_path / "new" / "folder", 5000), shard) == DATA["a"]
    assert len(server.requests) == 1
    assert not list((tmp_path / "new" / "folder").glob("*.part"))


def test_shards_of_one_name_are_kept_apart(server, tmp_path):
    cache = ShardCache(tmp_path, 5000)
    server.files["val/a.tar"] = b"another"
    assert read(cache, shard_of(server, "a")) == DATA["a"]
    assert read(cache, RemoteShard(server.url("val/a.tar"))) == b"another"
    assert read(cache, RemoteShard(server.url("val/a.tar?version=2"))) == b"another"
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_least_recently_opened_go_first(server, tmp_path):
    cache = ShardCache(tmp_path, 3500)
    for name in "abc":
        read(cache, shard_of(server, name))
    age(tmp_path, "bac")
    read(cache, shard_of(server, "d"))
    assert names(tmp_path) == "acd"
    read(cache, shard_of(server, "a"))  # so c is the oldest now
    read(cache, shard_of(server, "e"))
    assert names(tmp_path) == "ade"


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no manifest"])
def test_the_limit_holds(server, tmp_path, known):
    cache = ShardCache(tmp_path, 2500)
    for name in "abcdefab":
        assert read(cache, shard_of(server, name, known=known)) == DATA[name]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2500
    assert len(names(tmp_path)) == 2


def test_what_is_being_read_is_never_removed(server, tmp_path):
    cache = ShardCache(tmp_path, 2500)
    file = cache.open(shard_of(server, "a"), connect(shard_of(server, "a")))
    age(tmp_path, "a")
    for name in "bcd":
        read(cache, shard_of(server, name))
    assert "a" in names(tmp_path) and file.read() == DATA["a"]
    file.close()
    age(tmp_path, "a")
    read(cache, shard_of(server, "e"))
    assert "a" not in names(tmp_path)


def test_files_of_others_are_never_touched(server, tmp_path):
    others = ["notes.txt", "000.tar", "thesis.part", "0123456789abcdef.tar", "a-1000-b.tar"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(2000))
        os.utime(tmp_path / name, (0, 0))
    cache = ShardCache(tmp_path, 1500)
    for name in "abc":
        assert read(cache, shard_of(server, name)) == DATA[name]
    assert all((tmp_path / name).exists() for name in others)


@pytest.mark.parametrize("damage", [lambda data: data[:500], lambda data: data + b"x", lambda data: b""])
def test_a_copy_of_another_size_is_fetched_again(server, tmp_path, damage):
    cache, shard = ShardCache(tmp_path, 5000), shard_of(server, "a", known=False)
    read(cache, shard)
    (path,) = tmp_path.glob("*.tar")
    path.write_bytes(damage(DATA["a"]))
    assert read(cache, shard) == DATA["a"] and len(server.requests) == 2


def test_bytes_that_the_manifest_does_not_describe(server, tmp_path):
    cache, shard = ShardCache(tmp_path, 5000), shard_of(server, "a")
    server.files["set/a.tar"] = DATA["b"]  # as long, and another
    with pytest.raises(Unreachable) as caught:
        read(cache, shard)
    assert caught.value.reason == "changed_shard" and len(server.requests) == 2
    assert names(tmp_path) == "" and not list(tmp_path.glob("*.part"))


def test_a_shard_set_that_was_packed_again_is_fetched_again(server, tmp_path):
    cache = ShardCache(tmp_path, 5000)
    read(cache, shard_of(server, "a"))
    server.files["set/a.tar"] = DATA["b"]
    again = replace(shard_of(server, "a"), sha256=hashlib.sha256(DATA["b"]).hexdigest())
    assert read(cache, again) == DATA["b"]


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no manifest"])
def test_a_shard_larger_than_the_cache_is_streamed(server, tmp_path, known, caplog):
    cache = ShardCache(tmp_path, 999)
    for name in "ab":
        assert read(cache, shard_of(server, name, known=known)) is None
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.part"))
    assert caplog.text.count("larger than the cache of 999 bytes; such shards are streamed") == 1


def test_a_full_disk_is_no_end(server, tmp_path, monkeypatch, caplog):
    class Full(io.FileIO):
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_cache, "open", lambda path, mode: Full(path, mode), raising=False)
    assert read(ShardCache(tmp_path, 5000), shard_of(server, "a")) is None
    assert "No space left on device" in caplog.text and not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    assert read(ShardCache(tmp_path, 5000), shard_of(server, "a")) == DATA["a"]


def test_failures_of_the_network_are_passed_on(server, tmp_path):
    server.faults["set/a.tar"] = [Fault("reset", 500, 99)]
    with pytest.raises(Unreachable):
        read(ShardCache(tmp_path, 5000), shard_of(server, "a"))
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.part"))


def test_several_processes_fetch_a_shard_once(server, tmp_path):
    shards = [shard_of(server, name) for name in "abc"]
    server.faults = {f"set/{name}.tar": [Fault("stall", 500)] for name in "abc"}
    slow = replace(HASTY, timeout_s=0.7)  # that long, each takes to be fetched
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(read, [(ShardCache(tmp_path, 5000), shard, slow) for shard in shards for _ in range(4)], 1)
    assert found == [DATA[name] for name in "abc" for _ in range(4)]
    assert sum(first == 0 for _, first in server.requests) == 3


def test_processes_that_remove_what_others_read(server, tmp_path):
    """Room for one shard and four processes: each still gets every shard whole."""
    jobs = [(ShardCache(tmp_path, 1500), shard_of(server, name)) for name in "abcdef" * 5]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(read, jobs, 1)
    assert found == [DATA[name] for name in "abcdef" * 5]


def test_waiting_for_another_process_ends(server, tmp_path):
    server.faults["set/a.tar"] = [Fault("stall", 500, 9)]
    shard = shard_of(server, "a")
    context = multiprocessing.get_context("fork")
    other = context.Process(target=read, args=(ShardCache(tmp_path, 5000), shard))
    other.start()
    _wait_until(lambda: list(tmp_path.glob("*.part")))
    assert read(ShardCache(tmp_path, 5000, wait_s=0.1), shard) is None  # streamed
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    server.faults.clear()
    assert read(ShardCache(tmp_path, 5000), shard) == DATA["a"]  # the lock went with the process
    (part,) = tmp_path.glob("*.part")
    os.utime(part, (time.time() - 3600,) * 2)
    read(ShardCache(tmp_path, 5000), shard_of(server, "b"))
    assert not part.exists()


@pytest.mark.parametrize(
    ("folder", "limit", "message"), [("new", 0, "holds nothing"), ("file", 1, "cannot be a cache")]
)
def test_bad_arguments(tmp_path, folder, limit, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        ShardCache(tmp_path / folder, limit)


def _wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
