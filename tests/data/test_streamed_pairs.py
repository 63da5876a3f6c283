"""The whole loader over remote shards: the same batches as files on a disk would give, whatever stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from quiltnet.data.batches import Batch
from quiltnet.data.reading import Source, build_loader
from quiltnet.errors import UserError
from tests.conftest import ROOT
from tests.data.http_server import QUICK, Fault, serving
from tests.data.test_reading import TRANSFORM, Noise, joined, tokenize


@pytest.fixture
def server():
    with serving() as state:
        yield state


def publish(server, train: Path, name: str = "set") -> str:
    """Put a packed split on the server; returns its URL."""
    server.files[f"{name}/manifest.json"] = (train.parent / "manifest.json").read_bytes()
    for tar in train.glob("*.tar"):
        server.files[f"{name}/train/{tar.name}"] = tar.read_bytes()
    return server.url(f"{name}/train")


def batches(shards, count: int, **options) -> list[Batch]:
    defaults = {"global_batch_size": 6, "seed": 5, "workers": 0, "rank": 0, "world_size": 1, "augment": Noise()}
    stream = {"shuffle_buffer": 5, "shards_at_once": 2, "patience": QUICK, **options.pop("stream", {})}
    loader = build_loader(shards, TRANSFORM, tokenize, stream=stream, **{**defaults, **options})
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 1), (3, 0), (2, 2)])
def test_once_an_epoch_and_resumed_anywhere(make_shards, server, world_size, workers):
    url = publish(server, make_shards(36, samples_per_shard=7))
    layout = [{"rank": rank, "world_size": world_size, "workers": workers} for rank in range(world_size)]
    straight = [batches(url, 12, **place) for place in layout]
    units = world_size * max(workers, 1)
    of_unit: dict[int, list[str]] = {}
    for rank, parts in enumerate(straight):
        for number, batch in enumerate(parts):
            of_unit.setdefault(rank * max(workers, 1) + number % max(workers, 1), []).extend(batch.key)
    epoch = [key for unit, keys in of_unit.items() for key in keys[: (unit + 1) * 36 // units - unit * 36 // units]]
    assert sorted(Counter(epoch).values()) == [1] * 36
    for start in (1, 2, 5):
        for rank, place in enumerate(layout):
            resumed = batches(url, 3, start_position=start * 6, **place)
            expected = [joined([batch]) for batch in straight[rank][start : start + 3]]
            assert [joined([batch]) for batch in resumed] == expected


def test_a_batch_is_what_local_shards_would_give(make_shards, server):
    train = make_shards(20)
    local = build_loader(train, TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=0, rank=0, world_size=1)
    streamed = batches(publish(server, train), 1)[0]
    of_disk = next(iter(local))
    assert vars(streamed).keys() == vars(of_disk).keys()
    for name, value in vars(of_disk).items():
        if isinstance(value, torch.Tensor) and name != "draws":
            other = getattr(streamed, name)
            assert other.shape == value.shape and other.dtype == value.dtype
    stored = {local._pairs._pairs[n].key: local._pairs._pairs[n].image_id for n in range(20)}
    ids = [int(stored[key], 16) >> 1 for key in streamed.key]
    assert streamed.image_id.tolist() == ids and streamed.number.tolist() == [-1] * 6


def test_weighted_sources_resume_as_well(make_shards, server):
    one = publish(server, make_shards(20, name="one"), "one")
    two = publish(server, make_shards(6, name="two"), "two")
    sources = {"one": Source(one, 1), "two": Source(two, 2)}
    straight = batches(sources, 9, workers=2)
    resumed = batches(sources, 4, workers=2, start_position=5 * 6)
    assert [joined([batch]) for batch in resumed] == [joined([batch]) for batch in straight[5:]]
    loader = build_loader(
        sources, TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=0, rank=0, world_size=1,
        stream={"patience": QUICK},
    )  # fmt: skip
    counts = loader.source_counts(600)
    assert counts["one"] + counts["two"] == 600 and 150 < counts["one"] < 250


def test_a_bad_connection_loses_nothing_and_a_dead_shard_is_counted(make_shards, server):
    url = publish(server, make_shards(21))
    expected = [joined([batch]) for batch in batches(url, 6)]
    server.faults["set/train/test-000001.tar"] = [
        Fault("reset", at=3000), Fault("stall", at=5000), Fault("refuse", at=0, status=503)
    ]  # fmt: skip
    assert [joined([batch]) for batch in batches(url, 6)] == expected
    del server.files["set/train/test-000001.tar"]
    lost = [rejection for batch in batches(url, 6) for rejection in batch.rejected]
    assert {reason for _, reason in lost} == {"missing_shard"} and len(lost) >= 7


def test_doors(make_shards, server):
    train = make_shards(20)
    url = publish(server, train)
    with pytest.raises(UserError, match="go on at whole batches, not after 3 samples"):
        batches(url, 1, start_position=3)
    with pytest.raises(UserError, match=r"sources far are remote and the others are not; name local ones as file:///"):
        batches({"far": Source(url), "near": Source(train)}, 1)
    del server.files["set/manifest.json"]
    tars = [server.url(path) for path in server.files]
    with pytest.raises(UserError, match=r"no manifest counts .* data\.stream\.samples_per_epoch"):
        batches(tars, 1)
    assert len(batches(tars, 4, stream={"samples_per_epoch": 20})) == 4


READER = """
import json, sys
from itertools import islice
from tests.data.test_streamed_pairs import TRANSFORM, QUICK, Noise, build_loader, tokenize
url, workers, start = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
loader = build_loader(url, TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=workers, augment=Noise(),
                      start_position=start, stream={"shuffle_buffer": 5, "shards_at_once": 2, "patience": QUICK})
for batch in loader:
    print(json.dumps(batch.key), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "streamed"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_killed_and_resumed_inside_an_epoch(make_shards, server, workers, place):
    train = make_shards(60, samples_per_shard=9)
    shards = str(train) if place == "local" else publish(server, train)

    def read(start: int, count: int) -> list[list[str]]:
        """The keys of ``count`` batches, by a process that is then killed with all its children."""
        process = subprocess.Popen(
            [sys.executable, "-c", READER, shards, str(workers), str(start)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            return [json.loads(process.stdout.readline()) for _ in range(count)]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    unbroken = [batch.key for batch in batches(shards, 14, workers=workers)]  # an epoch is ten batches
    assert read(0, 4) + read(4 * 6, 10) == unbroken
