"""Checkpoints are whole or absent; what is damaged is told from what is not."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quiltnet.errors import UserError
from quiltnet.training import checkpoint
from quiltnet.training.checkpoint import (
    best_checkpoint,
    check_checkpoint,
    checkpoint_path,
    forget_after,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    put_back_replaced,
    save_checkpoint,
)
from quiltnet.training.full_state import load_optimizer_state, load_weights
from quiltnet.training.optim import build_optimizer
from quiltnet.training.tensor_tree import split_tensors
from tests.training.test_full_state import Wrapper, snapshot, step

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def state(samples_seen: int, **more) -> dict:
    weights = {"a": torch.randn(3, 2), "n": torch.tensor(7)}
    optimizer = {
        "state": {"a": {"step": torch.tensor(3.0), "exp_avg": torch.randn(3), "count": 3, "nothing": None}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.98), "params": ["a"]}],
    }
    random = [{"cpu": torch.get_rng_state()}, {"cpu": torch.get_rng_state(), "cuda": torch.arange(16).byte()}]
    return {
        "weights": weights, "optimizer": optimizer, "scaler": None, "samples_seen": samples_seen, "random": random,
        **more,
    }  # fmt: skip


def assert_same(ours: dict, theirs: dict) -> None:
    """To the bit, types of values included."""
    (plain, tensors), (other_plain, other_tensors) = split_tensors(ours), split_tensors(theirs)
    assert plain == other_plain
    torch.testing.assert_close(tensors, other_tensors, rtol=0, atol=0)


def names(folders) -> list[str]:
    return [folder.name for folder in folders]


def test_what_is_saved_is_what_loads(tmp_path):
    saved = state(128, scaler={"scale": 65536.0, "_growth_tracker": 3}, monitored={"metric": "a/b", "value": math.pi})
    folder = save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(folder)
    assert_same(loaded, saved)
    assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"], "a tuple is a tuple again"
    assert sorted(names(folder.iterdir())) == list(FILES)
    assert "state/a/exp_avg" in load_file(folder / "optimizer.safetensors")
    torch.testing.assert_close(load_file(folder / "model.safetensors"), saved["weights"], rtol=0, atol=0)


def test_averaged_weights_have_a_file_of_their_own(tmp_path):
    saved = state(128, average={"a": torch.randn(3, 2), "n": torch.tensor(7)})
    folder = save_checkpoint(tmp_path, saved)
    assert_same(load_checkpoint(folder), saved)
    torch.testing.assert_close(load_file(folder / "average.safetensors"), saved["average"], rtol=0, atol=0)


def new_pair(name: str) -> tuple[Wrapper, torch.optim.Optimizer]:
    model = Wrapper("one", "two")
    return model, build_optimizer(model, name=name, lr=0.01)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactorbv", "nadamlegacy", "madgrad"])
def test_optimisers_go_on_bit_for_bit(tmp_path, name):
    goes_on, resumed = (new_pair(name) for _ in range(2))
    for _ in range(2):
        step(*goes_on)
    saved = {**snapshot(*goes_on), "scaler": None, "samples_seen": 8, "random": []}
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    load_weights(resumed[0], loaded["weights"])
    load_optimizer_state(*resumed, loaded["optimizer"])
    for pair in (goes_on, resumed):
        step(*pair)
    assert_same(snapshot(*resumed), snapshot(*goes_on))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one byte flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_says_why(tmp_path, name, damage):
    whole = save_checkpoint(tmp_path, state(8))
    damaged = save_checkpoint(tmp_path, state(16))
    assert newest_valid(tmp_path) == (damaged, [])
    DAMAGES[damage](damaged / name)
    found, passed_over = newest_valid(tmp_path)
    assert found == whole and [folder for folder, _ in passed_over] == [damaged]
    assert name in passed_over[0][1]
    with pytest.raises(UserError, match=rf"not a valid checkpoint: .*{name}"):
        load_checkpoint(damaged)
    assert check_checkpoint(whole) is None and load_checkpoint(whole)["samples_seen"] == 8


def test_any_byte_of_the_manifest_matters(tmp_path):
    folder = save_checkpoint(tmp_path, state(8))
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for position in range(0, len(content), 7):
        manifest.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        assert check_checkpoint(folder, contents=()) or check_checkpoint(folder), position
    manifest.write_bytes(content)
    assert check_checkpoint(folder) is None


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = save_checkpoint(tmp_path, state(8))
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["../secret"] = {"size": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert check_checkpoint(folder) == "manifest.json names files outside the checkpoint"


def test_weights_are_taken_from_one_whose_weights_are_whole(tmp_path, caplog):
    """For weights alone the optimiser's file is not read; that it is as long as it was, is looked at."""
    first, second, third = (save_checkpoint(tmp_path, state(samples_seen)) for samples_seen in (8, 16, 24))
    flip(third / "optimizer.safetensors")
    assert latest_checkpoint(tmp_path) == third and not caplog.records
    flip(third / "model.safetensors")
    DAMAGES["truncated"](second / "optimizer.safetensors")
    assert latest_checkpoint(tmp_path) == first
    assert "samples-000000000024 is passed over: model.safetensors is damaged" in caplog.text
    assert "samples-000000000016 is passed over: optimizer.safetensors has" in caplog.text
    flip(first / "model.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid: samples-000000000024: model"):
        latest_checkpoint(tmp_path)


def test_one_of_an_earlier_version_is_called_so(tmp_path):
    folder = tmp_path / "samples-000000000008"
    folder.mkdir()
    torch.save({}, folder / "train_state.pt")
    assert "an earlier version of quiltnet wrote it" in check_checkpoint(folder)


def test_newest_in_order_of_samples(tmp_path):
    for samples_seen in (24_000_000_000, 8, 1000):
        save_checkpoint(tmp_path, state(samples_seen))
    (tmp_path / "samples-notes").mkdir()
    expected = ["samples-000000000008", "samples-000000001000", "samples-024000000000"]
    assert names(list_checkpoints(tmp_path)) == expected
    assert latest_checkpoint(tmp_path).name == expected[-1]


def test_no_checkpoint_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None and best_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match=r"not a valid checkpoint: manifest\.json is missing"):
        load_checkpoint(tmp_path)


def test_a_save_that_dies_leaves_the_earlier_one(tmp_path, monkeypatch):
    first = save_checkpoint(tmp_path, state(8))

    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(16))
    monkeypatch.undo()
    assert newest_valid(tmp_path) == (first, [])
    save_checkpoint(tmp_path, state(16))
    assert not list(tmp_path.glob(".*"))


@contextmanager
def files_of_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_full_disk_leaves_nothing_of_the_new_one_and_all_of_the_old(tmp_path, size):
    first = save_checkpoint(tmp_path, state(8))
    with files_of_at_most(size), pytest.raises(OSError, match="too large"):
        save_checkpoint(tmp_path, state(8))
    assert names(tmp_path.iterdir()) == [first.name] and check_checkpoint(first) is None


def test_a_folder_that_cannot_be_written(tmp_path):
    first = save_checkpoint(tmp_path, state(8))
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:  # root may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            save_checkpoint(tmp_path, state(16))
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert names(tmp_path.iterdir()) == [first.name] and check_checkpoint(first) is None


def test_one_that_is_replaced_is_never_without_a_whole_one(tmp_path, monkeypatch):
    first = save_checkpoint(tmp_path, state(8))
    expected = load_checkpoint(first)
    rename = Path.rename

    def dies_between(self, target):
        if self.name.startswith(".unfinished-"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies_between)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(8))
    monkeypatch.undo()
    assert newest_valid(tmp_path) == (None, [])
    put_back_replaced(tmp_path)
    assert_same(load_checkpoint(first), expected)
    replaced = save_checkpoint(tmp_path, state(8))
    assert names(tmp_path.iterdir()) == [first.name]
    assert not torch.equal(load_checkpoint(replaced)["weights"]["a"], expected["weights"]["a"])


def test_whoever_goes_on_forgets_the_course_it_left_and_keeps_what_is_damaged(tmp_path):
    for samples_seen in (8, 16, 24):
        save_checkpoint(tmp_path, state(samples_seen))
    flip(checkpoint_path(tmp_path, 24) / "model.safetensors")
    forget_after(tmp_path, 8)
    assert names(list_checkpoints(tmp_path)) == ["samples-000000000008", "samples-000000000024"]


def monitored(value: float, metric: str = "val/loss", lower_is_better: bool = True) -> dict:
    return {"metric": metric, "value": value, "lower_is_better": lower_is_better}


def test_the_best_is_the_earliest_of_the_best_by_the_newest_metric(tmp_path):
    for samples_seen, of in enumerate([monitored(2.0), monitored(1.0), monitored(1.0), monitored(math.nan), None]):
        save_checkpoint(tmp_path, state(samples_seen, monitored=of))
    assert best_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    DAMAGES["truncated"](checkpoint_path(tmp_path, 1) / "model.safetensors")
    assert best_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
    for samples_seen, value in ((7, 0.3), (8, 0.5), (9, 0.4)):
        save_checkpoint(tmp_path, state(samples_seen, monitored=monitored(value, "val/accuracy", False)))
    assert best_checkpoint(tmp_path) == checkpoint_path(tmp_path, 8)
