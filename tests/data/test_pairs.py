from __future__ import annotations

import hashlib

import pytest

from quiltnet.data.pairs import PairRow, caption_id, group_by_image, id_to_int64, image_id, sample_key


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


def test_rows_are_grouped_by_split_and_image_in_table_order():
    rows = [
        PairRow(0, "b.jpg", "one", "train", ""),
        PairRow(1, "a.jpg", "two", "train", ""),
        PairRow(2, "./b.jpg", "three", "train", ""),
        PairRow(3, "b.jpg", "four", "val", ""),
    ]
    groups = group_by_image(rows)
    assert [(g.split, g.image_path, [row.number for row in g.rows]) for g in groups] == [
        ("train", "b.jpg", [0, 2]),
        ("train", "a.jpg", [1]),
        ("val", "b.jpg", [3]),
    ]
