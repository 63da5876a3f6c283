"""Taken apart and put together, a nested value is what it was."""

from __future__ import annotations

import json
import math

import pytest
import torch

from quiltnet.training.tensor_tree import join_tensors, map_tensors, split_tensors

TREE = {
    "state": {
        "clip.visual.proj": {"step": 3.0, "exp_avg": torch.randn(2, 3), "Q": [torch.eye(2), torch.tensor(True)]},
        "empty": {},
    },
    "param_groups": [{"betas": (0.9, 0.98), "eps": 1e-6, "fused": None, "use_muon": False, "names": [], "kind": ()}],
    "numbers": {0: 1, "$tensor": "not a tag", "inner": {"$tuple": [1]}},
    "dtype": torch.bfloat16,
    "half": torch.randn(3).bfloat16(),
    "infinite": math.inf,
    "tenth": 0.1 + 0.2,
}


def test_through_json_and_back():
    plain, tensors = split_tensors(TREE)
    assert sorted(tensors) == [
        "half", "state/clip.visual.proj/Q/0", "state/clip.visual.proj/Q/1", "state/clip.visual.proj/exp_avg"
    ]  # fmt: skip
    back = join_tensors(json.loads(json.dumps(plain)), tensors)
    assert repr(back) == repr(TREE), "types of values and of keys among it"


def test_a_copy_shares_nothing_that_can_change():
    copy = map_tensors(TREE, lambda path, tensor: tensor.clone())
    copy["state"]["clip.visual.proj"]["exp_avg"].zero_()
    copy["param_groups"][0]["eps"] = 1
    assert TREE["state"]["clip.visual.proj"]["exp_avg"].any() and TREE["param_groups"][0]["eps"] == 1e-6


def test_what_json_cannot_hold_is_named():
    with pytest.raises(TypeError, match="state/a is a set"):
        split_tensors({"state": {"a": {1}}})
    plain, tensors = split_tensors(TREE)
    del tensors["half"]
    with pytest.raises(KeyError, match="half"):
        join_tensors(plain, tensors)
