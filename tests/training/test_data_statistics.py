from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quiltnet.training import data_statistics
from quiltnet.training.data_statistics import DataStatistics
from tests.ranks import run_ranks


def pairs(numbers: list[int], image_ids: list[int] | None = None, truncated: int = 0) -> SimpleNamespace:
    cut = torch.arange(len(numbers)) < truncated
    return SimpleNamespace(number=torch.tensor(numbers), image_id=torch.tensor(image_ids or numbers), truncated=cut)


def test_what_is_counted():
    statistics = DataStatistics(10, source_counts=lambda position: {"quilt": position})
    statistics.add(pairs([0, 1, 2, 3], truncated=1))
    statistics.add(pairs([3, 4, 5, 6], image_ids=[7, 7, 8, 9], truncated=2))
    assert statistics.collect(8) == {
        "data/truncated_captions": 3 / 8,
        "data/duplicate_images_in_batch": 0.5,
        "data/unique_coverage": 0.7,
        "data/samples_of_quilt": 8.0,
    }
    statistics.add(pairs([7, 8, 9, 0]))
    assert statistics.collect(12)["data/unique_coverage"] == 1.0


def test_coverage_is_left_out_where_samples_have_no_number():
    statistics = DataStatistics(10)
    statistics.add(pairs([-1, -1], image_ids=[1, 2]))
    assert set(statistics.collect(2)) == {"data/truncated_captions", "data/duplicate_images_in_batch"}


def test_large_sets_are_followed_by_every_nth_sample(monkeypatch):
    monkeypatch.setattr(data_statistics, "TRACKED_SAMPLES", 10)
    statistics = DataStatistics(95, np.arange(95) < 20)  # every 10th is followed
    assert statistics._seen.tolist() == [True, True] + [False] * 8
    statistics.add(pairs(list(range(50))))
    assert statistics.collect(50)["data/unique_coverage"] == 0.5


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
