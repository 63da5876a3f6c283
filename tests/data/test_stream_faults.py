from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from quiltnet.data import remote_sources
from quiltnet.data.remote_shards import RemoteShard
from quiltnet.data.shard_cache import ShardCache
from quiltnet.errors import UserError
from tests.data.http_server import HASTY, Fault, Server, keys_of, pack_samples, pack_tar, serve_shards, serving
from tests.data.streams import COUNTS, keys, rejected, stream, take


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote_sources, "BLOCK_BYTES", 4000)  # several requests a shard
    with serving() as server:
        yield server


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize(
    "fault",
    [Fault("stall", 6000), Fault("reset", 6000), Fault("refuse", 0, 3), Fault("refuse", 0, 2, 429)],
    ids=["stall", "reset", "503", "429"],
)
def test_mended_connections_change_nothing(server, fault, has_ranges):
    shards = serve_shards(server, COUNTS)
    server.has_ranges = has_ranges
    unbroken = keys(stream(shards), 44)
    server.faults.update({f"set/{n}.tar": [replace(fault)] for n in range(len(COUNTS))})
    streamed = take(stream(shards, patience=HASTY), 44)
    assert [one.pair.key for one in streamed] == unbroken and rejected(streamed) == []


@pytest.mark.parametrize(("fault", "reason"), [(None, "missing_shard"), (Fault("refuse", 0, 999), "unreachable_shard")])
def test_a_lost_shard_is_counted_and_moves_nothing(server, fault, reason, caplog):
    shards = serve_shards(server, COUNTS)
    unbroken = keys(stream(shards), 22)
    if fault is None:
        del server.files["set/4.tar"]
    else:
        server.faults["set/4.tar"] = [fault]
    streamed = take(stream(shards), 22)
    assert rejected(streamed) == [(server.url("set/4.tar"), reason)] * 5
    for one, key in zip(streamed, unbroken, strict=True):
        assert bool(one.rejected) == key.startswith("s4-")
        assert one.rejected or one.pair.key == key
        assert not one.pair.key.startswith("s4-")
    assert caplog.text.count(reason) == 1  # said once, with the URL
    for slot in range(22):
        assert take(stream(shards), 3, slot)[: 22 - slot] == streamed[slot : slot + 3]


@pytest.mark.parametrize("known", [True, False], ids=["counts", "no counts"])
@pytest.mark.parametrize("cut", ["tar", "connection"])
def test_a_shard_that_breaks_off(server, known, cut):
    shards = serve_shards(server, COUNTS, known=known)
    inside = 3 * 2560 + 1000  # of the image of the fourth of six samples
    if cut == "tar":
        server.files["set/2.tar"] = server.files["set/2.tar"][:inside]
    else:
        server.has_ranges = False
        server.faults["set/2.tar"] = [Fault("stall", inside, 999)]
    count = 22 if known else 21  # three samples and one broken slot are left of six
    streamed = take(stream(shards, patience=HASTY), 22)[:count]
    name = "s2-003" if cut == "tar" else server.url("set/2.tar")
    reason = "truncated_tar" if cut == "tar" else "unreachable_shard"
    found = sorted(rejected(streamed))
    if known:
        assert found == sorted([(name, reason)] + [(server.url("set/2.tar"), reason)] * 2)
    else:
        assert set(found) <= {(name, reason), (server.url("set/2.tar"), reason)} and found
    assert {one.pair.key for one in streamed} >= {"s2-000", "s2-001"}
    assert not {"s2-003", "s2-004", "s2-005"} & {one.pair.key for one in streamed}


def test_fewer_and_more_samples_than_promised(server, caplog):
    shards = serve_shards(server, COUNTS)
    shards[2], shards[4] = replace(shards[2], samples=8), replace(shards[4], samples=3)
    streamed = take(stream(shards), 22)
    assert rejected(streamed) == [(server.url("set/2.tar"), "missing_sample")] * 2
    assert sum(one.pair.key.startswith("s4-") for one in streamed if not one.rejected) == 3
    assert "set/4.tar holds more samples than the 3 that are promised" in caplog.text


def test_broken_samples_have_stand_ins(server):
    shards = serve_shards(server, COUNTS)
    unbroken = keys(stream(shards), 44)
    server.files["set/2.tar"] = pack_samples(2, 6, bad={0: b"{", 3: b'{"caption": null}'})
    streamed = take(stream(shards), 44)
    assert sorted(rejected(streamed)) == [("s2-000", "unreadable_json")] * 2 + [("s2-003", "no_caption")] * 2
    for one, key in zip(streamed, unbroken, strict=True):
        assert (one.pair.key != key) == (key in ("s2-000", "s2-003")) == bool(one.rejected)
    for slot in range(40):  # a stand-in is a function of its slot
        assert take(stream(shards), 4, slot) == streamed[slot : slot + 4]


def test_a_window_that_is_lost_whole_is_filled_from_the_next(server):
    shards = serve_shards(server, COUNTS)
    for shard in (2, 4, 6):
        del server.files[f"set/{shard}.tar"]
    unit = stream(shards, shuffle_buffer=2, shards_at_once=1)
    streamed = take(unit, 44)
    assert len(rejected(streamed)) == 2 * (6 + 5 + 4)
    assert {one.pair.key[:2] for one in streamed} <= {"s0", "s1", "s3", "s5"}
    for slot in range(0, 40, 3):
        assert take(unit, 4, slot) == streamed[slot : slot + 4]


@pytest.mark.parametrize("known", [True, False], ids=["counts", "no counts"])
def test_nothing_can_be_read(server, known):
    shards = [RemoteShard(server.url(f"set/{n}.tar?sig=abc"), 3 if known else None) for n in range(30)]
    with pytest.raises(UserError, match=r"16 shards in a row .* http://.*/set/\d+\.tar: missing_shard") as caught:
        take(stream(shards), 1)
    assert "abc" not in str(caught.value)


def test_shards_without_captions_or_samples(server):
    server.files["a.tar"] = pack_tar([(f"{n}.jpg", b"\xff\xd8\xff") for n in range(3)])
    with pytest.raises(UserError, match=r"not one usable sample.*a\.tar: no_caption"):
        take(stream([RemoteShard(server.url("a.tar"))]), 1)
    server.files["a.tar"] = pack_tar([])
    for known in (0, None):
        with pytest.raises(UserError, match=r"all empty|cannot serve"):
            take(stream([RemoteShard(server.url("a.tar"), known)]), 1)


def test_gzip_and_webpages(server):
    server.files["a.tar"] = gzip.compress(pack_samples(0, 4))
    server.files["b.tar"] = b"<html>log in first</html>" * 100
    streamed = take(stream([RemoteShard(server.url("a.tar"), 4), RemoteShard(server.url("b.tar"), 2)]), 6)
    assert {one.pair.key for one in streamed} == set(keys_of([4]))
    assert rejected(streamed) == [(server.url("b.tar"), "not_a_tar")] * 2


def test_substitutes_come_from_the_window(server):
    shards = serve_shards(server, [100])
    started = stream(shards, shuffle_buffer=50).start()
    first = {next(started).pair.key for _ in range(30)}
    drawn = [started.substitute(np.random.default_rng(n)).key for n in range(200)]
    assert drawn == [started.substitute(np.random.default_rng(n)).key for n in range(200)]
    window = first | {next(started).pair.key for _ in range(20)}
    assert set(drawn) <= window and len(set(drawn)) > 40
    started.close()
    # a window of less than 16 is helped out by those behind it
    small = stream(shards, shuffle_buffer=3).start()
    next(small)
    assert len({small.substitute(np.random.default_rng(n)).key for n in range(300)}) == 18
    small.close()


def test_a_damaged_copy_is_fetched_again(server, tmp_path):
    shards = serve_shards(server, [9])
    cached = stream(shards, cache=ShardCache(tmp_path, 10**6))
    assert sorted(keys(cached, 9)) == keys_of([9])
    (copy,) = tmp_path.glob("*.tar")
    copy.write_bytes(bytes(copy.stat().st_size - 10_000) + copy.read_bytes()[-10_000:])  # as long as it was
    with pytest.raises(UserError, match="not one usable sample"):
        take(cached, 9)
    assert sorted(keys(cached, 9)) == keys_of([9])
