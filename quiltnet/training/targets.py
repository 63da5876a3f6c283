"""What every image should be told of every caption of the global batch, a chunk of rows at a time.

Rows are images, columns are captions; the N pairs of all ranks are numbered rank after rank. A row's target is a
distribution over columns, a column's one over rows; neither is ever held for more than a chunk of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quiltnet.training.duplicates import Duplicates, partners, sharing_counts


class RowTargets(Protocol):
    """The targets of n rows; logits and gradients are ``(n, N)`` tiles."""

    def sums(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits weighed by the targets: of each row ``(n,)``, and these rows' part of each column ``(N,)``."""

    def adjust_(self, logits: Tensor, ratio: Tensor | None) -> None:
        """In place: divides the logits of positives by what hardness multiplied them with, leaves out by -inf."""

    def subtract_from_(self, gradient: Tensor) -> None:
        """In place: takes the rows' and the columns' targets from the sum of both probabilities."""


class Targets(Protocol):
    hardness: float
    kept: Tensor | None  # (N,) bool, captions that take part

    def of_rows(self, first: int, rows: int) -> RowTargets:
        """Those of pairs ``first`` to ``first + rows``."""


@dataclass(frozen=True)
class PairTargets:
    """The pair itself is the target; pairs that share an image or a caption may be targets too, or be left out.

    With S_ij true where pairs i and j share, and m_i and n_j the numbers below, the targets of "positive" are
    P_ij = S_ij kept_j / m_i for rows and U_ij = S_ij / n_j for columns; otherwise both are the identity. "mask" leaves
    S_ij, i != j, out of rows and columns. Smoothing mixes in a uniform target over what is not left out.

    Attributes:
        duplicates: see ``quiltnet.training.losses.info_nce``, as for the next two.
        label_smoothing, hardness: shares and factors; 0 for neither.
        image_id, caption_id: ``(N,)`` int64; None where duplicates are ignored.
        kept: ``(N,)`` bool, captions that take part; None for all. A pair whose caption does not counts neither as a
            row nor as a column, but its image stays a row of the others' columns.
        row_positives: ``(N,)`` m_i, kept pairs that share with i, at least 1; None where duplicates are ignored.
        column_positives: ``(N,)`` n_j, pairs that share with j; None where duplicates are ignored.
        row_choices, column_choices: ``(N,)`` how many columns a row has left, and the reverse; None without smoothing.
    """

    duplicates: Duplicates = "ignore"
    label_smoothing: float = 0.0
    hardness: float = 0.0
    image_id: Tensor | None = None
    caption_id: Tensor | None = None
    kept: Tensor | None = None
    row_positives: Tensor | None = None
    column_positives: Tensor | None = None
    row_choices: Tensor | None = None
    column_choices: Tensor | None = None

    def of_rows(self, first: int, rows: int) -> RowTargets:
        return _PairRows(self, first, rows)


def pair_targets(
    pairs: int,
    device: torch.device,
    *,
    duplicates: Duplicates = "ignore",
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    image_id: Tensor | None = None,
    caption_id: Tensor | None = None,
    kept: Tensor | None = None,
) -> PairTargets:
    """Counts what ``PairTargets`` needs. ``pairs``: N; the other arguments are its attributes."""
    row_positives = column_positives = row_choices = column_choices = None
    if duplicates == "ignore":
        image_id = caption_id = None
    else:
        row_positives = sharing_counts(image_id, caption_id, kept).clamp_(min=1)
        column_positives = sharing_counts(image_id, caption_id)
    if label_smoothing:
        column_choices = torch.full((pairs,), pairs, device=device)
        row_choices = column_choices if kept is None else kept.sum().expand(pairs)
        if duplicates == "mask":
            row_choices, column_choices = row_choices - row_positives + 1, column_choices - column_positives + 1
    return PairTargets(
        duplicates,
        label_smoothing,
        hardness,
        image_id,
        caption_id,
        kept,
        row_positives,
        column_positives,
        row_choices,
        column_choices,
    )


class _PairRows:
    def __init__(self, targets: PairTargets, first: int, rows: int) -> None:
        self.targets = targets
        self.first = first
        self.own = slice(first, first + rows)
        self.partnered = self.shared = None
        if targets.duplicates != "ignore":
            counts, ids = targets.column_positives, (targets.image_id, targets.caption_id)
            self.partnered, self.shared = partners(self.own, counts, *ids)

    def sums(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        targets, smoothing = self.targets, self.targets.label_smoothing
        diagonal = logits.diagonal(self.first)  # (n,) a view
        row, column = diagonal.clone(), logits.new_zeros(logits.shape[1])
        column[self.own] = diagonal
        shared = None if self.shared is None else torch.where(self.shared, logits[self.partnered], 0)  # (p, N)
        if targets.duplicates == "positive":
            row.index_add_(0, self.partnered, self._kept_only(shared).sum(1)).div_(targets.row_positives[self.own])
            column.add_(shared.sum(0)).div_(targets.column_positives)
        if smoothing:
            all_row, all_column = self._kept_only(logits).sum(1), logits.sum(0)
            if targets.duplicates == "mask":
                all_row.index_add_(0, self.partnered, self._kept_only(shared).sum(1), alpha=-1)
                all_column.sub_(shared.sum(0))
            row = (1 - smoothing) * row + smoothing * all_row / targets.row_choices[self.own]
            column = (1 - smoothing) * column + smoothing * all_column / targets.column_choices
        return row, column

    def adjust_(self, logits: Tensor, ratio: Tensor | None) -> None:
        if ratio is not None:
            logits.diagonal(self.first).mul_(ratio)
        if self.targets.duplicates == "mask":
            logits[self.partnered] = logits[self.partnered].masked_fill_(self.shared, -torch.inf)
        elif self.targets.duplicates == "positive" and ratio is not None:
            partnered = logits[self.partnered]
            logits[self.partnered] = torch.where(self.shared, partnered * ratio, partnered)
        if self.targets.kept is not None:
            logits.masked_fill_(~self.targets.kept, -torch.inf)

    def subtract_from_(self, gradient: Tensor) -> None:
        targets, smoothing = self.targets, self.targets.label_smoothing
        counts = gradient.new_ones(gradient.shape[0])  # (n,) 1 where the row counts
        if targets.kept is not None:
            counts.copy_(targets.kept[self.own])
        row, column = (
            (1 - smoothing) * counts,
            gradient.new_full((gradient.shape[1],), 1 - smoothing),
        )  # of one positive
        if targets.duplicates == "positive":
            row, column = row / targets.row_positives[self.own], column / targets.column_positives
        if smoothing:
            gradient.sub_((smoothing * counts / targets.row_choices[self.own])[:, None])
            gradient.sub_(smoothing * gradient.new_ones(()) / targets.column_choices)
        gradient.diagonal(self.first).sub_(row + column[self.own] * counts)
        if targets.duplicates == "mask":
            gradient[self.partnered] = gradient[self.partnered].masked_fill_(self.shared, 0)
        elif targets.duplicates == "positive":
            gradient[self.partnered] -= torch.where(self.shared, row[self.partnered, None] + column, 0)
        if targets.kept is not None:
            gradient.masked_fill_(~targets.kept, 0)

    def _kept_only(self, tile: Tensor) -> Tensor:
        return tile if self.targets.kept is None else torch.where(self.targets.kept, tile, 0)
