"""Checkpoints are whole or absent."""

from __future__ import annotations

import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.training import checkpoint
from quiltnet.training.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint


def state(samples_seen: int) -> dict:
    weights = {"a": torch.randn(3, 2), "n": torch.tensor(7)}
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3)}},
        "param_groups": [{"lr": 0.1}],
    }
    random = [{"cpu": torch.get_rng_state()}]
    return {
        "weights": weights, "optimizer": optimizer, "scaler": None, "samples_seen": samples_seen, "random": random
    }  # fmt: skip


def test_what_is_saved_is_what_loads(tmp_path):
    saved = state(128)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)


def test_only_the_newest_are_kept_in_order_of_samples(tmp_path):
    for samples_seen in (8, 16, 1000, 24_000_000_000):
        save_checkpoint(tmp_path, state(samples_seen), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "samples-000000001000",
        "samples-024000000000",
    ]
    assert latest_checkpoint(tmp_path).name == "samples-024000000000"


def test_a_save_that_dies_leaves_the_earlier_one(tmp_path, monkeypatch):
    first = save_checkpoint(tmp_path, state(8))

    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(16))
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == first
    save_checkpoint(tmp_path, state(16))
    assert not list(tmp_path.glob(".unfinished-*"))


def test_no_checkpoint_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path)
