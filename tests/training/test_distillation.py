"""Distillation against open_clip's, and the streamed form against the dense definition (ranks: test_losses.py)."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import Tensor

from quiltnet.training.distillation import Distillation, distillation_loss
from tests.training.test_duplicates import LargestTensor
from tests.training.test_kernels import TOLERANCES, assert_near, in_float64, scalar, unit_features, value_and_gradients


def teacher(rows: int, width: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    image, text = unit_features(rows, width, 2, dtype), unit_features(rows, width, 3, dtype)
    return image, text, scalar(20.0, dtype)


def test_the_definition_is_open_clips():
    inputs = (unit_features(13, seed=0), unit_features(13, seed=1), scalar(14.3))
    theirs = value_and_gradients(lambda *inputs: open_clip.DistillClipLoss()(*inputs, *teacher(13))[1], *inputs)
    assert_near(value_and_gradients(lambda *inputs: distillation_loss(*inputs, *teacher(13)), *inputs), theirs, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [2, 13, 29])
@pytest.mark.parametrize("chunk_size", [1, 8, None])
def test_streamed_equals_the_definition(dtype, rows, chunk_size):
    inputs = (unit_features(rows, 16, 0, dtype), unit_features(rows, 16, 1, dtype), scalar(14.25, dtype))
    known = teacher(rows, dtype=dtype)
    expected = in_float64(lambda *inputs: distillation_loss(*inputs, *(part.double() for part in known)), *inputs)
    ours = value_and_gradients(lambda *inputs: Distillation()(*inputs, *known, chunk_size=chunk_size), *inputs)
    assert_near(ours, expected, TOLERANCES[dtype])


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    image, text, scale = teacher(13)
    _, *gradients = value_and_gradients(
        lambda *student: Distillation()(*student, image, text, scale), image, text, scale
    )
    assert max(gradient.abs().max() for gradient in gradients) < 1e-14


def test_no_gradient_goes_to_the_teacher():
    known = tuple(part.requires_grad_() for part in teacher(5))
    student = unit_features(5, seed=0).requires_grad_()
    for loss in (distillation_loss, Distillation()):
        loss(student, unit_features(5, seed=1), scalar(14.3), *known).backward()
    assert student.grad is not None
    assert all(part.grad is None for part in known)


def test_memory_is_linear_in_the_batch():
    inputs = (unit_features(400, 8, seed=0), unit_features(400, 8, seed=1), scalar(14.3))
    with LargestTensor() as largest:
        value_and_gradients(lambda *inputs: Distillation()(*inputs, *teacher(400, 8), chunk_size=16), *inputs)
    assert largest.elements == 16 * 400
