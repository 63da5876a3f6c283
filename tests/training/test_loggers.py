"""What is logged can be read back: from our file, from Weights & Biases, from TensorBoard."""

from __future__ import annotations

import io
import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quiltnet.errors import UserError
from quiltnet.training.loggers import (
    ConsoleLogger,
    JsonlLogger,
    LoggerGroup,
    TensorBoardLogger,
    WandbLogger,
    cut_after,
)

LINES = [
    ({"train/loss": 3.25, "train/logit_scale": 14.3}, 64),
    ({"zeroshot_x/balanced_accuracy": 0.5}, 64),
    ({"train/loss": 2.75, "train/logit_scale": 14.2}, 128),
]


def read_wandb(path: Path) -> Iterator[dict[str, float]]:
    """History rows of a ``.wandb`` file: LevelDB's log format (blocks of 32 KiB, records cut at their ends)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, whole = path.read_bytes(), b""
    position = 7  # the file's own header
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:  # no record header fits: padding
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(whole)
            whole = b""
            if record.HasField("history"):
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def logged_to_wandb(directory: Path, rows: int) -> list[dict[str, float]]:
    """Scalars of the offline run below ``directory``; its writer is a process of its own, which may lag behind."""
    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while len(history := list(read_wandb(file))) < rows and time.monotonic() < deadline:
        time.sleep(0.2)
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in history]


def log_all(logger) -> None:
    for metrics, samples_seen in LINES:
        logger.log(metrics, samples_seen)
    logger.close()


def test_jsonl_holds_every_call_and_null_for_nan(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log({"train/loss": math.nan}, 32)
    log_all(logger)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"samples_seen": 32, "train/loss": None}
    assert rows[1:] == [{"samples_seen": samples, **metrics} for metrics, samples in LINES]


def test_a_resumed_log_forgets_what_will_be_seen_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log_all(JsonlLogger(path))
    with path.open("a") as file:
        file.write('{"samples_seen": 192, "train/lo')  # killed in the middle of a line
    JsonlLogger(path, resumed_at=64).close()
    assert [json.loads(line)["samples_seen"] for line in path.read_text().splitlines()] == [64, 64]


def test_cutting_an_absent_file_is_nothing(tmp_path):
    cut_after(tmp_path / "absent.jsonl", 3)


@pytest.mark.slow
def test_wandb_offline_holds_the_scalars_of_metrics_jsonl_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "hub.token=t0psecret"])  # W&B keeps the command line by itself
    wandb = WandbLogger(mode="offline")
    wandb.start(tmp_path, name="run", config={"lr": 1e-5, "token": "t0psecret", "data_root": "/data/Mueller_Hans"})
    log_all(LoggerGroup([JsonlLogger(tmp_path / "metrics.jsonl"), wandb]))
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged_to_wandb(tmp_path, len(ours)) == ours
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"t0psecret" not in kept and b"Mueller" not in kept and b"1e-05" in kept


def test_wandb_mode_is_checked():
    with pytest.raises(UserError, match="choose 'online' or 'offline'"):
        WandbLogger(mode="off")


def test_wandb_online_without_a_login_says_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"wandb login.*mode=offline"):
        WandbLogger()


def test_tensorboard_holds_the_scalars_over_samples(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger()
    logger.start(tmp_path, name="run", config={"lr": 1e-5})
    log_all(logger)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(64, 3.25), (128, 2.75)]


def test_console_prints_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    logger = ConsoleLogger(total_samples=128, stream=stream)
    rest = {"train/learning_rate": 1e-5, "train/samples_per_s": 12.0, "data/wait_share": 0.25}
    logger.log({**LINES[0][0], **rest}, 64)
    logger.log({"zeroshot_x/accuracy": 0.5, "zeroshot_x/weighted_f1": 0.25}, 64)
    first, second = stream.getvalue().splitlines()
    assert first.startswith(" 64/128  loss 3.2500  scale 14.30  lr 1.00e-05  12.0 samples/s  data wait 25%  ETA 0:00:0")
    assert second == "  zeroshot_x  accuracy 0.5  weighted_f1 0.25"


@pytest.mark.parametrize(
    ("options", "given", "called"),
    [
        ({}, "run", ("run", None)),
        ({}, "rates/trial-003", ("rates/trial-003", "rates")),
        ({"group": "mine"}, "rates/trial-003", ("rates/trial-003", "mine")),
        ({"name": "rates/trial-003"}, "trial-003", ("rates/trial-003", "rates")),
    ],
)
def test_wandb_groups_the_trials_of_a_sweep(options, given, called, tmp_path, monkeypatch):
    begun = {}

    class Run:
        def define_metric(self, *_, **__) -> None: ...

    monkeypatch.setattr("quiltnet.training.loggers.wandb.init", lambda **settings: begun.update(settings) or Run())
    WandbLogger(mode="offline", **options).start(tmp_path, name=given, config={})
    assert (begun["name"], begun["group"]) == called
