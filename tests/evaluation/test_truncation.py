from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from quiltnet.errors import UserError
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.knn import KNN, knn_logits
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.metrics import balanced_accuracy, predict
from quiltnet.evaluation.prompts import PromptSet
from quiltnet.evaluation.retrieval import Retrieval
from quiltnet.evaluation.truncation import TruncatedEncoder, TruncationCurve
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, many_to_many_pairs, noise_tile

NAMES = ["red", "green", "blue"]


def noise_set(count: int, seed: int, colours: bool = False) -> LabelledSet:
    tiles = [noise_tile(1000 * seed + index, NAMES[index % 3] if colours else None) for index in range(count)]
    return LabelledSet(tiles, torch.arange(count) % 3, NAMES)


def zeroshot(dataset: LabelledSet) -> ZeroShotClassification:
    return ZeroShotClassification(dataset, PromptSet(["tissue in {}"]))


def nearest(**options) -> KNN:
    return KNN(noise_set(30, seed=0), noise_set(40, seed=1), ks=[1], k=1, **options)


def test_each_score_is_that_of_the_first_dimensions_alone():
    encoder, evaluator = SetEncoder(ToyModel(width=64)), nearest()
    outcome = TruncationCurve(evaluator).run(encoder)
    assert list(outcome.scores) == ["balanced_accuracy", *(f"balanced_accuracy@dim={dim}" for dim in (32, 16, 8))]
    assert set(outcome.replicates) == set(outcome.scores)
    assert len(set(outcome.scores.values())) > 1
    train, test = (encoder.images(one, batch_size=8) for one in (evaluator.train, evaluator.test))
    for dim in (32, 16, 8):
        cut = (F.normalize(features[:, :dim], dim=-1) for features in (test, train))
        logits = knn_logits(*cut, evaluator.train.labels, num_classes=3, ks=[1])[1]
        score = balanced_accuracy(predict(logits), evaluator.test.labels)
        assert outcome.scores[f"balanced_accuracy@dim={dim}"] == score


def test_prompts_are_cut_like_images():
    outcome = TruncationCurve(zeroshot(noise_set(30, seed=0, colours=True)), dims=[1, 2]).run(SetEncoder(ColourModel()))
    assert outcome.scores["balanced_accuracy"] == 1
    # A colour is a dimension of images and of prompts: what is left of one that was cut off is 0, which ties.
    assert outcome.scores["balanced_accuracy@dim=2"] == pytest.approx(2 / 3)
    assert outcome.scores["balanced_accuracy@dim=1"] == pytest.approx(1 / 3)


def test_the_set_is_encoded_once():
    model = ToyModel(width=64)
    nearest().run(SetEncoder(model))
    images = len(model.encoded)
    TruncationCurve(nearest()).run(SetEncoder(model))
    assert len(model.encoded) == 2 * images + 1  # one text, to see how wide features are


def test_retrieval_can_be_truncated():
    encoder = SetEncoder(ToyModel(width=16))
    metric = "image_to_text_recall@5"
    curve = TruncationCurve(Retrieval(many_to_many_pairs(30)), dims=[4], metric=metric)
    outcome = curve.run(encoder)
    assert set(outcome.scores) == {metric, f"{metric}@dim=4"}
    truncated = TruncatedEncoder(encoder, 4)
    pairs = truncated.pairs(many_to_many_pairs(30), batch_size=8)
    texts = truncated.texts(["benign", "malignant"], batch_size=8)
    assert (pairs.image_features.shape, texts.shape) == ((30, 4), (2, 4))
    for features in (pairs.image_features, texts):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    outcome = TruncationCurve(nearest(), dims=[8, 1]).run(SetEncoder(BrokenModel(value)))
    assert set(outcome.scores.values()) == {0}


def test_narrow_features_are_left_whole():
    outcome = TruncationCurve(nearest()).run(SetEncoder(ColourModel()))
    assert list(outcome.scores) == ["balanced_accuracy"]


def test_door():
    for dims in ([], [0, 4]):
        with pytest.raises(UserError, match="each 1 or more"):
            TruncationCurve(nearest(), dims=dims)
    encoder = SetEncoder(ToyModel(width=16))
    with pytest.raises(UserError, match="have 16 dimensions"):
        TruncationCurve(nearest(), dims=[16]).run(encoder)
    with pytest.raises(UserError, match="'accuracy@k=3' is not one"):
        TruncationCurve(nearest(), metric="accuracy@k=3").run(encoder)
    with pytest.raises(UserError, match="before the projection"):
        TruncationCurve(nearest(projected=False)).run(encoder)


def test_describe():
    curve = TruncationCurve(nearest(), dims=(8, 4))
    described = json.loads(json.dumps(curve.describe()))
    assert described["dims"] == [8, 4]
    assert described["evaluator"]["k"] == 1
    assert curve.split == "test"
