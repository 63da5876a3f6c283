"""Every recipe composes, says nothing that nobody reads, runs two steps on tiny towers; its way of packing works."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml
from hydra.errors import HydraException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typer.testing import CliRunner

from quiltnet.cli.app import app
from quiltnet.cli.options import check_options
from quiltnet.cli.train import run_train
from quiltnet.data.synthetic import draw_pairs
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.training.run_plan import RunPlan, TowerPlan, plan_warnings
from tests.test_configs import CONF, composed, keys

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@cache
def tiny() -> DictConfig:
    return composed("model=tiny", "run_name=x").model


@cache
def tiny_model() -> ContrastiveModel:
    return instantiate(tiny(), _convert_="all")


@cache
def known_keys() -> set[str]:
    return keys(OmegaConf.to_container(composed("run_name=base")))


def with_tiny_towers(*overrides: str, conf: Path = CONF) -> DictConfig:
    """The config of a run, its model another: the experiments' own are large, and most are on the hub."""
    cfg = composed(*overrides, conf=conf)
    cfg.model = tiny()
    return cfg


def check_experiment(name: str, conf: Path = CONF) -> None:
    """Nothing but what train.yaml knows, and every `_target_` takes the arguments it is given."""
    cfg = composed(f"experiment={name}", "run_name=x", conf=conf)
    unknown = keys(OmegaConf.to_container(cfg)) - known_keys()
    assert {key for key in unknown if not key.startswith(".evaluator.")} == set()
    assert cfg.model.keys() - {"_target_"} <= inspect.signature(get_method(cfg.model._target_)).parameters.keys()
    for part in (cfg.loss, cfg.tuning):
        instantiate(part)
    instantiate(cfg.optim, tiny_model())
    instantiate(cfg.schedule, total_samples=100, warmup_samples=10)
    check_options(cfg)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_says_nothing_that_nobody_reads(name):
    check_experiment(name)


@pytest.mark.parametrize(
    "mistake",
    [
        "globl_batch_size: 64",
        "data:\n  train:\n    horizontal_flp: true",
        "optim:\n  learning_rate: 1",
        "model:\n  pretraind: openai",
        "tuning:\n  picture: lora",
        "data.x: 1",
    ],
    ids=["top level", "nested", "of a target", "of the model", "of the tuning", "dotted"],
)
def test_a_misspelt_key_inside_an_experiment_is_found(tmp_path, mistake):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "experiment" / "typo.yaml").write_text(f"# @package _global_\n{mistake}\n")
    with pytest.raises((AssertionError, HydraException, OmegaConfBaseException)):
        check_experiment("typo", conf)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_two_steps(name, drawn_shards, work):
    """On tiny towers and drawn shards, with all that the experiment says beside that."""
    cfg = with_tiny_towers(
        f"experiment={name}", f"run_name={name}", "debug=fast", "precision=fp32", "evaluator=[val_pairs]",
        f"data.train.shards={drawn_shards}/train", f"data.val.shards={drawn_shards}/val",
    )  # fmt: skip
    if cfg.micro_batch_size is not None:
        cfg.micro_batch_size = 4
    run_train(cfg)
    folder = work / "outputs" / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines if "train/loss" in line] == [8, 16]
    assert "val_pairs/loss" in json.loads((folder / "results.json").read_text())["last"]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["tuning"]["image"] == cfg.tuning.image


LARGE, SMALL = {"image": 86_000_000, "text": 63_000_000}, {"image": 3_700_000, "text": 22_700_000}
SAMPLES = {"demo": 1_800, "lc25000": 736, "atlas": 161, "in_house_reports": 3_000}  # Quilt-1M: 650,000


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_recipe_is_warned_of(name):
    cfg = composed(f"experiment={name}", "run_name=x")
    total = cfg.epochs * SAMPLES.get(name, 650_000)
    parameters = SMALL if cfg.model.get("image", {}).get("timm_model_name") == "tf_efficientnet_lite0" else LARGE
    towers = {
        tower: TowerPlan(
            cfg.tuning[tower],
            cfg.optim.lr * (cfg.optim.projection_lr_factor if cfg.tuning[tower] == "projection_only" else 1),
            parameters[tower],
            pretrained=True,
        )
        for tower in ("image", "text")
    }
    plan = RunPlan(total, total // 20, total // cfg.epochs, cfg.global_batch_size, cfg.optim.name, towers)
    assert plan_warnings(plan) == []


def header(name: str) -> str:
    """The comment at the head of an experiment."""
    return (CONF / "experiment" / f"{name}.yaml").read_text().partition("\ndefaults:")[0]


def pack_command(name: str) -> list[str]:
    """The arguments of `quiltnet` that it names."""
    return shlex.split(re.search(r"^# Pack first: quiltnet (.*)$", header(name), re.MULTILINE)[1])


def test_the_table_of_a_hospital_is_packed_as_its_recipe_says(work):
    """Columns as the recipe names them, captions over lines; then the recipe's own paths are what was packed."""
    (work / "images").mkdir()
    with (work / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image_path", "report", "case", "split"])
        for number, pair in enumerate(draw_pairs(12, 48, 0)):
            (work / "images" / f"{number}.jpg").write_bytes(pair.jpeg())
            table.writerow(
                [f"{number}.jpg", "\n".join(pair.captions), f"case-{number // 2}", ["train", "val"][number > 9]]
            )
    done = CliRunner().invoke(app, pack_command("in_house_reports"))
    assert done.exit_code == 0, done.output
    cfg = with_tiny_towers("experiment=in_house_reports", "run_name=x")
    manifest = json.loads((work / cfg.data.train.shards).parent.joinpath("manifest.json").read_text())
    assert {split: entry["samples"] for split, entry in manifest["splits"].items()} == {"train": 10, "val": 2}
    assert manifest["totals"]["sources"] == 6 and Path(cfg.data.val.shards).is_dir()


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "Pack first: quiltnet" in header(name)])
def test_options_that_a_recipe_packs_with_exist(name):
    shard = typer.main.get_command(app).commands["shard"]
    known = {option for parameter in shard.params for option in parameter.opts}
    assert {word for word in pack_command(name) if word.startswith("--")} <= known
