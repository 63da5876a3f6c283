"""What stays, by each of the three wishes; nothing goes before its successor is whole."""

from __future__ import annotations

import math

import pytest

from quiltnet.training.checkpoint import checkpoint_path, list_checkpoints, samples_of, save_checkpoint
from quiltnet.training.retention import Retention, remove_unwanted
from tests.training.test_checkpoint import DAMAGES, monitored, state

SAMPLES = list(range(10, 101, 10))


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), {90, 100}),
        (Retention(newest=1), {100}),
        (Retention(newest=1, best=2), {20, 50, 100}),
        (Retention(newest=1, every_samples=30), {30, 60, 90, 100}),
        (Retention(newest=1, every_samples=25), {30, 50, 80, 100}),
        (Retention(newest=3, best=1, every_samples=50), {20, 50, 80, 90, 100}),
        (Retention(newest=99), set(SAMPLES)),
    ],
)
def test_each_wish_keeps_its_own(retention, kept):
    merit = {10: 0.1, 20: 0.9, 50: 0.8, 70: 0.8, 80: 0.2}
    assert retention.kept(SAMPLES, merit) == kept


def test_what_would_be_among_the_best():
    two = Retention(best=2)
    assert two.is_among_best(0.1, []) and two.is_among_best(0.1, [0.5])
    assert not two.is_among_best(0.1, [0.5, 0.2]) and two.is_among_best(0.3, [0.5, 0.2])
    assert not two.is_among_best(0.5, [0.5, 0.5]), "as good is no better"
    assert not two.is_among_best(math.nan, []) and not Retention().is_among_best(1.0, [])


def test_what_is_unwanted_goes_and_the_damaged_do_not_count(tmp_path):
    for samples_seen, value in ((10, 0.5), (20, 0.1), (30, 0.3), (40, 0.4), (50, None), (60, 9.0)):
        of = None if value is None else monitored(value)
        save_checkpoint(tmp_path, state(samples_seen, monitored=of))
    DAMAGES["truncated"](checkpoint_path(tmp_path, 40) / "model.safetensors")
    DAMAGES["truncated"](checkpoint_path(tmp_path, 60) / "model.safetensors")  # of a resumed run, still ahead
    spare = checkpoint_path(tmp_path, 10)
    gone = remove_unwanted(tmp_path, checkpoint_path(tmp_path, 50), Retention(newest=2, best=1), spare=[spare])
    assert [samples_of(folder) for folder in gone] == [40]
    assert [samples_of(folder) for folder in list_checkpoints(tmp_path)] == [10, 20, 30, 50, 60]
    remove_unwanted(tmp_path, checkpoint_path(tmp_path, 50), Retention(newest=1))
    assert [samples_of(folder) for folder in list_checkpoints(tmp_path)] == [50, 60]
