from __future__ import annotations

import numpy as np
import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.retrieval import Retrieval
from quiltnet.evaluation.val_pairs import ValPairs
from tests.evaluation.toy import BrokenModel, DrawnPairs, ToyModel, many_to_many_pairs


def loss_by_definition(model: ToyModel, pairs: DrawnPairs, batch_size: int) -> float:
    losses = []
    for start in range(0, len(pairs) - batch_size + 1, batch_size):
        batch = [pairs[index] for index in range(start, start + batch_size)]
        image = model.encode_image(torch.stack([model.transform(image) for image, *_ in batch])).double().numpy()
        text = model.encode_text(model.tokenize([captions[0] for _, captions, _ in batch])).double().numpy()
        logits = 10.0 * image @ text.T
        for scores in (logits, logits.T):
            losses += (np.log(np.exp(scores).sum(axis=1)) - np.diag(scores)).tolist()
    return float(np.mean(losses))


@pytest.mark.parametrize(("batch_size", "used"), [(8, 8), (5, 5), (23, 23), (64, 23)])
def test_loss_is_the_mean_over_whole_batches(batch_size, used):
    pairs = many_to_many_pairs(23)
    found = dict(ValPairs(pairs, batch_size).run(ToyModel()))
    assert found["loss"] == pytest.approx(loss_by_definition(ToyModel(), pairs, used), rel=1e-5)


def test_recall_is_that_of_first_captions():
    pairs = many_to_many_pairs(23)
    found = dict(ValPairs(pairs).run(ToyModel()))
    firsts = DrawnPairs([(image, captions[:1], image_id) for image, captions, image_id in pairs.samples])
    del found["loss"]
    assert found == dict(Retrieval(firsts, ks=(1, 5)).run(ToyModel()))


def test_a_collapsed_model_has_the_loss_of_guessing():
    scores = dict(ValPairs(many_to_many_pairs(24), batch_size=8).run(BrokenModel(1.0)))
    assert scores.pop("loss") == pytest.approx(np.log(8))
    assert set(scores.values()) == {0.0}


def test_a_diverged_model_has_no_loss():
    assert np.isnan(dict(ValPairs(many_to_many_pairs(24)).run(BrokenModel(torch.nan)))["loss"])


def test_describe():
    evaluator = ValPairs(many_to_many_pairs(24), batch_size=8)
    list(evaluator.run(ToyModel()))
    assert evaluator.describe().keys() == {"pairs", "batch_size", "images", "captions"}


def test_door():
    with pytest.raises(UserError, match="at least two"):
        ValPairs(DrawnPairs([]))
    with pytest.raises(UserError, match="batch_size=1"):
        ValPairs(many_to_many_pairs(9), batch_size=1)
