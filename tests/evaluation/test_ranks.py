"""All ranks share the work of every evaluator, and find what one process finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quiltnet.evaluation.corruptions import Rotation
from quiltnet.evaluation.datasets import in_memory
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.few_shot import FewShot
from quiltnet.evaluation.image_retrieval import ImageRetrieval
from quiltnet.evaluation.knn import KNN
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.linear_probe import LinearProbe
from quiltnet.evaluation.prompts import PromptSet
from quiltnet.evaluation.retrieval import Retrieval
from quiltnet.evaluation.robustness import Robustness
from quiltnet.evaluation.truncation import TruncationCurve
from quiltnet.evaluation.val_pairs import ValPairs
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from tests.evaluation.toy import ToyModel, many_to_many_pairs, noise_tile
from tests.ranks import run_ranks

COUNT = 23  # over 2 and 3 ranks, and in batches of 4, nothing comes out even


def noise_set(count: int, split: str) -> LabelledSet:
    tiles = [noise_tile(1000 * len(split) + index) for index in range(count)]
    labels = [index % 3 for index in range(count)]
    return in_memory((tiles, labels, ["ape", "cat", "dog"]), source=split, split=split)


def evaluate_all(batch_size: int) -> tuple[dict[str, Any], list[torch.Tensor], list[int]]:
    """All evaluators' outcomes, a few features, and the sizes of the batches that this rank encoded."""
    model, train, val, pairs = ToyModel(), noise_set(40, "train"), noise_set(COUNT, "val"), many_to_many_pairs(COUNT)
    size = {"batch_size": batch_size}
    zeroshot = ZeroShotClassification(val, PromptSet(["a {}", "the {}"]), **size)
    probe = LinearProbe(train, val, c_values=[0.1, 10], **size)
    evaluators = {
        "zeroshot": zeroshot,
        "truncation": TruncationCurve(zeroshot, dims=[4]),
        "linear_probe": probe,
        "robustness": Robustness(probe, {"rotation": Rotation(90)}),
        "knn": KNN(train, val, ks=[1, 3], k=3, **size),
        "few_shot": FewShot(train, val, shots=[1, 2], episodes=5, **size),
        "image_retrieval": ImageRetrieval(val, **size),
        "retrieval": Retrieval(pairs, **size),
        "val_pairs": ValPairs(pairs, **size),
    }
    encoder = SetEncoder(model)
    outcomes = {name: evaluator.run(encoder).as_json() for name, evaluator in evaluators.items()}
    features = [
        encoder.images(val, batch_size=batch_size),
        encoder.texts(["one", "two"], batch_size=batch_size),  # of three ranks one has nothing to do
    ]
    return outcomes, features, model.encoded


def assert_equal(found: Any, expected: Any, place: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_equal(found[key], value, f"{place}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_equal(found[number], value, f"{place}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6), place
    else:
        assert found == expected, place


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_what_one_process_finds(world_size):
    outcomes, features, _ = evaluate_all(4)
    on_ranks = run_ranks(evaluate_all, world_size, 4)
    for outcomes_of_rank, features_of_rank, encoded in on_ranks:
        assert_equal(outcomes_of_rank, outcomes, "")
        for found, expected in zip(features_of_rank, features, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        # The same forward passes everywhere: a model with sharded parameters would wait for ever otherwise.
        assert encoded == on_ranks[0][2]
