from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from quiltnet.data import remote_sources, stream_windows
from quiltnet.data.remote_shards import RemoteShard
from quiltnet.data.shard_cache import ShardCache
from quiltnet.data.stream_order import SHARD_STREAM, WINDOW_STREAM, taken_in_turn
from quiltnet.data.streaming import PairStream
from quiltnet.errors import UserError
from tests.conftest import ROOT
from tests.data.http_server import Fault, Server, keys_of, pack_samples, serve_shards, serving
from tests.data.streams import COUNTS, in_memory, keys, stream, take


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote_sources, "BLOCK_BYTES", 4000)  # several requests a shard
    with serving() as server:
        yield server


def order_by_definition(counts: list[int], *, known: bool, seed: int, unit: int, units: int, epoch: int) -> list[str]:
    """Keys of one epoch of a unit with windows of 5 and two shards at once: the whole sequence, cut and shuffled."""
    order = np.random.default_rng([SHARD_STREAM, seed, epoch]).permutation(len(counts))
    if known:
        sequence = [(shard, number) for shard in order for number in range(counts[shard])]
        begin, end = unit * len(sequence) // units, (unit + 1) * len(sequence) // units
        mine = sequence[begin:end]
    else:
        mine = [(shard, number) for shard in order[unit::units] for number in range(counts[shard])]
        begin = 0
    parts = {shard: [key for key in mine if key[0] == shard] for shard, _ in mine}
    read = []
    queues = list(parts.values())
    while queues:
        pair, queues = queues[:2], queues[2:]
        while any(pair):
            read += [queue.pop(0) for queue in pair if queue]
    keys = []
    for start in range(0, len(read), 5):
        window = read[start : start + 5]
        key = [0, begin + start] if known else [1 + unit, start]
        permutation = np.random.default_rng([WINDOW_STREAM, seed, epoch, *key]).permutation(len(window))
        keys += ["s{}-{:03d}".format(*window[place]) for place in permutation]
    return keys


@pytest.mark.parametrize("known", [True, False], ids=["counts", "no counts"])
@pytest.mark.parametrize("units", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("counts", [[13], [7, 2], COUNTS], ids=len)
def test_exactly_once_and_in_the_defined_order(counts, units, known):
    if not known and len(counts) < units:
        return
    shards = in_memory(counts, known=known)
    of_epochs: list[list[str]] = [[], []]
    for unit in range(units):
        expected = [
            order_by_definition(counts, known=known, seed=3, unit=unit, units=units, epoch=epoch) for epoch in (0, 1)
        ]
        found = keys(stream(shards, seed=3, unit=unit, units=units), len(expected[0] + expected[1]))
        assert found == expected[0] + expected[1]
        of_epochs = [before + more for before, more in zip(of_epochs, expected, strict=True)]
    assert sorted(of_epochs[0]) == sorted(of_epochs[1]) == keys_of(counts)
    assert of_epochs[0] != of_epochs[1]


def test_seeds_differ():
    shards = in_memory(COUNTS)
    orders = {tuple(keys(stream(shards, seed=seed), 22)) for seed in range(5)}
    assert len(orders) == 5 and len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("known", [True, False], ids=["counts", "no counts"])
@pytest.mark.parametrize(("unit", "units"), [(0, 1), (1, 3)])
def test_resume_at_every_slot(known, unit, units):
    started = stream(in_memory(COUNTS, known=known), unit=unit, units=units)
    straight = keys(started, 40)
    for slot in range(35):
        assert keys(started, 5, slot) == straight[slot : slot + 5]


def test_whole_shards_before_the_slot_are_not_read(server):
    shards = serve_shards(server, [10] * 6)
    unit = stream(shards, shuffle_buffer=10)
    keys(unit, 1, slot=60 + 45)  # in the last two shards of the second epoch
    assert len({path for path, _ in server.requests}) == 2


def test_taken_in_turn():
    def by_definition(lengths: tuple[int, ...]) -> list[int]:
        return [n for turn in range(9) for n, length in enumerate(lengths) if turn < length]

    for lengths in [(4,), (0, 3), (5, 1, 5), (1, 5, 0, 5), (2, 2, 2), (7, 3, 1, 8)]:
        order = by_definition(lengths)
        for count in range(len(order) + 1):
            taken, following = taken_in_turn(lengths, count)
            assert taken == [order[:count].count(n) for n in range(len(lengths))]
            assert count == len(order) or following == order[count]


def test_reads_one_window_ahead_and_no_further(monkeypatch):
    judged = []
    original = stream_windows.pair_from_members
    monkeypatch.setattr(stream_windows, "pair_from_members", lambda *a: judged.append(a[0]) or original(*a))
    started = stream(in_memory([200]), shuffle_buffer=20).start()
    for taken in range(1, 101):
        next(started)
        if taken % 10 == 0:
            expected = 20 * (1 + -(-taken // 20))
            _wait_until(lambda expected=expected: len(judged) >= expected)
            time.sleep(0.01)
            assert len(judged) == expected  # the window in hand, and the next one
    started.close()


def test_memory_of_a_window_is_freed(monkeypatch):
    monkeypatch.setattr(stream_windows, "pair_from_members", lambda key, members, place: _Counted(key))
    monkeypatch.setattr(stream_windows, "StoredPair", _Counted)
    monkeypatch.setattr("quiltnet.data.streaming.StoredPair", _Counted)
    started = stream(in_memory([200]), shuffle_buffer=20).start()
    for _ in range(1000):
        next(started)
        assert _Counted.alive <= 2 * 20 + 1
    started.close()


class _Counted:
    alive = 0

    def __init__(self, key: str) -> None:
        self.key = key
        _Counted.alive += 1

    def __del__(self) -> None:
        _Counted.alive -= 1


def test_the_thread_ends_with_the_stream(server):
    shards = serve_shards(server, COUNTS)
    for end in (PairStream.close, lambda started: None):
        started = stream(shards).start()
        next(started)
        end(started)
        del started
        gc.collect()
        _wait_until(lambda: not any(thread.name == "read ahead" for thread in threading.enumerate()))


def test_a_closed_stream_does_not_hang():
    started = stream(in_memory(COUNTS)).start()
    next(started)
    started.close()
    with pytest.raises(ValueError, match="closed"):
        list(started)


def test_reports_what_it_does(server):
    shards = serve_shards(server, COUNTS)
    server.faults["set/0.tar"] = [Fault("refuse")]
    said: list[tuple[str, str]] = []
    take(stream(shards, report=lambda *what: said.append(what)), 22)
    assert ("reading", server.url("set/3.tar")) in said
    assert any(stage.startswith("retry 1 of 3") and shard == server.url("set/0.tar") for stage, shard in said)
    assert any(stage.startswith("filling shuffle buffer ") and stage.endswith("/5") for stage, _ in said)


def test_commands_run_only_when_allowed(tmp_path):
    (tmp_path / "0.tar").write_bytes(pack_samples(0, 4))
    shards = [RemoteShard(f"pipe:cat {shlex.quote(str(tmp_path / '0.tar'))}", 4)]
    with pytest.raises(UserError, match=r"pipe:cat ….*data\.allow_pipe=true"):
        stream(shards)
    assert sorted(keys(stream(shards, allow_pipe=True), 4)) == keys_of([4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0"),
        ({"unit": 3, "units": 3}, "unit 3 of 3"),
        ({"units": 23}, "22 samples cannot serve 23 loaders.*use at most 22"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        stream(in_memory(COUNTS), **options)


def test_more_units_than_shards_without_counts():
    with pytest.raises(UserError, match=r"7 remote shards .* cannot serve 8 .* use at most 7, .*quiltnet shard"):
        stream(in_memory(COUNTS, known=False), units=8)


def test_a_cache_changes_nothing_but_the_requests(server, tmp_path):
    shards = serve_shards(server, COUNTS)
    streamed = keys(stream(shards), 44)
    server.requests.clear()
    cached = stream(shards, cache=ShardCache(tmp_path, 10**6))
    assert keys(cached, 44) == streamed
    asked = len(server.requests)
    assert keys(cached, 44) == streamed and len(server.requests) == asked


def test_pickles_and_runs_in_a_fork(server):
    unit = pickle.loads(pickle.dumps(stream(serve_shards(server, COUNTS))))
    expected = keys(unit, 22)  # in the parent first: nothing of it may be used by the child
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(keys, (unit, 22)) == expected


READER = """
import sys
from quiltnet.data.remote_shards import RemoteShard
from quiltnet.data.streaming import UnitStream
url, slot = sys.argv[1:]
shards = [RemoteShard(f"{url}{n}.tar", 40) for n in range(5)]
for streamed in UnitStream(shards, seed=0, unit=1, units=2, shuffle_buffer=7).start(int(slot)):
    print(streamed.pair.key, flush=True)
"""


def test_resume_after_kill_9(server):
    shards = serve_shards(server, [40] * 5)
    straight = keys(stream(shards, unit=1, units=2, shuffle_buffer=7, shards_at_once=4), 150)
    seen: list[str] = []
    for until in (43, 120):  # killed in each epoch; each start goes on where the one before was
        command = [sys.executable, "-c", READER, server.url("set/"), str(len(seen))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            seen += [process.stdout.readline().strip() for _ in range(until - len(seen))]
            process.send_signal(signal.SIGKILL)
    assert seen == straight[:120]
    assert keys(stream(shards, unit=1, units=2, shuffle_buffer=7, shards_at_once=4), 30, 120) == straight[120:]


def _wait_until(condition: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
