from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from quiltnet.data import stored_pairs
from quiltnet.data.decoding import BrokenSample
from quiltnet.data.held_out import ShardPairs
from quiltnet.data.pairs import image_id
from quiltnet.data.shard_files import ShardFile, resolve_shards
from quiltnet.data.stored_pairs import StoredPairs
from quiltnet.errors import UserError
from tests.data.conftest import draw_image, encode

JPEG = encode(draw_image(0))


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_packed_shards_come_back_whole(make_shards):
    train = make_shards(10, samples_per_shard=4)
    pairs = StoredPairs(resolve_shards(train))
    assert len(pairs) == 10 and pairs.missing == {}
    assert {pair.image for pair in pairs} == {encode(draw_image(n)) for n in range(10)}
    for n in range(10):
        number = int(pairs[n].captions[0].split()[-1])
        assert pairs[n].captions == [f"first of {number}", f"second of {number}"]
        assert pairs[n].image_id == image_id(f"tile{number:03d}.jpg")
        assert pairs[n].key == pairs.key(n) == f"tile{number:03d}_{pairs[n].image_id[:8]}"
    assert pairs[-1] == pairs[9]
    with pytest.raises(IndexError):
        pairs[10]


def test_foreign_shards(tmp_path):
    members = {
        "000.jpg": JPEG, "000.txt": " From txt. \n",
        "001.jpg": JPEG, "001.json": '{"caption": "From json.", "image_id": 17}', "001.txt": "not this",
        "002.png": JPEG, "002.json": '{"captions": ["One.", null, " ", 3, "Two."]}',
        "003.jpeg": JPEG, "003.json": '{"width": 3}', "003.txt": "The json has none.",
        "004.jpg": JPEG, "004.txt": b"caf\xe9",
    }  # fmt: skip
    first = write_tar(tmp_path / "a" / "00.tar", members)
    second = write_tar(tmp_path / "b" / "00.tar", {"000.jpg": JPEG, "000.txt": "x"})
    pairs = StoredPairs([ShardFile(first), ShardFile(second)])
    assert [pair.captions for pair in pairs] == [
        ["From txt."],
        ["From json."],
        ["One.", "Two."],
        ["The json has none."],
        ["caf\ufffd"],
        ["x"],
    ]
    ids = [pair.image_id for pair in pairs]
    assert ids[0] == image_id("a/00.tar/000") and len(set(ids)) == 6
    assert [pair.key for pair in pairs] == ["000", "001", "002", "003", "004", "000"]


def test_broken_samples_by_reason(tmp_path):
    members = {
        "good.jpg": JPEG, "good.txt": "x",
        "noimage.txt": "x",
        "nocaption.jpg": JPEG,
        "blank.jpg": JPEG, "blank.txt": " \n",
        "null.jpg": JPEG, "null.json": '{"captions": null}',
        "json.jpg": JPEG, "json.json": '{"captions": ["x"',
        "list.jpg": JPEG, "list.json": '["x"]',
        "bytes.jpg": JPEG, "bytes.json": b"\xff\xfe\xfd",
        "deep.jpg": JPEG, "deep.json": "[" * 200_000,
    }  # fmt: skip
    pairs = StoredPairs([ShardFile(write_tar(tmp_path / "a.tar", members))])
    reasons = {}
    for n in range(1, len(pairs)):
        with pytest.raises(BrokenSample) as caught:
            pairs[n]
        reasons[caught.value.key] = caught.value.reason
    assert reasons == {
        "noimage": "no_image",
        "nocaption": "no_caption",
        "blank": "no_caption",
        "null": "no_caption",
        "json": "unreadable_json",
        "list": "unreadable_json",
        "bytes": "unreadable_json",
        "deep": "unreadable_json",
    }


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "is an empty tar"),
        ({"README": "x"}, "is an empty tar"),
        ({"a.jpg": JPEG, "b.jpg": JPEG}, r"has no captions: .*its first sample a has jpg"),
        ({"a.jpg": JPEG, "a.json": '{"width": 3}'}, r"has no captions: .*has jpg, json"),
        ({"a.jpg": JPEG, "a.txt": ""}, "has no captions"),
        ({"a.txt": "x", "b.txt": "y"}, "has no captions"),
    ],
)
def test_doors(tmp_path, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        StoredPairs([ShardFile(path)])


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match="not a tar that can be read"):
        StoredPairs([ShardFile(tmp_path / "a.tar")])


def test_broken_json_at_the_front_does_not_hide_captions(tmp_path):
    members = {"a.jpg": JPEG, "a.json": "{", "b.jpg": JPEG, "b.txt": "x"}
    assert len(StoredPairs([ShardFile(write_tar(tmp_path / "a.tar", members))])) == 2


@pytest.mark.parametrize("kept", [0.2, 0.35, 0.5, 0.65])
def test_truncated_tar_with_a_manifest(make_shards, kept):
    train = make_shards(12, samples_per_shard=6)
    path = train / "test-000001.tar"
    os.truncate(path, int(path.stat().st_size * kept))
    pairs = StoredPairs(resolve_shards(train))
    readable = broken = 0
    for n in range(len(pairs)):
        try:
            readable += bool(pairs[n].captions)
        except BrokenSample as error:
            assert error.reason == "truncated_tar" and n == len(pairs) - 1
            broken += 1
    assert readable + broken + sum(pairs.missing.values()) == 12
    assert set(pairs.missing) <= {str(path)} and readable < 12


def test_truncated_tar_without_a_manifest(tmp_path):
    members = {f"{n}.{e}": d for n in range(4) for e, d in (("jpg", JPEG), ("txt", "x"))}
    path = write_tar(tmp_path / "a.tar", members)
    os.truncate(path, 4 * 1024)
    assert StoredPairs([ShardFile(path)]).missing == {str(path): 1}


def test_shard_pairs(make_shards):
    train = make_shards(10, samples_per_shard=4)
    pairs = ShardPairs(train)
    assert len(pairs) == 10 and len(ShardPairs(train, limit=3)) == 3 and len(ShardPairs(train, limit=99)) == 10
    seen = [(captions[0], image_id) for _, captions, image_id in pairs]
    assert sorted(seen) == sorted((f"first of {n}", image_id(f"tile{n:03d}.jpg")) for n in range(10))
    image, captions, _ = pairs[4]
    number = int(captions[0].split()[-1])
    assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - np.asarray(draw_image(number))).mean() < 10
    assert [c for _, c, _ in ShardPairs(train, limit=3)] == [c for _, c, _ in pairs][:3]


def test_shard_pairs_name_what_is_broken(tmp_path):
    members = {"good.jpg": JPEG, "good.txt": "x", "bad.jpg": JPEG[:-60], "bad.txt": "y"}
    pairs = ShardPairs(write_tar(tmp_path / "a.tar", members))
    assert pairs[0][1] == ["x"]
    with pytest.raises(UserError, match=r"held-out pair bad cannot be read \(broken_image\)"):
        pairs[1]


def test_held_out_pairs_are_all_there_or_refused(make_shards):
    folder = make_shards(10, samples_per_shard=5)
    tar = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(tar) as whole:
        cut = whole.getmembers()[4].offset  # the first two samples stay
    tar.write_bytes(tar.read_bytes()[:cut] + bytes(1024))
    with pytest.raises(UserError, match="lack samples that their manifest lists"):
        ShardPairs(folder)


def test_json_of_a_stranger_cannot_set_the_image_id(tmp_path):
    record = {"captions": ["x"], "image_id": "../../x"}
    path = write_tar(tmp_path / "set" / "a.tar", {"k.jpg": JPEG, "k.json": json.dumps(record)})
    assert StoredPairs([ShardFile(path)])[0].image_id == image_id("set/a.tar/k")


def test_a_tar_that_is_replaced_meanwhile_is_not_taken_for_the_old_one(tmp_path):
    """A loader process that opens it for the first time later on would count samples from another end."""
    path = write_tar(tmp_path / "a.tar", {f"{n}.{e}": d for n in range(5) for e, d in (("jpg", JPEG), ("txt", "old"))})
    rest = write_tar(tmp_path / "b.tar", {"b.jpg": JPEG, "b.txt": "rest"})
    pairs = StoredPairs([ShardFile(path), ShardFile(rest)])
    time.sleep(0.02)  # the clock of a file system is coarse
    write_tar(path, {"0.jpg": JPEG, "0.txt": "new"})
    StoredPairs([ShardFile(path)])  # another run, which makes the index anew
    stored_pairs._opened.cache_clear()
    for number in range(5):
        with pytest.raises(BrokenSample, match="unreadable_shard"):
            pairs[number]
    assert pairs[5].captions == ["rest"]
