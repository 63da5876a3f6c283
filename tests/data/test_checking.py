from __future__ import annotations

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from quiltnet.data.check_report import describe
from quiltnet.data.checking import Bounds, Check, Limits, check_data
from quiltnet.errors import UserError
from tests.data.made_sets import encoded, pair, tissue, write_set, write_tar

TILES = [tissue(seed) for seed in range(24)]
JPEGS = [encoded(tile, quality=92) for tile in TILES]


def good(*numbers: int, name: str = "tile") -> dict[str, bytes | str]:
    samples = [
        pair(f"{name}{n}", JPEGS[n], f"Caption of {name} {n}.", image_path=f"slides/{name}{n}.jpg") for n in numbers
    ]
    return {member: data for sample in samples for member, data in sample.items()}


def counts(check: Check) -> dict[str, int]:
    return {finding.name: finding.count for finding in check.findings if finding.count}


def details(check: Check, name: str) -> dict[str, int]:
    return next(finding.details for finding in check.findings if finding.name == name)


def keys(check: Check, name: str) -> list[str]:
    report = describe(check, examples=99)
    return [example["key"] for example in report["findings"][name]["examples"]]


def above(check: Check) -> list[str]:
    return [finding.name for finding in check.findings if finding.is_above]


def test_a_good_set_passes(tmp_path):
    check = check_data(write_set(tmp_path / "set", {"train": [good(0, 1, 2), good(3, 4)], "val": [good(5)]}))
    assert check.passed and counts(check) == {}
    report = describe(check, examples=5)
    assert report["sets"] == {"train": 5, "val": 1} and report["captions"] == 6 and report["passed"]
    assert {finding["of"] for name, finding in report["findings"].items() if name == "broken"} == {6}


def test_one_split_or_one_tar_can_be_checked(tmp_path):
    folder = write_set(tmp_path / "set", {"train": [good(0, 1)], "val": [good(2)]})
    assert describe(check_data(folder / "val"), examples=1)["sets"] == {"val": 1}
    assert describe(check_data(folder / "train" / "made-000000.tar"), examples=1)["sets"] == {"made-000000": 2}
    write_tar(tmp_path / "foreign" / "a" / "0.tar", good(0))
    write_tar(tmp_path / "foreign" / "b" / "0.tar", good(1, 2))
    assert describe(check_data(tmp_path / "foreign"), examples=1)["sets"] == {"a": 1, "b": 2}


def test_files_against_the_manifest(tmp_path):
    folder = write_set(tmp_path / "set", {"train": [good(n, n + 1) for n in range(0, 14, 2)]})
    tars = sorted((folder / "train").glob("*.tar"))
    tars[0].unlink()
    os.truncate(tars[1], tars[1].stat().st_size // 3)
    shutil.copy(tars[6], folder / "train" / "stray.tar")
    changed = bytearray(tars[2].read_bytes())
    changed[700] ^= 1  # in the first image: size and samples stay
    tars[2].write_bytes(changed)
    write_tar(tars[3], good(6))
    tars[4].write_bytes(b"no tar")
    check = check_data(folder)
    expected = {"missing_shards": 1, "unlisted_shards": 1, "unreadable_shards": 2, "miscounted_shards": 2}
    found = counts(check)
    assert {name: found[name] for name in expected} == expected and not check.passed
    assert found["changed_shards"] == 1  # by size, the one cut short
    assert counts(check_data(folder, checksums=True))["changed_shards"] == 3
    shards = {n["shard"] for n in describe(check, examples=9)["findings"]["unreadable_shards"]["examples"]}
    assert shards == {str(tars[1]), str(tars[4])}


BROKEN = {
    "cut": (JPEGS[0][:-80], "x", "broken_image"),
    "html": (b"<html>404</html>", "x", "not_an_image"),
    "zero": (b"", "x", "empty_image"),
    "bomb": (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "x", "too_many_pixels"),
    "blank": (JPEGS[1], " \n", "no_caption"),
    "float": (encoded(Image.fromarray(np.ones((80, 80), np.float32)), "TIFF"), "x", "unknown_pixel_range"),
}


def test_broken_samples_are_counted_by_reason(tmp_path):
    members = good(*range(5, 20))
    for key, (image, caption, _) in BROKEN.items():
        members |= {f"{key}.jpg": image, f"{key}.txt": caption}
    members |= {"json.jpg": JPEGS[2], "json.json": '{"captions": ["x"'}
    members |= {"two.jpg": JPEGS[3], "two.png": encoded(TILES[4], "PNG"), "two.txt": "x"}
    members |= {"none.txt": "x", "both.jpg": b"x", "both.json": "["}  # what the reader would meet first
    write_tar(tmp_path / "foreign" / "0.tar", members)
    check = check_data(tmp_path / "foreign", limits=Limits(broken=0.3))
    expected = {reason: 1 for _, _, reason in BROKEN.values()}
    assert details(check, "broken") == {**expected, "unreadable_json": 2, "several_images": 1, "no_image": 1}
    assert set(keys(check, "broken")) == {*BROKEN, "json", "two", "none", "both"}
    assert counts(check)["giant"] == 1 and above(check) == ["broken"]
    assert keys(check, "grey") == keys(check, "over_8_bit") == ["float"]
    assert check_data(tmp_path / "foreign", limits=Limits(broken=0.5)).passed


def test_what_is_wrong_with_captions(tmp_path):
    texts = {
        "ok": ["fine"],
        "number": [17],
        "null": [None],
        "blank": ["  "],
        "emoji": ["🔬🧫"],
        "mixed": ["fine", "", 3],
    }
    members = {k: v for n, (key, text) in enumerate(texts.items()) for k, v in pair(key, JPEGS[n], *text).items()}
    members |= {"absent.jpg": JPEGS[8], "latin.jpg": JPEGS[9], "latin.txt": b"caf\xe9 au lait"}
    members |= {"caption.jpg": JPEGS[10], "caption.json": '{"caption": 3.5}', "json.jpg": JPEGS[11], "json.json": "{"}
    write_tar(tmp_path / "a" / "0.tar", members)
    check = check_data(tmp_path / "a")
    assert set(keys(check, "caption_missing")) == {"null", "absent"}
    assert set(keys(check, "caption_empty")) == {"blank", "mixed"}
    assert set(keys(check, "caption_not_text")) == {"number", "mixed", "caption"}
    assert set(keys(check, "caption_garbled")) == {"latin"}
    assert set(keys(check, "caption_wordless")) == {"emoji"}
    assert details(check, "broken") == {"no_caption": 5, "unreadable_json": 1}  # latin, emoji and mixed are used


def test_repeated_keys(tmp_path):
    members = [*good(0, 1).items(), *good(0).items()]
    write_tar(tmp_path / "a" / "0.tar", members)
    write_tar(tmp_path / "a" / "1.tar", good(1))  # elsewhere the same key is another sample
    assert keys(check_data(tmp_path / "a"), "repeated_keys") == ["tile0", "tile0"]


def odd_images() -> dict[str, bytes]:
    turned = Image.Exif()
    turned[0x0112] = 6
    sixteen = Image.fromarray(np.asarray(TILES[5].convert("L")).astype(np.uint16) * 257)
    return {
        "grey": encoded(TILES[0].convert("L")),
        "palette": encoded(TILES[1].convert("P"), "PNG"),
        "alpha": encoded(TILES[2].convert("RGBA"), "PNG"),
        "cmyk": encoded(TILES[3].convert("CMYK")),
        "over_8_bit": encoded(sixteen, "PNG"),
        "exif_turned": encoded(TILES[4], exif=turned),
        "tiny": encoded(TILES[6].resize((40, 90))),
        "giant": encoded(TILES[7].resize((400, 300))),
        "elongated": encoded(TILES[8].resize((330, 80))),
        "flat": encoded(Image.new("RGB", (96, 96), "white"), "PNG"),
    }


def test_images_out_of_the_ordinary(tmp_path):
    members = good(10, 11)
    for name, data in odd_images().items():
        members |= {f"{name}.jpg": data, f"{name}.txt": "x"}
    write_tar(tmp_path / "a" / "0.tar", members)
    check = check_data(tmp_path / "a", bounds=Bounds(giant_pixels=100_000))
    assert {name: keys(check, name) for name in odd_images() if name != "grey"} == {
        name: [name] for name in odd_images() if name != "grey"
    }
    assert set(keys(check, "grey")) == {"grey", "over_8_bit"}
    assert check.passed


def test_copies_within_a_split(tmp_path):
    members = good(*range(8))
    copies = {
        "bytes": JPEGS[0],
        "pixels": encoded(Image.open(io.BytesIO(JPEGS[1])), "PNG"),
        "worse": encoded(TILES[2], quality=40),
        "smaller": encoded(TILES[3].resize((70, 70), Image.Resampling.BICUBIC)),
        "smaller-again": encoded(TILES[3].resize((60, 60), Image.Resampling.BICUBIC)),
        "turned": encoded(TILES[4].transpose(Image.Transpose.ROTATE_90)),
    }
    for key, data in copies.items():
        members |= {f"{key}.png": data, f"{key}.txt": "x"}
    white = encoded(Image.new("RGB", (64, 64), "white"), "PNG")
    for key, data in (("white", white), ("pink", encoded(Image.new("RGB", (64, 64), "pink"), "PNG")), ("same", white)):
        members |= {f"{key}.png": data, f"{key}.txt": "x"}
    members |= {
        "wide.png": encoded(Image.new("RGB", (128, 32), "white"), "PNG"),
        "wide.txt": "x",
    }  # as many white pixels
    write_tar(tmp_path / "a" / "0.tar", members)
    check = check_data(tmp_path / "a", limits=Limits(duplicates=0.3))
    assert details(check, "duplicates a") == {"exact": 3, "near": 4}
    examples = describe(check, examples=99)["findings"]["duplicates a"]["examples"]
    found = {example["key"]: example["copy_of"]["key"] for example in examples}
    assert found.pop("turned") == "tile4"
    assert {example["key"]: example["turned"] for example in examples} == {
        key: key == "turned" for key in (*found, "turned")
    }
    assert max(example["bits"] for example in examples) <= 4
    unturned = check_data(tmp_path / "a", bounds=Bounds(turned=False))
    assert details(unturned, "duplicates a") == {"exact": 3, "near": 3}
    assert found.pop("smaller-again") in ("smaller", "tile3")
    assert found == {"bytes": "tile0", "pixels": "tile1", "worse": "tile2", "smaller": "tile3", "same": "white"}
    assert above(check) == ["duplicates a"]  # 7 of 18
    strict = check_data(tmp_path / "a", bounds=Bounds(near_distance=0))
    assert details(strict, "duplicates a")["near"] <= 4


def test_leaks_between_splits_and_into_evaluation_sets(tmp_path):
    train = good(0, 1, 2, 3)
    val = pair("v1", JPEGS[1], "x") | pair("v2", encoded(TILES[2], quality=50), "x") | good(4, 5, name="v")
    folder = write_set(tmp_path / "set", {"val": [val], "train": [train]})
    images = tmp_path / "eval" / "deep"
    images.mkdir(parents=True)
    for number in (3, 4, 6):
        (images / f"{number}.jpg").write_bytes(encoded(TILES[number], quality=70))
    (images / "broken.png").write_bytes(b"not at all")
    check = check_data(folder, against=[str(tmp_path / "eval")])
    found = {name: details(check, name) for name in counts(check) if name.startswith("leaks")}
    assert found == {
        "leaks val in train": {"exact": 1, "near": 1},
        "leaks eval in train": {"exact": 0, "near": 1},
        "leaks eval in val": {"exact": 0, "near": 1},
    }
    assert set(keys(check, "leaks val in train")) == {"v1", "v2"}
    assert keys(check, "leaks eval in train") == [str(images / "3.jpg")]
    assert details(check, "broken_evaluation_images") == {"not_an_image": 1} and counts(check).get("broken") is None
    assert len(above(check)) == 3
    example = describe(check, examples=9)["findings"]["leaks eval in val"]["examples"][0]
    assert example["copy_of"]["image_path"] == "slides/v4.jpg"  # as the table that was packed names it
    assert check_data(folder, against=[str(tmp_path / "eval")], limits=Limits(leaks=2)).passed
    assert check_data(folder, limits=Limits(leaks=None)).passed


def test_repeated_and_truncated_captions(tmp_path):
    train = (
        pair("a", JPEGS[0], "A gland.", "Other.") | pair("b", JPEGS[1], "a  GLAND.") | pair("c", JPEGS[2], "Long one.")
    )
    folder = write_set(tmp_path / "set", {"train": [train], "val": [pair("d", JPEGS[3], "A gland.")]})
    limits = Limits(duplicate_captions=0.1, truncated=0.3)
    check = check_data(folder, truncated=lambda captions: [len(text) > 8 for text in captions], limits=limits)
    assert counts(check) == {"duplicate_captions": 1, "truncated_captions": 2}
    assert keys(check, "duplicate_captions") == ["b"] and keys(check, "truncated_captions") == ["b", "c"]
    assert above(check) == ["duplicate_captions", "truncated_captions"]  # 1 and 2 of 5


def many_truncated(captions: list[str]) -> list[bool]:
    return [text.endswith("1.") for text in captions]


@pytest.mark.slow
def test_workers_find_the_same(tmp_path):
    folder = write_set(tmp_path / "set", {"train": [good(0, 1), good(1, 2), good(3)], "val": [good(0, 4)]})
    (folder / "train" / "made-000002.tar").unlink()
    said: list[tuple[int, int, int]] = []
    one, two = (
        check_data(folder, truncated=many_truncated, workers=n, progress=lambda *state: said.append(state))
        for n in (1, 2)
    )
    assert describe(one, examples=9) == describe(two, examples=9)
    assert said[:4] == said[4:] == [(1, 4, 2), (2, 4, 4), (3, 4, 4), (4, 4, 6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": Limits(broken=2)}, "--max-broken 2 is not a share, between 0 and 1"),
        ({"limits": Limits(leaks=-3)}, "--max-leaks -3 is not a number of images, 0 or more"),
        ({"bounds": Bounds(near_distance=40)}, "--near-distance 40 is not between 0 and 16 bits"),
        ({"bounds": Bounds(tiny_side=-1)}, "--tiny-side -1: pixels are counted from 0"),
        ({"bounds": Bounds(aspect=0.5)}, "--aspect 0.5: the longer side by the shorter is 1 at least"),
        ({"against": ["nowhere"]}, "--against nowhere: there is nothing"),
    ],
)
def test_bad_requests(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        check_data(write_set(tmp_path / "set", {"train": [good(0)]}), **options)


def test_bad_places(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        check_data(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither tars nor a manifest"):
        check_data(tmp_path / "empty")
    folder = write_set(tmp_path / "set", {"train": [good(0)]})
    with pytest.raises(UserError, match=r"holds no images .* and no shards"):
        check_data(folder, against=[str(tmp_path / "empty")])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["path"] = "../elsewhere.tar"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"names \.\./elsewhere.tar, which is outside its folder"):
        check_data(folder)
