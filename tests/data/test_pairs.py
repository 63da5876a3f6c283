from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

import pytest

from quiltnet.data.pairs import caption_id, hash_code, id_to_int64, image_id, plain_path, sample_key


def test_image_id_is_blake2b_of_the_path():
    assert image_id("a/b.jpg") == hashlib.blake2b(b"a/b.jpg", digest_size=8).hexdigest() == "67ed673b4d9fccae"
    assert image_id("./a//b.jpg") == image_id("a/b.jpg")
    assert image_id("b.jpg") != image_id("a/b.jpg")


@pytest.mark.parametrize(
    "same",
    ["H&E STAINED  gland.", " h&e stained\ngland.", "H&amp;E stained gland.", "H&amp;amp;E stained gland."],
)
def test_caption_id_sees_through_case_space_and_escapes(same):
    assert caption_id(same) == caption_id("H&E stained gland.")


def test_caption_id_tells_words_apart():
    assert caption_id("benign gland") != caption_id("malignant gland")
    assert caption_id("caf\u00e9") == caption_id("cafe\u0301")


def test_ids_fit_a_signed_tensor():
    assert id_to_int64("ffffffffffffffff") == 2**63 - 1
    assert id_to_int64("0000000000000003") == 1


@pytest.mark.parametrize(
    ("path", "readable"),
    [
        ("lc25000__lungn127.jpeg", "lc25000__lungn127"),
        ("case 1/tile.v2.png", "case-1-tile-v2"),
        ("d\u00e9j\u00e0.jpg", "d-j"),
        ("\u7d44\u7e54.jpg", "image"),
        ("x" * 300 + ".jpg", "x" * 64),
    ],
)
def test_key_is_readable_and_has_no_dot_or_slash(path, readable):
    assert sample_key(path) == f"{readable}_{image_id(path)[:8]}"


@pytest.mark.parametrize(
    "path",
    ["a.jpg", "./a.jpg", "a//b.jpg", "a/./b.jpg", "a/../b.jpg", "/a", "a/", "a/.", ".", "..", "...", ".a/b.", "a./b"],
)
def test_plain_path_is_what_pathlib_says(path):
    assert plain_path(path) == PurePosixPath(path).as_posix()


def test_a_hash_is_a_number():
    assert f"{hash_code('a/b.jpg'):016x}" == image_id("a/b.jpg")
