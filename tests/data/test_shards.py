from __future__ import annotations

import hashlib
import json
import re
import struct
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from quiltnet.data.decoding import find_defect
from quiltnet.data.image_files import ImageFolder
from quiltnet.data.manifest import read_manifest
from quiltnet.data.pairs import PairRow, caption_id, image_id
from quiltnet.data.row_table import ListedRows
from quiltnet.data.shards import write_shards
from quiltnet.errors import UserError
from tests.data.conftest import draw_image, encode


def pack(rows: list[PairRow], out: Path, images: Path, **options: object) -> dict:
    defaults = {"name": "test", "source": {"from": "a test"}, "check_image": find_defect}
    return write_shards(ListedRows(rows), out, images=ImageFolder(images), **{**defaults, **options})


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
        "sources": 1,
        "rejected": {},
        "in_several_splits": {"images": 0, "sources": 0},
        "caption_words": {"min": 1, "p5": 1, "p25": 1, "p50": 1, "p75": 2, "p95": 2, "max": 2},
        "image_sizes": {
            "width": dict.fromkeys(("min", "p5", "p25", "p50", "p75", "p95", "max"), 40),
            "height": dict.fromkeys(("min", "p5", "p25", "p50", "p75", "p95", "max"), 32),
            "below_64": 1,
        },
        "findings": {},
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
    assert (manifest["schema_version"], manifest["seed"], manifest["source"]) == (2, 3, {"from": "a test"})
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


def huge_png() -> bytes:
    """The header of 20,000 x 20,000 pixels, and hardly any of them."""
    data = bytearray(encode(draw_image(0), "PNG"))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (encode(draw_image(0)) + b"trailing junk", None),
        (encode(draw_image(0).convert("RGBA"), "PNG"), None),
        (encode(draw_image(0).convert("CMYK")), None),
        (encode(draw_image(0).convert("L")), None),
        (encode(draw_image(0).convert("I;16"), "PNG"), None),
        (encode(draw_image(0, 1, 1)), None),
        (encode(draw_image(0), "WEBP"), None),
        (huge_png(), "too_many_pixels"),
        (encode(draw_image(0))[:400], "broken_image"),
        (b"<html>404</html>", "not_an_image"),
    ],
)
def test_images_of_any_kind(images, tmp_path, data, detail):
    (images / "odd.jpg").write_bytes(data)
    rows = [PairRow(n, path, "x", "train", "") for n, path in enumerate(["a.jpg", "odd.jpg"])]
    manifest = pack(rows, tmp_path / "out", images)
    packed = [content for name, content in contents(tmp_path / "out").items() if "/odd_" in name and "json" not in name]
    assert packed == ([data] if detail is None else [])
    assert manifest["totals"]["rejected"] == ({} if detail is None else {"unreadable_image": 1})
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["detail"] for line in lines] == ([] if detail is None else [detail])


def test_nothing_left_is_an_error_and_leaves_nothing(images, tmp_path):
    with pytest.raises(UserError, match=r"no pair is left.*'missing_image': 1"):
        pack([PairRow(0, "gone.jpg", "x", "train", "")], tmp_path / "out", images)
    with pytest.raises(UserError, match="the rows has no row to pack"):
        pack([], tmp_path / "out", images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize("split", ["../train", "a/b", "", ".hidden", "tr ain"])
def test_a_split_must_name_a_folder(images, tmp_path, split):
    with pytest.raises(UserError, match="cannot name a folder"):
        pack([PairRow(0, "a.jpg", "x", split, "")], tmp_path / "out", images)


def test_pixels_as_they_are_kept_by_preparing(images, tmp_path):
    np.save(images / "p.npy", np.arange(7 * 9 * 3, dtype=np.uint8).reshape(7, 9, 3))
    np.save(images / "x.npy", np.zeros((7, 9)))
    rows = [PairRow(n, path, "x", "train", "") for n, path in enumerate(["p.npy", "x.npy"])]
    totals = pack(rows, tmp_path / "out", images)["totals"]
    packed = {name.split(".")[1]: data for name, data in contents(tmp_path / "out").items()}
    assert packed["npy"] == (images / "p.npy").read_bytes() and totals["rejected"] == {"unreadable_image": 1}
    assert (totals["image_sizes"]["width"]["max"], totals["image_sizes"]["height"]["max"]) == (9, 7)


@pytest.mark.parametrize("split", ["work", "journal", "manifest", "0"])
def test_a_split_may_have_any_other_name(images, tmp_path, split):
    pack([PairRow(0, "a.jpg", "x", split, "")], tmp_path / "out", images)
    assert len(contents(tmp_path / "out")) == 2


def test_target_in_use(images, tmp_path):
    rows = [PairRow(0, "a.jpg", "x", "train", "")]
    out = tmp_path / "out"
    out.mkdir()
    pack(rows, out, images)  # an empty folder is free
    with pytest.raises(UserError, match="exists already"):
        pack(rows, out, images)
    pack([PairRow(0, "c.tif", "x", "val", "")], out, images, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "rejected.jsonl", "val"]
    with pytest.raises(UserError, match=r'holds another source: \{"from": "a test"\}, and not \{"from": "elsewhere"\}'):
        pack(rows, out, images, source={"from": "elsewhere"})
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


def test_a_sample_a_row(images, tmp_path):
    rows = [
        PairRow(0, "a.jpg", "One.", "train", "s"),
        PairRow(1, "a.jpg", "Two.", "train", "s"),
        PairRow(2, "a.jpg", "one.", "train", "s"),
        PairRow(3, "c.tif", "Three.", "train", "s"),
    ]
    totals = pack(rows, tmp_path / "out", images, layout="rows")["totals"]
    assert [totals[name] for name in ("rows", "samples", "captions", "images", "duplicate_captions")] == [4, 4, 4, 2, 0]
    records = {name: json.loads(data) for name, data in contents(tmp_path / "out").items() if name.endswith("json")}
    code = image_id("a.jpg")
    assert {name: record["captions"] for name, record in records.items() if record["image_id"] == code} == {
        f"train/a_{code[:8]}_0.json": ["One."],
        f"train/a_{code[:8]}_1.json": ["Two."],
        f"train/a_{code[:8]}_2.json": ["one."],
    }


def test_the_number_of_workers_changes_no_byte(images, tmp_path):
    (images / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:-40])
    paths = ["a.jpg", "deep/b.jpg", "c.tif", "cut.jpg", "gone.jpg"]
    rows = [PairRow(n, path, f"{path} {n}", ("train", "val")[n % 2], path) for n, path in enumerate(paths * 4)]
    manifests = [
        pack(rows, tmp_path / str(workers), images, samples_per_shard=4, workers=workers) for workers in (0, 2)
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0]["totals"]["rejected"] == {"missing_image": 4, "unreadable_image": 4}
    files = [
        {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "0", tmp_path / "2")
    ]
    assert set(files[0]) == set(files[1]) >= {"manifest.json", "rejected.jsonl", "train/test-000000.tar.index"}
    for name, data in files[0].items():
        assert name.endswith(".index") or files[1][name] == data, name


def test_statistics_are_those_of_what_is_packed(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    sizes, rows = rng.integers(40, 90, (30, 2)), []
    for number, (width, height) in enumerate(sizes.tolist()):
        (images / f"{number}.png").write_bytes(encode(draw_image(number, width, height), "PNG"))
        caption = " ".join(["word"] * (1 + number % 7))
        rows.append(PairRow(number, f"{number}.png", caption, "train", f"source {number % 4}"))
    totals = pack(rows, tmp_path / "out", images, samples_per_shard=7)["totals"]
    shares = {"min": 0, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1}

    def expected(values):
        return {name: np.quantile(values, share, method="inverted_cdf") for name, share in shares.items()}

    assert totals["caption_words"] == expected([1 + number % 7 for number in range(30)])
    assert totals["image_sizes"] == {
        "width": expected(sizes[:, 0]),
        "height": expected(sizes[:, 1]),
        "below_64": int((sizes.min(axis=1) < 64).sum()),
    }
    assert totals["sources"] == 4


def test_a_bad_request(images, tmp_path):
    rows = [PairRow(0, "a.jpg", "x", "train", "")]
    for options in ({"samples_per_shard": 0}, {"layout": "columns"}):
        with pytest.raises(UserError, match="holds at least 1, and the layout is one of images, rows"):
            pack(rows, tmp_path / "out", images, **options)
    with pytest.raises(UserError, match="workers=-1; give the number of processes"):
        pack(rows, tmp_path / "out", images, workers=-1)


def test_space_is_asked_for_first(images, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"need about 0\.0 MiB, and .* has 0\.0 MiB free; make room"):
        pack([PairRow(0, "a.jpg", "x", "train", "")], tmp_path / "out", images)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_estimate_is_close_to_what_is_written(images, tmp_path):
    said = []
    progress = SimpleNamespace(stage=lambda *_: None, advance=lambda _: None, say=said.append)
    for number in range(40):
        (images / f"{number}.png").write_bytes(encode(draw_image(number, 300, 300), "PNG"))
    rows = [PairRow(n, f"{n}.png", "A caption of some words.", "train", "s") for n in range(40)]
    manifest = pack(rows, tmp_path / "out", images, progress=progress)
    estimate = float(re.search(r"40 samples to pack into 1 tars, about (\S+) MiB", said[0])[1]) * 2**20
    assert estimate == pytest.approx(manifest["splits"]["train"]["shards"][0]["bytes"], rel=0.05)


@pytest.mark.slow
def test_a_million_rows_without_a_caption(images, tmp_path):
    def rows(count):
        return (
            PairRow(n, "a.jpg" if n == 7 else f"{n}.jpg", "x" if n == 7 else " ", "train", "s") for n in range(count)
        )

    with pytest.raises(UserError, match=r"no pair is left.*'null_caption': 20000"):
        pack((PairRow(n, f"{n}.jpg", "", "train", "s") for n in range(20_000)), tmp_path / "none", images)
    totals = pack(rows(1_000_000), tmp_path / "out", images)["totals"]
    assert (totals["rows"], totals["samples"], totals["rejected"]) == (1_000_000, 1, {"null_caption": 999_999})
    with open(tmp_path / "out" / "rejected.jsonl") as file:
        assert sum(1 for _ in file) == 999_999
    tracemalloc.start()
    pack(rows(40_000), tmp_path / "traced", images)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400 * 40_000  # a list of rows, or of lines, takes three times that
