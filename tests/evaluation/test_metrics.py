from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from quiltnet.evaluation.metrics import (
    NO_CLASS,
    accuracy,
    balanced_accuracy,
    classification_scores,
    cosine_similarity,
    negatives_ahead,
    predict,
    recall_at_k,
    retrieval_recalls,
    symmetric_info_nce,
    weighted_f1,
)


def unit_features(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_classification_scores_are_those_of_sklearn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 1, 1, 4, 5], size=200)  # unbalanced; classes 2 and 3 are absent
    predicted = np.where(rng.random(200) < 0.6, labels, rng.integers(NO_CLASS, 7, 200))
    scores = classification_scores(torch.tensor(predicted), torch.tensor(labels))
    assert scores == {
        "accuracy": pytest.approx(accuracy_score(labels, predicted)),
        "balanced_accuracy": pytest.approx(balanced_accuracy_score(labels, predicted)),
        "weighted_f1": pytest.approx(f1_score(labels, predicted, average="weighted")),
    }


def test_scores_one_can_check_by_eye():
    labels = torch.tensor([0, 0, 0, 1])
    predicted = torch.tensor([0, 0, 0, 0])
    assert accuracy(predicted, labels) == 0.75
    assert balanced_accuracy(predicted, labels) == 0.5
    assert weighted_f1(predicted, labels) == pytest.approx(0.75 * 6 / 7)


def test_no_prediction_is_always_wrong():
    labels = torch.tensor([0, 1, 2])
    assert set(classification_scores(torch.full((3,), NO_CLASS), labels).values()) == {0.0}


def test_predict_takes_a_single_largest_logit_only():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[0.0, 2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 1.0, 1.0], [0.0, nan, 1.0], [nan] * 3, [-inf, -1.0, -inf]]
    )
    assert predict(logits).tolist() == [1, NO_CLASS, 0, NO_CLASS, NO_CLASS, 1]


SIMILARITY = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]])
POSITIVES = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)


def test_recall_one_can_check_by_eye():
    # Best positives: 0.9 leads; 0.2 is behind 0.9 and 0.8; 0.2 is behind 0.4 and 0.3.
    assert negatives_ahead(SIMILARITY, POSITIVES).tolist() == [0, 2, 2]
    assert [recall_at_k(SIMILARITY, POSITIVES, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 1.0])


def test_ties_count_against():
    tied = torch.tensor([[0.5, 0.5, 0.1]])
    assert recall_at_k(tied, torch.tensor([[True, False, False]]), 1) == 0
    assert recall_at_k(tied, torch.tensor([[True, False, False]]), 2) == 1
    assert recall_at_k(tied, torch.tensor([[True, True, False]]), 1) == 1  # tied with another right one


def test_nan_never_scores():
    similarity = torch.full((2, 3), torch.nan)
    positives = torch.tensor([[True, False, False], [True, True, False]])
    assert [recall_at_k(similarity, positives, k) for k in (1, 2, 3)] == [0, 0, 0]
    nan_beside = torch.tensor([[0.5, torch.nan, 0.1]])
    assert recall_at_k(nan_beside, torch.tensor([[True, False, False]]), 1) == 0
    nan_and_good = torch.tensor([[0.9, torch.nan, 0.1]])
    assert recall_at_k(nan_and_good, torch.tensor([[True, True, False]]), 3) == 0


def test_a_query_without_a_positive_is_a_miss():
    assert recall_at_k(torch.tensor([[0.5, 0.1]]), torch.zeros(1, 2, dtype=torch.bool), 2) == 0


@pytest.mark.parametrize("width", [3, 64, 384, 513])
def test_equal_features_tie_whatever_the_shape(width):
    # A float32 product gives equal columns unequal values: BLAS sums the last few in another order.
    for candidates in (5, 7, 100, 1003):
        feature = unit_features(1, width, seed=candidates)
        similarity = cosine_similarity(feature.expand(3, -1), feature.expand(candidates, -1).contiguous())
        assert len(similarity.unique()) == 1


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_retrieval_recalls_by_brute_force(chunk_size):
    queries, candidates = unit_features(31, 6, seed=0), unit_features(23, 6, seed=1)
    rng = np.random.default_rng(0)
    positives = {(int(rng.integers(31)), int(rng.integers(23))) for _ in range(60)} | {(q, q % 23) for q in range(31)}
    ks = (1, 3, 10, 23, 24)

    hits = dict.fromkeys(ks, 0)
    for query in range(31):
        order = np.argsort(-(candidates.numpy() @ queries[query].numpy()))
        first_hit = min(rank for rank, candidate in enumerate(order) if (query, int(candidate)) in positives)
        # The rank among wrong candidates only: right ones do not stand in each other's way.
        wrong_before = sum((query, int(candidate)) not in positives for candidate in order[:first_hit])
        for k in ks:
            hits[k] += wrong_before < k
    expected = {k: pytest.approx(hits[k] / 31) for k in ks if k <= 23}
    shuffled = torch.tensor(sorted(positives))[torch.randperm(len(positives), generator=torch.Generator())]
    assert retrieval_recalls(queries, candidates, shuffled, ks, chunk_size) == expected


def test_info_nce_is_that_of_open_clip():
    image, text = unit_features(9, 5, seed=0), unit_features(9, 5, seed=1)
    expected = ClipLoss()(image, text, torch.tensor(14.3)).item()
    assert symmetric_info_nce(image, text, torch.tensor(14.3)) == pytest.approx(expected, rel=1e-5)
