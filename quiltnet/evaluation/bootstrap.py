"""The same set drawn again and again from its own items, to see how far a number depends on which items they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from quiltnet.evaluation.labelled_set import LabelledSet

CHUNK_ELEMENTS = 2**20  # of one chunk of counts: 4 MiB of float32, of which metrics make several copies


class Resamples:
    """Bootstrap resamples of N items: drawn stratum by stratum, whole groups where there are groups.

    Without groups every resample has as many items of each stratum as the set has. With groups, a group belongs to
    the stratum of most of its items (of several, the lowest), and as many groups are drawn of each stratum as the set
    has; a resample's size, and that of its strata, then varies with the sizes of the groups that were drawn, and a
    class that is nowhere the most frequent can be missing.

    Nothing but the arguments decides what is drawn, so two models' scores on the same items can be compared resample
    by resample (Efron & Tibshirani 1993; TITAN and KEEP also draw 1,000). Intervals are too narrow where a stratum has
    few units (items, or groups): with n of them by a factor of sqrt((n - 1) / n), and with one they do not vary.

    Args:
        size: N.
        strata: (N,) int64, not negative: what a resample must have its share of, such as classes. All one where not
            given.
        groups: N names of what belongs together, such as the patient of a tile.
        count: R.
        seed: of the drawing.

    Attributes:
        units: how many are drawn each time, of items or of groups.
        fewest_units: in any stratum.
    """

    def __init__(
        self,
        size: int,
        *,
        strata: Tensor | None = None,
        groups: Sequence[str] | None = None,
        count: int = 1000,
        seed: int = 0,
    ) -> None:
        assert size > 0 and count > 0
        strata_of_items = np.zeros(size, dtype=np.int64) if strata is None else strata.cpu().numpy()
        assert strata_of_items.shape == (size,) and strata_of_items.min() >= 0
        assert groups is None or len(groups) == size
        self.size = size
        self.count = count
        self.seed = seed
        if groups is None:
            unit_of_items, stratum_of_units = np.arange(size), strata_of_items
        else:
            unit_of_items = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
            stratum_of_units = _most_frequent(unit_of_items, strata_of_items)
        # Units stand stratum by stratum, so that a draw is a number between a stratum's first place and its last.
        order = np.argsort(stratum_of_units, kind="stable")
        place_of_units = np.empty_like(order)
        place_of_units[order] = np.arange(len(order))
        self._place_of_items = place_of_units[unit_of_items]  # (N,)
        _, first, stratum, units = np.unique(
            stratum_of_units[order], return_index=True, return_inverse=True, return_counts=True
        )
        self._first_place = first[stratum]  # (units,)
        self._places = units[stratum].astype(np.float64)  # (units,)
        self.units = len(order)
        self.fewest_units = int(units.min())

    @classmethod
    def of_set(cls, dataset: LabelledSet, count: int = 1000) -> Resamples:
        """Of a set's images class by class: by whole groups where it has them, else by slides, else one by one."""
        groups = dataset.groups if dataset.groups is not None else dataset.slides
        return cls(len(dataset), strata=dataset.labels, groups=groups, count=count)

    def __len__(self) -> int:
        return self.count

    def sha256(self) -> str:
        """The same for two objects that draw the same."""
        digest = hashlib.sha256(f"{self.count} {self.seed}".encode())
        for places in (self._place_of_items, self._first_place, self._places):
            digest.update(places.tobytes())
        return digest.hexdigest()

    def counts(self, chunk: int | None = None) -> Iterator[Tensor]:
        """(r, N) float32: how often each item is in each resample. Chunks of r resamples, in order; 4 MiB by default.

        Each call begins anew, and the size of the chunks does not change what is drawn.
        """
        chunk = chunk or max(1, CHUNK_ELEMENTS // self.size)
        generator = np.random.default_rng(self.seed)
        for start in range(0, self.count, chunk):
            counts = np.empty((min(chunk, self.count - start), self.size), dtype=np.float32)
            for row in counts:
                row[:] = self._draw(generator)[self._place_of_items]
            yield torch.from_numpy(counts)

    def means(self, values: Tensor) -> Tensor:
        """Means of the values (N, M) over the items of each resample: (R, M) float64."""
        assert len(values) == self.size
        values = values.double()
        sums_and_sizes = ((counts.double() @ values, counts.double().sum(dim=1)) for counts in self.counts())
        return torch.cat([sums / sizes[:, None] for sums, sizes in sums_and_sizes])

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        """(units,): how often each unit, by its place, is in the next resample."""
        drawn = (generator.random(self.units) * self._places).astype(np.int64)
        drawn += self._first_place
        return np.bincount(drawn, minlength=self.units)


def _most_frequent(unit_of_items: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """(units,): the stratum of most of a unit's items, the lowest of several."""
    pairs, items = np.unique(np.stack([unit_of_items, strata]), axis=1, return_counts=True)  # (2, P), (P,)
    unit, stratum = pairs
    order = np.lexsort((stratum, -items, unit))
    return stratum[order][np.unique(unit[order], return_index=True)[1]]
