from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from quiltnet.errors import UserError
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.retrieval import Retrieval
from quiltnet.evaluation.val_pairs import ValPairs, symmetric_info_nce
from tests.evaluation.toy import BrokenModel, DrawnPairs, ToyModel, many_to_many_pairs, noise_tile


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
    found = ValPairs(pairs, batch_size).run(SetEncoder(ToyModel()))
    assert found.scores["loss"] == pytest.approx(loss_by_definition(ToyModel(), pairs, used), rel=1e-5)


def test_recall_is_that_of_first_captions():
    pairs = many_to_many_pairs(23)
    found = ValPairs(pairs).run(SetEncoder(ToyModel()))
    firsts = DrawnPairs([(image, captions[:1], image_id) for image, captions, image_id in pairs.samples])
    of_firsts = Retrieval(firsts, ks=(1, 5)).run(SetEncoder(ToyModel()))
    recalls = [f"{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5)]
    assert {**found.scores, "loss": 0} == {"loss": 0, **{metric: of_firsts.scores[metric] for metric in recalls}}
    assert list(found.replicates) == recalls
    assert found.items == of_firsts.items


def test_a_collapsed_model_has_the_loss_of_guessing():
    scores = dict(ValPairs(many_to_many_pairs(24), batch_size=8).run(SetEncoder(BrokenModel(1.0))).scores)
    assert scores.pop("loss") == pytest.approx(np.log(8))
    assert set(scores.values()) == {0.0}


def test_a_diverged_model_has_no_loss():
    found = ValPairs(many_to_many_pairs(24)).run(SetEncoder(BrokenModel(torch.nan)))
    assert "loss" not in found.scores
    assert "nan" in found.details["undefined"]["loss"]
    assert set(found.scores.values()) == {0.0}


def test_describe():
    evaluator = ValPairs(many_to_many_pairs(24), batch_size=8)
    assert evaluator.split == "val"
    assert evaluator.describe() == {"pairs": 24, "split": "val", "ks": [1, 5], "batch_size": 8}


def test_door():
    with pytest.raises(UserError, match="at least two"):
        ValPairs(DrawnPairs([]))
    with pytest.raises(UserError, match="batch_size=1"):
        ValPairs(many_to_many_pairs(9), batch_size=1)
    with pytest.raises(UserError, match="have no caption"):
        ValPairs(DrawnPairs([(noise_tile(0), [], "a"), (noise_tile(1), ["fat"], "b")])).run(SetEncoder(ToyModel()))


def test_info_nce_is_that_of_open_clip():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(9, 5, generator=generator), dim=-1) for _ in range(2))
    expected = ClipLoss()(image, text, torch.tensor(14.3)).item()
    assert symmetric_info_nce(image, text, torch.tensor(14.3)) == pytest.approx(expected, rel=1e-5)
