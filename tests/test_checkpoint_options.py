"""What the command line makes of checkpoints: which one it goes on from, with what, and which it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest

import quiltnet
from quiltnet.cli.run_directory import RunDirectory, create_run_directory
from quiltnet.errors import UserError
from quiltnet.training.checkpoint import best_checkpoint, list_checkpoints, load_checkpoint, samples_of
from tests.test_train_cli import refused, run
from tests.training.test_checkpoint import DAMAGES, assert_same, files_of_at_most

CLOCK = ["callbacks.checkpoint_every_samples=8", "callbacks.keep_checkpoints=9", "total_samples=24"]
CHECKPOINTS = Path("outputs/x/checkpoints")


@pytest.fixture(scope="module")
def finished(drawn_shards, tmp_path_factory) -> Path:
    """A run with checkpoints of 8, 16 and 24 samples."""
    folder = tmp_path_factory.mktemp("finished")
    run("run_name=x", f"output_dir={folder}/outputs", f"data.train.shards={drawn_shards}/train", *CLOCK)
    return folder


@pytest.fixture
def options(finished, work, drawn_shards) -> list[str]:
    """To go on with a copy of the finished run in the working directory."""
    shutil.copytree(finished / "outputs", work / "outputs")
    return ["run_name=x", f"data.train.shards={drawn_shards}/train", *CLOCK, "resume=auto"]


def saved() -> list[int]:
    return [samples_of(folder) for folder in list_checkpoints(CHECKPOINTS)]


def test_a_damaged_newest_is_passed_over_and_made_again(options, capsys):
    name = "optimizer.safetensors"
    newest = list_checkpoints(CHECKPOINTS)[-1]
    expected = load_checkpoint(newest)
    DAMAGES["one byte flipped"](newest / name)
    capsys.readouterr()
    run(*options)
    said = capsys.readouterr()
    assert f"note: {newest} is passed over: {name} is damaged" in said.err
    assert "continues outputs/x/checkpoints/samples-000000000016" in said.out
    assert saved() == [8, 16, 24]
    assert_same(load_checkpoint(newest), expected)


def test_where_none_is_valid_nothing_is_begun_over_them(options, capsys):
    for folder in list_checkpoints(CHECKPOINTS):
        DAMAGES["empty"](folder / "state.json")
    message = refused(capsys, *options)
    assert "no checkpoint in outputs/x/checkpoints is valid (samples-000000000024: state.json has 0 bytes" in message
    assert saved() == [8, 16, 24]
    message = refused(capsys, *options[:-1], f"resume={CHECKPOINTS}/samples-000000000008")
    assert "state.json has 0 bytes" in message and "resume=auto" in message


def test_one_of_an_earlier_version_is_named(options, capsys):
    for folder in list_checkpoints(CHECKPOINTS):
        (folder / "manifest.json").rename(folder / "train_state.pt")
    assert "an earlier version of quiltnet wrote it" in refused(capsys, *options)


def test_changes_are_refused_by_name_and_made_where_they_are_allowed(options, capsys):
    changed = ["total_samples=40", "optim.lr=3e-3", "optim.weight_decay=0.5", "seed=7"]
    message = refused(capsys, *options, *changed)
    assert "optim.lr: 1e-05 then, 0.003 now" in message and "seed: 0 then, 7 now" in message
    assert "total_samples: 24 then, 40 now" in message and "allow_changes=true" in message
    capsys.readouterr()
    run(*options, *changed, "allow_changes=true")
    assert "note: continues with a change: optim.lr: 1e-05 then, 0.003 now" in capsys.readouterr().err
    assert saved() == [8, 16, 24, 32, 40]
    lines = [json.loads(line) for line in Path("outputs/x/metrics.jsonl").read_text().splitlines()]
    rates = {line["samples_seen"]: line["train/learning_rate"] for line in lines if "train/learning_rate" in line}
    assert rates[16] <= 1e-5 and rates[32] > 1e-4, "the new rate is in use"
    groups = load_checkpoint(CHECKPOINTS / "samples-000000000040")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    run(*options, *changed)  # it is now the run's configuration


def test_a_run_directory_may_be_a_link(options, capsys):
    Path("outputs/x").rename("elsewhere")
    Path("outputs/x").symlink_to(Path("elsewhere").resolve())
    shutil.rmtree(list_checkpoints(CHECKPOINTS)[-1])
    run(*options)
    assert saved() == [8, 16, 24]
    run(*options[:-1], "overwrite=true", "total_samples=16")
    assert saved() == [8, 16] and Path("outputs/x").is_symlink()


def test_a_run_that_began_from_a_checkpoint_and_was_ended_at_once_begins_from_it_again(options, capsys):
    earlier = CHECKPOINTS / "samples-000000000016"
    again = ["run_name=y", *options[1:-1]]
    shutil.copytree("outputs/x", "outputs/y", ignore=shutil.ignore_patterns("samples-*"))
    config = Path("outputs/y/config.yaml")
    config.write_text(config.read_text().replace("resume: null", f"resume: {earlier}"))
    assert f"began with resume={earlier} and ended before" in refused(capsys, *again, "resume=auto")
    run(*again, f"resume={earlier}")
    assert [samples_of(folder) for folder in list_checkpoints(Path("outputs/y/checkpoints"))] == [24]
    assert "holds an earlier run" in refused(capsys, *again, f"resume={earlier}")


def test_a_checkpoint_within_the_directory_is_not_deleted_to_begin_from_it(options, capsys):
    CHECKPOINTS.rename("outputs/x/kept")
    message = refused(capsys, *options[:-1], "resume=outputs/x/kept/samples-000000000016")
    assert "holds an earlier run" in message and len(list_checkpoints(Path("outputs/x/kept"))) == 3


def test_a_full_disk_at_a_start_leaves_what_the_next_one_needs(finished, tmp_path):
    path = tmp_path / "x"
    shutil.copytree(finished / "outputs/x", path)
    before = (path / "config.yaml").read_text()
    with files_of_at_most(100), pytest.raises(UserError, match=r"x cannot be written .*free space"):
        create_run_directory(RunDirectory(path), {"seed": 1, "note": "a" * 200}, {})
    assert (path / "config.yaml").read_text() == before


def test_what_a_state_is_made_of_cannot_change(options, capsys):
    before = Path("outputs/x/config.yaml").read_text()
    message = refused(capsys, *options, "optim.name=adam", "allow_changes=true")
    assert "another optimiser (optim.name: adamw then, adam now)" in message
    with pytest.raises(SystemExit, match="2"):
        run(*options, "model.image.layers=1", "total_samples=40", "allow_changes=true")
    message = capsys.readouterr().err
    assert "of another model than this run's" in message and "absent now" in message
    assert Path("outputs/x/config.yaml").read_text() == before


def test_the_best_is_kept_measured_at_the_end_and_copied(drawn_shards, work):
    """The rate is so high that the loss on val gets worse at some step."""
    run(
        "run_name=x", f"data.train.shards={drawn_shards}/train", f"data.val.shards={drawn_shards}/val",
        "evaluator=[val_pairs]", "total_samples=48", "optim.lr=0.02", "callbacks.evaluate_every_samples=8",
        "callbacks.checkpoint_every_samples=48", "callbacks.keep_checkpoints=1", "callbacks.keep_best=1",
        "callbacks.copy_checkpoints_to=memory://of_options",
    )  # fmt: skip
    lines = [json.loads(line) for line in Path("outputs/x/metrics.jsonl").read_text().splitlines()]
    losses = {line["samples_seen"]: line["val_pairs/loss"] for line in lines if "val_pairs/loss" in line}
    del losses[0]
    best = min(losses, key=losses.__getitem__)
    assert samples_of(best_checkpoint(CHECKPOINTS)) == best and saved() == sorted({best, 48})
    results = json.loads(Path("outputs/x/results.json").read_text())
    assert results["best"]["samples_seen"] == best
    assert results["best"]["scores"]["val_pairs/loss"] == pytest.approx(losses[best], rel=1e-6)
    fsspec.filesystem("memory").get("/of_options/x", "back", recursive=True)
    assert [samples_of(folder) for folder in list_checkpoints(Path("back/checkpoints"))] == saved()
    assert quiltnet.load("back").encode_text(["a"]).shape == (1, 32)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("callbacks.keep_best=1", "callbacks.keep_best=1 needs a metric to find the best by"),
        ("callbacks.keep_best=-1", "callbacks.keep_best=-1 must be a whole number of at least 0"),
        ("callbacks.keep_checkpoints=0", "callbacks.keep_checkpoints=0 must be"),
        ("callbacks.keep_every_samples=0", "callbacks.keep_every_samples=0 must be"),
        ("callbacks.on_save_failure=ignore", "one of continue, stop"),
        ("callbacks.copy_checkpoints_to=nowhere://x", "Protocol not known: nowhere"),
        ("allow_changes=1", "allow_changes=1 must be true or false"),
    ],
)
def test_mistakes_are_told_at_the_door(drawn_shards, work, capsys, mistake, message):
    assert message in refused(capsys, "run_name=y", f"data.train.shards={drawn_shards}/train", mistake)
    assert not Path("outputs/y").exists()
