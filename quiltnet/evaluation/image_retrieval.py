"""Finding images of the same class by an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.bootstrap import Resamples
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet, Split
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.retrieval_metrics import on_grid

TILE_ELEMENTS = 2**23  # of one tile of similarities: 64 MiB of float64


@dataclass
class ImageRetrieval:
    """Whether an image's most similar images show its class, by any of the first k or by the majority of them.

    Acc@K and mMV@K as in RetCCL (Wang et al. 2023) and MUSK (github.com/lilab-stanford/MUSK, image_retrieval.py), Acc@K
    and MVAcc@K in UNI and TITAN. Every image is a query among all others, or among those of ``gallery``; never among
    its own group (patient, slide), where the sets name groups. A wrong image that is as similar as a right one comes
    before it, and a majority is more votes than any other class has.

    Queries without an image of their class to find are left out and counted in the details.

    Args:
        dataset: the queries.
        gallery: what they look among, such as a train split, of the same classes; each other where not given.
        ks: one larger than the images that some query can look among is left out.
    """

    dataset: LabelledSet
    gallery: LabelledSet | None = None
    ks: Sequence[int] = (1, 3, 5)
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        self.ks = tuple(self.ks)
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"ks={list(self.ks)}: give at least one, all 1 or more")
        if self.gallery is not None and list(self.gallery.class_names) != list(self.dataset.class_names):
            raise UserError(
                f"the gallery has the classes {list(self.gallery.class_names)}, its queries "
                f"{list(self.dataset.class_names)}; give sets of the same classes in the same order"
            )

    @property
    def split(self) -> Split:
        return self.dataset.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """accuracy@k: one of the first k is right; majority_vote_accuracy@k: most of them are."""
        gallery = self.dataset if self.gallery is None else self.gallery
        groups, gallery_groups = self._groups()
        queries = Labelled(self._features(encoder, self.dataset), self.dataset.labels, groups)
        candidates = Labelled(self._features(encoder, gallery), gallery.labels, gallery_groups)
        return self._outcome(find_neighbours(queries, candidates, self.ks), gallery)

    def describe(self) -> dict[str, Any]:
        """Data and choices; JSON types only."""
        gallery = "all other images" if self.gallery is None else self.gallery.describe()
        return {"dataset": self.dataset.describe(), "gallery": gallery, "ks": list(self.ks)}

    def _groups(self) -> tuple[Tensor, Tensor]:
        """Numbers of the queries' and of the gallery's groups (Q,) and (G,): equal where they must not be paired."""
        own = _groups(self.dataset)
        if self.gallery is None:
            numbers = torch.arange(len(self.dataset)) if own is None else _numbered(own)
            return numbers, numbers
        other = _groups(self.gallery)
        if own is None or other is None:
            return torch.zeros(len(self.dataset)), torch.ones(len(self.gallery))
        return _numbered([*own, *other]).split([len(own), len(other)])

    def _features(self, encoder: SetEncoder, dataset: LabelledSet) -> Tensor:
        return encoder.images(dataset, batch_size=self.batch_size, workers=self.workers)

    def _outcome(self, found: Neighbours, gallery: LabelledSet) -> Outcome:
        kept = found.right > 0  # (Q,)
        ks = [k for k in self.ks if kept.any() and k <= found.candidates[kept].min()]
        reason = "no query has an image of its class to find" if not kept.any() else "some query has fewer candidates"
        per_query = {f"accuracy@{k}": found.wrong_ahead < k for k in ks}
        per_query |= {f"majority_vote_accuracy@{k}": found.is_majority[k] for k in ks}
        names = [f"{metric}@{k}" for metric in ("accuracy", "majority_vote_accuracy") for k in self.ks]
        details = {
            "queries": int(kept.sum()),
            "queries_without_a_right_answer": int((~kept).sum()),
            "gallery": {"images": len(gallery), "fewest_candidates": int(found.candidates.min())},
            "undefined": {name: reason for name in names if name not in per_query},
        }
        items = self.dataset.sha256() if self.gallery is None else f"{self.dataset.sha256()} {gallery.sha256()}"
        if not per_query:
            return Outcome({}, {}, details, items)
        values = torch.stack(list(per_query.values()), dim=1)[kept].double()  # (queries, metrics)
        groups = _groups(self.dataset)
        if groups is not None:
            groups = [group for group, is_kept in zip(groups, kept.tolist(), strict=True) if is_kept]
        drawn = Resamples(len(values), strata=self.dataset.labels[kept], groups=groups).means(values)
        return Outcome(
            scores=dict(zip(per_query, values.mean(dim=0).tolist(), strict=True)),
            replicates=dict(zip(per_query, drawn.T.contiguous(), strict=True)),
            details=details,
            items=items,
        )


class Labelled(NamedTuple):
    """Images by their features (N, D) of unit length, labels (N,) int64 and numbers (N,) of their groups."""

    features: Tensor
    labels: Tensor
    groups: Tensor


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What Q queries find.

    Attributes:
        candidates: (Q,) int64, the images that a query looks among.
        right: (Q,) int64, those of them that are of its class.
        wrong_ahead: (Q,) int64, wrong ones that are not less similar than the most similar right one.
        is_majority: k -> (Q,) bool, whether the query's class has the most of the first k.
    """

    candidates: Tensor
    right: Tensor
    wrong_ahead: Tensor
    is_majority: dict[int, Tensor]


def find_neighbours(queries: Labelled, gallery: Labelled, ks: Sequence[int]) -> Neighbours:
    """All queries against the gallery, but for its images of their own group; a k above G is left out.

    Beside a float64 copy of the gallery's features, memory does not grow with Q * G.
    """
    ks = [k for k in ks if k <= len(gallery.labels)]
    size = max(1, TILE_ELEMENTS // len(gallery.labels))
    classes = int(torch.cat([queries.labels, gallery.labels]).max()) + 1
    one_hot = F.one_hot(gallery.labels, classes).double()  # (G, classes)
    gallery_features = on_grid(gallery.features)
    found = []
    for features, labels, groups in zip(
        queries.features.split(size), queries.labels.split(size), queries.groups.split(size), strict=True
    ):
        similarity = on_grid(features) @ gallery_features.T  # (q, G)
        is_candidate = groups[:, None] != gallery.groups
        is_right = labels[:, None] == gallery.labels
        # NaN counts against: a wrong image that has one comes first, a right one last, and a query finds nothing.
        similarity = torch.where(similarity.isnan(), torch.where(is_right, -torch.inf, torch.inf), similarity)
        similarity.masked_fill_(~is_candidate, -torch.inf)
        best = similarity.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)  # (q, 1)
        wrong_ahead = (is_candidate & ~is_right & (similarity >= best)).sum(dim=1)
        is_finite = features.isfinite().all(dim=1)
        majorities = [is_finite & _is_majority(similarity, is_candidate, labels, one_hot, k) for k in ks]
        found.append(
            [
                is_candidate.sum(dim=1),
                (is_candidate & is_right).sum(dim=1),
                wrong_ahead.masked_fill(~is_finite, len(gallery.labels)),
                *majorities,
            ]
        )
    candidates, right, wrong_ahead, *majorities = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Neighbours(candidates, right, wrong_ahead, dict(zip(ks, majorities, strict=True)))


def _is_majority(similarity: Tensor, is_candidate: Tensor, labels: Tensor, one_hot: Tensor, k: int) -> Tensor:
    """Whether the class (q,) has more of the k most similar (q, G) than any other, however ties among them fall."""
    kth = similarity.topk(k).values[:, -1:]  # (q, 1)
    closer = (similarity > kth).double() @ one_hot  # (q, classes)
    tied = ((similarity == kth) & is_candidate).double() @ one_hot
    places = k - closer.sum(dim=1, keepdim=True)  # (q, 1), for those that tie
    own = labels[:, None]
    wrong_tied = tied.sum(dim=1, keepdim=True) - tied.gather(1, own)
    # At worst all places go to wrong images while there are any, and those of one class first.
    votes = closer.gather(1, own) + (places - wrong_tied).clamp(min=0)  # (q, 1)
    most_of_others = (closer + tied.minimum(places)).scatter(1, own, 0).amax(dim=1, keepdim=True)
    return (votes > most_of_others).squeeze(1)


def _groups(dataset: LabelledSet) -> Sequence[str] | None:
    return dataset.groups if dataset.groups is not None else dataset.slides


def _numbered(groups: Sequence[str]) -> Tensor:
    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    return torch.tensor([number[group] for group in groups])
