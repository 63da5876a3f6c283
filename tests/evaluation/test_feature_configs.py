"""The configurations of what looks at features as they are: nearest neighbours, few shots, truncation, corruption."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from quiltnet.evaluation.corruptions import StainJitter
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.measuring import Evaluator
from tests.evaluation.toy import ToyModel

CONF = Path(__file__).parents[2] / "conf" / "evaluator"
SMALL = {"train": 80, "test": 24}


def evaluator_config(name: str, data_root: Path | str = "absent") -> DictConfig:
    cfg = OmegaConf.load(CONF / f"{name}.yaml")
    assert list(cfg) == [name]
    return OmegaConf.merge({"data_root": str(data_root)}, cfg)[name]


def small(cfg: DictConfig) -> DictConfig:
    """With fewer and smaller drawn tiles."""
    for part, count in SMALL.items():
        cfg[part].tiles = {**cfg[part].tiles, "count": count, "size": 48}
    return cfg


def build(cfg: DictConfig) -> Evaluator:
    return instantiate(cfg, _convert_="all")


def test_nearest_neighbours():
    outcome = build(small(evaluator_config("knn_synthetic"))).run(SetEncoder(ToyModel()))
    assert {f"balanced_accuracy@k={k}" for k in (1, 3, 5, 10, 20)} < set(outcome.scores)
    assert outcome.scores["balanced_accuracy"] == outcome.scores["balanced_accuracy@k=5"]


def test_few_shots():
    cfg = small(evaluator_config("few_shot_synthetic"))
    cfg.shots, cfg.episodes = [1, 4], 20
    outcome = build(cfg).run(SetEncoder(ToyModel()))
    assert {"balanced_accuracy@4-shot", "majority_vote_balanced_accuracy@4-shot"} < set(outcome.scores)


def test_truncation():
    cfg = evaluator_config("truncation_synthetic")
    small(cfg.evaluator)
    outcome = build(cfg).run(SetEncoder(ToyModel(width=32)))
    assert list(outcome.scores) == ["balanced_accuracy", "balanced_accuracy@dim=16", "balanced_accuracy@dim=8"]


def test_robustness():
    cfg = evaluator_config("robustness_synthetic")
    small(cfg.evaluator)
    evaluator = build(cfg)
    assert [one.strength for one in evaluator.corruptions.values() if isinstance(one, StainJitter)] == [0.05, 0.1, 0.2]
    outcome = evaluator.run(SetEncoder(ToyModel()))
    names = ["hed_1", "hed_2", "hed_3", "blur", "jpeg", "rotation"]
    assert {f"drop@{name}" for name in names} | {"mean_drop"} < set(outcome.scores)
    again = evaluator.run(SetEncoder(ToyModel()))
    assert again.scores == outcome.scores  # the probe is fitted anew for each, and always the same


@pytest.mark.parametrize("family", ["knn", "few_shot", "truncation", "robustness"])
def test_real_tiles(shared_data, family):
    evaluator = build(evaluator_config(f"{family}_lc25000", shared_data / "quilt_like"))
    sets = evaluator if family in ("knn", "few_shot") else evaluator.evaluator
    assert (len(sets.train), len(sets.test)) == (736, 247)
    assert evaluator.split == "val"
