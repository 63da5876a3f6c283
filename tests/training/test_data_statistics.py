from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quiltnet.training import data_statistics
from quiltnet.training.data_statistics import DataStatistics, duplicate_advice, loss_floor
from tests.ranks import run_ranks


def pairs(
    numbers: list[int], image_ids: list[int] | None = None, caption_ids: list[int] | None = None, truncated: int = 0
) -> SimpleNamespace:
    return SimpleNamespace(
        number=torch.tensor(numbers),
        image_id=torch.tensor(image_ids or numbers),
        caption_id=torch.tensor(caption_ids or numbers),
        truncated=torch.arange(len(numbers)) < truncated,
    )


def test_what_is_counted():
    statistics = DataStatistics(10, source_counts=lambda position: {"quilt": position})
    statistics.add(pairs([0, 1, 2, 3], truncated=1))
    statistics.add(pairs([3, 4, 5, 6], image_ids=[7, 7, 8, 9], caption_ids=[5, 5, 5, 6], truncated=2))
    assert statistics.collect(8) == {
        "data/truncated_captions": 3 / 8,
        "data/duplicate_images_in_batch": 0.5,
        "data/duplicate_captions_in_batch": 0.75,
        "data/unique_coverage": 0.7,
        "data/samples_of_quilt": 8.0,
    }
    statistics.add(pairs([7, 8, 9, 0]))
    assert statistics.collect(12)["data/unique_coverage"] == 1.0


def test_coverage_is_left_out_where_samples_have_no_number():
    statistics = DataStatistics(10)
    statistics.add(pairs([-1, -1], image_ids=[1, 2]))
    assert "data/unique_coverage" not in statistics.collect(2)


def test_large_sets_are_followed_by_every_nth_sample(monkeypatch):
    monkeypatch.setattr(data_statistics, "TRACKED_SAMPLES", 10)
    statistics = DataStatistics(95, np.arange(95) < 20)  # every 10th is followed
    assert statistics._seen.tolist() == [True, True] + [False] * 8
    statistics.add(pairs(list(range(50))))
    assert statistics.collect(50)["data/unique_coverage"] == 0.5


DISTINCT, TWINS = np.arange(8), np.arange(8) // 2


@pytest.mark.parametrize(
    ("images", "captions", "duplicates", "words"),
    [
        (DISTINCT, DISTINCT, "ignore", None),
        (DISTINCT, np.array([0, 0, 1, 2, 3, 4, 5, 6]), "ignore", None),  # a quarter: no mode is better
        (DISTINCT, TWINS, "ignore", "InfoNCE cannot fall below 0.69"),
        (DISTINCT, TWINS, "positive", None),
        (DISTINCT, TWINS, "mask", "ignore or positive did better"),
        (TWINS, DISTINCT, "ignore", "--layout images.*loss.duplicates=positive meanwhile"),
        (TWINS, DISTINCT, "positive", "--layout images.*smaller global_batch_size$"),
    ],
)
def test_advice_that_follows_from_repeats(images, captions, duplicates, words):
    advice = duplicate_advice(images, captions, duplicates)
    assert advice is None if words is None else re.search(words, advice)


def test_advice_is_given_once_and_only_where_the_loss_is_known(caplog):
    for duplicates, times in ((None, 0), ("ignore", 1)):
        caplog.clear()
        statistics = DataStatistics(4, duplicates=duplicates)
        for _ in range(2):
            statistics.add(pairs([0, 1, 2, 3], caption_ids=[1, 1, 1, 1]))
            statistics.collect(4)
        assert [record.getMessage()[:4] for record in caplog.records] == ["0% o"] * times


@pytest.mark.parametrize(
    ("images", "captions"),
    [(DISTINCT, TWINS), (TWINS, np.zeros(8, int)), (np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 3]))],
)
def test_no_features_get_below_the_floor(images, captions):
    """InfoNCE is convex in the logits of image g and caption c: where its gradient is zero, there is nothing below."""
    times = torch.zeros(8, 8, dtype=torch.float64)
    times.index_put_((torch.from_numpy(images), torch.from_numpy(captions)), torch.ones(()).double(), accumulate=True)
    table = (times / times.sum(0).clamp(min=1) / times.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-12).log()
    table.requires_grad_()
    logits, target = table[images][:, captions], torch.arange(len(images))
    for loss in (torch.nn.functional.cross_entropy(part, target) for part in (logits, logits.T)):
        assert loss.item() == pytest.approx(loss_floor(images, captions), abs=1e-9)
        assert torch.autograd.grad(loss, table, retain_graph=True)[0].abs().max() < 1e-9


def of_rank() -> dict[str, float]:
    rank = torch.distributed.get_rank()
    statistics = DataStatistics(8)
    statistics.add(pairs([[0, 1, 2], [3, 4]][rank], image_ids=[[1, 2, 3], [3, 4]][rank], truncated=rank))
    return statistics.collect(5)


@pytest.mark.slow
def test_two_ranks_tell_the_same():
    one, two = run_ranks(of_rank, 2)
    assert one == two
    assert one["data/unique_coverage"] == 5 / 8 and one["data/duplicate_images_in_batch"] == 2 / 5
    assert one["data/truncated_captions"] == 1 / 5
