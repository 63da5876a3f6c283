"""What a search may choose, from a config's tree to the command line of a trial."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from quiltnet.cli.search_space import Parameter, as_text, parse_space
from quiltnet.errors import UserError


def test_tree_becomes_parameters_by_option():
    space = parse_space(
        {
            "optim": {"lr": {"low": 1e-6, "high": 1e-3, "log": True}, "weight_decay": {"low": 0, "high": 0.5}},
            "global_batch_size": {"low": 64, "high": 256, "step": 64},
            "optim.layer_decay": {"low": 1, "high": 2, "step": 0.5},
            "loss": {"choices": ["infonce", "siglip"], "low": None},
            "model": {},
        }
    )
    assert space == {
        "optim.lr": Parameter(1e-6, 1e-3, log=True),
        "optim.weight_decay": Parameter(0, 0.5),
        "global_batch_size": Parameter(64, 256, step=64),
        "optim.layer_decay": Parameter(1.0, 2.0, step=0.5),
        "loss": Parameter(choices=("infonce", "siglip")),
    }
    assert [name for name, parameter in space.items() if parameter.is_whole] == ["global_batch_size"]
    assert space["optim.lr"].examples() == (1e-6, 1e-3)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ({"low": 1e-3, "high": 1e-6}, "low below high"),
        ({"low": 1, "high": 1}, "low below high"),
        ({"low": 1}, "two numbers"),
        ({"low": "1e-5x", "high": 1}, "two numbers"),
        ({"low": 0, "high": 1.0, "log": True}, "low above 0"),
        ({"low": 1, "high": 10, "log": True, "step": 2}, "no step"),
        ({"low": 1, "high": 2, "step": 5}, "fits the range"),
        ({"low": 1, "high": 2, "log": "yes"}, "log is true or false"),
        ({"low": 1, "hihg": 2}, "search.optim.lr has no hihg"),
        ({"choices": [1]}, "a list of two or more"),
        ({"choices": [1, 1]}, "each once"),
        ({"choices": "ab"}, "a list of two or more"),
        ({"choices": [1, 2], "low": 1}, "has choices and low"),
        ([1, 2], "neither a range nor choices"),
        (1e-4, "neither a range nor choices"),
    ],
)
def test_what_is_no_range_and_no_choices(leaf, message):
    with pytest.raises(UserError, match=message):
        parse_space({"optim": {"lr": leaf}})


@pytest.mark.parametrize("tree", [{}, {"optim": {}}])
def test_nothing_to_search(tree):
    with pytest.raises(UserError, match="nothing to search"):
        parse_space(tree)


@pytest.mark.parametrize(
    "value",
    [3, 1e-05, 0.1 + 0.2, True, None, "infonce", "ViT-B-32", "/data/shards", "./a", "quilt/train-{0..3}.tar", "a,b",
     "it's", "true", "1e-3", "", "a b", "x=y", "${no}", [0.5, 1.0], ["a", "b c"]],
)  # fmt: skip
def test_text_of_a_value_is_read_back_by_hydra(value):
    assert OverridesParser.create().parse_override(f"x={as_text(value)}").value() == value


def test_trial_draws_within_its_parameters_and_the_same_when_asked_again():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rates, steps = {"low": 1e-6, "high": 1e-3, "log": True}, {"low": 1, "high": 9, "step": 2}
    space = parse_space({"a": rates, "b": steps, "c": {"choices": [1, "x"]}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    drawn = []
    for _ in range(50):
        trial = study.ask()
        drawn.append({name: parameter.suggest(name, trial) for name, parameter in space.items()})
        assert drawn[-1] == {name: parameter.suggest(name, trial) for name, parameter in space.items()}
        study.tell(trial, 0.0)
    assert all(1e-6 <= values["a"] <= 1e-3 for values in drawn) and min(values["a"] for values in drawn) < 1e-5
    assert {values["b"] for values in drawn} == {1, 3, 5, 7, 9}
    assert {values["c"] for values in drawn} == {"1", "x"}
