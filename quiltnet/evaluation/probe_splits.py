"""Which rows a probe learns from, and which of them are held out to choose its penalty on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainPart:
    """So much of a training set: a fraction of each class, or ``shots`` images of each."""

    fraction: float = 1.0
    shots: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.shots is None and self.fraction == 1

    @property
    def name(self) -> str:
        """Such as ``10%`` or ``16-shot``."""
        return f"{100 * self.fraction:g}%" if self.shots is None else f"{self.shots}-shot"

    def rows(self, labels: Tensor, seed: int) -> Tensor:
        """(n,) int64, ascending: what is drawn of labels (N,), at least one row of each class.

        With the same seed a smaller part lies within a larger one.
        """
        labels_of_rows = labels.numpy()
        drawn = []
        for label in np.unique(labels_of_rows):
            own = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels_of_rows == label))
            count = max(1, round(self.fraction * len(own))) if self.shots is None else self.shots
            drawn.append(own[:count])
        return torch.from_numpy(np.sort(np.concatenate(drawn)))


def hold_out(labels: Tensor, groups: Sequence[str] | None, *, fraction: float, seed: int) -> Tensor:
    """Which rows to hold out: whole groups, drawn class by class until a fraction of its rows is out.

    A group counts for the class of its first row. Every class keeps at least one group to train on, so a
    class of a single group is not held out at all.

    Args:
        labels: (N,) int64.
        groups: N names; every row is its own group where there are none.

    Returns:
        (N,) bool, the same for the same arguments.
    """
    rng = np.random.default_rng(seed)
    first_row, group_of_row, rows_of_group = _groups(len(labels), groups)
    label_of_group = labels.numpy()[first_row]
    is_held_out = np.zeros(len(first_row), dtype=bool)
    for label in np.unique(label_of_group):
        drawn = rng.permutation(np.flatnonzero(label_of_group == label))
        rows = rows_of_group[drawn].cumsum()
        enough = int(np.searchsorted(rows, fraction * rows[-1])) + 1
        is_held_out[drawn[: min(enough, len(drawn) - 1)]] = True
    return torch.from_numpy(is_held_out[group_of_row])


def hold_out_folds(labels: Tensor, groups: Sequence[str] | None, *, folds: int, seed: int) -> Tensor:
    """Which rows each fold of a cross-validation holds out: whole groups, those of a class dealt out in turn.

    A group counts for the class of its first row. A class of a single group is never held out.

    Returns:
        (F, N) bool, the same for the same arguments; no row is in two folds. F is ``folds``, or less where there are
        fewer groups to deal out.
    """
    rng = np.random.default_rng(seed)
    first_row, group_of_row, _ = _groups(len(labels), groups)
    label_of_group = labels.numpy()[first_row]
    fold_of_group = np.full(len(first_row), -1)
    dealt = 0
    for label in np.unique(label_of_group):
        own = rng.permutation(np.flatnonzero(label_of_group == label))
        if len(own) > 1:
            fold_of_group[own] = (dealt + np.arange(len(own))) % folds
            dealt += len(own)
    fold_of_row = torch.from_numpy(fold_of_group[group_of_row])
    return torch.arange(min(folds, dealt))[:, None] == fold_of_row


def _groups(count: int, groups: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first row of each group (G,), the group of each row (N,), and the rows of each group (G,)."""
    names = np.arange(count) if groups is None else np.asarray(groups)
    _, first_row, group_of_row, rows_of_group = np.unique(
        names, return_index=True, return_inverse=True, return_counts=True
    )
    return first_row, group_of_row, rows_of_group
