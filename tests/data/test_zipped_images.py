"""Zips as Python's zipfile writes and reads them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from quiltnet.data.pairs import hash_code
from quiltnet.data.zipped_images import ZippedImages
from quiltnet.errors import UserError

RNG = np.random.default_rng(0)
DATA = {f"{n}.jpg": RNG.bytes(50 + 37 * n) + b"x" * 500 for n in range(20)}


def write_zip(path, members, method=zipfile.ZIP_DEFLATED, leading=""):
    with zipfile.ZipFile(path, "w", method) as file:
        if leading:
            file.writestr(leading, b"")
        for name, data in members.items():
            file.writestr(f"{leading}{name}", data)


def opened(tmp_path, *paths, wanted=tuple(DATA)):
    images = ZippedImages(paths)
    images.prepare(tmp_path, np.array([hash_code(path) for path in wanted], np.uint64))
    return pickle.loads(pickle.dumps(images))  # as a worker process gets it


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("leading", ["", "quilt_1m/"])
def test_members_of_several_zips(tmp_path, method, leading):
    items = list(DATA.items())
    write_zip(tmp_path / "a.zip", dict(items[:12]), method, leading)
    write_zip(tmp_path / "b.zip", dict(items[9:]), method, leading)  # three are in both, and the same
    images = opened(tmp_path, tmp_path / "a.zip", tmp_path / "b.zip")
    for name, data in DATA.items():
        assert images.read(name) == images.read(f"./{name}") == data
        assert images.size(name) == len(data)
    for missing in ("20.jpg", "quilt_1m", "x/0.jpg"):
        assert images.size(missing) == 0
        with pytest.raises(FileNotFoundError):
            images.read(missing)


def test_only_one_leading_directory_is_left_out(tmp_path):
    write_zip(tmp_path / "a.zip", {"x/y/0.jpg": b"0", "z/1.jpg": b"1", "/2.jpg": b"2"})
    images = opened(tmp_path, tmp_path / "a.zip", wanted=["0.jpg", "y/0.jpg", "x/y/0.jpg", "1.jpg", "2.jpg"])
    assert images.read("y/0.jpg") == images.read("x/y/0.jpg") == b"0"
    assert images.read("1.jpg") == b"1"
    for name in ("0.jpg", "2.jpg"):
        with pytest.raises(FileNotFoundError):
            images.read(name)


def test_a_full_name_goes_first(tmp_path):
    write_zip(tmp_path / "a.zip", {"case/a.jpg": b"1", "a.jpg": b"2"})
    images = opened(tmp_path, tmp_path / "a.zip", wanted=["a.jpg", "case/a.jpg"])
    assert (images.read("a.jpg"), images.read("case/a.jpg")) == (b"2", b"1")


def test_the_same_path_with_different_bytes(tmp_path):
    write_zip(tmp_path / "a.zip", {"quilt_1m/a.jpg": b"one", "case 1/b.jpg": b"x", "case 2/b.jpg": b"y"})
    write_zip(tmp_path / "b.zip", {"quilt_1m/a.jpg": b"other"})
    zips = tmp_path / "a.zip", tmp_path / "b.zip"
    with pytest.raises(
        UserError, match=r"quilt_1m/a.jpg in .*a\.zip \(3 bytes\) and .*b\.zip \(5 bytes\) are the same"
    ):
        opened(tmp_path, *zips, wanted=["a.jpg"])
    # Nobody asks for b.jpg: the table says which folder it means.
    assert opened(tmp_path, *zips, wanted=["case 2/b.jpg"]).read("case 2/b.jpg") == b"y"
    with pytest.raises(UserError, match=r"case 1/b.jpg in .* and case 2/b.jpg in .* are the same path"):
        opened(tmp_path, *zips, wanted=["b.jpg"])


@pytest.mark.parametrize("data", [b"", b"<html>quota exceeded</html>", b"PK\3\4" + b"x" * 100])
def test_no_zip(tmp_path, data):
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip is not a zip that can be read"):
        ZippedImages([tmp_path / "a.zip"])


def test_a_directory_that_is_damaged(tmp_path):
    write_zip(tmp_path / "a.zip", DATA)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\1\2")] = 0
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"is not a zip that can be read .*; get it again"):
        opened(tmp_path, tmp_path / "a.zip")


def damaged(tmp_path, change):
    write_zip(tmp_path / "a.zip", DATA)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    change(data)
    (tmp_path / "a.zip").write_bytes(data)
    return opened(tmp_path, tmp_path / "a.zip")


def encrypt(data):
    place = data.index(b"PK\1\2")
    data[place + 8] |= 1


def claim_size(data):
    place = data.index(b"PK\1\2")
    data[place + 24 : place + 28] = struct.pack("<I", 0xFFFFFFF0)


def change_method(data):
    place = data.index(b"PK\1\2")
    data[place + 10] = 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (encrypt, "encrypted"),
        (claim_size, "said to have 4294967280 bytes"),
        (change_method, "compressed by method 14"),
        (lambda data: data.__setitem__(slice(45, 60), bytes(15)), "damaged"),
        (lambda data: data.__setitem__(0, 0), "no member begins"),
    ],
)
def test_a_member_that_cannot_be_read(tmp_path, change, message):
    images = damaged(tmp_path, change)
    with pytest.raises(OSError, match=message):
        images.read("0.jpg")
    assert images.read("1.jpg") == DATA["1.jpg"]


def test_a_member_that_swells(tmp_path):
    """A zip bomb: the directory says 100 bytes, and 100 MB come out."""
    write_zip(tmp_path / "a.zip", {"0.jpg": bytes(100_000_000)})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.index(b"PK\1\2")
    data[place + 24 : place + 28] = struct.pack("<I", 100)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(OSError, match="checksum differs"):
        opened(tmp_path, tmp_path / "a.zip").read("0.jpg")


def test_a_zip_behind_other_bytes(tmp_path):
    """A self-extracting one, or with a data descriptor after each member, as streams are zipped."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("0.jpg", "w") as member:
            member.write(DATA["0.jpg"])
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" * 100 + buffer.getvalue())
    assert opened(tmp_path, tmp_path / "a.zip").read("0.jpg") == DATA["0.jpg"]
