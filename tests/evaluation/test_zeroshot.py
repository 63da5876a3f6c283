from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.datasets import csv_labels, in_memory
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.outcome import Outcome, paired_difference
from quiltnet.evaluation.prompts import PromptSet
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

PROMPTS = PromptSet(["a {} tile", "stained {}"])
ANIMALS = ["ape", "cat", "dog"]


class ContrastModel(ToyModel):
    """Blind to brightness, which is most of what a tile's pixels have in common with another's."""

    def encode_image(self, image: Tensor, *, projected: bool = True) -> Tensor:
        return super().encode_image(image - image.mean(dim=(1, 2, 3), keepdim=True), projected=projected)


def colour_set(colours: list[str], class_names: list[str]) -> LabelledSet:
    tiles = [noise_tile(seed, colour) for seed, colour in enumerate(colours)]
    return in_memory((tiles, [class_names.index(colour) for colour in colours], class_names))


def noise_set(count: int, class_names: list[str] = ANIMALS) -> LabelledSet:
    """Labels of which a random model is sometimes right; classes of different sizes."""
    labels = np.random.default_rng(0).choice(len(class_names), count, p=np.array([3, 2, 1]) / 6).tolist()
    return in_memory(([noise_tile(seed) for seed in range(count)], labels, class_names))


def run(dataset: LabelledSet, prompts: PromptSet, model: ToyModel, **options: int) -> Outcome:
    return ZeroShotClassification(dataset, prompts, **options).run(SetEncoder(model))


@pytest.mark.parametrize("class_names", [["red", "green", "blue"], ["blue", "red", "green"]])
def test_a_model_that_knows_the_classes_is_right(class_names):
    outcome = run(
        colour_set(["red", "blue", "blue", "green", "red"], class_names), PROMPTS, ColourModel(), batch_size=2
    )
    for metric in ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1", "auroc"):
        assert outcome.scores[metric] == pytest.approx(1.0)


def test_known_mistakes():
    tiles = [noise_tile(seed, colour) for seed, colour in enumerate(["red", "red", "red", "blue"])]
    dataset = in_memory((tiles, [0, 0, 1, 1], ["red", "blue"]))  # the third tile's label is wrong
    scores = run(dataset, PROMPTS, ColourModel()).scores
    assert scores["accuracy"] == 0.75
    assert scores["balanced_accuracy"] == 0.75
    assert scores["weighted_f1"] == pytest.approx((0.8 + 2 / 3) / 2)


def clip_benchmark_scores(
    model: ToyModel, dataset: LabelledSet, prompts: dict[str, list[str]]
) -> tuple[float, float, np.ndarray]:
    """acc1, mean_per_class_recall and logits, as github.com/LAION-AI/CLIP_benchmark defines them."""
    weights = []
    for texts in prompts.values():
        embeddings = model.encode_text(model.tokenize(texts)).numpy().astype(np.float64)
        embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        mean = embeddings.mean(axis=0)
        weights.append(mean / np.linalg.norm(mean))
    images = model.encode_image(torch.stack([model.transform(dataset[index][0]) for index in range(len(dataset))]))
    images = images.numpy() / np.linalg.norm(images.numpy(), axis=1, keepdims=True)
    logits = float(model.logit_scale) * images @ np.stack(weights).T
    predicted, labels = logits.argmax(axis=1), dataset.labels.numpy()
    recalls = [(predicted[labels == label] == label).mean() for label in np.unique(labels)]
    return (predicted == labels).mean(), np.mean(recalls), logits


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS,
        PromptSet(["a {} tile", "stained {}"], synonyms={"cat": ["kitten", "tom", "mouser"], "dog": ["hound"]}),
        PromptSet(["a {} tile"], prompts={"ape": ["it climbs", "it peels fruit"]}),
    ],
    ids=["templates", "synonyms", "outright"],
)
@pytest.mark.parametrize("batch_size", [7, 64])
def test_scores_are_those_of_clip_benchmark(prompts, batch_size):
    dataset, model = noise_set(40), ToyModel()
    accuracy, recall, logits = clip_benchmark_scores(model, dataset, prompts.fill(ANIMALS))
    outcome = run(dataset, prompts, model, batch_size=batch_size)
    assert 0 < accuracy < 1 and accuracy != recall
    assert outcome.scores["accuracy"] == pytest.approx(accuracy)
    assert outcome.scores["balanced_accuracy"] == pytest.approx(recall)
    chosen = np.bincount(logits.argmax(axis=1), minlength=3).tolist()
    assert np.sum(outcome.details["confusion_matrix"], axis=0).tolist() == [*chosen, 0]


def test_probabilities_are_the_softmax_of_scaled_logits():
    dataset, model = noise_set(40), ToyModel()
    _, _, logits = clip_benchmark_scores(model, dataset, PROMPTS.fill(ANIMALS))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sklearn = pytest.importorskip("sklearn.metrics")
    expected = sklearn.roc_auc_score(dataset.labels.numpy(), probabilities, multi_class="ovr")
    assert run(dataset, PROMPTS, model).scores["auroc"] == pytest.approx(expected)


def test_class_features_are_normalised_again_after_the_mean():
    """Unnormalised, a class whose prompts point apart has a short feature, and loses."""
    prompts = PromptSet(prompts={"apart": ["blue", "green"], "alike": ["red green blue"]})
    tiles = [np.full((8, 8, 3), colour, dtype=np.uint8) for colour in ((50, 200, 200), (200, 200, 200))]
    dataset = in_memory((tiles, [0, 1], ["apart", "alike"]))
    assert run(dataset, prompts, ColourModel()).scores["accuracy"] == 1


@pytest.mark.parametrize("value", [1.0, torch.nan])
@pytest.mark.parametrize("synonyms", [{}, {"red": ["crimson", "scarlet", "ruby"], "blue": ["azure", "navy"]}])
def test_a_broken_model_does_not_score(value, synonyms):
    dataset = colour_set(["red", "green", "blue"], ["red", "green", "blue"])
    outcome = run(dataset, PromptSet(["a {} tile", "stained {}", "{}"], synonyms), BrokenModel(value))
    for metric in ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1"):
        assert outcome.scores[metric] == 0
        assert (outcome.replicates[metric] == 0).all()


def test_a_diverged_logit_scale_does_not_score():
    model = ColourModel()
    model.logit_scale = torch.tensor(torch.inf)
    outcome = run(colour_set(["red", "green", "blue"], ["red", "green", "blue"]), PROMPTS, model)
    assert all(np.isfinite(score) for score in outcome.scores.values())
    model.logit_scale = torch.tensor(torch.nan)
    assert run(colour_set(["red", "green"], ["red", "green"]), PROMPTS, model).scores["accuracy"] == 0


def test_each_prompt_is_encoded_once_also_of_a_thousand_classes():
    templates = ["{}", "{} tile", *(f"view {number} of {{}}" for number in range(20))]
    class_names = [f"kind{number}" for number in range(1000)]
    # Each class has one prompt twice: "kind tile" in the first template, "kind" in the second.
    synonyms = {name: [name, f"{name} tile"] for name in class_names[:5]}
    dataset = in_memory(([noise_tile(0), noise_tile(1)], [0, 1], class_names))
    model = ToyModel()
    outcome = run(dataset, PromptSet(templates, synonyms), model)
    assert sum(model.encoded) == 2 + 1000 * 22 + 5 * 22 - 5
    assert set(outcome.scores) >= {"accuracy", "balanced_accuracy"}


def test_a_prompt_that_comes_twice_counts_twice():
    dataset, model = noise_set(40), ToyModel()
    prompts = PromptSet(["{}", "{} tile"], {"cat": ["cat", "cat tile"]})
    accuracy, recall, _ = clip_benchmark_scores(model, dataset, prompts.fill(ANIMALS))
    assert prompts.fill(ANIMALS)["cat"].count("cat tile") == 2
    assert run(dataset, prompts, model).scores["accuracy"] == pytest.approx(accuracy)
    assert run(dataset, prompts, model).scores["balanced_accuracy"] == pytest.approx(recall)


def test_two_prompt_sets_are_compared_in_pairs():
    dataset, encoder = noise_set(60), SetEncoder(ToyModel())
    one, other = (
        ZeroShotClassification(dataset, prompts).run(encoder) for prompts in (PROMPTS, PromptSet(["{} again"]))
    )
    difference = paired_difference(one, other, "accuracy")
    assert difference.low <= difference.value <= difference.high


def test_what_no_prompt_can_tell_apart_is_refused_at_the_door():
    with pytest.raises(UserError, match="no prompt can tell them apart"):
        ZeroShotClassification(noise_set(10), PromptSet(["a {}"], synonyms={"cat": ["pet"], "dog": ["pet"]}))
    with pytest.raises(UserError, match="no prompts of class 'ape'"):
        ZeroShotClassification(noise_set(10), PromptSet(prompts={"cat": ["it purrs"]}))


def test_describe_records_what_moves_the_result():
    evaluator = ZeroShotClassification(colour_set(["red", "blue", "blue"], ["red", "blue"]), PROMPTS)
    described = json.loads(json.dumps(evaluator.describe()))
    assert evaluator.split == described["dataset"]["split"] == "test"
    assert described["class_names"] == ["red", "blue"]
    assert described["dataset"]["images_per_class"] == {"red": 1, "blue": 2}
    assert described["prompts"]["templates"] == ["a {} tile", "stained {}"]
    assert described["prompts"]["prompts"]["blue"] == ["a blue tile", "stained blue"]


def test_real_tiles(shared_data):
    root = shared_data / "quilt_like"
    dataset = csv_labels(
        root / "lc25000_labels.csv",
        root / "images",
        name_column="class_name",
        split_column="split",
        split="val",
    )
    model = ContrastModel()
    accuracy, recall, _ = clip_benchmark_scores(model, dataset, PROMPTS.fill(dataset.class_names))
    outcome = run(dataset, PROMPTS, model)
    assert outcome.scores["accuracy"] == pytest.approx(accuracy)
    assert outcome.scores["balanced_accuracy"] == pytest.approx(recall)
    low, high = outcome.intervals()["balanced_accuracy"]
    assert 0 < low < recall < high < 0.6  # random weights
