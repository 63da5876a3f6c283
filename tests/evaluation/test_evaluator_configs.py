from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig

from quiltnet.errors import UserError
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.linear_probe import LinearProbe
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from tests.evaluation.toy import ToyModel

CONF = Path(__file__).parents[2] / "conf"
SEVERAL = {"zeroshot_all"}  # files that only name others
NAMES = sorted({path.stem for path in (CONF / "evaluator").glob("*.yaml")} - SEVERAL)


def compose_evaluators(folder: Path, *overrides: str, data_root: Path | str = "absent") -> DictConfig:
    """The evaluator group below a primary config that has what its files refer to, and nothing else."""
    (folder / "main.yaml").write_text(
        "defaults: [evaluator: [], _self_]\n"
        f"hydra: {{searchpath: ['file://{CONF}']}}\n"
        f"data_root: {data_root}\n"
        "data: {val: {shards: absent}}\n"
    )
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("main", overrides=list(overrides)).evaluator


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_one_evaluator_of_its_own_name(tmp_path, name):
    assert list(compose_evaluators(tmp_path, f"evaluator=[{name}]")) == [name]


def test_several_stand_side_by_side(tmp_path):
    assert set(compose_evaluators(tmp_path, f"evaluator=[{','.join(NAMES)}]")) == set(NAMES)


def test_all_published_zeroshot_sets_come_together(tmp_path):
    chosen_by = {
        "zeroshot_synthetic",
        "zeroshot_lc25000",
        "zeroshot_lc25000_ensemble",
    }  # drawn tiles, and a subset to validate on
    real = {name for name in NAMES if name.startswith("zeroshot")} - chosen_by
    for option in ("evaluator=zeroshot_all", "evaluator=[zeroshot_all]"):
        assert set(compose_evaluators(tmp_path, option)) == real


def test_prompts_can_be_exchanged(tmp_path):
    zeroshot = [name for name in NAMES if name.startswith("zeroshot")]
    assert zeroshot
    for name in zeroshot:
        override = f"evaluator.{name}.prompts.templates=['H&E of {{}}']"
        cfg = compose_evaluators(tmp_path, f"evaluator=[{name}]", override)
        assert instantiate(cfg[name].prompts, _convert_="all").templates == ("H&E of {}",)
        with pytest.raises(HydraException, match="no_such_set"):
            compose_evaluators(tmp_path, f"evaluator=[{name}]", f"prompts@evaluator.{name}.prompts=no_such_set")


def test_synthetic_evaluators_run(tmp_path):
    overrides = [
        "evaluator=[zeroshot_synthetic,linear_probe_synthetic]",
        "evaluator.zeroshot_synthetic.dataset.tiles={count: 20, size: 48}",
        "evaluator.linear_probe_synthetic.train.tiles={count: 60, size: 48}",
        "evaluator.linear_probe_synthetic.test.tiles={count: 20, size: 48}",
    ]
    cfg = compose_evaluators(tmp_path, *overrides)
    zeroshot = instantiate(cfg.zeroshot_synthetic, _convert_="all")
    probe = instantiate(cfg.linear_probe_synthetic, _convert_="all")
    assert isinstance(zeroshot, ZeroShotClassification)
    assert isinstance(probe, LinearProbe)
    assert len(zeroshot.dataset.class_names) >= 8
    encoder = SetEncoder(ToyModel())
    assert "balanced_accuracy" in zeroshot.run(encoder).scores
    assert probe.run(encoder).scores["balanced_accuracy"] > 0.2


def test_missing_data_is_said_at_the_door(tmp_path):
    cfg = compose_evaluators(tmp_path, "evaluator=[zeroshot_lc25000]")
    # Hydra wraps what a constructor raises; the command line looks through to the cause.
    with pytest.raises(Exception, match=r"absent/lc25000_labels\.csv is not a file") as raised:
        instantiate(cfg.zeroshot_lc25000)
    assert isinstance(raised.value, UserError) or isinstance(raised.value.__cause__, UserError)


def test_lc25000_evaluators_build(tmp_path, shared_data):
    names = ["zeroshot_lc25000", "linear_probe_lc25000"]
    cfg = compose_evaluators(tmp_path, f"evaluator=[{','.join(names)}]", data_root=shared_data / "quilt_like")
    zeroshot, probe = (instantiate(cfg[name], _convert_="all") for name in names)
    assert len(zeroshot.dataset) == len(probe.test) == 247
    assert len(probe.train) == 736
