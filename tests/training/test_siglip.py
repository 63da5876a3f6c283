"""SigLIP's loss: the definition against open_clip and by hand, the streamed form against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quiltnet.training.siglip import SigLIP, siglip
from quiltnet.training.siglip_kernels import log1p_sums_, streamed_siglip
from tests.training.test_duplicates import LargestTensor
from tests.training.test_kernels import (
    OPTIONS,
    TOLERANCES,
    assert_near,
    ids,
    in_float64,
    scalar,
    unit_features,
    value_and_gradients,
)


@pytest.mark.parametrize("loss", [siglip, SigLIP(), streamed_siglip])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -10.0), (1.0, 0.0)])
@pytest.mark.parametrize(("dtype", "rows", "width"), [(torch.float64, 1, 16), (torch.float64, 13, 16),
    (torch.float32, 257, 512), (torch.bfloat16, 257, 512)], ids=str)  # fmt: skip
def test_equals_open_clips_loss_in_float64(loss, scale, bias, dtype, rows, width):
    if loss is siglip and dtype == torch.bfloat16:
        return  # the definition computes in what it is given
    of_scalars = torch.promote_types(dtype, torch.float32)
    inputs = (unit_features(rows, width, 0, dtype), unit_features(rows, width, 1, dtype))
    inputs = (*inputs, scalar(scale, of_scalars), scalar(bias, of_scalars))
    expected = in_float64(SigLipLoss(), *inputs)
    ours = value_and_gradients(loss, *inputs)
    assert [part.dtype for part in ours[1:]] == [part.dtype for part in inputs]
    assert_near(ours, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
@pytest.mark.parametrize(("label_smoothing", "hardness"), [(0.0, 0.0), (0.2, 3.0)])
@pytest.mark.parametrize("kept", [[True] * 5, [True, False, True, True, False]], ids=["", "dropped"])
def test_the_definition_is_the_one_by_hand(duplicates, label_smoothing, hardness, kept):
    image_id, caption_id = [0, 0, 1, 2, 3], [0, 1, 1, 2, 2]

    def by_hand(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        total = 0
        for i in range(5):
            for j in range(5):
                share = i == j or image_id[i] == image_id[j] or caption_id[i] == caption_id[j]
                same = share if duplicates != "ignore" else i == j
                if not kept[j] or (duplicates == "mask" and same and i != j):
                    continue
                label = float(same if duplicates == "positive" else i == j)
                label = label * (1 - label_smoothing) + label_smoothing / 2
                cosine = image[i] @ text[j]
                logit = scale * cosine + bias
                raised = logit if same else logit + hardness * cosine.detach()
                # Binary cross-entropy from logits, the part of a label of 0 with the raised one.
                total = total - F.logsigmoid(-raised) - label * logit
        return total / sum(kept)

    inputs = (unit_features(5, seed=0), unit_features(5, seed=1), scalar(7.0), scalar(-3.0))
    numbers = {"image_id": torch.tensor(image_id), "caption_id": torch.tensor(caption_id)}
    options = {"duplicates": duplicates, "label_smoothing": label_smoothing, "hardness": hardness}
    ours = value_and_gradients(siglip, *inputs, kept=torch.tensor(kept), **options, **numbers)
    assert_near(ours, value_and_gradients(by_hand, *inputs), 1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dropped", [False, True], ids=["", "captions dropped"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_option_equals_the_dense_definition(options, dropped, dtype):
    rows = 29
    kept = torch.rand(rows, generator=torch.Generator().manual_seed(4)) < 0.6 if dropped else None
    scalars = scalar(14.25, dtype), scalar(-9.5, dtype)
    inputs = (unit_features(rows, 16, 0, dtype), unit_features(rows, 16, 1, dtype), *scalars)
    expected = in_float64(siglip, *inputs, kept=kept, **options, **ids(rows))
    for chunk_size in (1, 8, None):
        ours = value_and_gradients(streamed_siglip, *inputs, kept=kept, chunk_size=chunk_size, **options, **ids(rows))
        assert_near(ours, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batches_full_of_duplicates_and_zero_vectors(options):
    numbers = torch.zeros(7, dtype=torch.int64)
    options = {**options, "image_id": numbers, "caption_id": numbers}
    image = unit_features(7, seed=0)
    image[3] = 0
    inputs = (image, unit_features(7, seed=1), scalar(100.0), scalar(-10.0))
    expected = value_and_gradients(siglip, *inputs, **options)
    ours = value_and_gradients(streamed_siglip, *inputs, chunk_size=3, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kept", [[True, False, True], [False, False, True], [False, False, False]], ids=str)
@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
def test_captions_that_sit_out(kept, duplicates):
    inputs = (unit_features(3, seed=0), unit_features(3, seed=1), scalar(14.3), scalar(-10.0))
    options = {"image_id": torch.tensor([0, 0, 0]), "caption_id": torch.tensor([1, 2, 3]), "duplicates": duplicates}
    expected = value_and_gradients(siglip, *inputs, kept=torch.tensor(kept), **options)
    ours = value_and_gradients(streamed_siglip, *inputs, kept=torch.tensor(kept), **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    if any(kept):
        assert (ours[2][~torch.tensor(kept)] == 0).all()


@pytest.mark.parametrize("aligned", [0.1, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("bias", [-10.0, -100.0])
def test_float32_keeps_a_small_loss_at_the_largest_scale(aligned, bias):
    image = unit_features(257, 512, seed=0)
    text = F.normalize(unit_features(257, 512, seed=1) + aligned * image, dim=-1)
    inputs = (image.float(), text.float(), scalar(100.0, torch.float32), scalar(bias, torch.float32))
    ours, expected = value_and_gradients(streamed_siglip, *inputs), in_float64(siglip, *inputs)
    logit_error = 100 * 2**-24  # of a logit near 100, and so of the losses' relative error
    assert (ours[0].double() / expected[0] - 1).abs() <= 1e-5 + logit_error


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logarithms_of_products_are_sums_of_logarithms(width, dtype):
    powers = torch.rand(7, width, generator=torch.Generator().manual_seed(0), dtype=dtype) ** 30
    powers[0], powers[1], powers[2] = 0, 1, 1e-30
    expected = powers.double().log1p().sum(1)
    rtol = 4 * width * torch.finfo(dtype).eps if width < 16 else 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(log1p_sums_(powers).double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "options",
    [OPTIONS["plain"], OPTIONS["mask, smoothing"], {"duplicates": "positive", "label_smoothing": 0.1}],
    ids=str,
)
def test_gradients_by_differences(options):
    inputs = (unit_features(5, 3, seed=0), unit_features(5, 3, seed=1), scalar(5.0), scalar(-2.0))
    inputs = tuple(part.requires_grad_() for part in inputs)
    options = {**options, "kept": torch.tensor([True, False, True, True, True])}
    same = {"image_id": torch.tensor([0, 0, 1, 2, 3]), "caption_id": torch.tensor([0, 1, 1, 2, 3])}
    assert torch.autograd.gradcheck(lambda *given: streamed_siglip(*given, chunk_size=2, **options, **same), inputs)


@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
def test_only_gradients_that_are_needed(needed):
    inputs = [unit_features(7, seed=0), unit_features(7, seed=1), scalar(14.3), scalar(-10.0)]
    expected = value_and_gradients(siglip, *inputs)
    for number in needed:
        inputs[number].requires_grad_()
    loss = streamed_siglip(*inputs)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-12, atol=0)
    if needed:
        (3 * loss).backward()
    for number, part in enumerate(inputs):
        assert (part.grad is None) == (number not in needed)
        if number in needed:
            torch.testing.assert_close(part.grad, 3 * expected[1 + number], rtol=1e-12, atol=1e-13)


class MatrixProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


def test_loss_alone_takes_one_matrix_product_and_gradients_two_more():
    bias = torch.nn.Parameter(scalar(-10.0))  # which asks for a gradient under no_grad too
    inputs = (unit_features(40, seed=0), unit_features(40, seed=1), scalar(14.3), bias)
    with torch.no_grad(), MatrixProducts() as forward:
        streamed_siglip(*inputs)
    with MatrixProducts() as both:
        value_and_gradients(streamed_siglip, *inputs)
    assert (forward.count, both.count) == (1, 3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_memory_is_linear_in_the_batch(options):
    rows, chunk_size = 400, 16
    inputs = (unit_features(rows, 8, seed=0), unit_features(rows, 8, seed=1), scalar(10.0), scalar(-10.0))
    kept = torch.arange(rows) % 3 > 0
    with LargestTensor() as largest:
        value_and_gradients(streamed_siglip, *inputs, kept=kept, chunk_size=chunk_size, **options, **ids(rows))
    assert largest.elements == chunk_size * rows


def test_autocast_leaves_it_alone():
    inputs = (unit_features(29, seed=0).float(), unit_features(29, seed=1).float())
    inputs = (*inputs, scalar(10.0, torch.float32), scalar(-10.0, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = value_and_gradients(streamed_siglip, *inputs)
    assert_near(ours, in_float64(siglip, *inputs), 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tower", [0, 1])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["mask, all"], OPTIONS["positive, all"]], ids=str)
def test_what_is_not_finite_stays_so(bad, tower, options):
    inputs = (unit_features(9, seed=0), unit_features(9, seed=1), scalar(10.0), scalar(-10.0))
    inputs[tower][4, 3] = bad
    assert not streamed_siglip(*inputs, chunk_size=4, **options, **ids(9)).isfinite()


def test_the_loss_of_training_draws_captions_anew():
    inputs = (unit_features(29, seed=0), unit_features(29, seed=1), scalar(10.0), scalar(-10.0))
    loss = SigLIP(caption_dropout=0.5)
    torch.manual_seed(7)
    first, second = loss(*inputs), loss(*inputs)
    torch.manual_seed(7)
    kept = torch.rand(29) >= 0.5
    torch.testing.assert_close(first, siglip(*inputs, kept=kept), rtol=1e-12, atol=0)
    assert first != second


def test_a_missing_bias_is_said():
    with pytest.raises(ValueError, match="init_logit_bias=-10"):
        SigLIP()(unit_features(3), unit_features(3), scalar(10.0))
