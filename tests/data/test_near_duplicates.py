from __future__ import annotations

import io
from itertools import combinations

import imagehash
import numpy as np
import pytest
from PIL import Image

from quiltnet.data.near_duplicates import (
    FLAT_CONTRAST,
    LEAST_CORRELATION,
    NEAR_DISTANCE,
    bits_set,
    confirm_pairs,
    group_pairs,
    look_of,
    near_pairs,
    near_when_turned,
)
from tests.data.made_sets import encoded, tissue


def all_pairs(hashes: np.ndarray, distance: int) -> list[list[int]]:
    """The definition: every two are compared."""
    return [
        [i, j]
        for i, j in combinations(range(len(hashes)), 2)
        if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= distance
    ]


def families(count: int, flips: int, seed: int = 0) -> np.ndarray:
    """Distinct hashes, many of which are few bits from another one."""
    rng = np.random.default_rng(seed)
    hashes = []
    for value in rng.integers(0, 1 << 63, count // 4, dtype=np.uint64):
        hashes.append(int(value))
        for _ in range(3):
            bits = rng.choice(64, rng.integers(0, flips + 1), replace=False)
            hashes.append(int(value) ^ sum(1 << int(bit) for bit in bits))
    return np.array(sorted(set(hashes)), np.uint64)


@pytest.mark.parametrize("distance", [0, 1, 4, 7, 16])
def test_pairs_are_those_of_comparing_all(distance):
    hashes = families(200, flips=distance + 3)
    pairs = near_pairs(hashes, distance)
    assert pairs.tolist() == all_pairs(hashes, distance)
    assert (len(pairs) == 0) == (distance == 0)


@pytest.mark.parametrize("hashes", [[], [7], [0, 2**64 - 1], [0, 1]])
def test_few_hashes(hashes):
    assert near_pairs(np.array(hashes, np.uint64), 1).tolist() == all_pairs(np.array(hashes, np.uint64), 1)


def test_hashes_that_crowd_in_a_corner():
    """As of self-similar images: all agree in most bits, so that every bucket is full."""
    rng = np.random.default_rng(0)
    hashes = np.unique(rng.integers(0, 1 << 14, 300).astype(np.uint64))
    assert near_pairs(hashes, 4).tolist() == all_pairs(hashes, 4)


def test_many_hashes_are_not_compared_with_all():
    """Comparing 200,000 with each other would be 20 billion comparisons, some minutes."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, 200_000, dtype=np.uint64)
    hashes = np.unique(np.concatenate([hashes, hashes[:50] ^ np.uint64(0b1011)]))
    pairs = near_pairs(hashes, NEAR_DISTANCE)
    assert len(pairs) == 50
    assert set(bits_set(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]])) == {3}


def slow_when_turned(hashes: np.ndarray, turned: np.ndarray, distance: int) -> list[list[int]]:
    """The definition: the hash of each is compared with the turned ones of each other."""

    def is_near(one: int, other: int) -> bool:
        return any(bin(int(hashes[one]) ^ int(value)).count("1") <= distance for value in turned[other])

    return [[i, j] for i, j in combinations(range(len(hashes)), 2) if is_near(i, j) or is_near(j, i)]


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_turned_pairs_are_those_of_comparing_all(distance):
    hashes = families(120, flips=2)
    rng = np.random.default_rng(1)
    # Turned hashes that are those of other ones, equal to each other, near, or near to none.
    strangers = rng.integers(0, 1 << 63, (len(hashes), 5), dtype=np.uint64)
    turned = np.concatenate([rng.choice(hashes, (len(hashes), 2)), strangers], axis=1)
    turned[::3, 2] = turned[0, 2]
    turned[::4, 3] = hashes[5] ^ np.uint64(3)
    pairs = near_when_turned(hashes, turned, distance)
    assert pairs.tolist() == slow_when_turned(hashes, turned, distance) and len(pairs) > 100


def test_no_hashes_to_turn():
    assert near_when_turned(np.zeros(0, np.uint64), np.zeros((0, 7), np.uint64), 4).shape == (0, 2)


def test_bits_set():
    values = np.array([0, 1, 0xFF, 2**63, 2**64 - 1, 0x0123456789ABCDEF], np.uint64)
    assert bits_set(values).tolist() == [bin(int(value)).count("1") for value in values]


def test_groups_follow_chains():
    groups = group_pairs(6, np.array([[0, 2], [2, 4], [3, 5]]))
    assert groups[0] == groups[2] == groups[4] != groups[3] == groups[5] != groups[1]
    assert len(set(group_pairs(3, np.empty((0, 2), np.int64)))) == 3


def test_the_look_is_imagehash_phash():
    for seed in range(5):
        image = tissue(seed, 130, 90)
        assert f"{look_of(image).hash:016x}" == str(imagehash.phash(image))


@pytest.mark.parametrize("turned", [False, True])
def test_pairs_are_confirmed_by_correlation(turned):
    rng = np.random.default_rng(0)
    grids = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8)
    grids[10:20] = np.clip(grids[:10] + rng.normal(0, np.arange(1, 31, 3)[:, None, None], (10, 8, 8)), 0, 255)
    grids[20] = 255 - grids[0]  # the opposite is not alike
    grids[21:28] = [np.asarray(Image.fromarray(grids[1]).transpose(position)) for position in Image.Transpose]
    grids[28] = 7  # even
    pairs = np.array(list(combinations(range(30), 2)))

    def correlation(one: int, other: int) -> float:
        if grids[one].std() == 0 or grids[other].std() == 0:
            return 0.0
        positions = [Image.fromarray(grids[other]).transpose(p) for p in Image.Transpose] if turned else [grids[other]]
        return max(np.corrcoef(grids[one].ravel(), np.asarray(p).ravel())[0, 1] for p in positions)

    expected = [list(pair) for pair in pairs.tolist() if correlation(*pair) >= LEAST_CORRELATION]
    assert confirm_pairs(pairs, grids, turned=turned).tolist() == expected and len(expected) > 4
    assert confirm_pairs(pairs[:0], grids, turned=turned).shape == (0, 2)


def test_the_grid_is_of_mean_grey_levels():
    image = tissue(3, 160, 160)
    cells = np.asarray(image.convert("L")).astype(float).reshape(8, 20, 8, 20).mean(axis=(1, 3))
    assert np.abs(look_of(image).grid - cells).max() < 4  # the thumbnail's filter reaches over the edges of cells


def test_the_turned_looks_are_those_of_the_turned_image():
    for seed in range(5):
        look = look_of(image := tissue(seed, 128, 128))
        hashes = [int(str(imagehash.phash(image.transpose(position))), 16) for position in Image.Transpose]
        assert len(look.turned) == 7
        # The thumbnail of the turned image may differ by rounding from the turned thumbnail.
        assert all(bin(one ^ other).count("1") <= 2 for one, other in zip(look.turned, hashes, strict=True))


def bits_apart(one: Image.Image, other: Image.Image) -> int:
    return bin(look_of(one).hash ^ look_of(other).hash).count("1")


def reencoded(image: Image.Image, **options: object) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, **options)))


def test_what_is_near_on_real_tiles(shared_data):
    """The table of docs/data_checking.md, on every 20th tile."""
    files = sorted((shared_data / "quilt_like" / "images").iterdir())[::20]
    tiles = [Image.open(file).convert("RGB") for file in files]
    changes = {
        "jpeg 50": lambda image: reencoded(image, quality=50),
        "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
        "quarter turn": lambda image: image.transpose(Image.Transpose.ROTATE_90),
        "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }
    found = {
        name: np.mean([bits_apart(tile, change(tile)) <= NEAR_DISTANCE for tile in tiles])
        for name, change in changes.items()
    }
    assert found == {"jpeg 50": 1, "half": 1, "quarter turn": 0, "mirrored": 0}
    assert all(
        min(bin(look_of(tile).hash ^ value).count("1") for value in look_of(change(tile)).turned) <= NEAR_DISTANCE
        for tile in tiles
        for change in (changes["quarter turn"], changes["mirrored"])
    )
    looks = np.unique(np.array([look_of(tile).hash for tile in tiles], np.uint64))
    assert len(looks) == len(tiles) and len(near_pairs(looks, NEAR_DISTANCE)) == 0
    assert min(look_of(tile).contrast for tile in tiles) > FLAT_CONTRAST


def test_background_has_no_look():
    white, pink = (Image.new("RGB", (64, 64), colour) for colour in ("white", "pink"))
    assert look_of(white).hash == look_of(pink).hash and look_of(white).contrast < FLAT_CONTRAST
