from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.prompts import PromptSet, class_features


def test_every_class_gets_all_templates():
    filled = PromptSet(["a {}", "{} is {}."]).fill(["cat", "{x} dog"])
    assert filled == {"cat": ["a cat", "cat is cat."], "{x} dog": ["a {x} dog", "{x} dog is {x} dog."]}


def test_synonyms_take_the_place_of_the_class_name():
    prompts = PromptSet(["a {}", "one {}"], synonyms={"cat": ["tom", "kitten"], "cow": ["cow", "ox"]})
    assert prompts.fill(["dog", "cat"]) == {
        "dog": ["a dog", "one dog"],
        "cat": ["a tom", "one tom", "a kitten", "one kitten"],
    }
    assert prompts.fill(["cow", "dog"])["cow"] == ["a cow", "one cow", "a ox", "one ox"]


def test_prompts_given_outright_take_the_place_of_templates():
    prompts = PromptSet(["a {}"], synonyms={"cat": ["tom"]}, prompts={"cat": ["it purrs", "it sees at night"]})
    assert prompts.fill(["cat", "dog"]) == {"cat": ["it purrs", "it sees at night"], "dog": ["a dog"]}


@pytest.mark.parametrize(
    ("period", "expected"),
    [("as_written", ["a cat", "one cat."]), ("add", ["a cat.", "one cat."]), ("remove", ["a cat", "one cat"])],
)
def test_period(period, expected):
    assert PromptSet(["a {}", "one {}."], period=period).fill(["cat"])["cat"] == expected
    assert PromptSet(prompts={"cat": ["a cat", "one cat."]}, period=period).fill(["cat"])["cat"] == expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [("as_written", "H&E of pT1 cat"), ("lower", "H&E of pt1 cat"), ("capitalized", "H&E of PT1 cat")],
)
def test_case_is_that_of_the_names_alone(case, expected):
    assert PromptSet(["H&E of {}"], case=case).fill(["pT1 cat"]) == {"pT1 cat": [expected]}
    of_synonym = PromptSet(["H&E of {}"], synonyms={"cat": ["pT1 cat"]}, case=case).fill(["cat"])
    assert of_synonym == {"cat": [expected]}


@pytest.mark.parametrize("templates", [["a {}", "no slot"], ["{c}"]])
def test_a_template_without_slot_is_named(templates):
    with pytest.raises(UserError, match=r"no slot|\{c\}"):
        PromptSet(templates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"templates": []}, "at least one"),
        ({"templates": "a {}"}, "give a list"),
        ({"templates": ["a {}", "a {}"]}, "twice"),
        ({"templates": ["a {}"], "synonyms": {"cat": "tom"}}, "give a list"),
        ({"templates": ["a {}"], "synonyms": {"cat": []}}, "synonyms of 'cat' is empty"),
        ({"templates": ["a {}"], "synonyms": {"cat": ["tom", "tom"]}}, "'tom' twice"),
        ({"templates": ["a {}"], "synonyms": {"cat": ["tom", " "]}}, "texts that say something"),
        ({"templates": ["a {}"], "synonyms": {"cat": [False]}}, "in quotes"),
        ({"prompts": {"cat": []}}, "prompts of 'cat' is empty"),
        ({"templates": ["a {}"], "period": "yes"}, "period='yes' must be one of as_written, add, remove"),
        ({"templates": ["a {}"], "case": "upper"}, "case='upper' must be one of as_written, lower, capitalized"),
    ],
)
def test_mistakes_are_refused_at_the_door(arguments, message):
    with pytest.raises(UserError, match=message):
        PromptSet(**arguments)


@pytest.mark.parametrize("synonyms", [{"cat": ["pet", "tom"], "dog": ["pet"]}, {"cat": ["Dog"]}])
def test_a_name_that_two_classes_share_is_refused(synonyms):
    prompts = PromptSet(["a {}"], synonyms=synonyms)
    with pytest.raises(UserError, match=r"'cat' and 'dog' share the prompt.*no prompt can tell them apart"):
        prompts.fill(["cat", "dog"])
    assert prompts.fill(["cat", "cow"])  # the two are never in one set


def test_a_class_without_prompt_is_named():
    with pytest.raises(UserError, match=r"no prompts of class 'dog'.*'cat'"):
        PromptSet(prompts={"cat": ["it purrs"]}).fill(["cat", "dog"])


def test_describe_has_every_prompt_and_names_what_synonyms_leave_out():
    prompts = PromptSet(["a {}"], synonyms={"cat": ["tom", "kitten"]}, period="add", name="pets")
    described = json.loads(json.dumps(prompts.describe(["cat", "dog"])))
    assert described["prompts"] == {"cat": ["a tom.", "a kitten."], "dog": ["a dog."]}
    assert described["without_synonyms"] == ["dog"]
    assert (described["name"], described["period"], described["case"]) == ("pets", "add", "as_written")
    assert described["sha256"] == prompts.describe(["cat", "dog"])["sha256"]
    assert described["sha256"] != prompts.describe(["dog", "cat"])["sha256"]
    assert described["sha256"] != PromptSet(["a {}"], prompts.synonyms).describe(["cat", "dog"])["sha256"]
    assert prompts.describe(["ox", "dog"])["without_synonyms"] == ["ox", "dog"]


def test_class_features_weigh_prompts_alike_whatever_their_length():
    prompt_features = torch.tensor([[[10.0, 0.0], [0.0, 0.1]], [[3.0, 4.0], [3.0, 4.0]]])
    expected = [[np.sqrt(0.5), np.sqrt(0.5)], [0.6, 0.8]]
    torch.testing.assert_close(class_features(prompt_features), torch.tensor(expected, dtype=torch.float32))


def test_class_features_of_different_numbers_of_prompts():
    of_classes = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])]
    expected = [[1.0, 0.0], [np.sqrt(1 / 5), np.sqrt(4 / 5)]]
    torch.testing.assert_close(class_features(of_classes), torch.tensor(expected, dtype=torch.float32))


def test_equal_prompts_make_equal_class_features_however_many_there_are():
    for seed in range(20):
        feature = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        features = class_features(feature.expand(count, 64) for count in (1, 3, 5, 7, 22, 110))
        assert (features == features[0]).all()
