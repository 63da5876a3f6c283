"""Drawn H&E-like tiles with captions that are true of them: the embedded default, load tests of any size.

Nothing here is tissue. The drawings (``synthetic_tissue``) are recognisable, no more: a model that tells them
apart has shown that training works, not that it knows histology. That is why names and pages say "synthetic".
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from quiltnet.data.synthetic_captions import CLASS_NAMES, write_captions
from quiltnet.data.synthetic_tissue import PATTERNS, Attributes, draw_tile
from quiltnet.errors import UserError

MIN_SIZE = 48  # pixels: a small nucleus is then two pixels wide, the least that can still be seen

# First word of a tile's seed: each use has a stream of its own, so no seed of one repeats a tile of another.
PAIR_STREAM, LABELLED_STREAM = 0, 1


@dataclass(frozen=True)
class SyntheticPair:
    """One drawn tile and its captions. image: (H, W, 3) uint8; every caption is true of the image."""

    name: str
    image: np.ndarray
    captions: list[str]
    pattern: str
    attributes: Attributes

    def jpeg(self) -> bytes:
        """Quality 95 without chroma subsampling: thin stained structures keep their colour."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()


def draw_pairs(count: int, size: int, seed: int = 0, *, start: int = 0) -> Iterator[SyntheticPair]:
    """Pairs ``start`` to ``start + count`` of the endless series that ``seed`` names.

    Pair i depends on (seed, i, size) alone, so workers can share a series by ranges; another size is the same
    picture at another resolution. Patterns and attributes are drawn evenly and independently.
    Raises UserError for a size under 48 pixels or a negative number.
    """
    _check(count=count, size=size, seed=seed, start=start)
    return (_draw_pair(index, size, seed) for index in range(start, start + count))


def labelled_tiles(count: int, size: int, seed: int = 0) -> tuple[list[np.ndarray], list[int], list[str]]:
    """Images (H, W, 3) uint8, labels and class names for zero-shot or a probe, classes in turn.

    A shorter call gives the head of a longer one. No tile is one of ``draw_pairs``, whatever the seeds.
    Raises UserError as ``draw_pairs`` does.
    """
    _check(count=count, size=size, seed=seed)
    labels = [index % len(PATTERNS) for index in range(count)]
    images = []
    for index, label in enumerate(labels):
        rng = np.random.default_rng([LABELLED_STREAM, seed, index])
        images.append(draw_tile(PATTERNS[label], Attributes.draw(rng), size, rng))
    return images, labels, [CLASS_NAMES[pattern] for pattern in PATTERNS]


def _draw_pair(index: int, size: int, seed: int) -> SyntheticPair:
    rng = np.random.default_rng([PAIR_STREAM, seed, index])
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    attributes = Attributes.draw(rng)
    captions = write_captions(pattern, attributes, rng)  # before the tile: captions do not depend on its size
    image = draw_tile(pattern, attributes, size, rng)
    return SyntheticPair(f"synthetic-{index:06d}", image, captions, pattern, attributes)


def _check(*, size: int, **numbers: int) -> None:
    if size < MIN_SIZE:
        raise UserError(f"synthetic tile size is {size} pixels; nuclei need at least {MIN_SIZE}: ask for a larger size")
    for name, number in numbers.items():
        if number < 0:
            raise UserError(f"{name} of synthetic tiles is {number}; it counts from 0: give a number of 0 or more")
