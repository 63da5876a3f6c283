from __future__ import annotations

import multiprocessing
import random
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from quiltnet.data import remote_sources
from quiltnet.data.remote_files import RemoteFile, Stopped, Unreachable, read_whole
from quiltnet.data.remote_sources import without_secrets
from quiltnet.errors import UserError
from tests.data.http_server import HASTY, QUICK, Fault, Server, serving

DATA = random.Random(0).randbytes(10_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote_sources, "BLOCK_BYTES", 4000)
    with serving() as server:
        server.files["a.tar"] = DATA
        yield server


def read(url: str, **options: object) -> bytes:
    with RemoteFile(url, options.pop("patience", QUICK), **options) as file:
        return file.readall()


@pytest.mark.parametrize("has_ranges", [True, False])
def test_whole_file(server, has_ranges):
    server.has_ranges = has_ranges
    assert read(server.url("a.tar")) == DATA
    assert [first for _, first in server.requests] == ([0, 4000, 8000] if has_ranges else [0])


@pytest.mark.parametrize("size", [0, 1, 3999, 4000, 8000])
def test_sizes_around_a_block(server, size):
    server.files["a.tar"] = DATA[:size]
    assert read(server.url("a.tar")) == DATA[:size]


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        [Fault("stall", 0)],
        [Fault("stall", 5500)],
        [Fault("reset", 5500)],
        [Fault("reset", 9999)],
        [Fault("refuse", times=3)],
        [Fault("refuse", status=429), Fault("reset", 100), Fault("stall", 9000)],
    ],
)
def test_bad_connections_are_mended(server, has_ranges, faults):
    server.has_ranges = has_ranges
    server.faults["a.tar"] = [replace(fault) for fault in faults]
    said = []
    found = read(server.url("a.tar"), patience=HASTY, report=lambda stage, place: said.append((stage, place)))
    assert found == DATA
    assert said and all(stage.startswith("retry") and place == server.url("a.tar") for stage, place in said)


def test_goes_on_at_the_byte_where_it_was_left(server):
    server.faults["a.tar"] = [Fault("reset", 5500)]
    assert read(server.url("a.tar")) == DATA
    firsts = [first for _, first in server.requests]
    assert firsts[:2] == [0, 4000] and 4000 <= firsts[2] <= 5500  # a reset may overtake bytes that were sent


@pytest.mark.parametrize("fault", [Fault("stall", 2000, 99), Fault("reset", 2000, 99), Fault("refuse", 0, 99)])
def test_patience_ends(server, fault):
    server.has_ranges = False
    server.faults["a.tar"] = [fault]
    begin = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        read(server.url("a.tar"), patience=replace(HASTY, retries=2))
    assert caught.value.reason == "unreachable_shard" and server.url("a.tar") in str(caught.value)
    assert len(server.requests) == 3 and time.monotonic() - begin < 20


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (403, 1), (410, 1), (429, 4), (500, 4), (503, 4)])
def test_only_what_may_pass_is_asked_again(server, status, tries):
    server.faults["a.tar"] = [Fault("refuse", 0, 99, status)]
    with pytest.raises(Unreachable, match=str(status)):
        read(server.url("a.tar"))
    assert len(server.requests) == tries


def test_a_missing_file_is_said_at_once(server):
    with pytest.raises(Unreachable) as caught:
        read(server.url("b.tar"))
    assert caught.value.reason == "missing_shard" and len(server.requests) == 1
    assert read_whole(server.url("b.tar"), QUICK) is None
    assert read_whole(server.url("a.tar"), QUICK) == DATA


def test_nobody_listens():
    with serving() as server:
        url = server.url("a.tar")
    with pytest.raises(Unreachable) as caught:
        read(url)
    assert caught.value.reason == "unreachable_shard"


def test_a_server_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        begin = time.monotonic()
        with pytest.raises(Unreachable, match=r"not a byte in 0\.3 s"):
            read(f"http://127.0.0.1:{deaf.getsockname()[1]}/a.tar", patience=replace(HASTY, retries=1))
        assert time.monotonic() - begin < 20


def test_a_file_that_is_replaced_meanwhile_is_given_up(server):
    with RemoteFile(server.url("a.tar"), QUICK) as file:
        assert file.read(4000) == DATA[:4000]
        server.files["a.tar"] = DATA + b"more"
        with pytest.raises(Unreachable, match="had 10000 bytes when it was begun, and has 10004 now"):
            file.readall()


def test_stop_ends_the_waiting(server):
    server.faults["a.tar"] = [Fault("refuse", 0, 99)]
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(Stopped):
        read(server.url("a.tar"), patience=replace(QUICK, first_delay_s=60.0), stop=stop)
    assert time.monotonic() - begin < 20


def test_stores_are_read_by_ranges(tmp_path):
    fsspec.filesystem("memory").pipe("/rf/a.tar", DATA)
    (tmp_path / "a.tar").write_bytes(DATA)
    assert read("memory://rf/a.tar") == read(f"file://{tmp_path}/a.tar") == DATA
    for url in ("memory://rf/none.tar", f"file://{tmp_path}/none.tar"):
        with pytest.raises(Unreachable) as caught:
            read(url)
        assert caught.value.reason == "missing_shard"


def test_ranges_are_asked_for_by_name(monkeypatch):
    """In s3fs, the version of a file stands where others have the first byte."""
    fsspec.filesystem("memory").pipe("/rf/a.tar", DATA)
    original = MemoryFileSystem.cat_file

    def cat_file(self, path, version_id=None, start=None, end=None):
        assert version_id is None
        return original(self, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert read("memory://rf/a.tar") == DATA


def test_commands_run_only_when_allowed(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    url = f"pipe:touch {tmp_path}/ran; cat {shlex.quote(str(tmp_path / 'a.tar'))}"
    with pytest.raises(UserError, match=r"pipe:touch ….*data\.allow_pipe=true"):
        read(url)
    assert not (tmp_path / "ran").exists()
    assert read(url, allow_pipe=True) == DATA


@pytest.mark.parametrize("command", ["false", "head -c 100 /dev/zero; exit 7", "sleep 30"])
def test_commands_that_fail(command):
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=r"status|nothing") as caught:
        read(f"pipe:{command}", allow_pipe=True, patience=replace(HASTY, retries=1))
    assert caught.value.reason == "unreachable_shard" and time.monotonic() - begin < 20


def test_a_command_that_fails_once(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    name = shlex.quote(str(tmp_path))
    command = (
        f"if [ -e {name}/once ]; then cat {name}/a.tar; else touch {name}/once; head -c 300 {name}/a.tar; false; fi"
    )
    assert read(f"pipe:{command}", allow_pipe=True) == DATA


def test_protocols_that_cannot_be_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/a\.tar: .*pip install quiltnet\[s3\]"):
        RemoteFile("s3://bucket/a.tar", QUICK)
    with pytest.raises(UserError, match="nonsense:// cannot be read"):
        RemoteFile("nonsense://bucket/a.tar", QUICK)
    with pytest.raises(UserError, match="chained"):
        RemoteFile("simplecache::https://host/a.tar", QUICK)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:word@host/a.tar?sig=abc#x", "https://host/a.tar"),
        ("503, url='http://me:word@host:80/a.tar?sig=abc'", "503, url='http://host:80/a.tar'"),
        ("hf://datasets/org/name@main/a.tar", "hf://datasets/org/name@main/a.tar"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://host/a.tar", "pipe:curl …"),
        ("no URL at all?", "no URL at all?"),
    ],
)
def test_secrets_are_not_shown(text, shown):
    assert without_secrets(text) == shown


def test_errors_hide_secrets(server):
    server.faults["a.tar"] = [Fault("refuse", 0, 99, 403)]
    with pytest.raises(Unreachable) as caught:
        read(server.url("a.tar?sig=abc").replace("http://", "http://me:word@"))
    assert not any(secret in str(caught.value) for secret in ("word", "abc", "me:"))


def test_forked_processes_read_too(server):
    """fsspec's event loop does not survive a fork: a loader's workers must get one of their own."""
    assert read(server.url("a.tar")) == DATA
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read, [server.url("a.tar")] * 4) == [DATA] * 4
