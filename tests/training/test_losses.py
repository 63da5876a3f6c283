"""InfoNCE against open_clip's loss, and W ranks against one process."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from quiltnet.distributed import gather_rows, rank
from quiltnet.model.assembly import build_model
from quiltnet.training.losses import InfoNCE, info_nce
from tests.ranks import run_ranks

TINY = {
    "image": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "embed_dim": 16,
}


def unit_features(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 16, dtype=torch.float64, generator=generator)
    return F.normalize(features, dim=-1).requires_grad_()


@pytest.mark.parametrize("rows", [1, 2, 13])
@pytest.mark.parametrize("loss", [info_nce, InfoNCE()])
def test_value_and_gradients_are_open_clips(loss, rows):
    image, text = unit_features(rows, seed=0), unit_features(rows, seed=1)
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    ours, theirs = loss(image, text, scale), open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    inputs = (image, text, scale)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), rtol=1e-10, atol=1e-12
    )


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49000, (13, 8), generator=generator)
    text[:, -1] = 49407  # the end token, at which the text tower pools
    return image, text


def _gradients(sizes: list[int]) -> dict[str, Tensor]:
    """Gradients of a model wrapped as training wraps it, this rank holding its slice of the 13 pairs."""
    torch.manual_seed(0)
    model = Accelerator(cpu=True).prepare(build_model(**TINY))
    assert isinstance(model, DistributedDataParallel) == (len(sizes) > 1)
    image, text = _batch()
    first = sum(sizes[: rank()])
    mine = slice(first, first + sizes[rank()])
    loss = InfoNCE()(*model(image[mine], text[mine]), sizes=sizes)
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[7, 6], [6, 4, 3], [1, 11, 1]], ids=str)
def test_ranks_with_uneven_batches_give_the_gradients_of_one_process(sizes):
    expected = _gradients([13])
    assert {"clip.logit_scale", "clip.visual.proj", "clip.text_projection"} <= expected.keys()
    for of_rank in run_ranks(_gradients, len(sizes), sizes):
        assert of_rank.keys() == expected.keys()
        for name, gradient in of_rank.items():
            error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-5, name


def _gathered() -> Tensor:
    rows = torch.full((rank() * 2, 3), float(rank()))  # rank 0 holds none
    return gather_rows(rows)


@pytest.mark.slow
def test_gather_rows_takes_any_number_of_rows():
    for gathered in run_ranks(_gathered, 3):
        assert gathered[:, 0].tolist() == [1, 1, 2, 2, 2, 2]
