"""A shuffled order of any length that is computed, not stored."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

ROUNDS = 8


def permuted(places: np.ndarray, length: int, *key: int) -> np.ndarray:
    """Entries at ``places`` of a pseudo-random permutation of ``range(length)``, one for each ``key``.

    A Feistel network over the next power of two; where it leads out of the range it is applied again until it comes
    back (cycle walking: Black and Rogaway, Ciphers with arbitrary finite domains, 2002). A stored permutation of
    50 million samples would be 400 MB in every loader process.

    Args:
        places: int64, each in [0, length).
        key: numbers of at least 0; a seed and an epoch.
    """
    bits = max((length - 1).bit_length(), 2)
    keys = _round_keys(key)
    values = _network(np.asarray(places).astype(np.uint64), bits, keys)
    while len(outside := np.flatnonzero(values >= length)):
        values[outside] = _network(values[outside], bits, keys)
    return values.astype(np.int64)


def _network(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 2**bits): the halves of a value are changed in turn, each by a function of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (_mixed(high, key) & low_mask)
        else:
            high = high ^ (_mixed(low, key) & high_mask)
    return high << low_bits | low


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014)."""
    values = values + key
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
