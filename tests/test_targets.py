"""What a config may have called. Each attack that succeeds leaves a folder behind, ``marker``."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from quiltnet.cli.evaluators import make_evaluators
from quiltnet.cli.hydra_main import eval_main, train_main
from quiltnet.cli.targets import TARGETS, check_composed, check_targets
from quiltnet.errors import UserError
from tests.conftest import ROOT
from tests.security_attacks import torch_zip

CONF = ROOT / "conf"


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def attacks(tmp_path, marker) -> dict[str, dict]:
    """Nodes that do their harm when they are instantiated."""
    (tmp_path / "evil.pt").write_bytes(torch_zip(marker))
    load = {"_target_": "torch.load", "f": str(tmp_path / "evil.pt"), "weights_only": False}
    pipe = {"_target_": "webdataset.gopen", "url": f"pipe:mkdir {marker}"}
    return {
        "torch.load": load,
        "gopen": pipe,
        "gopen by its module": {**pipe, "_target_": "webdataset.gopen.gopen"},
        "through a module of ours": {**pipe, "_target_": "quiltnet.data.remote_sources.gopen"},
        "torch through a module of ours": {**load, "_target_": "quiltnet.training.placement.torch.load"},
        "partial of load": {"_target_": "functools.partial", "_args_": [load]},
        "partial of gopen": {"_target_": "functools.partial", "_args_": [pipe]},
        "as a partial": {"_target_": "quiltnet.evaluation.prompts.PromptSet", "templates": [{"deep": pipe}]},
        "os": {"_target_": "os.mkdir", "path": str(marker)},
        "subprocess": {"_target_": "subprocess.run", "args": ["mkdir", str(marker)], "_convert_": "all"},
        "ours that runs commands": {
            "_target_": "quiltnet.data.remote_sources.open_source", "url": pipe["url"], "allow_pipe": True
        },
        "hydra's own door": {"_target_": "hydra.utils.call", "config": load},
    }  # fmt: skip


ATTACKS = (
    "torch.load", "gopen", "gopen by its module", "through a module of ours", "torch through a module of ours",
    "partial of load", "partial of gopen", "as a partial", "os", "subprocess", "ours that runs commands",
    "hydra's own door",
)  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_config_that_calls_something_else_is_refused_before_anything_is_called(name, attacks, marker):
    cfg = OmegaConf.create({"evaluator": {"x": attacks[name]}})
    with pytest.raises(UserError, match="is not among what a config may have called"):
        make_evaluators(cfg)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["torch.load", "gopen"])
def test_the_attacks_are_real(name, attacks, marker):
    try:
        done = instantiate(OmegaConf.create(attacks[name]))
    except InstantiationException as error:
        pytest.skip(f"this version of Hydra refuses it by itself: {error}")
    if name == "gopen":
        done.wait_for_child()
    assert marker.exists()


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "${name}"},
        {"_target_": "${oc.decode:${name}}"},
        {"inner": "${elsewhere}"},
        {"inner": "${oc.create:${elsewhere}}"},
        {"inner": [[{"_target_": "os.mkdir", "_partial_": True}]]},
        {"_target_": "quiltnet.evaluation.knn.KNN", "_args_": [{"_target_": "os.mkdir"}]},
        {"_target_": "???"},
        {"_target_": None},
        {"_target_": "${nowhere}"},
        {"_target_": "quiltnet.evaluation.knn.KNN.__init__.__globals__"},
        {"_target_": "quiltnet.evaluation.knn"},
        {"_target_": " quiltnet.evaluation.knn.KNN"},
    ],
)
def test_a_name_is_found_however_it_is_written(node):
    cfg = OmegaConf.create({"node": node, "name": "os.mkdir", "elsewhere": {"_target_": "os.mkdir", "path": "x"}})
    with pytest.raises(UserError, match="may have called"):
        check_targets(cfg.node)


def test_a_config_may_refer_to_itself():
    cfg = OmegaConf.create({"a": {"b": "${c}"}, "c": {"d": "${a}"}})
    check_targets(cfg)


def test_own_classes_are_allowed_by_their_name_or_that_of_their_module():
    cfg = OmegaConf.create({"x": {"_target_": "my.module.Evaluator"}})
    check_targets(cfg, ["my.module"])
    check_targets(cfg, ["my.module.Evaluator"])
    for not_enough in (["my"], ["my.module.Other"], ["module"]):
        with pytest.raises(UserError, match=r"allow_targets=\[my\.module\.Evaluator\]"):
            check_targets(cfg, not_enough)
    through_it = OmegaConf.create({"x": {"_target_": "my.module.os.system"}})
    with pytest.raises(UserError, match="may have called"):
        check_targets(through_it, ["my.module"])


def test_an_own_class_that_is_allowed_is_made():
    cfg = OmegaConf.create({"allow_targets": ["collections"], "evaluator": {"x": {"_target_": "collections.Counter"}}})
    assert make_evaluators(cfg) == {"x": Counter()}


def test_a_misspelt_name_is_told_the_nearest():
    with pytest.raises(UserError, match=r"did you mean quiltnet\.evaluation\.knn\.KNN\?"):
        check_targets(OmegaConf.create({"_target_": "quiltnet.evaluation.knn.Knn"}))


def test_every_name_of_the_list_exists_and_is_of_the_module_that_is_named():
    """Not what a module has imported: that may change without anybody looking here."""
    from hydra.utils import get_object

    for name in sorted(name for name in TARGETS if name.startswith("quiltnet.")):
        found = get_object(name)
        assert f"{found.__module__}.{found.__qualname__}" == name


def test_our_own_configs_name_nothing_else():
    for path in sorted(CONF.rglob("*.yaml")):
        check_targets(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "recipe",
    [
        {"allow_targets": ["os"]},
        {"data": {"allow_pipe": True}},
        {"hydra": {"job": {"env_set": {"PATH": "/tmp/evil"}}}},
        {"hydra": {"callbacks": {"x": {"_target_": "os.mkdir", "path": "x"}}}},
        {"hydra": {"launcher": {"_target_": "os.mkdir"}}},
        {"hydra": {"job_logging": {"handlers": {"x": {"class": "logging.os.mkdir", "path": "x"}}}}},
        {"hydra": {"hydra_logging": {"formatters": {"x": {"()": "os.mkdir", "path": "x"}}}}},
        {"hydra": {"job_logging": {"handlers": {"x": {"stream": "ext://antigravity.webbrowser"}}}}},
    ],
    ids=lambda recipe: str(recipe)[:60],
)
def test_what_lets_code_run_is_said_on_the_command_line_or_not_at_all(recipe):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=["run_name=x"], return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    check_composed(cfg, ["run_name=x"])
    with pytest.raises(UserError):
        check_composed(OmegaConf.merge(cfg, recipe), ["run_name=x"])


def test_what_the_command_line_says_is_let_through():
    cfg = OmegaConf.create({"allow_targets": ["my.module"], "data": {"allow_pipe": True}})
    check_composed(cfg, ["allow_targets=[my.module]", "+data.allow_pipe=true"])
    with pytest.raises(UserError, match=r"a config file says data\.allow_pipe=True"):
        check_composed(cfg, ["allow_targets=[my.module]", "data.allow_pip=true"])


@pytest.mark.parametrize(
    ("main", "options"),
    [(train_main, ["run_name=x", "experiment=evil"]), (eval_main, ["checkpoint=x", "+evaluator@evaluator=evil"])],
)
def test_a_recipe_of_somebody_else_is_refused_at_the_door(main, options, work, marker, monkeypatch, capsys):
    """Hydra makes its callbacks before it calls us; nothing of the recipe may have run by then."""
    conf = work / "conf"
    shutil.copytree(CONF, conf)
    mkdir = {"_target_": "os.mkdir", "path": str(marker)}
    recipe = {"hydra": {"callbacks": {"first": mkdir}}} if main is train_main else {"evil": mkdir}
    group = "experiment" if main is train_main else "evaluator"
    (conf / group / "evil.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(recipe)}")
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as left:
        main(options, conf=str(conf))
    assert left.value.code == 2 and "os.mkdir" in capsys.readouterr().err
    assert not marker.exists()
