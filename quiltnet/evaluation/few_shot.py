"""A handful of labelled images a class: SimpleShot over many draws of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.bootstrap import Resamples
from quiltnet.evaluation.classification import classification_outcome
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet, Split
from quiltnet.evaluation.metrics import NO_CLASS, predict
from quiltnet.evaluation.outcome import Outcome, percentile_interval
from quiltnet.evaluation.train_sets import check_goes_with_train, check_shots

# Numbers at a time: 32 MiB of float64, of which there are a handful.
CHUNK_ELEMENTS = 2**22
# A squared distance below this share of the squared lengths is what rounding leaves of none: float32 has 6e-8.
NO_DISTANCE = 1e-12


class Episodes(NamedTuple):
    """What E episodes predicted of N images.

    Attributes:
        right: (N,) float64, the share of episodes in which the image's class is predicted.
        votes: (N, C) float64, the episodes that predict each class; some may predict none.
        balanced_accuracy: (E,) float64.
    """

    right: Tensor
    votes: Tensor
    balanced_accuracy: Tensor


@dataclass
class FewShot:
    """SimpleShot (Wang et al. 2019, "CL2N") with k images a class, drawn anew in each episode.

    Features are centred by the mean of the episode's drawn images, as in THUNDER (the paper takes the mean of base
    classes, which there are none of here), and brought to unit length; the mean of a class's drawn images is its
    prototype, and the nearest prototype (Euclidean) names the class.

    Two numbers come of it that must not be confused. ``balanced_accuracy@4-shot`` is the mean over episodes: what to
    expect of four labelled images a class. ``majority_vote_balanced_accuracy@4-shot``, THUNDER's, lets all episodes
    vote on each image, which has seen ``episodes`` x 4 images a class and is mostly higher.

    Args:
        train: what is drawn from, image by image; a class is drawn if an image of train or test has it.
        test: what is scored.
        shots: k, images a class.
        episodes: E draws of them.
        seed: of the draws, which depend on nothing else but train's labels.
        projected: features of the joint space; False for those of the image tower before its projection.

    Raises:
        UserError: the sets do not name the same classes or share a group, a class has fewer than the most shots in
            train, or a number is below 1.
    """

    train: LabelledSet
    test: LabelledSet
    shots: Sequence[int] = (1, 2, 4, 8, 16)
    episodes: int = 1000
    seed: int = 0
    projected: bool = True
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        self.shots = tuple(sorted(set(self.shots)))
        if not self.shots or self.shots[0] < 1:
            raise UserError(f"shots={list(self.shots)}: give at least one number of images a class, each 1 or more")
        if self.episodes < 1:
            raise UserError(f"episodes={self.episodes}: give 1 or more; THUNDER has 1000")
        check_goes_with_train(self.train, self.test, "test")
        check_shots(self.train, self.shots, self._classes())

    @property
    def split(self) -> Split:
        return self.test.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """``accuracy@k-shot`` and ``balanced_accuracy@k-shot``, and every metric of the majority vote.

        The details have the standard deviation and the central 95 % of balanced accuracy over episodes. Replicates
        are over the test images, for the episodes that were drawn.
        """
        train, test = self._encode(encoder, self.train), self._encode(encoder, self.test)
        found = {shots: self._run_episodes(train, test, shots) for shots in self.shots}
        scores, replicates = self._means_over_episodes(torch.stack([found[shots].right for shots in self.shots], dim=1))
        for shots in self.shots:
            vote = classification_outcome(found[shots].votes, self.test)
            scores |= {f"majority_vote_{metric}@{shots}-shot": value for metric, value in vote.scores.items()}
            replicates |= {f"majority_vote_{metric}@{shots}-shot": values for metric, values in vote.replicates.items()}
        details = {
            "balanced_accuracy_over_episodes": {
                f"{shots}-shot": _spread(found[shots].balanced_accuracy) for shots in self.shots
            },
            "undefined": {},
            "bootstrap": vote.details["bootstrap"],
        }
        return Outcome(scores, replicates, details, vote.items)

    def describe(self) -> dict[str, Any]:
        """The sets, and what is drawn; JSON types only."""
        return {
            "train": self.train.describe(),
            "test": self.test.describe(),
            "class_names": list(self.train.class_names),
            "shots": list(self.shots),
            "episodes": self.episodes,
            "seed": self.seed,
            "projected": self.projected,
        }

    def _classes(self) -> list[int]:
        """Those that an image of train or test has."""
        return torch.cat([self.train.labels, self.test.labels]).unique().tolist()

    def _encode(self, encoder: SetEncoder, dataset: LabelledSet) -> Tensor:
        return encoder.images(dataset, batch_size=self.batch_size, workers=self.workers, projected=self.projected)

    def _run_episodes(self, train: Tensor, test: Tensor, shots: int) -> Episodes:
        classes = self._classes()
        supports = draw_supports(self.train.labels, classes, shots, episodes=self.episodes, seed=self.seed)
        return run_episodes(train, test, self.test, supports, classes)

    def _means_over_episodes(self, right: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Scores and replicates of accuracy and balanced accuracy, of the share of episodes (N, S) that are right."""
        of_set = _mean_accuracies(right, self.test, lambda values: values.mean(dim=0, keepdim=True))
        of_resamples = _mean_accuracies(right, self.test, Resamples.of_set(self.test).means)
        scores, replicates = {}, {}
        for metric in of_set:
            for column, shots in enumerate(self.shots):
                scores[f"{metric}@{shots}-shot"] = of_set[metric][0, column].item()
                replicates[f"{metric}@{shots}-shot"] = of_resamples[metric][:, column]
        return scores, replicates


def draw_supports(labels: Tensor, classes: Sequence[int], shots: int, *, episodes: int, seed: int) -> Tensor:
    """Rows of ``shots`` different images of each class, for each episode: (E, C, k) int64, classes in their order.

    The first episodes of many are those of few.
    """
    generator = np.random.default_rng([seed, shots])
    rows = [(labels == label).nonzero().squeeze(1).numpy() for label in classes]
    drawn = [[generator.choice(own, shots, replace=False) for own in rows] for _ in range(episodes)]
    return torch.from_numpy(np.array(drawn))


def run_episodes(
    train_features: Tensor, test_features: Tensor, test: LabelledSet, supports: Tensor, classes: Sequence[int]
) -> Episodes:
    """All episodes, a few at a time.

    Args:
        train_features: (N', D).
        test_features: (N, D), of the images of ``test``.
        supports: (E, C', k) rows of train_features.
        classes: C' labels, which the supports are of.
    """
    label_of_place = torch.tensor([*classes, NO_CLASS])
    of_class = F.one_hot(test.labels, len(test.class_names)).double()  # (N, C)
    images = of_class.sum(dim=0)  # (C,)
    right, votes = torch.zeros(len(test), dtype=torch.float64), torch.zeros_like(of_class)
    balanced_accuracies = []
    of_an_episode = max(len(test) * (len(classes) + 1), supports[0].numel() * train_features.shape[1])
    for some in supports.split(max(1, CHUNK_ELEMENTS // of_an_episode)):
        # NO_CLASS is -1, the last place.
        predicted = label_of_place[nearest_prototypes(train_features[some], test_features)]  # (N, E)
        is_right = (predicted == test.labels[:, None]).double()  # (N, E)
        right += is_right.sum(dim=1)
        for label in classes:
            votes[:, label] += (predicted == label).sum(dim=1)
        recall = of_class.T @ is_right / images.clamp(min=1)[:, None]  # (C, E)
        balanced_accuracies.append(recall[images > 0].mean(dim=0))
    return Episodes(right / len(supports), votes, torch.cat(balanced_accuracies))


def nearest_prototypes(supports: Tensor, features: Tensor) -> Tensor:
    """Which class's prototype is the nearest, in each episode: (N, E) int64, or ``NO_CLASS``.

    Args:
        supports: (E, C, k, D), drawn features of each episode.
        features: (N, D), to name the classes of.
    """
    supports, features = supports.double(), features.double()
    mean = supports.mean(dim=(1, 2))  # (E, D)
    squared = features.square().sum(dim=-1)[:, None]  # (N, 1)
    # |x - m|^2 and (x - m) p, for all images and episodes, are products of matrices; x - m would be (N, E, D).
    scale = squared + mean.square().sum(dim=-1)  # (N, E)
    distance = _or_none(scale - 2 * features @ mean.T, scale)  # (N, E)
    prototypes = _centred(supports, mean).mean(dim=2)  # (E, C, D)
    along = features @ prototypes.flatten(0, 1).T  # (N, E * C)
    along = along.unflatten(1, prototypes.shape[:2]) - (prototypes * mean[:, None]).sum(dim=-1)  # (N, E, C)
    along = torch.where(distance[..., None] == 0, 0, along / distance.sqrt()[..., None])
    # The nearest has the largest x p - |p|^2 / 2. Rounded, because equal prototypes must tie.
    return predict((along - prototypes.square().sum(dim=-1) / 2).float())


def _centred(supports: Tensor, mean: Tensor) -> Tensor:
    """(E, C, k, D) minus (E, D), to unit length; 0 where there is no difference but by rounding."""
    centred = supports - mean[:, None, None]
    squared = _or_none(centred.square().sum(dim=-1, keepdim=True), supports.square().sum(dim=-1, keepdim=True))
    return torch.where(squared == 0, 0, centred / squared.sqrt())


def _or_none(squared_distance: Tensor, scale: Tensor) -> Tensor:
    """Squared distances, those that are rounding alone made 0; a NaN is kept."""
    return squared_distance.masked_fill(squared_distance < NO_DISTANCE * scale, 0)


def _mean_accuracies(right: Tensor, test: LabelledSet, means: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Accuracy and balanced accuracy (R, S), of the share of episodes (N, S) in which each image is right.

    The mean over episodes of a resample's recall is the recall's mean over episodes: both are sums over images. So
    resampling those shares is resampling every episode.

    means: values (N, M) to their means over the items of each resample, (R, M).
    """
    of_class = F.one_hot(test.labels, len(test.class_names)).double()  # (N, C)
    right_of_class = (of_class[:, :, None] * right[:, None]).flatten(1)  # (N, C * S)
    images, hits = means(torch.cat([of_class, right_of_class], dim=1)).split(
        [of_class.shape[1], right_of_class.shape[1]], dim=1
    )
    hits = hits.unflatten(1, (of_class.shape[1], -1))  # (R, C, S)
    is_present = images > 0  # (R, C)
    recall = torch.where(is_present[..., None], hits / images[..., None], 0)  # (R, C, S)
    return {
        "accuracy": hits.sum(dim=1),
        "balanced_accuracy": recall.sum(dim=1) / is_present.sum(dim=1, keepdim=True),
    }


def _spread(values: Tensor) -> dict[str, Any]:
    """Of (E,) values over episodes; no standard deviation of a single one."""
    spread: dict[str, Any] = {"interval": list(percentile_interval(values))}
    return spread | ({"standard_deviation": values.std().item()} if len(values) > 1 else {})
