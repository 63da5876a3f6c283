from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from quiltnet.data.decoding import find_defect
from quiltnet.data.pairs import PairRow, caption_id, group_by_image, image_id
from quiltnet.data.shards import folder_reader, read_manifest, write_shards
from quiltnet.errors import UserError
from tests.data.conftest import draw_image, encode


def pack(rows: list[PairRow], out: Path, images: Path, **options: object) -> dict:
    defaults = {"name": "test", "source": {"from": "a test"}, "check_image": find_defect}
    return write_shards(group_by_image(rows), out, read_image=folder_reader(images), **{**defaults, **options})


def contents(out: Path) -> dict[str, bytes]:
    """Bytes by member name of all tars, as the standard library reads them."""
    members = {}
    for path in sorted(out.rglob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {f"{path.parent.name}/{m.name}": tar.extractfile(m).read() for m in tar}
    return members


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(encode(draw_image(0)))
    (folder / "deep" / "b.jpg").write_bytes(encode(draw_image(1), "PNG"))  # a png by its bytes, whatever its name
    (folder / "c.tif").write_bytes(encode(draw_image(2), "TIFF"))
    return folder


def test_sample_holds_the_image_and_all_it_is_known_by(images, tmp_path):
    rows = [
        PairRow(0, "a.jpg", " A gland. ", "train", "case 1", {"stain": "H&E", "roi": ["x"], "n": None}),
        PairRow(1, "a.jpg", "a  GLAND.", "train", "case 1", {"stain": "H&E", "roi": ["y"], "n": None}),
        PairRow(2, "a.jpg", "Tumour.", "train", "case 1", {"stain": "H&E", "roi": ["z"], "n": None}),
    ]
    manifest = pack(rows, tmp_path / "out", images)
    key = f"train/a_{image_id('a.jpg')[:8]}"
    members = contents(tmp_path / "out")
    assert set(members) == {f"{key}.jpg", f"{key}.json"}
    assert members[f"{key}.jpg"] == (images / "a.jpg").read_bytes()
    assert json.loads(members[f"{key}.json"]) == {
        "captions": ["A gland.", "Tumour."],
        "caption_ids": [caption_id("A gland."), caption_id("Tumour.")],
        "image_id": image_id("a.jpg"),
        "source_id": "case 1",
        "image_path": "a.jpg",
        "metadata": {"stain": "H&E", "n": None},
        "caption_metadata": {"roi": [["x"], ["z"]]},
    }
    assert manifest["totals"] == {
        "rows": 3,
        "samples": 1,
        "captions": 2,
        "duplicate_captions": 1,
        "images": 1,
        "rejected": {},
        "in_several_splits": {"images": 0, "sources": 0},
    }


def test_extension_comes_from_the_bytes(images, tmp_path):
    rows = [PairRow(n, path, "x", "train", "") for n, path in enumerate(["a.jpg", "deep/b.jpg", "c.tif"])]
    pack(rows, tmp_path / "out", images)
    extensions = {name.split("_")[0]: name.split(".")[1] for name in contents(tmp_path / "out") if ".json" not in name}
    assert extensions == {"train/a": "jpg", "train/deep-b": "png", "train/c": "tif"}


def test_manifest_describes_the_files(images, tmp_path):
    rows = [
        PairRow(0, "a.jpg", "one", "train", "s1"),
        PairRow(1, "deep/b.jpg", "two", "train", "s2"),
        PairRow(2, "c.tif", "three", "train", "s2"),
        PairRow(3, "a.jpg", "four", "val", "s1"),
    ]
    manifest = pack(rows, tmp_path / "out", images, samples_per_shard=2, seed=3)
    assert read_manifest(tmp_path / "out") == manifest
    assert (manifest["schema_version"], manifest["seed"], manifest["source"]) == (1, 3, {"from": "a test"})
    assert [(s, e["samples"], e["captions"]) for s, e in manifest["splits"].items()] == [
        ("train", 3, 3),
        ("val", 1, 1),
    ]
    shards = [shard for entry in manifest["splits"].values() for shard in entry["shards"]]
    assert [(s["path"], s["samples"]) for s in shards] == [
        ("train/test-000000.tar", 2),
        ("train/test-000001.tar", 1),
        ("val/test-000000.tar", 1),
    ]
    for shard in shards:
        data = (tmp_path / "out" / shard["path"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["totals"]["in_several_splits"] == {"images": 1, "sources": 1}
    assert (manifest["totals"]["samples"], manifest["totals"]["images"]) == (4, 3)
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""


def test_same_input_gives_the_same_bytes(images, tmp_path):
    rows = [PairRow(n, path, "x", "train", "") for n, path in enumerate(["a.jpg", "deep/b.jpg", "c.tif"])]
    first = pack(rows, tmp_path / "one", images)
    time.sleep(1.1)  # a tar notes times to the second
    assert pack(rows, tmp_path / "two", images) == first
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_order_is_mixed_by_the_seed(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    data = encode(draw_image(0))
    for number in range(60):
        (images / f"{number:02d}.jpg").write_bytes(data)
    # 30 rows of one source, then 30 of another, as a table has them
    rows = [PairRow(n, f"{n:02d}.jpg", "x", "train", f"source{n // 30}") for n in range(60)]
    orders = {}
    for seed in (0, 1):
        pack(rows, tmp_path / str(seed), images, seed=seed)
        orders[seed] = [
            json.loads(data)["source_id"] for name, data in contents(tmp_path / str(seed)).items() if "json" in name
        ]
    assert orders[0] != orders[1]
    for order in orders.values():
        assert 8 <= sum(source == "source0" for source in order[:30]) <= 22


def test_every_row_is_accounted_for(images, tmp_path):
    (images / "text.jpg").write_text("this is no image")
    (images / "empty.jpg").write_bytes(b"")
    (images / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:-40])
    (images / "portable.ppm").write_bytes(encode(draw_image(0), "PPM"))
    rows = [
        PairRow(0, "a.jpg", "good", "train", ""),
        PairRow(1, "a.jpg", "GOOD", "train", ""),
        PairRow(2, "a.jpg", None, "train", ""),
        PairRow(3, "a.jpg", " \n", "train", ""),
        PairRow(4, "c.tif", None, "train", ""),
        PairRow(5, "gone.jpg", "x", "train", ""),
        PairRow(6, "gone.jpg", "y", "train", ""),
        PairRow(7, "a.jpg/below", "x", "train", ""),
        PairRow(8, "deep", "x", "train", ""),
        PairRow(9, None, "x", "train", ""),
        PairRow(10, "text.jpg", "x", "train", ""),
        PairRow(11, "empty.jpg", "x", "train", ""),
        PairRow(12, "cut.jpg", "x", "train", ""),
        PairRow(13, "portable.ppm", "x", "train", ""),
        PairRow(14, "../images/a.jpg", "x", "train", ""),
        PairRow(15, str(images / "a.jpg"), "x", "train", ""),
        PairRow(16, "a\0.jpg", "x", "train", ""),
    ]
    totals = pack(rows, tmp_path / "out", images)["totals"]
    assert totals["rejected"] == {
        "missing_image": 5,
        "null_caption": 3,
        "unreadable_image": 4,
        "unsafe_path": 3,
    }
    assert totals["rows"] == 17 == totals["captions"] + totals["duplicate_captions"] + sum(totals["rejected"].values())
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["row"]: line["reason"] for line in lines}
    assert [number for number in range(17) if number not in reasons] == [0, 1]
    assert reasons[2] == "null_caption" and reasons[6] == "missing_image" and reasons[14] == "unsafe_path"
    details = {line["row"]: line["detail"] for line in lines}
    assert [details[n] for n in (10, 11, 12)] == ["not_an_image", "empty_image", "broken_image"]


def test_nothing_left_is_an_error_and_leaves_nothing(images, tmp_path):
    with pytest.raises(UserError, match=r"no pair is left.*'missing_image': 1"):
        pack([PairRow(0, "gone.jpg", "x", "train", "")], tmp_path / "out", images)
    with pytest.raises(UserError, match="no row to pack"):
        pack([], tmp_path / "out", images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize("split", ["../train", "a/b", "", ".hidden", "tr ain"])
def test_a_split_must_name_a_folder(images, tmp_path, split):
    with pytest.raises(UserError, match="cannot name a folder"):
        pack([PairRow(0, "a.jpg", "x", split, "")], tmp_path / "out", images)


def test_target_in_use(images, tmp_path):
    rows = [PairRow(0, "a.jpg", "x", "train", "")]
    out = tmp_path / "out"
    out.mkdir()
    pack(rows, out, images)  # an empty folder is free
    with pytest.raises(UserError, match="exists already"):
        pack(rows, out, images)
    pack([PairRow(0, "c.tif", "x", "val", "")], out, images, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "rejected.jsonl", "val"]
    with pytest.raises(UserError, match="not a shard set"):
        pack(rows, images, images, overwrite=True)
    assert (images / "a.jpg").exists()
    with pytest.raises(UserError, match="cannot be written"):
        pack(rows, images / "a.jpg" / "out", images)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out"}


def test_a_failed_overwrite_keeps_what_was_there(images, tmp_path):
    out = tmp_path / "out"
    before = pack([PairRow(0, "a.jpg", "x", "train", "")], out, images)
    with pytest.raises(UserError, match="no pair is left"):
        pack([PairRow(0, "gone.jpg", "x", "train", "")], out, images, overwrite=True)
    assert read_manifest(out) == before


def test_folder_of_images_must_exist(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        folder_reader(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}'])
def test_manifest_of_somebody_else(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(tmp_path)


def test_manifest_of_a_newer_version(tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema_version": 99, "splits": {}, "totals": {}}')
    with pytest.raises(UserError, match="schema_version 99"):
        read_manifest(tmp_path)


SLOW_PACKER = """
import sys, time
from pathlib import Path
from quiltnet.data.pairs import PairRow, group_by_image
from quiltnet.data.shards import write_shards
out, image = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
def read_image(path):
    time.sleep(0.01)
    return image
rows = [PairRow(n, f"{n}.jpg", "x", "train", "") for n in range(10_000)]
write_shards(group_by_image(rows), out, name="test", source={}, read_image=read_image,
             check_image=lambda data: None, samples_per_shard=5)
"""


@pytest.mark.slow
def test_killed_at_any_point_nothing_looks_finished(images, tmp_path):
    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", SLOW_PACKER, str(out), str(images / "a.jpg")])
    try:
        deadline = time.monotonic() + 120
        while len(list(partial.glob("train/*.tar"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert not (partial / "manifest.json").exists()
    pack([PairRow(0, "a.jpg", "x", "train", "")], out, images)
    assert read_manifest(out)["totals"]["samples"] == 1
    assert not partial.exists()
