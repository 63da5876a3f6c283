"""Tars as open_clip, img2dataset and webdataset write them, and as they get damaged."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest
from webdataset.writer import TarWriter

from quiltnet.data.decoding import find_defect
from quiltnet.data.image_files import ImageFolder
from quiltnet.data.manifest import read_manifest
from quiltnet.data.pairs import PairRow, image_id
from quiltnet.data.repacking import WebDatasetSource
from quiltnet.data.row_table import ListedRows
from quiltnet.data.shards import write_shards
from quiltnet.errors import UserError
from tests.data.conftest import draw_image, encode


def image(number: int) -> bytes:
    return encode(draw_image(number))


def img2dataset(number: int) -> dict:
    key = f"{number:09d}"
    record = {"caption": f"Caption {number}.", "url": f"https://example.org/{number}", "key": key, "status": "success"}
    texts = {"txt": f"Caption {number}.".encode(), "json": json.dumps(record).encode()}
    return {"__key__": key, "jpg": image(number), **texts}


def write_tar(path, members, mode="w"):
    """members: (name, bytes) pairs, or TarInfo of what is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def pair(key, number):
    return [(f"{key}.jpg", image(number)), (f"{key}.txt", f"Caption {number}.".encode())]


def repack(named, out, **options):
    """(manifest, sample's json by image path, image by image path)"""
    source = WebDatasetSource(named if isinstance(named, list) else [named], **options)
    manifest = write_shards(
        source, out, name="test", source={}, images=source.images, check_image=find_defect, samples_per_shard=4
    )
    records, images = {}, {}
    for path in out.rglob("*.tar"):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".json"):
                record = json.loads(data)
                records[record["image_path"]] = record
                stem = name.removesuffix("json")
                images[record["image_path"]] = next(members[n] for n in members if n.startswith(stem) and n != name)
    assert manifest == read_manifest(out)
    return manifest, records, images


def test_what_img2dataset_writes(tmp_path):
    (tmp_path / "in").mkdir()
    for shard in range(2):
        with TarWriter(str(tmp_path / "in" / f"{shard:05d}.tar"), encoder=False) as tar:
            for number in range(5 * shard, 5 * shard + 5):
                tar.write(img2dataset(number))
    manifest, records, images = repack(tmp_path / "in", tmp_path / "out")
    assert manifest["totals"]["samples"] == manifest["totals"]["captions"] == manifest["totals"]["rows"] == 10
    assert manifest["totals"]["findings"] == {}
    path = "00001/000000007.jpg"
    assert images[path] == image(7)
    assert records[path] == {
        "captions": ["Caption 7."],
        "caption_ids": records[path]["caption_ids"],
        "image_id": image_id(path),
        "source_id": path,
        "image_path": path,
        "metadata": {"url": "https://example.org/7", "key": "000000007", "status": "success"},
        "caption_metadata": {},
    }


def test_our_own_set_stays_what_it_is(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number in range(9):
        (folder / f"{number}.jpg").write_bytes(image(number))
        for n in range(1 + number % 3):
            facts = {"stain": "H&E", "roi": [n]}
            split = "val" if number > 6 else "train"
            rows.append(PairRow(len(rows), f"{number}.jpg", f"Text {n} of {number}.", split, f"s{number // 2}", facts))
    options = {"name": "test", "source": {}, "check_image": find_defect, "samples_per_shard": 4}
    write_shards(ListedRows(rows), tmp_path / "first", images=ImageFolder(folder), **options)
    repack(tmp_path / "first", tmp_path / "second")
    for path in (tmp_path / "first").rglob("*.tar"):
        assert (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes() == path.read_bytes()


def test_what_can_be_wrong_with_a_sample(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(
        tmp_path / "in" / "a.tar",
        [
            *pair("good", 0),
            ("two.jpg", image(1)), ("two.png", image(1)), ("two.txt", b"x"),
            ("bad-json.jpg", image(2)), ("bad-json.json", b"{"), ("bad-json.txt", b"x"),
            ("no-caption.jpg", image(3)), ("no-caption.json", b'{"caption": 3}'),
            ("empty.jpg", image(3)), ("empty.txt", b" \n"),
            link, ("link.txt", b"x"),
            ("html.jpg", b"<html>404</html>"), ("html.txt", b"x"),
            ("zero.jpg", b""), ("zero.txt", b"x"),
            ("only.txt", b"x"),
            ("readme", b"no dot"),
            ("emoji.jpg", image(4)), ("emoji.txt", "\U0001f52c".encode()),
            ("long.JPG", image(5)), ("long.txt", b"word " * 20_000),
            ("latin.jpg", image(6)), ("latin.txt", b"caf\xe9"),
        ],
    )  # fmt: skip
    manifest, records, _ = repack(tmp_path / "in" / "a.tar", tmp_path / "out")
    totals = manifest["totals"]
    assert totals["rejected"] == {
        "missing_image": 2,
        "null_caption": 2,
        "several_images": 1,
        "unreadable_image": 2,
        "unreadable_json": 1,
    }
    assert totals["rows"] == 12
    assert sorted(records) == ["a/emoji.jpg", "a/good.jpg", "a/latin.jpg", "a/long.jpg"]
    assert records["a/emoji.jpg"]["captions"] == ["\U0001f52c"]
    assert records["a/latin.jpg"]["captions"] == ["caf\ufffd"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["image_path"]: line["reason"] for line in lines}
    assert reasons["a/link.jpg"] == "missing_image" and reasons["a/two.jpg"] == "several_images"


def test_names_are_labels(tmp_path):
    members = [
        *pair("/etc/cron.d/x", 0),
        *pair("../../up", 1),
        *pair("a/../b", 2),
        *pair("same", 3),
        *pair("other", 4),
        *pair("same", 5),
        *pair("./other", 6),
        ("twice.jpg", image(7)), ("twice.txt", b"one"), ("twice.jpg", image(8)), ("twice.txt", b"two"),
    ]  # fmt: skip
    write_tar(tmp_path / "in" / "a.tar", members)
    manifest, _, images = repack(tmp_path / "in", tmp_path / "out")
    expected = ["etc/cron.d/x", "up", "a/b", "same", "other", "same~2", "other~2", "twice", "twice~2"]
    assert images == {f"a/{name}.jpg": image(number) for number, name in enumerate(expected)}
    assert manifest["totals"]["findings"] == {"duplicate_keys": 3, "unsafe_names": 4}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("kept", ["half an image", "no caption", "no end"])
def test_a_tar_that_is_cut(tmp_path, kept):
    members = [member for number in range(4) for member in pair(f"{number}", number)]
    write_tar(tmp_path / "in" / "a.tar", members)
    write_tar(tmp_path / "in" / "b.tar", pair("x", 9))
    path = tmp_path / "in" / "a.tar"
    with tarfile.open(path) as tar:
        infos = {info.name: info for info in tar}
    end = {
        "half an image": infos["3.jpg"].offset_data + 300,
        "no caption": infos["3.txt"].offset,
        "no end": infos["3.txt"].offset_data + 512,
    }[kept]
    path.write_bytes(path.read_bytes()[:end])
    manifest, records, _ = repack(tmp_path / "in", tmp_path / "out")
    lost = kept != "no end"
    assert manifest["totals"]["rejected"] == ({"truncated_tar": 1} if lost else {})
    assert manifest["totals"]["findings"] == {"truncated_tars": 1}
    assert len(records) == (4 if lost else 5)


def test_compressed_tars(tmp_path):
    write_tar(tmp_path / "in" / "a.tar.gz", [m for n in range(3) for m in pair(f"{n}", n)], "w:gz")
    write_tar(tmp_path / "in" / "b.tgz", pair("3", 3), "w:gz")
    write_tar(tmp_path / "in" / "c.tar", pair("4", 4), "w:gz")  # compressed, whatever its name
    large = [(f"{n}.jpg", encode(draw_image(n, 300, 300), "PNG")) for n in range(5, 9)]
    members = [m for name, data in large for m in [(name, data), (name.replace("jpg", "txt"), b"x")]]
    write_tar(tmp_path / "in" / "d.tar.gz", members, "w:gz")
    path = tmp_path / "in" / "d.tar.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    manifest, records, _ = repack(tmp_path / "in", tmp_path / "out")
    assert {path for path in records if not path.startswith("d/")} == {
        "a/0.jpg", "a/1.jpg", "a/2.jpg", "b/3.jpg", "c/4.jpg",
    }  # fmt: skip
    assert manifest["totals"]["findings"] == {"truncated_tars": 1}
    assert manifest["totals"]["rejected"] == {"truncated_tar": 1}


def test_what_is_no_tar_is_counted(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", pair("0", 0))
    (tmp_path / "in" / "b.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "in" / "c.tar").write_bytes(b"")
    (tmp_path / "in" / "d.tar").write_bytes(gzip.compress(b"not a tar"))
    manifest, records, _ = repack(tmp_path / "in", tmp_path / "out")
    assert manifest["totals"]["rejected"] == {"unreadable_tar": 3}
    assert manifest["totals"]["findings"] == {"unreadable_tars": 3}
    assert len(records) == 1
    with pytest.raises(UserError, match="no pair is left"):
        repack(tmp_path / "in" / "b.tar", tmp_path / "none")


def test_splits_are_folders(tmp_path):
    write_tar(tmp_path / "in" / "train" / "a.tar", pair("0", 0))
    write_tar(tmp_path / "in" / "val" / "a.tar", pair("0", 1))
    write_tar(tmp_path / "in" / "stray.tar", pair("0", 2))
    manifest, records, _ = repack(tmp_path / "in", tmp_path / "out", source_of=lambda path: path.split("/")[1])
    assert {split: entry["samples"] for split, entry in manifest["splits"].items()} == {"train": 1, "val": 1}
    assert manifest["totals"]["rejected"] == {"no_split": 1}
    assert {record["source_id"] for record in records.values()} == {"a"}
    manifest, _, _ = repack(tmp_path / "in", tmp_path / "val", split="val")
    assert list(manifest["splits"]) == ["val"] and manifest["totals"]["rejected"] == {}
    manifest, _, _ = repack(tmp_path / "in" / "train" / "a.tar", tmp_path / "test", split="test")
    assert list(manifest["splits"]) == ["test"]


def test_splits_of_our_own_sets_keep_their_names(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rows = [PairRow(n, f"{n}.jpg", f"Caption {n}.", f"fold{n % 3}", f"{n}") for n in range(6)]
    for number in range(6):
        (images / f"{number}.jpg").write_bytes(image(number))
    options = {"name": "test", "source": {}, "check_image": find_defect}
    write_shards(ListedRows(rows), tmp_path / "set", images=ImageFolder(images), **options)
    splits = repack(tmp_path / "set", tmp_path / "all")[0]["splits"]
    assert [(split, entry["samples"]) for split, entry in splits.items()] == [("fold0", 2), ("fold1", 2), ("fold2", 2)]
    assert list(repack(tmp_path / "set", tmp_path / "one", split="fold1")[0]["splits"]) == ["fold1"]
    assert list(repack(tmp_path / "set" / "fold2", tmp_path / "two")[0]["splits"]) == ["fold2"]
    assert list(repack(tmp_path / "set" / "fold2", tmp_path / "val", split="val")[0]["splits"]) == ["val"]
    (tmp_path / "set" / "fold0" / "test-000000.tar").unlink()
    with pytest.raises(UserError, match=r"test-000000\.tar is missing, and the manifest lists it"):
        repack(tmp_path / "set", tmp_path / "lost")


def test_two_sets_of_ours_with_the_same_paths(tmp_path):
    record = {
        "captions": ["x"], "caption_ids": ["0"], "image_id": image_id("a.jpg"), "source_id": "s", "image_path": "a.jpg",
        "metadata": {}, "caption_metadata": {},
    }  # fmt: skip
    for name, number in (("one", 0), ("two", 1), ("again", 0)):
        write_tar(tmp_path / f"{name}.tar", [("a.jpg", image(number)), ("a.json", json.dumps(record).encode())])
    manifest, _, _ = repack([tmp_path / "one.tar", tmp_path / "again.tar"], tmp_path / "out")
    assert manifest["totals"]["duplicate_captions"] == 1
    with pytest.raises(UserError, match=r"two\.tar holds an image with the path of another .*pack the two sets"):
        repack([tmp_path / "one.tar", tmp_path / "two.tar"], tmp_path / "none")


def test_nothing_is_there(tmp_path):
    with pytest.raises(UserError, match="holds no tar; give tars, their folder"):
        WebDatasetSource([tmp_path])
