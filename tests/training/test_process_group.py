"""Ranks that are started again agree among themselves, whatever those before them left in the store."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from quiltnet.training.process_group import agree_on_prefix


def start(store: HashStore, delays: list[float]) -> set[str]:
    """What each rank takes for the prefix; they come to the store at different times."""

    def come(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_prefix(store, rank, len(delays))

    with ThreadPoolExecutor(len(delays)) as ranks:
        return set(ranks.map(come, range(len(delays))))


@pytest.mark.parametrize(
    "delays", [[0.0, 0.0, 0.1], [0.1, 0.0, 0.0], [0.0]], ids=["others late", "rank 0 late", "alone"]
)
def test_each_start_has_one_prefix_of_its_own(delays):
    store = HashStore()
    starts = [start(store, delays) for _ in range(3)]
    assert [len(prefixes) for prefixes in starts] == [1, 1, 1]
    assert len(set.union(*starts)) == 3


def test_a_rank_that_died_while_asking_is_not_waited_for():
    store = HashStore()
    store.set("quiltnet/asks/1", "the word of a rank that is gone")
    assert len(start(store, [0.0, 0.1])) == 1
