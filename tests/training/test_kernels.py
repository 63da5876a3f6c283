"""The streamed loss against its dense definition: values, gradients, memory, and every awkward batch."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.training.kernels import streamed_info_nce
from quiltnet.training.losses import InfoNCE, info_nce
from tests.training.test_duplicates import LargestTensor, random_ids

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
OPTIONS = {
    "plain": {},
    "mask": {"duplicates": "mask"},
    "positive": {"duplicates": "positive"},
    "smoothing": {"label_smoothing": 0.1},
    "hardness": {"hardness": 9.0},
    "mask, smoothing": {"duplicates": "mask", "label_smoothing": 0.2},
    "positive, hardness": {"duplicates": "positive", "hardness": 3.0},
    "mask, all": {"duplicates": "mask", "label_smoothing": 0.1, "hardness": 3.0},
    "positive, all": {"duplicates": "positive", "label_smoothing": 0.1, "hardness": 3.0},
}


def unit_features(rows: int, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1)
    return features.to(dtype)


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def value_and_gradients(loss: Any, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The loss, and its gradient by each input."""
    inputs = tuple(part.detach().clone().requires_grad_() for part in inputs)
    value = loss(*inputs, **options)
    return (value.detach(), *torch.autograd.grad(value, inputs))


def in_float64(loss: Any, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return value_and_gradients(loss, *(part.double() for part in inputs), **options)


def assert_near(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """max |a - b| / max |b| of each."""
    assert len(ours) == len(expected)
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error <= tolerance, f"{number}: {error:.1e}"


def ids(rows: int) -> dict[str, Tensor]:
    """About every third pair shares."""
    return {"image_id": random_ids(rows, 3 * rows, seed=2), "caption_id": random_ids(rows, 3 * rows, seed=3)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(2, 16), (13, 16), (257, 512)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_equals_open_clips_loss_in_float64(dtype, rows, width, scale):
    inputs = (unit_features(rows, width, 0, dtype), unit_features(rows, width, 1, dtype), scalar(scale, torch.float32))
    if dtype == torch.float64:
        inputs = (*inputs[:2], inputs[2].double())
    expected = in_float64(open_clip.ClipLoss(), *inputs)
    ours = value_and_gradients(streamed_info_nce, *inputs, chunk_size=100)
    assert [part.dtype for part in ours[1:]] == [part.dtype for part in inputs]
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(ours, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dropped", [False, True], ids=["", "captions dropped"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_option_equals_the_dense_definition(options, dropped, dtype):
    rows = 29
    kept = torch.rand(rows, generator=torch.Generator().manual_seed(4)) < 0.6 if dropped else None
    inputs = (unit_features(rows, 16, 0, dtype), unit_features(rows, 16, 1, dtype), scalar(14.25, dtype))
    expected = in_float64(info_nce, *inputs, kept=kept, **options, **ids(rows))
    for chunk_size in (1, 8, None):
        ours = value_and_gradients(streamed_info_nce, *inputs, kept=kept, chunk_size=chunk_size, **options, **ids(rows))
        assert_near(ours, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("image_ids", "caption_ids"), [(1, 1), (1, 30), (30, 1), (3, 4)])
def test_batches_full_of_duplicates(options, image_ids, caption_ids):
    numbers = torch.arange(13)
    options = {**options, "image_id": numbers % image_ids, "caption_id": numbers % caption_ids}
    inputs = (unit_features(13, seed=0), unit_features(13, seed=1), scalar(14.3))
    expected = value_and_gradients(info_nce, *inputs, **options)
    ours = value_and_gradients(streamed_info_nce, *inputs, chunk_size=5, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)  # all masked: the loss is 0


@pytest.mark.parametrize("kept", [[True, False, True], [False, False, True], [False, False, False]], ids=str)
@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
def test_captions_that_sit_out(kept, duplicates):
    inputs = (unit_features(3, seed=0), unit_features(3, seed=1), scalar(14.3))
    options = {"image_id": torch.tensor([0, 0, 0]), "caption_id": torch.tensor([1, 2, 3]), "duplicates": duplicates}
    expected = value_and_gradients(info_nce, *inputs, kept=torch.tensor(kept), **options)
    ours = value_and_gradients(streamed_info_nce, *inputs, kept=torch.tensor(kept), **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    if any(kept):
        assert (ours[2][~torch.tensor(kept)] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_one_pair_has_no_loss_at_all(dtype):
    inputs = (unit_features(1, 512, 0, dtype), unit_features(1, 512, 1, dtype), scalar(100.0, torch.float32))
    assert [part.abs().max().item() for part in value_and_gradients(streamed_info_nce, *inputs)] == [0, 0, 0, 0]


@pytest.mark.parametrize("zero", ["image", "text", "both"])
def test_zero_vectors(zero):
    image, text = unit_features(9, seed=0), unit_features(9, seed=1)
    image[2:4] *= zero == "text"
    text[3:6] *= zero == "image"
    inputs = (image, text, scalar(100.0))
    expected = value_and_gradients(info_nce, *inputs)
    torch.testing.assert_close(
        value_and_gradients(streamed_info_nce, *inputs, chunk_size=4), expected, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("aligned", [0.1, 0.2, 0.3, 1.0])
def test_float32_keeps_a_small_loss_at_the_largest_scale(aligned):
    # Log-sum-exps near 100: a loss that is their difference to the targets must not be rounded like them.
    image = unit_features(257, 512, seed=0)
    text = F.normalize(unit_features(257, 512, seed=1) + aligned * image, dim=-1)
    inputs = (image.float(), text.float(), scalar(100.0, torch.float32))
    ours, expected = value_and_gradients(streamed_info_nce, *inputs), in_float64(info_nce, *inputs)
    assert (ours[0].double() - expected[0]).abs() <= 1e-5 * expected[0] + 1e-7
    if expected[0] > 0.1:  # below that, 1 - p is a rounding error of p in float32, here and in open_clip's loss
        assert_near(ours[1:3], expected[1:3], 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tower", [0, 1])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["mask, all"], OPTIONS["positive, all"]], ids=str)
def test_a_feature_that_is_not_finite_gives_a_loss_that_is_not(bad, tower, options):
    inputs = (unit_features(9, seed=0), unit_features(9, seed=1), scalar(14.3))
    inputs[tower][4, 3] = bad
    assert value_and_gradients(streamed_info_nce, *inputs, chunk_size=4, **options, **ids(9))[0].isnan()


@pytest.mark.parametrize(
    "options",
    [OPTIONS["plain"], OPTIONS["mask, smoothing"], {"duplicates": "positive", "label_smoothing": 0.1}],
    ids=str,
)
def test_gradients_are_those_of_the_value(options):
    kept = torch.tensor([True, False, True, True, True])
    inputs = tuple(
        part.requires_grad_() for part in (unit_features(5, 3, seed=0), unit_features(5, 3, seed=1), scalar(5.0))
    )
    same = {"image_id": torch.tensor([0, 0, 1, 2, 3]), "caption_id": torch.tensor([0, 1, 1, 2, 3])}
    assert torch.autograd.gradcheck(
        lambda *inputs: streamed_info_nce(*inputs, kept=kept, chunk_size=2, **options, **same), inputs
    )


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_only_gradients_that_are_needed(needed):
    inputs = [unit_features(7, seed=0), unit_features(7, seed=1), scalar(14.3)]
    expected = value_and_gradients(info_nce, *inputs)
    for number in needed:
        inputs[number].requires_grad_()
    streamed_info_nce(*inputs).backward()
    for number, part in enumerate(inputs):
        assert (part.grad is None) == (number not in needed)
        if number in needed:
            torch.testing.assert_close(part.grad, expected[1 + number], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_memory_is_linear_in_the_batch(options):
    rows, chunk_size = 400, 16
    inputs = (unit_features(rows, 8, seed=0), unit_features(rows, 8, seed=1), scalar(14.3))
    kept = torch.arange(rows) % 3 > 0
    with LargestTensor() as largest:
        value_and_gradients(streamed_info_nce, *inputs, kept=kept, chunk_size=chunk_size, **options, **ids(rows))
    assert largest.elements == chunk_size * rows


def test_autocast_leaves_it_alone():
    inputs = (unit_features(29, seed=0).float(), unit_features(29, seed=1).float(), scalar(14.3, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = value_and_gradients(streamed_info_nce, *inputs)
    assert_near(ours, in_float64(info_nce, *inputs), 1e-5)


def test_upstream_gradients_are_passed_on():
    inputs = (unit_features(7, seed=0), unit_features(7, seed=1), scalar(14.3))
    single, thrice = (
        value_and_gradients(lambda *inputs, times=times: times * streamed_info_nce(*inputs), *inputs)
        for times in (1, 3)
    )
    torch.testing.assert_close(thrice, tuple(3 * part for part in single))


def test_the_loss_of_training_draws_captions_anew():
    image, text, scale = unit_features(29, seed=0), unit_features(29, seed=1), scalar(14.3)
    loss = InfoNCE(caption_dropout=0.5)
    torch.manual_seed(7)
    first, second = loss(image, text, scale), loss(image, text, scale)
    torch.manual_seed(7)
    kept = torch.rand(29) >= 0.5
    torch.testing.assert_close(first, info_nce(image, text, scale, kept=kept), rtol=1e-12, atol=0)
    assert first != second


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="from torch 2.14")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_torchs_own_chunked_loss_is_of_the_same_opinion(label_smoothing):
    def both_ways(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        target = torch.arange(len(image))
        options = {"label_smoothing": label_smoothing}
        rows = F.linear_cross_entropy(scale * image, text, target, **options)
        return (rows + F.linear_cross_entropy(scale * text, image, target, **options)) / 2

    inputs = (unit_features(29, seed=0), unit_features(29, seed=1), scalar(14.3))
    ours = value_and_gradients(streamed_info_nce, *inputs, label_smoothing=label_smoothing, chunk_size=8)
    assert_near(ours, value_and_gradients(both_ways, *inputs), 1e-12)
