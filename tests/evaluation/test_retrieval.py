from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.retrieval import Retrieval, build_gallery
from tests.evaluation.toy import (
    BrokenModel,
    ColourModel,
    DrawnPairs,
    ToyModel,
    many_to_many_pairs,
    noise_tile,
)


def test_gallery_one_can_check_by_eye():
    gallery = build_gallery(
        ["x", "y", "x", "z"],
        [["Glands."], ["fat", "glands. "], ["Fat", "stroma  tissue"], ["Stroma tissue", "stroma tissue"]],
    )
    assert gallery.first_rows == [0, 1, 3]
    assert gallery.captions == ["Glands.", "fat", "stroma  tissue"]
    assert gallery.caption_of_row == [[0], [1, 0], [1, 2], [2, 2]]
    assert gallery.positives.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 2]]
    assert gallery.sizes() == {"images": 3, "captions": 3}


def test_captions_that_read_alike_are_one():
    same = ["H&E, na\u00efve", "h&amp;e, nai\u0308ve", "H&amp;amp;E,  NA\u00cfVE"]
    assert build_gallery(["x", "y"], [same[:2], same[2:]]).captions == same[:1]


def brute_force(model: ToyModel, pairs: DrawnPairs, ks: tuple[int, ...]) -> dict[str, float]:
    """Recall by sorting, with sets of ids: no matrix of positives, no chunk."""
    images: dict[str, torch.Tensor] = {}
    belongs: set[tuple[str, str]] = set()
    for array, captions, image_id in pairs.samples:
        images.setdefault(image_id, torch.from_numpy(array).permute(2, 0, 1).float() / 255)
        belongs |= {(image_id, caption) for caption in captions}
    texts = sorted({caption for _, caption in belongs})
    similarity = {
        (image_id, text): float(model.encode_image(image[None]) @ model.encode_text(model.tokenize([text])).T)
        for image_id, image in images.items()
        for text in texts
    }
    recalls = {}
    for name, queries, flip in (("image_to_text", images, False), ("text_to_image", texts, True)):
        candidates = images if flip else texts
        wrong_before = []
        for query in queries:
            pair_of = {c: (c, query) if flip else (query, c) for c in candidates}
            best = max(similarity[pair] for pair in pair_of.values() if pair in belongs)
            wrong_before.append(sum(similarity[p] >= best for p in pair_of.values() if p not in belongs))
        for k in ks:
            if k <= len(candidates):
                recalls[f"{name}_recall@{k}"] = float(np.mean([before < k for before in wrong_before]))
    return recalls


@pytest.mark.parametrize("seed", range(3))
def test_recall_by_brute_force(seed):
    pairs, ks = many_to_many_pairs(31, seed), (1, 5, 10, 20, 50)
    evaluator = Retrieval(pairs, ks, batch_size=7)
    found = dict(evaluator.run(ToyModel()))
    assert found == pytest.approx(brute_force(ToyModel(), pairs, ks))
    assert 0 < found["image_to_text_recall@1"] < 1
    assert "text_to_image_recall@20" in found
    assert "text_to_image_recall@50" not in found  # there are not so many images


def test_shared_captions_and_repeated_images_are_right_answers():
    samples = [
        (noise_tile(0, "red"), ["red", "A red tile"], "a"),
        (noise_tile(1, "red"), ["Red"], "b"),  # equal to the first but for its case
        (noise_tile(2, "blue"), ["blue"], "c"),
        (noise_tile(2, "blue"), ["Stained blue"], "c"),  # the same image in another row
    ]
    scores = dict(Retrieval(DrawnPairs(samples), ks=[1, 2]).run(ColourModel()))
    # The first tile has both red captions; the second has one of the two, which to the model are equal.
    assert scores["image_to_text_recall@1"] == pytest.approx(2 / 3)
    # Three of four: "A red tile" belongs to one of two equal tiles.
    assert scores["text_to_image_recall@1"] == 0.75
    assert scores["image_to_text_recall@2"] == scores["text_to_image_recall@2"] == 1.0


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    scores = dict(Retrieval(many_to_many_pairs(40), ks=(1, 5, 10)).run(BrokenModel(value)))
    assert set(scores.values()) == {0.0}


def test_describe_has_the_sizes_of_the_gallery():
    pairs = many_to_many_pairs(20)
    evaluator = Retrieval(pairs, ks=[1, 5])
    assert evaluator.describe() == {"pairs": 20, "ks": [1, 5]}
    list(evaluator.run(ToyModel()))
    captions = {caption for _, in_row, _ in pairs.samples for caption in in_row}
    sizes = {"images": len({image_id for *_, image_id in pairs.samples}), "captions": len(captions)}
    assert json.loads(json.dumps(evaluator.describe())) == {"pairs": 20, "ks": [1, 5], **sizes}


def test_door():
    with pytest.raises(UserError, match="all 1 or more"):
        Retrieval(many_to_many_pairs(9), ks=[0, 1])
    with pytest.raises(UserError, match="at least two"):
        Retrieval(DrawnPairs([]))
