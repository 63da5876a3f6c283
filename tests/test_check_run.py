"""A run directory that is whole passes; each thing that can be wrong with it is found, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from typer.testing import CliRunner

from quiltnet.cli.check import check
from quiltnet.cli.check_run import REQUIRED_KEYS, check_run
from quiltnet.errors import UserError
from quiltnet.model.folder import write_description
from quiltnet.training.checkpoint import list_checkpoints, save_checkpoint
from tests.model.towers import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def run(tmp_path, model) -> Path:
    folder = tmp_path / "outputs" / "first"
    write_description(model, folder / "model")
    config = OmegaConf.create()
    for key in REQUIRED_KEYS:
        OmegaConf.update(config, key, {"shards": "quilt/train"} if key == "data.train" else 8)
    config.also = "${seed}"
    OmegaConf.save(config, folder / "config.yaml")
    (folder / "environment.json").write_text(json.dumps({"git": "abc", "time": "now", "data": {"samples": 3}}))
    lines = [{"samples_seen": seen, "train/loss": 1.0} for seen in (0, 8, 8, 16)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"samples_seen": 16, "start": {"val/loss": 2.0}, "last": {"val/loss": 1.0}, "evaluators": {}}
    (folder / "results.json").write_text(json.dumps(results))
    broken = [
        {"samples_seen": 8, "key": "k", "reason": reason, "samples": 2} for reason in ("no_image", "no_image", "x")
    ]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken))
    for seen in (8, 16):
        save(folder, model, seen)
    return folder


def save(folder: Path, model: torch.nn.Module, samples_seen: int, **changed: torch.Tensor) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    state = {"optimizer": optimizer, "scaler": None, "samples_seen": samples_seen, "random": []}
    save_checkpoint(folder / "checkpoints", {"weights": {**model.clip.state_dict(), **changed}, **state})


def wrong(folder: Path) -> dict[str, str]:
    return {looked.name: looked.detail for looked in check_run(folder) if not looked.is_well}


def test_a_whole_run(run):
    found = {looked.name: looked.detail for looked in check_run(run)}
    assert wrong(run) == {}
    assert list(found) == [
        "config", "environment", "metrics", "results", "quarantine", "samples-000000000008", "samples-000000000016",
        "model",
    ]  # fmt: skip
    assert found["metrics"] == "4 lines up to 16 samples" and found["quarantine"] == "4 no_image, 2 x"
    assert found["results"] == "1 metrics at 16 samples" and "all finite" in found["samples-000000000016"]
    for name in ("results.json", "quarantine.jsonl"):
        (run / name).unlink()  # neither an evaluator nor a broken sample: nothing wrong
    assert wrong(run) == {}


def cut(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-9])


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def append(name: str, line: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text((run / name).read_text() + line + "\n")


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (remove("config.yaml"), "config", "is missing"),
        (append("config.yaml", "seed: ["), "config", "does not resolve"),
        (append("config.yaml", "bad: ${nowhere}"), "config", "does not resolve"),
        (append("config.yaml", "open: ???"), "config", "does not resolve"),
        (lambda run: (run / "config.yaml").write_text("seed: 1\n"), "config", "lacks run_name, global_batch_size"),
        (remove("environment.json"), "environment", "is missing"),
        (lambda run: (run / "environment.json").write_text("{}"), "environment", "does not say which data"),
        (remove("metrics.jsonl"), "metrics", "is missing"),
        (cut("metrics.jsonl"), "metrics", "line 4 of .* is not JSON"),
        (append("metrics.jsonl", '{"samples_seen": 8}'), "metrics", "line 5 of .* goes back from 16 samples to 8"),
        (append("metrics.jsonl", '{"train/loss": 8}'), "metrics", "line 5 of .* has no samples_seen"),
        (append("metrics.jsonl", "7"), "metrics", "line 5 of .* is no object"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics", "is empty"),
        (cut("results.json"), "results", "cannot be read"),
        (lambda run: (run / "results.json").write_text('{"start": {}}'), "results", "lacks samples_seen, last"),
        (append("quarantine.jsonl", '{"key": "k"}'), "quarantine", "line 4 of .* names no reason"),
        (append("quarantine.jsonl", '{"reason": ["x"]}'), "quarantine", "line 4 of .* names no reason"),
        (append("quarantine.jsonl", '{"reason": "x", "samples": "2"}'), "quarantine", "or no number of samples"),
        (
            lambda run: (run / "results.json").write_text('{"samples_seen": 8, "start": {}, "last": 3}'),
            "results",
            "does not say how many samples gave which metrics",
        ),
        (cut("checkpoints/samples-000000000008/model.safetensors"), "samples-000000000008", "model.safetensors has"),
        (cut("checkpoints/samples-000000000008/state.json"), "samples-000000000008", "state.json has"),
        (remove("checkpoints/samples-000000000008/manifest.json"), "samples-000000000008", "manifest.json is missing"),
    ],
)
def test_what_is_wrong_is_found(run, spoil, name, message):
    spoil(run)
    found = wrong(run)
    assert list(found) == [name]
    with pytest.raises(UserError, match=message):
        raise UserError(found[name])


def test_weights_that_are_not_finite(run, model):
    name = "positional_embedding"
    weights = model.clip.state_dict()[name].clone()
    weights[1, 2] = torch.inf
    save(run, model, 24, **{name: weights})
    assert wrong(run) == {"samples-000000000024": f"weights not finite: {name}"}


def test_a_checkpoint_under_a_wrong_name(run):
    list_checkpoints(run / "checkpoints")[0].rename(run / "checkpoints" / "samples-000000000009")
    assert "says samples_seen=8" in wrong(run)["samples-000000000009"]


def test_a_checkpoint_of_another_model(run):
    other = tiny_model()
    state = other.clip.state_dict()
    save(run, other, 32, positional_embedding=state["positional_embedding"][:, :8].clone())
    assert list(wrong(run)) == ["model"]


def test_a_run_without_a_checkpoint(run):
    for folder in list_checkpoints(run / "checkpoints"):
        folder.rename(folder.with_name(f".unfinished-{folder.name}"))
    assert "holds no finished checkpoint" in wrong(run)["checkpoints"]


def test_what_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is no run directory: it has neither config"):
            check_run(folder)


def test_the_command(run):
    result = CliRunner().invoke(check, ["run", str(run)])
    assert result.exit_code == 0 and "all finite" in result.output and "wrong" not in result.output
    (run / "config.yaml").unlink()
    result = CliRunner().invoke(check, ["run", str(run)])
    assert result.exit_code == 1 and "wrong" in result.output
    assert f" {run / 'config.yaml'} is missing " in result.output  # a path is not broken over lines
