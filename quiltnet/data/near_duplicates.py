"""Images that look the same: a perceptual hash each, and all pairs of hashes that differ in few bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, count
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

# docs/data_checking.md has what this distance finds and misses on real tiles.
NEAR_DISTANCE = 4
MAX_DISTANCE = 16

# A tile whose grey thumbnail varies less than this (standard deviation, of 255) is background: its hash is noise, and
# all background looks the same.
FLAT_CONTRAST = 3.0

POSITIONS = tuple(Image.Transpose)  # by which a square is moved onto itself, but for where it is already
HASH_BITS = 64
THUMBNAIL = (32, 32)  # what imagehash.phash reduces an image to
GRID = 8  # cells a side of what confirms that two images with close hashes are alike

# Correlation of two grids, from which on they are. Hashes say little of tiles that are background but for a corner;
# docs/data_checking.md has the numbers.
LEAST_CORRELATION = 0.98
_CANDIDATES_AT_ONCE = 1 << 20
_GRIDS_AT_ONCE = 1 << 16


class Look(NamedTuple):
    """hash: 64 bits, as ``imagehash.phash``. turned: those of the image in its seven other positions, as a tile may
    lie on any side. grid: (8, 8) uint8, mean grey levels. contrast: in grey levels."""

    hash: int
    turned: list[int]
    grid: np.ndarray
    contrast: float


def look_of(image: Image.Image) -> Look:
    """What an image looks like from afar.

    The hash is what the signs of the 8x8 lowest frequencies of a 32x32 grey thumbnail say, after their median: it
    hardly moves under re-encoding, resizing or a change of brightness, and it does under crops and turns.
    """
    thumbnail = image.convert("L").resize(THUMBNAIL, Image.Resampling.LANCZOS)
    turned = [_hash(thumbnail.transpose(position)) for position in POSITIONS]
    levels = np.asarray(thumbnail)
    grid = levels.reshape(GRID, THUMBNAIL[0] // GRID, GRID, -1).mean(axis=(1, 3)).round().astype(np.uint8)
    return Look(_hash(thumbnail), turned, grid, float(levels.std()))


def _hash(thumbnail: Image.Image) -> int:
    return int.from_bytes(np.packbits(imagehash.phash(thumbnail).hash).tobytes(), "big")


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """(P, 2) int64, sorted: the positions i < j of all hashes that differ in at most ``distance`` bits.

    Two hashes that differ in d bits agree in at least m of d + m segments, whichever way the bits are dealt to
    segments. So the hashes are sorted by every choice of m segments, and only those that agree there are compared:
    the work grows a little faster than N, where comparing all grows with its square.

    Args:
        hashes: (N,) uint64, all different (a thousand equal ones are half a million pairs that say one thing).
        distance: 0 to 16.
    """
    found = [np.empty((0, 2), np.int64)]
    for mask in _masks(len(hashes), distance):
        found.extend(_close_where_equal(hashes, mask, distance))
    return np.unique(np.concatenate(found), axis=0)


def near_when_turned(hashes: np.ndarray, turned: np.ndarray, distance: int) -> np.ndarray:
    """(P, 2) int64, sorted: positions i < j where a turned hash of one is within ``distance`` bits of the other's hash.

    Args:
        hashes: (N,) uint64, all different.
        turned: (N, 7) uint64, of each in its other positions.
    """
    if not len(hashes):
        return np.empty((0, 2), np.int64)
    values, number = np.unique(np.concatenate([hashes, turned.ravel()]), return_inverse=True)
    upright, turned_to = number[: len(hashes)], number[len(hashes) :]
    owner = np.full(len(values), -1)
    owner[upright] = np.arange(len(hashes))
    pairs = near_pairs(values, distance)
    pairs = np.concatenate([pairs, pairs[:, ::-1], np.stack([np.arange(len(values))] * 2, axis=1)])
    pairs = pairs[owner[pairs[:, 0]] >= 0]  # an upright one, and what a turned one may be
    # A turned value may be that of several: its owners lie together, in order of value.
    order = np.argsort(turned_to, kind="stable")
    first = np.searchsorted(turned_to[order], pairs[:, 1], side="left")
    times = np.searchsorted(turned_to[order], pairs[:, 1], side="right") - first
    one = np.repeat(owner[pairs[:, 0]], times)
    place = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times) + np.repeat(first, times)
    other = order[place] // turned.shape[1]
    found = np.sort(np.stack([one, other], axis=1)[one != other], axis=1)
    return np.unique(found, axis=0)


def confirm_pairs(pairs: np.ndarray, grids: np.ndarray, *, turned: bool) -> np.ndarray:
    """Those of ``pairs`` whose grids correlate.

    Args:
        pairs: (P, 2) positions in ``grids``.
        grids: (N, 8, 8) uint8.
        turned: the second of each pair is taken in the position that suits best, other than its own.
    """
    confirmed = [np.zeros(0, bool)]
    for begin in range(0, len(pairs), _GRIDS_AT_ONCE):
        one, other = (_centred(grids[side]) for side in pairs[begin : begin + _GRIDS_AT_ONCE].T)
        best = np.max([(one * position).sum(axis=(1, 2)) for position in _positions(other, turned)], axis=0)
        confirmed.append(best >= LEAST_CORRELATION)
    return pairs[np.concatenate(confirmed)]


def group_pairs(count: int, pairs: np.ndarray) -> np.ndarray:
    """(count,) int: the number of the group of each; those of a pair are in one group, and so on along pairs."""
    edges = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def bits_set(values: np.ndarray) -> np.ndarray:
    """How many of the 64 bits of each value are set (numpy 1.26 has no ``bitwise_count``)."""
    pairs, nibbles, halves = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F
    values = values - ((values >> np.uint64(1)) & np.uint64(pairs))
    values = (values & np.uint64(nibbles)) + ((values >> np.uint64(2)) & np.uint64(nibbles))
    values = (values + (values >> np.uint64(4))) & np.uint64(halves)
    return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def _centred(grids: np.ndarray) -> np.ndarray:
    """Of mean 0 and length 1: the sum of products of two is their correlation."""
    centred = grids.astype(np.float32)
    centred -= centred.mean(axis=(1, 2), keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)


def _positions(grids: np.ndarray, turned: bool) -> list[np.ndarray]:
    """(P, 8, 8) as it is, or in the seven other positions of a square."""
    mirrored = grids[:, :, ::-1]
    if not turned:
        return [grids]
    return [np.rot90(grids, k, axes=(1, 2)) for k in (1, 2, 3)] + [np.rot90(mirrored, k, axes=(1, 2)) for k in range(4)]


def _masks(hashes: int, distance: int) -> Iterator[np.uint64]:
    """The bits of each choice of segments that are compared for equality."""
    agree = min((1, 2, 3), key=lambda m: _work(hashes, distance, m))
    segments = distance + agree
    # Bits are dealt out in turn: neighbours, which hold neighbouring frequencies, go to different segments.
    bits = [sum(1 << bit for bit in range(start, HASH_BITS, segments)) for start in range(segments)]
    return (np.uint64(sum(chosen)) for chosen in combinations(bits, agree))


def _work(hashes: int, distance: int, agree: int) -> float:
    """Cost of ``near_pairs``, if bits were drawn evenly: a sort, and the candidates, of each choice of segments."""
    segments = distance + agree
    candidates = hashes**2 / 2 ** (HASH_BITS * agree / segments + 1)
    return math.comb(segments, agree) * (20 * hashes + candidates)


def _close_where_equal(hashes: np.ndarray, mask: np.uint64, distance: int) -> Iterator[np.ndarray]:
    order = np.argsort(hashes & mask, kind="stable")
    sorted_bits = (hashes & mask)[order]
    left = np.arange(len(hashes))
    for step in count(1):
        # Of a run of n equal ones, the first n - step have a partner this many places on.
        left = left[left + step < len(hashes)]
        left = left[sorted_bits[left] == sorted_bits[left + step]]
        if not len(left):
            return
        for begin in range(0, len(left), _CANDIDATES_AT_ONCE):
            some = left[begin : begin + _CANDIDATES_AT_ONCE]
            one, other = order[some], order[some + step]
            close = bits_set(hashes[one] ^ hashes[other]) <= distance
            yield np.sort(np.stack([one[close], other[close]], axis=1), axis=1)
