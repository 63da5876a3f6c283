"""Saving beside training: it does not change its course, and what goes wrong is told."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path

import pytest
import torch
from open_clip.transformer import PatchDropout

from quiltnet.distributed import rank, world_size
from quiltnet.errors import UserError
from quiltnet.evaluation.outcome import Outcome
from quiltnet.training import saving
from quiltnet.training.averaging import Averaging
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.checkpoint import (
    best_checkpoint,
    check_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    samples_of,
    save_checkpoint,
)
from quiltnet.training.checkpoint_copies import CheckpointCopies
from quiltnet.training.engine import Callback, TrainState, fit
from quiltnet.training.retention import Retention
from quiltnet.training.saving import HostBuffers, SaveCheckpoint
from tests.ranks import run_ranks
from tests.training.test_callbacks import OBJECTIVE, Recorder, batches, new_state
from tests.training.test_checkpoint import assert_same, files_of_at_most

ALL = Retention(newest=99)


def train(callbacks, steps=4, averaging=None) -> TrainState:
    torch.manual_seed(5)
    state = new_state(averaging)
    state.unwrapped.clip.visual.patch_dropout = PatchDropout(0.5)  # draws
    fit(state, batches(), OBJECTIVE, callbacks, total_samples=4 * steps)
    return state


def saved_in(root: Path) -> list[int]:
    return [samples_of(folder) for folder in list_checkpoints(root)]


class Remember(Callback):
    """What a checkpoint of each step must hold, taken down while nothing runs beside."""

    def __init__(self) -> None:
        self.states = {}

    def step_end(self, state, batch, metrics) -> None:
        self.states[state.samples_seen] = HostBuffers().take(state.state_dict())


def test_checkpoints_are_of_their_moment_and_training_takes_its_course(tmp_path, monkeypatch):
    """Each save is held back until the next step is done, which moves every weight."""
    may_write = threading.Semaphore(0)

    def slowly(root, state):
        assert may_write.acquire(timeout=60)
        return save_checkpoint(root, state)

    class Release(Callback):
        def step_end(self, state, batch, metrics):
            if state.samples_seen > 4:
                may_write.release()

        def fit_end(self, state):
            may_write.release()

    monkeypatch.setattr(saving, "save_checkpoint", slowly)
    averaging, remember = Averaging(decay=0.5), Remember()
    silent = train([], averaging=averaging)
    saved = train([Release(), remember, SaveCheckpoint(tmp_path, 4, ALL)], averaging=averaging)
    assert_same(saved.state_dict(), silent.state_dict())
    assert saved_in(tmp_path) == [4, 8, 12, 16]
    for folder in list_checkpoints(tmp_path):
        assert_same(load_checkpoint(folder), remember.states[samples_of(folder)])


def test_buffers_are_used_again(tmp_path):
    buffers, source = HostBuffers(), {"a": torch.ones(3), "lr": [0.1]}
    first = buffers.take(source)
    source["a"].fill_(2)
    assert first["a"].tolist() == [1, 1, 1]
    again = buffers.take(source)
    assert again["a"].data_ptr() == first["a"].data_ptr() and again["a"].tolist() == [2, 2, 2]
    assert buffers.take({"a": torch.ones(4, dtype=torch.float64)})["a"].dtype == torch.float64


class FullDisk:
    """Saves at the given moments fail, as they do on a full disk."""

    def __init__(self, monkeypatch, *fails: int) -> None:
        def save(root, state):
            if state["samples_seen"] not in fails:
                return save_checkpoint(root, state)
            with files_of_at_most(1000):
                return save_checkpoint(root, state)

        monkeypatch.setattr(saving, "save_checkpoint", save)


def test_a_full_disk_is_told_and_training_goes_on(tmp_path, monkeypatch, caplog):
    FullDisk(monkeypatch, 8)
    train([SaveCheckpoint(tmp_path, 4, Retention(newest=1))], steps=3)
    assert "checkpoint after 8 samples could not be written" in caplog.text and "too large" in caplog.text
    assert "is samples-000000000004" in caplog.text and "training goes on" in caplog.text
    assert saved_in(tmp_path) == [12] and not list(tmp_path.glob(".*"))


def test_a_full_disk_ends_the_run_where_it_shall(tmp_path, monkeypatch):
    FullDisk(monkeypatch, 8)
    save = SaveCheckpoint(tmp_path, 8, Retention(newest=1), on_failure="stop")
    torch.manual_seed(5)
    state = new_state()
    with pytest.raises(UserError, match="checkpoint after 8 samples could not be written"):
        fit(state, batches(), OBJECTIVE, [save], total_samples=4000)
    assert state.samples_seen < 4000 and saved_in(tmp_path) == []


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, on_failure):
    FullDisk(monkeypatch, 12)
    with pytest.raises(UserError, match=r"after 12 samples.*the newest in .* is samples-000000000008"):
        train([SaveCheckpoint(tmp_path, 4, on_failure=on_failure)], steps=3)
    assert saved_in(tmp_path) == [4, 8]


def test_saved_at_once_where_it_is_asked_for(tmp_path):
    save = SaveCheckpoint(tmp_path, 1000)

    class Asks(Callback):
        def step_end(self, state, batch, metrics):
            if state.samples_seen == 8:
                save.save_now(state)
                assert check_checkpoint(list_checkpoints(tmp_path)[-1]) is None
                modified = (tmp_path / "samples-000000000008").stat().st_mtime_ns
                save.run_stopped(state)
                assert (tmp_path / "samples-000000000008").stat().st_mtime_ns == modified, "once is enough"

    train([Asks(), save])
    assert saved_in(tmp_path) == [8, 16]


def measuring(folder, losses, every_samples=4) -> Evaluate:
    """Before the first step, and after each."""
    found = iter(losses)
    return Evaluate(
        lambda model: {"val": Outcome({"loss": next(found)})},
        Recorder(),
        every_samples=every_samples,
        results=folder / "results.json",
        evaluators={"val": {}},
        monitor="val/loss",
    )


def test_the_best_are_kept_though_their_moment_is_not_a_clocks(tmp_path):
    evaluate = measuring(tmp_path, [9.0, 5.0, 3.0, 4.0, 3.5, 6.0])
    options = {"evaluate": evaluate, "monitor": "val/loss", "lower_is_better": True}
    train([evaluate, SaveCheckpoint(tmp_path / "c", 20, Retention(newest=1, best=2), **options)], steps=5)
    assert saved_in(tmp_path / "c") == [8, 16, 20]
    assert samples_of(best_checkpoint(tmp_path / "c")) == 8
    assert load_checkpoint(best_checkpoint(tmp_path / "c"))["monitored"] == {
        "metric": "val/loss", "value": 3.0, "lower_is_better": True
    }  # fmt: skip


def test_a_resumed_run_knows_which_was_the_best(tmp_path):
    root = tmp_path / "c"
    for losses, steps, expected in (([9.0, 3.0, 5.0], 2, [4, 8]), ([4.0, 2.0, 6.0], 5, [16, 20])):
        evaluate = measuring(tmp_path, losses)
        save = SaveCheckpoint(
            root, 100, Retention(newest=1, best=1), evaluate=evaluate, monitor="val/loss", lower_is_better=True
        )
        state = new_state()
        newest, _ = newest_valid(root)
        if newest is not None:
            state.load_state_dict(load_checkpoint(newest))
        fit(state, batches(), OBJECTIVE, [evaluate, save], total_samples=4 * steps)
        assert saved_in(root) == expected
        assert samples_of(best_checkpoint(root)) == expected[0]


def test_the_last_is_saved_again_with_what_the_last_evaluation_found(tmp_path):
    evaluate = measuring(tmp_path, [9.0, 3.0], every_samples=None)
    root, options = tmp_path / "c", {"evaluate": evaluate, "monitor": "val/loss", "lower_is_better": True}
    train([evaluate, SaveCheckpoint(root, 8, Retention(newest=1, best=1), **options)])
    assert saved_in(root) == [16] and samples_of(best_checkpoint(root)) == 16


def test_a_run_that_ends_by_an_error_leaves_no_thread_at_work(tmp_path, monkeypatch):
    """Its lock is given up then, and whoever starts it again would meet the writer."""
    may_write, copies = threading.Event(), CheckpointCopies(tmp_path, f"file://{tmp_path}/there")

    def slowly(root, state):
        assert may_write.wait(timeout=60)
        return save_checkpoint(root, state)

    class Fails(Callback):
        def step_end(self, state, batch, metrics):
            if state.samples_seen == 8:
                threading.Timer(0.2, may_write.set).start()
                raise UserError("broken")

    monkeypatch.setattr(saving, "save_checkpoint", slowly)
    with pytest.raises(UserError, match="broken"):
        train([Fails(), SaveCheckpoint(tmp_path / "c", 4, copies=copies)])
    assert saved_in(tmp_path / "c") == [4]
    assert not {"checkpoint_0", "checkpoint copies"} & {thread.name for thread in threading.enumerate()}


def test_an_error_of_the_writer_does_not_hide_the_one_that_ended_the_run(tmp_path, monkeypatch, caplog):
    class Fails(Callback):
        def step_end(self, state, batch, metrics):
            if state.samples_seen == 8:
                raise UserError("broken")

    FullDisk(monkeypatch, 4)
    with pytest.raises(UserError, match="broken"):
        train([Fails(), SaveCheckpoint(tmp_path, 4)])
    assert "checkpoint after 4 samples could not be written" in caplog.text


def test_one_that_cannot_be_deleted_stays_and_no_save_fails_for_it(tmp_path, monkeypatch, caplog):
    rmtree = shutil.rmtree

    def busy(folder, **options):
        if Path(folder).name == "samples-000000000004":
            raise OSError("busy")
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    train([SaveCheckpoint(tmp_path, 4, Retention(newest=1))])
    assert saved_in(tmp_path) == [4, 16]
    assert "samples-000000000004 cannot be deleted, and stays (busy)" in caplog.text
    assert "could not be written" not in caplog.text


def test_copies_follow_what_is_kept(tmp_path):
    copies = CheckpointCopies(tmp_path, f"file://{tmp_path}/there")
    train([SaveCheckpoint(tmp_path / "c", 4, Retention(newest=1), copies=copies)])
    assert saved_in(tmp_path / "c") == saved_in(tmp_path / "there/c") == [16]
    assert check_checkpoint(list_checkpoints(tmp_path / "there/c")[0]) is None


def rank_batches(seen: int = 0):
    """The same 12 pairs a step over all ranks, whatever their number."""
    for step in itertools.count(seen // 12):
        generator = torch.Generator().manual_seed(step)
        batch = next(batches(12))
        batch.text = torch.randint(1, 1000, (12, 12), generator=generator)
        rows = slice(rank() * 12 // world_size(), (rank() + 1) * 12 // world_size())
        batch.image, batch.text = batch.image[rows], batch.text[rows]
        batch.image_id = batch.caption_id = torch.arange(12)[rows]
        yield batch


def train_on_ranks(root: str, total: int) -> dict:
    state = new_state(Averaging(decay=0.5))
    state.global_batch_size = 12
    newest, _ = newest_valid(Path(root))
    resumed = None
    if newest is not None:
        state.load_state_dict(load_checkpoint(newest))
        resumed = HostBuffers().take(state.state_dict())
    fit(
        state,
        rank_batches(state.samples_seen),
        OBJECTIVE,
        [SaveCheckpoint(Path(root), 12, Retention(newest=9), on_failure="stop")],
        total_samples=total,
    )
    return {"resumed": resumed, "samples_seen": state.samples_seen}


def full_disk_on_ranks(root: str) -> str:
    state = new_state()
    state.global_batch_size = 12
    Path(root).parent.joinpath("file").touch()
    save = SaveCheckpoint(Path(root).parent / "file", 12, on_failure="stop")  # a file in place of its folder
    try:
        fit(state, rank_batches(), OBJECTIVE, [save], total_samples=12_000)
    except UserError as error:
        return f"{state.samples_seen} {error}"
    return "nothing"


@pytest.mark.slow
def test_another_number_of_ranks_takes_up_exactly_what_was_saved(tmp_path):
    root = tmp_path / "c"
    run_ranks(train_on_ranks, 2, str(root), 24)
    expected = load_checkpoint(root / "samples-000000000024")
    for ranks in (1, 3):
        arguments = str(root), 36
        results = run_ranks(train_on_ranks, ranks, *arguments) if ranks > 1 else [train_on_ranks(*arguments)]
        assert [result["samples_seen"] for result in results] == [36] * ranks
        for result in results:
            for part in ("weights", "average", "optimizer"):
                assert_same({part: result["resumed"][part]}, {part: expected[part]})
        newest, _ = newest_valid(root)
        newest.rename(tmp_path / f"of-{ranks}")
    one, three = (load_checkpoint(tmp_path / f"of-{ranks}")["weights"] for ranks in (1, 3))
    torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-5)
    assert len(load_checkpoint(tmp_path / "of-3")["random"]) == 3


@pytest.mark.slow
def test_all_ranks_end_where_rank_0_cannot_save(tmp_path):
    ends = run_ranks(full_disk_on_ranks, 2, str(tmp_path / "c"))
    assert ends[0] == ends[1] and "could not be written" in ends[0]
