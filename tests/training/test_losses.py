"""The dense definition against independent ones, and W ranks against one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from quiltnet.distributed import gather_rows, max_over_ranks, mean_over_ranks, rank, reduce_scatter_rows, sum_over_ranks
from quiltnet.model.assembly import build_model
from quiltnet.training.distillation import Distillation, distillation_loss
from quiltnet.training.duplicates import draw_kept
from quiltnet.training.kernels import streamed_info_nce
from quiltnet.training.losses import InfoNCE, info_nce
from quiltnet.training.siglip import siglip
from quiltnet.training.siglip_kernels import streamed_siglip
from tests.ranks import run_ranks
from tests.training.test_distillation import teacher
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

TINY = {
    "image": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "embed_dim": 16,
}


@pytest.mark.parametrize("rows", [1, 2, 13])
@pytest.mark.parametrize("loss", [info_nce, InfoNCE()])
def test_value_and_gradients_are_open_clips(loss, rows):
    inputs = (unit_features(rows, seed=0), unit_features(rows, seed=1), scalar(14.3))
    expected = value_and_gradients(open_clip.ClipLoss(), *inputs)
    torch.testing.assert_close(value_and_gradients(loss, *inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_positives_are_soft_labels_of_cross_entropy(label_smoothing):
    shared = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2), torch.ones(4, 4)).double()  # (9, 9)

    def soft_labels(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits, target = scale * image @ text.T, shared / shared.sum(1, keepdim=True)
        rows = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
        return (rows + F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)) / 2

    inputs = (unit_features(9, seed=0), unit_features(9, seed=1), scalar(14.3))
    image_id = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    options = {"duplicates": "positive", "image_id": image_id, "caption_id": torch.arange(9)}
    ours = value_and_gradients(info_nce, *inputs, label_smoothing=label_smoothing, **options)
    assert_near(ours, value_and_gradients(soft_labels, *inputs), 1e-12)


@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("hardness", [0.0, 3.0])
@pytest.mark.parametrize("kept", [[True] * 7, [True, False, True, True, False, True, True]], ids=["", "dropped"])
def test_the_definition_is_the_one_by_hand(duplicates, label_smoothing, hardness, kept):
    image_id, caption_id = [0, 0, 1, 2, 3, 3, 4], [0, 1, 1, 2, 3, 4, 2]

    def by_hand(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        total, pairs = 0, range(7)
        takes_part = [j for j in pairs if kept[j]]
        for from_image in (True, False):
            for i in takes_part:
                candidates = takes_part if from_image else pairs
                partners = {j for j in candidates if image_id[i] == image_id[j] or caption_id[i] == caption_id[j]}
                if duplicates == "ignore":
                    partners = {i}
                if duplicates == "mask":
                    candidates = [j for j in candidates if j == i or j not in partners]
                positives = partners if duplicates == "positive" else {i}
                denominator = 0
                for j in candidates:
                    similarity = image[i] @ text[j] if from_image else image[j] @ text[i]
                    harder = 0 if j in partners else hardness * similarity.detach()
                    denominator = denominator + (scale * similarity + harder).exp()
                    target = label_smoothing / len(candidates)
                    target += (1 - label_smoothing) / len(positives) if j in positives else 0
                    total = total - target * scale * similarity
                total = total + denominator.log()
        return total / (2 * len(takes_part))

    inputs = (unit_features(7, seed=0), unit_features(7, seed=1), scalar(5.0))
    numbers = {"image_id": torch.tensor(image_id), "caption_id": torch.tensor(caption_id)}
    options = {"duplicates": duplicates, "label_smoothing": label_smoothing, "hardness": hardness}
    ours = value_and_gradients(info_nce, *inputs, kept=torch.tensor(kept), **options, **numbers)
    assert_near(ours, value_and_gradients(by_hand, *inputs), 1e-12)


def test_a_harder_negative_weighs_more():
    # exp((s + a) c) in the denominator, but the gradient of exp(s c): Lan et al. 2025.
    image, text = unit_features(5, seed=0), unit_features(5, seed=1)
    _, plain, *_ = value_and_gradients(info_nce, image, text, scalar(5.0))
    _, harder, *_ = value_and_gradients(info_nce, image, text, scalar(5.0), hardness=9.0)
    assert harder.norm() > plain.norm()


# Everything below runs on several ranks: one start of the processes for each number of them.
SIZES = {2: [[7, 7], [12, 1]], 3: [[4, 4, 4], [1, 7, 5], [6, 0, 3]]}
DDP_SIZES = {2: [[7, 6]], 3: [[6, 4, 3], [1, 11, 1]]}
LAYOUTS = [(sizes, dtype) for of_world in SIZES.values() for sizes in of_world for dtype in TOLERANCES]
SIGLIP_OPTIONS = ["plain", "mask", "positive, all"]
WIDTH = 512


def _problem(rows: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor]:
    """Image, text, scale; ids; kept captions."""
    inputs = (unit_features(rows, WIDTH, 0, dtype), unit_features(rows, WIDTH, 1, dtype))
    kept = torch.arange(rows) % 4 != 1
    return (*inputs, scalar(50.0, torch.promote_types(dtype, torch.float32))), ids(rows), kept


def _options(name: str, kept: Tensor) -> dict[str, Any]:
    return {**OPTIONS[name], **({"kept": kept} if "all" in name else {})}


def _slice(sizes: list[int]) -> slice:
    return slice(sum(sizes[: rank()]), sum(sizes[: rank() + 1]))


def _shares(sizes: list[int], dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """This rank's value and gradients of every loss."""
    inputs, numbers, kept = _problem(sum(sizes), dtype)
    own = _slice(sizes)
    mine = (inputs[0][own], inputs[1][own], inputs[2])
    shares = {}
    for name in OPTIONS:
        loss = partial(streamed_info_nce, sizes=sizes, chunk_size=3, **_options(name, kept))
        shares[name] = value_and_gradients(loss, *mine, **{key: part[own] for key, part in numbers.items()})
    image, text, scale = teacher(sum(sizes), dtype=dtype)
    known = (image[own], text[own], scale)
    bias = scalar(-9.5, mine[2].dtype)
    for name in SIGLIP_OPTIONS:
        loss = partial(streamed_siglip, sizes=sizes, chunk_size=3, **_options(name, kept))
        shares[f"siglip {name}"] = value_and_gradients(
            loss, *mine, bias, **{key: part[own] for key, part in numbers.items()}
        )
    shares["distillation"] = value_and_gradients(
        lambda *student: Distillation()(*student, *known, sizes=sizes, chunk_size=3), *mine
    )
    return shares


def _pixels_and_tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49000, (13, 8), generator=generator)
    text[:, -1] = 49407  # the end token, at which the text tower pools
    return image, text


def _ddp_gradients(sizes: list[int]) -> dict[str, Tensor]:
    """Gradients of a model wrapped as training wraps it, this rank holding its slice of the 13 pairs."""
    torch.manual_seed(0)
    model = Accelerator(cpu=True).prepare(build_model(**TINY))
    assert isinstance(model, DistributedDataParallel) == (len(sizes) > 1)
    image, text = _pixels_and_tokens()
    own = _slice(sizes)
    features = model(image[own], text[own])
    loss = InfoNCE()(features.image_features, features.text_features, features.logit_scale, sizes=sizes)
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def _collectives(world_size: int) -> dict[str, Tensor]:
    sizes = [2 * number for number in range(world_size)]  # rank 0 holds none
    rows = torch.full((sizes[rank()], 3), float(rank()))
    blocks = torch.repeat_interleave(torch.arange(float(world_size)), torch.tensor(sizes))[:, None].expand(-1, 3)
    number = torch.tensor([float(rank()), -float(rank())])
    torch.manual_seed(rank())
    return {
        "gathered": gather_rows(rows),
        "gathered, sizes known": gather_rows(rows, sizes),
        "scattered": reduce_scatter_rows(blocks * (rank() + 1), sizes),
        "sum": sum_over_ranks(number),
        "max": max_over_ranks(number),
        "mean": mean_over_ranks(number),
        "untouched": number,
        "kept": draw_kept(torch.zeros(sizes[rank()], 1), 0.5, sizes),
    }


def _all_of_a_rank(world_size: int) -> dict[str, Any]:
    return {
        **{f"{sizes} {dtype}": _shares(sizes, dtype) for sizes in SIZES[world_size] for dtype in TOLERANCES},
        **{f"{sizes} ddp": _ddp_gradients(sizes) for sizes in DDP_SIZES[world_size]},
        "collectives": _collectives(world_size),
    }


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {world_size: run_ranks(_all_of_a_rank, world_size, world_size) for world_size in SIZES}


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype"), LAYOUTS, ids=str)
@pytest.mark.parametrize("name", [*OPTIONS, "distillation"])
def test_shares_of_ranks_make_the_loss_of_one_process(ranks, sizes, dtype, name):
    inputs, numbers, kept = _problem(sum(sizes), dtype)
    if name == "plain":
        expected = in_float64(open_clip.ClipLoss(), *inputs)
    elif name == "distillation":
        known = tuple(part.double() for part in teacher(sum(sizes), dtype=dtype))
        expected = in_float64(lambda *student: distillation_loss(*student, *known), *inputs)
    else:
        expected = in_float64(info_nce, *inputs, **_options(name, kept), **numbers)
    shares = [of_rank[f"{sizes} {dtype}"][name] for of_rank in ranks[len(sizes)]]
    loss, image, text, scale = zip(*shares, strict=True)
    mean = (
        torch.stack(loss).mean(),
        torch.cat(image).double() / len(sizes),  # DDP's mean over ranks
        torch.cat(text).double() / len(sizes),
        torch.stack(scale).mean(),
    )
    assert_near(mean, expected, TOLERANCES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype"), LAYOUTS, ids=str)
@pytest.mark.parametrize("name", SIGLIP_OPTIONS)
def test_shares_of_ranks_make_siglips_loss_of_one_process(ranks, sizes, dtype, name):
    inputs, numbers, kept = _problem(sum(sizes), dtype)
    inputs = (*inputs, scalar(-9.5, inputs[2].dtype))
    if name == "plain":
        expected = in_float64(SigLipLoss(), *inputs)
    else:
        expected = in_float64(siglip, *inputs, **_options(name, kept), **numbers)
    shares = [of_rank[f"{sizes} {dtype}"][f"siglip {name}"] for of_rank in ranks[len(sizes)]]
    loss, image, text, scale, bias = zip(*shares, strict=True)
    mean = (
        torch.stack(loss).mean(),
        torch.cat(image).double() / len(sizes),
        torch.cat(text).double() / len(sizes),
        torch.stack(scale).mean(),
        torch.stack(bias).mean(),
    )
    assert_near(mean, expected, TOLERANCES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [sizes for of_world in DDP_SIZES.values() for sizes in of_world], ids=str)
def test_ranks_with_uneven_batches_give_the_gradients_of_one_process(ranks, sizes):
    expected = _ddp_gradients([13])
    assert {"clip.logit_scale", "clip.visual.proj", "clip.text_projection"} <= expected.keys()
    for of_rank in ranks[len(sizes)]:
        gradients = of_rank[f"{sizes} ddp"]
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-5, name


@pytest.mark.slow
def test_collectives_take_any_number_of_rows(ranks):
    for number, of_rank in enumerate(ranks[3]):
        found = of_rank["collectives"]
        assert found["gathered"][:, 0].tolist() == found["gathered, sizes known"][:, 0].tolist() == [1, 1, 2, 2, 2, 2]
        assert found["scattered"].tolist() == [[number * 6.0] * 3] * (2 * number)  # 1 + 2 + 3 times the block's number
        assert found["sum"].tolist() == [3, -3]
        assert found["max"].tolist() == [2, 0]
        assert found["mean"].tolist() == [1, -1]
        assert found["untouched"].tolist() == [number, -number]
        assert torch.equal(found["kept"], ranks[3][0]["collectives"]["kept"])
        assert len(found["kept"]) == 6
