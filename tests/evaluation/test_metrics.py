from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from quiltnet.evaluation.metrics import (
    NO_CLASS,
    RankedScores,
    accuracy,
    agreement_values,
    balanced_accuracy,
    confusion_matrix,
    cosine_similarity,
    count_classes,
    macro_f1,
    predict,
    quadratic_kappa,
    weighted_f1,
)


def unit_features(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def labels_and_predictions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """200 of each: unbalanced, classes 2 and 3 without images, some predictions of classes without, and of none."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 1, 1, 4, 5], size=200)
    predicted = np.where(rng.random(200) < 0.6, labels, rng.integers(NO_CLASS, 7, 200))
    return torch.tensor(labels), torch.tensor(predicted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_are_those_of_sklearn(seed):
    labels, predicted = labels_and_predictions(seed)
    assert accuracy(predicted, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert balanced_accuracy(predicted, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert weighted_f1(predicted, labels) == pytest.approx(f1_score(labels, predicted, average="weighted"))
    of_present = f1_score(labels, predicted, average="macro", labels=[0, 1, 4, 5])
    assert macro_f1(predicted, labels) == pytest.approx(of_present)
    assert of_present != pytest.approx(f1_score(labels, predicted, average="macro"), abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_every_class_has_the_numbers_of_sklearn(seed):
    labels, predicted = labels_and_predictions(seed)
    precision, recall, f1, images = precision_recall_fscore_support(
        labels, predicted, labels=range(7), zero_division=0.0
    )
    by_class = count_classes(predicted, labels, num_classes=7)
    np.testing.assert_array_equal(by_class.images, images)
    np.testing.assert_allclose(by_class.precision(), precision)
    np.testing.assert_allclose(by_class.recall(), recall)
    np.testing.assert_allclose(by_class.f1(), f1)


def test_counts_of_items_are_the_items_that_often():
    labels, predicted = labels_and_predictions(0)
    counts = torch.randint(4, (200, 3), generator=torch.Generator().manual_seed(0))
    of_resamples = count_classes(predicted, labels, 7, counts.float())
    for column in range(3):
        of_items = count_classes(*(of.repeat_interleave(counts[:, column]) for of in (predicted, labels)), 7)
        for field in ("images", "predicted", "right"):
            torch.testing.assert_close(getattr(of_resamples, field)[column], getattr(of_items, field), rtol=0, atol=0)
        for metric in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1"):
            assert getattr(of_resamples, metric)()[column].item() == pytest.approx(getattr(of_items, metric)().item())


@pytest.mark.parametrize("seed", range(5))
def test_confusion_matrix_is_that_of_sklearn_and_has_a_column_for_none(seed):
    labels, predicted = labels_and_predictions(seed)
    matrix = confusion_matrix(predicted, labels, num_classes=7)
    np.testing.assert_array_equal(matrix[:, :7], sklearn_confusion_matrix(labels, predicted, labels=range(7)))
    none = [int(((labels == label) & (predicted == NO_CLASS)).sum()) for label in range(7)]
    assert matrix[:, 7].tolist() == none and sum(none) > 0


def test_scores_one_can_check_by_eye():
    labels = torch.tensor([0, 0, 0, 1])
    predicted = torch.tensor([0, 0, 0, 0])
    assert accuracy(predicted, labels) == 0.75
    assert balanced_accuracy(predicted, labels) == 0.5
    assert weighted_f1(predicted, labels) == pytest.approx(0.75 * 6 / 7)
    assert macro_f1(predicted, labels) == pytest.approx(0.5 * 6 / 7)


def test_no_prediction_is_always_wrong():
    labels, predicted = torch.tensor([0, 1, 2]), torch.full((3,), NO_CLASS)
    assert {score(predicted, labels) for score in (accuracy, balanced_accuracy, macro_f1, weighted_f1)} == {0.0}


def test_predict_takes_a_single_largest_logit_only():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[0.0, 2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 1.0, 1.0], [0.0, nan, 1.0], [nan] * 3, [-inf, -1.0, -inf]]
    )
    assert predict(logits).tolist() == [1, NO_CLASS, 0, NO_CLASS, NO_CLASS, 1]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_quadratic_kappa_is_that_of_sklearn(classes, seed):
    rng = np.random.default_rng(seed)
    labels = torch.tensor(rng.integers(classes, size=100))
    predicted = torch.tensor(np.where(rng.random(100) < 0.5, labels, rng.integers(NO_CLASS, classes, 100)))
    furthest = torch.where(labels > (classes - 1) / 2, 0, classes - 1)
    if classes % 2:
        furthest[labels == classes // 2] = 0  # both ends are as far
    expected = cohen_kappa_score(
        labels, torch.where(predicted == NO_CLASS, furthest, predicted), weights="quadratic", labels=range(classes)
    )
    kappa = quadratic_kappa(agreement_values(predicted, labels, classes).mean(dim=0)).item()
    assert kappa == pytest.approx(expected, abs=1e-12)


def test_quadratic_kappa_at_its_ends():
    labels = torch.tensor([0, 1, 2, 3])

    def kappa(predicted: list[int], labels: torch.Tensor = labels) -> float:
        return quadratic_kappa(agreement_values(torch.tensor(predicted), labels, 4).mean(dim=0)).item()

    assert kappa([0, 1, 2, 3]) == 1
    assert kappa([3, 2, 1, 0]) == -1
    assert kappa([2, 2, 2, 2]) == 0
    assert kappa([NO_CLASS] * 4) < -0.6
    assert np.isnan(kappa([1, 1], torch.tensor([1, 1])))


@pytest.mark.parametrize("decimals", [1, 8])  # many ties, and none
@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_that_of_sklearn_on_a_set_and_on_resamples(decimals, seed):
    generator = torch.Generator().manual_seed(seed)
    is_positive = torch.rand(80, generator=generator) < 0.3
    scores = (torch.rand(80, dtype=torch.float64, generator=generator) + 0.2 * is_positive).round(decimals=decimals)
    ranked = RankedScores(scores, is_positive)
    assert ranked.auroc().item() == pytest.approx(roc_auc_score(is_positive, scores), abs=1e-12)
    counts = torch.randint(4, (80, 6), generator=generator)
    expected = [
        roc_auc_score(is_positive.repeat_interleave(of_resample), scores.repeat_interleave(of_resample))
        for of_resample in counts.T
    ]
    np.testing.assert_allclose(ranked.auroc(counts.float()), expected, rtol=0, atol=1e-12)


def test_auroc_pair_by_pair_with_nan_and_infinities():
    generator = torch.Generator().manual_seed(0)
    is_positive = torch.rand(60, generator=generator) < 0.4
    scores = torch.randint(5, (60,), generator=generator).double()
    for position, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        scores[position::7] = value
    pairs = [(own, other) for own in scores[is_positive] for other in scores[~is_positive]]
    won = sum(1.0 if own > other else 0.5 if own == other else 0.0 for own, other in pairs)
    assert RankedScores(scores, is_positive).auroc().item() == pytest.approx(won / len(pairs), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], 1.0),
        ([0.9, 0.8, 0.2, 0.1], 0.0),
        ([0.5, 0.5, 0.5, 0.5], 0.5),
        ([torch.nan] * 4, 0.0),
        ([torch.nan, torch.nan, 0.8, 0.9], 0.0),
        ([0.1, 0.2, torch.nan, torch.nan], 0.0),
        ([0.1, 0.2, torch.nan, 0.9], 0.5),
    ],
)
def test_auroc_one_can_check_by_eye(scores, expected):
    ranked = RankedScores(torch.tensor(scores), torch.tensor([False, False, True, True]))
    assert ranked.auroc().item() == expected


@pytest.mark.parametrize("is_positive", [True, False])
def test_auroc_of_one_kind_of_image_is_not_a_number(is_positive):
    ranked = RankedScores(torch.rand(4), torch.full((4,), is_positive))
    assert ranked.auroc().isnan() and ranked.auroc(torch.ones(4, 3)).isnan().all()


@pytest.mark.parametrize("width", [3, 64, 384, 513])
def test_equal_features_tie_whatever_the_shape(width):
    # A float32 product gives equal columns unequal values: BLAS sums the last few in another order.
    for candidates in (5, 7, 100, 1003):
        feature = unit_features(1, width, seed=candidates)
        similarity = cosine_similarity(feature.expand(3, -1), feature.expand(candidates, -1).contiguous())
        assert len(similarity.unique()) == 1
