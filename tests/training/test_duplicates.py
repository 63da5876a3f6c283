"""Sharing pairs are counted without a mask of all pairs; options are checked before a run begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quiltnet.errors import UserError
from quiltnet.training.duplicates import all_if_none, draw_kept, sharing, sharing_counts
from quiltnet.training.losses import InfoNCE


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that an operation makes or views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def random_ids(pairs: int, values: int, seed: int) -> Tensor:
    """Large and negative ids, as hashes are."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, values, (pairs,), generator=generator) - values // 2) * (2**57 + 1)


@pytest.mark.parametrize("pairs", [1, 2, 40])
@pytest.mark.parametrize("values", [1, 4, 30])
def test_counts_are_those_of_the_mask(pairs, values):
    image_id, caption_id = random_ids(pairs, values, seed=0), random_ids(pairs, values, seed=1)
    kept = torch.rand(pairs, generator=torch.Generator().manual_seed(2)) < 0.5
    mask = sharing(image_id, caption_id, image_id, caption_id)
    assert torch.equal(sharing_counts(image_id, caption_id), mask.sum(1))
    assert torch.equal(sharing_counts(image_id, caption_id, kept), (mask & kept).sum(1))


def test_sharing_is_direct():
    # 0 and 1 show one image, 1 and 2 say one sentence: that makes 0 and 2 no pair.
    shared = sharing(*(torch.tensor(ids) for ids in ([5, 5, 6], [7, 8, 8], [5, 5, 6], [7, 8, 8])))
    assert shared.tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def test_counting_needs_linear_memory():
    ids = random_ids(1000, 50, seed=0)
    with LargestTensor() as largest:
        sharing_counts(ids, ids.flip(0), ids > 0)
    assert largest.elements <= 1001


def test_captions_sit_out_at_random_but_never_all():
    torch.manual_seed(0)
    first, second = (draw_kept(torch.zeros(2000, 2), 0.25, [2000]) for _ in range(2))
    assert first.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert not torch.equal(first, second)
    assert all_if_none(torch.tensor([False, False])).tolist() == [True, True]
    assert all_if_none(torch.tensor([False, True])).tolist() == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duplicates": "positives"}, "did you mean positive"),
        ({"duplicates": "masked"}, "did you mean mask"),
        ({"duplicates": None}, "none of ignore, mask, positive"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and less than 1"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"caption_dropout": float("nan")}, "caption_dropout"),
        ({"label_smoothing": "a little"}, "label_smoothing=a little"),
        ({"hardness": -1.0}, "hardness=-1.0"),
        ({"hardness": None}, "hardness=None"),
        ({"hardness": float("inf")}, "hardness"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        InfoNCE(**options)


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
def test_ids_are_required_to_compare_them(duplicates):
    features = torch.eye(3)
    with pytest.raises(ValueError, match="pass image_id and caption_id"):
        InfoNCE(duplicates=duplicates)(features, features, torch.tensor(1.0), image_id=torch.arange(3))
