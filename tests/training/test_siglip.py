"""SigLIP's loss: the definition against open_clip and by hand, the streamed form against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor

from quiltnet.training.siglip import SigLIP, siglip
from quiltnet.training.siglip_kernels import streamed_siglip
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


def test_gradients_by_differences():
    inputs = (unit_features(4, seed=0), unit_features(4, seed=1), scalar(5.0), scalar(-2.0))
    inputs = tuple(part.requires_grad_() for part in inputs)
    assert torch.autograd.gradcheck(lambda *given: streamed_siglip(*given, chunk_size=3), inputs)


def test_no_tensor_of_all_logits():
    inputs = (unit_features(300, seed=0), unit_features(300, seed=1), scalar(10.0), scalar(-10.0))
    with LargestTensor() as largest:
        value_and_gradients(streamed_siglip, *inputs, chunk_size=10)
    assert largest.elements <= 300 * 16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad):
    image = unit_features(5, seed=0)
    image[2, 3] = bad
    assert not streamed_siglip(image, unit_features(5, seed=1), scalar(10.0), scalar(-10.0)).isfinite()


def test_a_missing_bias_is_said():
    with pytest.raises(ValueError, match="init_logit_bias=-10"):
        SigLIP()(unit_features(3), unit_features(3), scalar(10.0))
