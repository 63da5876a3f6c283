"""Distillation: the student's rows and columns are told to look like those of a frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quiltnet.distributed import gather_rows, rank, world_size
from quiltnet.training.kernels import log_sum_exps, streamed_cross_entropy
from quiltnet.training.targets import PairTargets


def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor,
) -> Tensor:
    """Cross-entropy of the student's logits with the teacher's softmax: the dense definition, for one process.

    Over images and over captions, as ``dist_loss`` of open_clip's ``DistillClipLoss``; the contrastive loss that is
    returned beside it there, and added with weight 1, is the caller's to add.

    Args:
        image_features, text_features: ``(B, D)``, unit length.
        logit_scale: ``()``.
        teacher_image_features, teacher_text_features: ``(B, D')``, unit length; no gradient goes to them.
        teacher_logit_scale: ``()``.

    Returns:
        ``()``: the mean over rows and columns.
    """
    with torch.no_grad():
        teacher = teacher_logit_scale * teacher_image_features @ teacher_text_features.T  # (B, B)
    student = logit_scale * image_features @ text_features.T  # (B, B)
    rows = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    columns = -(teacher.softmax(0) * student.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


class Distillation:
    """``distillation_loss`` over the pairs of all ranks, streamed: a chunk of rows of either's logits at a time."""

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        teacher_image_features: Tensor,
        teacher_text_features: Tensor,
        teacher_logit_scale: Tensor,
        *,
        sizes: Sequence[int] | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:  # all ranks
        """The local share of the loss, whose mean over ranks is that of the global batch.

        Args:
            image_features, text_features: ``(B, D)``, unit length, of this rank.
            logit_scale: ``()``.
            teacher_image_features, teacher_text_features: ``(B, D')``, unit length, of this rank.
            teacher_logit_scale: ``()``.
            sizes: B of each rank, where they differ.
            chunk_size: rows at once; by default as many as a tile of moderate size has.
        """
        sizes = list(sizes or [len(image_features)] * world_size())
        with torch.no_grad():
            targets = TeacherTargets(
                teacher_image_features, teacher_text_features, teacher_logit_scale, sizes, chunk_size
            )
        return streamed_cross_entropy(image_features, text_features, logit_scale, targets, sizes, chunk_size)


class TeacherTargets:  # all ranks
    """Softmax of the teacher's logits over each row and over each column, made anew for each chunk."""

    hardness = 0.0
    kept = None

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor, sizes: Sequence[int], chunk_size: int | None
    ) -> None:
        self.image = image
        self.all_text = gather_rows(text, sizes)  # (N, D')
        self.scale = scale
        self.first = sum(sizes[: rank()])
        sums = log_sum_exps(image, self.all_text, scale, PairTargets(), sizes, chunk_size)
        self.row_lse, self.column_lse = sums.row, sums.column

    def of_rows(self, first: int, rows: int) -> _TeacherRows:
        own = slice(first - self.first, first - self.first + rows)
        return _TeacherRows(self.image[own], self.all_text, self.scale, self.row_lse[own], self.column_lse)


class _TeacherRows:
    def __init__(self, image: Tensor, all_text: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor) -> None:
        wide = row_lse.dtype
        logits = (image.to(wide) * scale) @ all_text.to(wide).T  # (n, N)
        self.by_row = (logits - row_lse[:, None]).exp_()
        self.by_column = logits.sub_(column_lse).exp_()

    def sums(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return (self.by_row.mul_(logits)).sum(1), (self.by_column.mul_(logits)).sum(0)  # not needed afterwards

    def adjust_(self, logits: Tensor, ratio: Tensor | None) -> None:
        """A teacher raises no negatives and leaves nothing out."""

    def subtract_from_(self, gradient: Tensor) -> None:
        gradient.sub_(self.by_row).sub_(self.by_column)
