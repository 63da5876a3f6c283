from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, f1_score, roc_auc_score

from quiltnet.evaluation.bootstrap import Resamples
from quiltnet.evaluation.calibration import calibration_gaps, expected_calibration_error
from quiltnet.evaluation.classification import classification_outcome, mean_outcome
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.metrics import NO_CLASS, predict
from quiltnet.evaluation.outcome import Outcome, paired_difference


def labelled(labels: torch.Tensor, classes: int, **options) -> LabelledSet:
    count = len(labels)
    return LabelledSet(
        [b""] * count,
        labels,
        [f"class {label}" for label in range(classes)],
        names=[f"tile-{index}" for index in range(count)],
        **options,
    )


def drawn(count: int, classes: int, seed: int = 0, **options) -> tuple[torch.Tensor, LabelledSet]:
    """Logits of a fair classifier, some of them tied or NaN, and an unbalanced set."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) ** 2 * classes).long()
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1
    logits[::9] = logits[::9].round()
    logits[4::31, 1] = torch.nan
    return logits, labelled(labels, classes, **options)


def by_sklearn(predicted: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """The definitions, on items that may come several times."""
    classes = probabilities.shape[1]
    present = np.unique(labels)
    is_nan = np.isnan(probabilities).any(axis=1)

    def auroc(label: int) -> float:
        is_positive = labels == label
        scores = np.where(is_nan, np.where(is_positive, -1, 2), probabilities[:, label])
        return roc_auc_score(is_positive, scores)

    furthest = np.where(labels < (classes - 1) / 2, classes - 1, 0)
    chosen = np.where(predicted == NO_CLASS, furthest, predicted)
    gaps = calibration_gaps(torch.tensor(probabilities), torch.tensor(predicted == labels))
    return {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "weighted_f1": f1_score(labels, predicted, average="weighted"),
        "macro_f1": f1_score(labels, predicted, average="macro", labels=present),
        "auroc": auroc(1) if classes == 2 else np.mean([auroc(label) for label in present]),
        "expected_calibration_error": expected_calibration_error(gaps.mean(dim=0)).item(),
        "quadratic_kappa": cohen_kappa_score(labels, chosen, weights="quadratic", labels=range(classes)),
    }


@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_and_replicates_are_those_of_sklearn_on_the_items_one_by_one(classes, has_groups):
    groups = [f"patient {index // 3}" for index in range(90)] if has_groups else None
    logits, dataset = drawn(90, classes, is_ordered=True, groups=groups)
    probabilities = logits.double().softmax(dim=1)
    outcome = classification_outcome(logits, dataset, probabilities=probabilities, resamples=20)

    arrays = [of.numpy() for of in (predict(logits), dataset.labels, probabilities)]
    assert (arrays[0] == NO_CLASS).sum() > 3
    assert outcome.scores == pytest.approx(by_sklearn(*arrays), abs=1e-12)
    (counts,) = Resamples(90, strata=dataset.labels, groups=groups, count=20).counts()
    expected = [
        by_sklearn(*(np.repeat(array, of_resample.astype(int), axis=0) for array in arrays))
        for of_resample in counts.numpy()
    ]
    assert set(outcome.replicates) == set(expected[0])
    for metric, values in outcome.replicates.items():
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values, [row[metric] for row in expected], rtol=0, atol=1e-9, err_msg=metric)
        assert values.std() > 0


def test_auroc_is_that_of_sklearn_and_torchmetrics():
    logits, dataset = drawn(200, 4)
    logits = logits.nan_to_num(nan=0.5)
    probabilities = logits.double().softmax(dim=1)
    auroc = classification_outcome(logits, dataset, probabilities=probabilities, resamples=2).scores["auroc"]
    assert auroc == pytest.approx(roc_auc_score(dataset.labels, probabilities, multi_class="ovr", average="macro"))
    classification = pytest.importorskip("torchmetrics.functional.classification")
    expected = classification.multiclass_auroc(probabilities, dataset.labels, num_classes=4, average="macro")
    assert auroc == pytest.approx(expected.item(), abs=1e-6)


def test_what_is_reported_depends_on_what_is_known():
    logits, dataset = drawn(40, 3)
    always = {"accuracy", "balanced_accuracy", "weighted_f1", "macro_f1"}
    of_probabilities = {"auroc", "expected_calibration_error"}
    assert set(classification_outcome(logits, dataset).scores) == always
    outcome = classification_outcome(logits, dataset, probabilities=logits.softmax(dim=1), details={"c": 1.0})
    assert set(outcome.scores) == set(outcome.replicates) == always | of_probabilities
    assert outcome.details["c"] == 1.0
    assert all(len(values) == 1000 for values in outcome.replicates.values())
    _, ordered = drawn(40, 3, is_ordered=True)
    assert set(classification_outcome(logits, ordered).scores) == always | {"quadratic_kappa"}


def test_details_name_every_class():
    labels = torch.tensor([0, 0, 2, 2, 2])
    logits = torch.tensor([[3.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 2, 0], [0, 2, 0, 0], [0, 0, torch.nan, 0]])
    outcome = classification_outcome(logits, labelled(labels, 4), probabilities=logits.softmax(dim=1), resamples=5)
    details = outcome.details
    assert details["confusion_matrix"] == [[1, 0, 0, 0, 1], [0] * 5, [0, 1, 1, 0, 1], [0] * 5]
    assert details["classes_without_images"] == ["class 1", "class 3"]
    assert details["per_class"]["class 2"] == {
        "images": 3,
        "precision": 1,
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 2),
        "auroc": 3 / 6,  # the first has a higher probability than both other images, the second than one
    }
    assert details["per_class"]["class 1"] == {"images": 0, "precision": 0, "recall": 0, "f1": 0}
    assert details["bootstrap"] == {
        "resamples": 5,
        "seed": 0,
        "unit": "image",
        "units": 5,
        "fewest_units_of_a_class": 2,
    }
    of_present = [details["per_class"][name]["auroc"] for name in ("class 0", "class 2")]
    assert outcome.scores["auroc"] == pytest.approx(np.mean(of_present))
    json.dumps(outcome.as_json(), allow_nan=False)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_collapsed_model_does_not_score(classes):
    _, dataset = drawn(60, classes, is_ordered=True)
    logits = torch.full((60, classes), 0.3)
    outcome = classification_outcome(logits, dataset, probabilities=logits.softmax(dim=1), resamples=20)
    for metric in ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1"):
        assert outcome.scores[metric] == 0 and not outcome.replicates[metric].any()
    assert outcome.scores["auroc"] == 0.5 and (outcome.replicates["auroc"] == 0.5).all()
    assert outcome.scores["expected_calibration_error"] == pytest.approx(1 / classes)
    assert outcome.scores["quadratic_kappa"] < 0


@pytest.mark.parametrize("classes", [2, 5])
def test_a_diverged_model_does_not_score(classes):
    _, dataset = drawn(60, classes, is_ordered=True)
    logits = torch.full((60, classes), torch.nan)
    outcome = classification_outcome(logits, dataset, probabilities=logits.softmax(dim=1), resamples=20)
    for metric in ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1", "auroc"):
        assert outcome.scores[metric] == 0 and not outcome.replicates[metric].any()
    assert outcome.scores["expected_calibration_error"] == 1
    assert outcome.scores["quadratic_kappa"] < 0
    json.dumps(outcome.as_json(), allow_nan=False)


def test_one_class_predicted_of_all():
    labels = torch.tensor([0, 0, 0, 1, 2])
    logits = torch.tensor([[1.0, 0, 0]] * 5)
    outcome = classification_outcome(logits, labelled(labels, 3, is_ordered=True), resamples=20)
    assert outcome.scores == pytest.approx(
        {
            "accuracy": 0.6,
            "balanced_accuracy": 1 / 3,
            "weighted_f1": 0.6 * 0.75,
            "macro_f1": 0.75 / 3,
            "quadratic_kappa": 0,
        }
    )
    assert all(values.isfinite().all() for values in outcome.replicates.values())


def test_two_images():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    dataset = labelled(torch.tensor([0, 1]), 2, is_ordered=True)
    outcome = classification_outcome(logits, dataset, probabilities=logits.softmax(dim=1))
    for metric in ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1", "auroc", "quadratic_kappa"):
        assert outcome.scores[metric] == 1 and (outcome.replicates[metric] == 1).all()
    assert outcome.details["bootstrap"]["fewest_units_of_a_class"] == 1


def test_a_resample_without_the_second_class_has_no_auroc_and_no_say_in_its_interval():
    # The class is nowhere the most frequent: of five patients only the last has it, and is often not drawn.
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    groups = [f"patient {index // 3}" for index in range(15)]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(15, 2, generator=generator)
    outcome = classification_outcome(logits, labelled(labels, 2, groups=groups), probabilities=logits.softmax(dim=1))
    auroc = outcome.replicates["auroc"]
    assert auroc.isnan().double().mean() == pytest.approx((4 / 5) ** 5, abs=0.05)
    assert all(math.isfinite(end) for interval in outcome.intervals().values() for end in interval)
    difference = paired_difference(outcome, outcome, "auroc")
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_a_class_that_a_resample_lacks_is_left_out_of_its_means():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 2])
    groups = [f"patient {index // 3}" for index in range(15)]
    logits = torch.randn(15, 3, generator=torch.Generator().manual_seed(0))
    probabilities = logits.double().softmax(dim=1)
    dataset = labelled(labels, 3, groups=groups)
    outcome = classification_outcome(logits, dataset, probabilities=probabilities, resamples=20)
    (counts,) = Resamples.of_set(dataset, count=20).counts()
    lacks = counts[:, 14] == 0
    assert 0 < lacks.sum() < 20
    arrays = [of.numpy() for of in (predict(logits), labels, probabilities)]
    for row in lacks.nonzero().squeeze(1).tolist():
        of_resample = [np.repeat(array, counts[row].long().numpy(), axis=0) for array in arrays]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of predictions of the class that is lacking
            expected = by_sklearn(*of_resample)
        for metric, values in outcome.replicates.items():
            assert values[row].item() == pytest.approx(expected[metric], abs=1e-12)


def test_of_two_classes_auroc_is_that_of_the_second():
    logits, dataset = drawn(40, 2)
    probabilities = logits.nan_to_num(nan=0.0).double().sigmoid()  # of each class alone: they do not sum to 1
    outcome = classification_outcome(logits, dataset, probabilities=probabilities, resamples=2)
    assert outcome.scores["auroc"] == pytest.approx(roc_auc_score(dataset.labels, probabilities[:, 1]))
    assert outcome.details["per_class"]["class 1"]["auroc"] == outcome.scores["auroc"]
    assert "auroc" not in outcome.details["per_class"]["class 0"]


def test_one_nan_spoils_all_probabilities_of_its_row():
    logits, dataset = drawn(40, 3)
    probabilities = logits.nan_to_num(nan=0.0).double().softmax(dim=1)
    one, all_of_row = probabilities.clone(), probabilities.clone()
    one[7, 1] = torch.nan
    all_of_row[7] = torch.nan
    of_one, of_all = (
        classification_outcome(logits, dataset, probabilities=spoilt, resamples=2).scores
        for spoilt in (one, all_of_row)
    )
    assert of_one == of_all
    assert of_one != classification_outcome(logits, dataset, probabilities=probabilities, resamples=2).scores


def test_a_thousand_classes():
    # (R, C, C) numbers of 1,000 resamples would be 8 GB.
    labels = torch.arange(2000) % 1000
    logits = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(2000), labels] += 3
    outcome = classification_outcome(logits, labelled(labels, 1000, is_ordered=True))
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    assert outcome.scores["accuracy"] == pytest.approx(accuracy)
    assert outcome.replicates["balanced_accuracy"].mean().item() == pytest.approx(accuracy, abs=0.01)
    few = classification_outcome(
        logits, labelled(labels, 1000), probabilities=logits.double().softmax(dim=1), resamples=10
    )
    assert 0.9 < few.scores["auroc"] < 1


@pytest.mark.parametrize("shape", [(3, 3), (2, 2), (3,)])
def test_logits_have_a_row_an_image_and_a_column_a_class(shape):
    dataset = labelled(torch.tensor([0, 1, 1]), 2)
    with pytest.raises(AssertionError, match="is not"):
        classification_outcome(torch.zeros(shape), dataset)


def test_logits_are_not_taken_for_probabilities():
    dataset = labelled(torch.tensor([0, 1, 1]), 2)
    logits = torch.tensor([[3.0, -1.0]] * 3)
    with pytest.raises(AssertionError, match="between 0 and 1"):
        classification_outcome(logits, dataset, probabilities=logits)


def test_models_are_paired_on_the_same_images_resampled_in_the_same_way():
    logits, dataset = drawn(60, 3)
    _, by_patient = drawn(60, 3, groups=[f"patient {index // 2}" for index in range(60)])
    outcome = classification_outcome(logits, dataset)
    assert paired_difference(outcome, classification_outcome(2 * logits, dataset), "accuracy").value == 0
    assert paired_difference(outcome, classification_outcome(logits, by_patient), "accuracy") is None
    assert paired_difference(outcome, classification_outcome(logits, dataset, resamples=99), "accuracy") is None


def test_an_obviously_better_model_is_clearly_better():
    noise, dataset = drawn(150, 3, seed=1)
    better = torch.eye(3)[dataset.labels] + 0.1 * noise.nan_to_num()
    outcomes = [
        classification_outcome(logits, dataset, probabilities=logits.double().softmax(dim=1))
        for logits in (better, noise)
    ]
    for metric in ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1", "auroc"):
        difference = paired_difference(*outcomes, metric)
        assert difference.is_clear and difference.low > 0


def test_autocast_around_changes_nothing():
    logits, dataset = drawn(60, 3, is_ordered=True)
    probabilities = logits.double().softmax(dim=1)
    plain = classification_outcome(logits, dataset, probabilities=probabilities, resamples=20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = classification_outcome(logits, dataset, probabilities=probabilities, resamples=20)
    assert inside.scores == plain.scores
    for metric, values in plain.replicates.items():
        assert torch.equal(inside.replicates[metric], values)


def outcome_of(items: str = "set", **scores: float) -> Outcome:
    replicates = {metric: torch.tensor([value - 0.1, value + 0.1]) for metric, value in scores.items()}
    return Outcome(scores, replicates, {"undefined": {}}, items)


def test_mean_of_repeats_one_can_check_by_eye():
    outcome = mean_outcome([outcome_of(accuracy=0.5), outcome_of(accuracy=0.75), outcome_of(accuracy=1.0)])
    assert outcome.scores == {"accuracy": 0.75}
    torch.testing.assert_close(outcome.replicates["accuracy"], torch.tensor([0.65, 0.85]))
    assert outcome.items == "set"
    assert outcome.details["repeats"] == [{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": 1.0}]
    assert outcome.details["standard_deviation_over_repeats"] == {"accuracy": pytest.approx(0.25)}
    # Student's t of two degrees of freedom is 4.303 at 97.5 %.
    half = 4.302653 * 0.25 / math.sqrt(3)
    assert outcome.details["interval_over_repeats"] == {"accuracy": pytest.approx([0.75 - half, 0.75 + half])}
    json.dumps(outcome.as_json(), allow_nan=False)


def test_mean_of_repeats_has_what_all_of_them_have():
    outcome = mean_outcome([outcome_of(accuracy=0.5, auroc=0.5), outcome_of(accuracy=0.5)])
    assert set(outcome.scores) == set(outcome.replicates) == {"accuracy"}
    assert outcome.details["undefined"] == {"auroc": "not defined in every repeat"}


def test_one_repeat_has_no_spread():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = mean_outcome([outcome_of(accuracy=0.5)])
    assert outcome.scores == {"accuracy": 0.5}
    assert outcome.details["standard_deviation_over_repeats"] == {} == outcome.details["interval_over_repeats"]


def test_repeats_are_of_the_same_items():
    with pytest.raises(AssertionError):
        mean_outcome([outcome_of(accuracy=0.5), outcome_of(items="other", accuracy=0.5)])
