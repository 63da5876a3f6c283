from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from quiltnet.errors import UserError
from quiltnet.evaluation.prompts import PromptSet, class_features

CONF = Path(__file__).parents[2] / "conf"


def test_fill_goes_class_after_class():
    prompts = PromptSet(["a {}", "{} is {}."]).fill(["cat", "{x} dog"])
    assert prompts == ["a cat", "cat is cat.", "a {x} dog", "{x} dog is {x} dog."]


@pytest.mark.parametrize("templates", [["a {}", "no slot"], ["{c}"]])
def test_a_template_without_slot_is_named(templates):
    with pytest.raises(UserError, match=r"no slot|\{c\}"):
        PromptSet(templates)


def test_no_template_is_refused():
    with pytest.raises(UserError, match="at least one"):
        PromptSet([])


def test_quilt4_is_the_published_set_without_full_stop():
    assert yaml.safe_load((CONF / "prompts/quilt4.yaml").read_text())["templates"] == [
        "a histopathology slide showing {}",
        "histopathology image of {}",
        "pathology tissue showing {}",
        "presence of {} tissue on image",
    ]


def test_class_features_weigh_prompts_alike_whatever_their_length():
    prompt_features = torch.tensor([[[10.0, 0.0], [0.0, 0.1]], [[3.0, 4.0], [3.0, 4.0]]])
    expected = [[np.sqrt(0.5), np.sqrt(0.5)], [0.6, 0.8]]
    torch.testing.assert_close(class_features(prompt_features), torch.tensor(expected, dtype=torch.float32))
