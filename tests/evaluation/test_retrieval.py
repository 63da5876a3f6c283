from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.gallery import MAX_POSITIVES, build_gallery
from quiltnet.evaluation.outcome import paired_difference
from quiltnet.evaluation.retrieval import Retrieval
from tests.evaluation.toy import BrokenModel, ColourModel, DrawnPairs, ToyModel, many_to_many_pairs, noise_tile

IDS = ["x", "y", "x", "z"]
CAPTIONS = [["Glands."], ["fat", "glands. "], ["Fat", "stroma  tissue"], ["Stroma tissue", "stroma tissue"]]


def scores_of(pairs: DrawnPairs, model: ToyModel | None = None, **options) -> dict[str, float]:
    return dict(Retrieval(pairs, **options).run(SetEncoder(model or ToyModel())).scores)


def test_gallery_one_can_check_by_eye():
    gallery = build_gallery(IDS, CAPTIONS)
    assert gallery.image_rows == [0, 1, 3]
    assert gallery.image_ids == ["x", "y", "z"]
    assert gallery.captions == ["Glands.", "fat", "stroma  tissue"]
    assert gallery.caption_of_text.tolist() == [0, 1, 2]
    assert gallery.id_of_text == ["x", "y", "x"]
    assert gallery.caption_of_row == [[0], [1, 0], [1, 2], [2, 2]]
    assert gallery.positives.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 2]]
    assert gallery.sizes() == {"images": 3, "captions": 3}


def test_gallery_of_rows_one_can_check_by_eye():
    gallery = build_gallery(IDS, CAPTIONS, every_row=True)
    assert gallery.image_rows == [0, 1, 2, 3]
    assert gallery.captions == ["Glands.", "fat", "stroma  tissue"]  # of which each is encoded once
    assert gallery.caption_of_text.tolist() == [0, 1, 0, 1, 2, 2]  # a row's own repetition is none
    assert gallery.id_of_text == ["x", "y", "y", "x", "x", "z"]
    # x has all three captions, in whichever of its rows; y has the first two; z the last.
    of_x, of_y, of_z = [0, 1, 2, 3, 4, 5], [0, 1, 2, 3], [4, 5]
    expected = [[row, text] for row, texts in enumerate([of_x, of_y, of_x, of_z]) for text in texts]
    assert gallery.positives.tolist() == expected
    assert gallery.sizes() == {"images": 4, "captions": 6}


def test_captions_that_read_alike_are_one():
    same = ["H&E, na\u00efve", "h&amp;e, nai\u0308ve", "H&amp;amp;E,  NA\u00cfVE"]
    assert build_gallery(["x", "y"], [same[:2], same[2:]]).captions == same[:1]


@pytest.mark.parametrize("bare", [[], [" "], ["fat", ""], ["&nbsp;"]])
def test_a_pair_without_a_caption_is_refused(bare):
    with pytest.raises(UserError, match=r"1 of 3 held-out pairs have no caption.*image y"):
        build_gallery(["x", "y", "z"], [["fat"], bare, ["glands"]])


def test_more_right_answers_than_memory_are_refused():
    rows = int(MAX_POSITIVES**0.5) + 1
    with pytest.raises(UserError, match="would be right"):
        build_gallery(["x"] * rows, [["fat"]] * rows, every_row=True)
    assert build_gallery(["x"] * rows, [["fat"]] * rows).positives.tolist() == [[0, 0]]


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
    recalls: dict[str, float] = {}
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
    outcome = Retrieval(pairs, ks, batch_size=7).run(SetEncoder(ToyModel()))
    expected = brute_force(ToyModel(), pairs, ks)
    assert {metric: outcome.scores[metric] for metric in expected} == pytest.approx(expected)
    assert 0 < outcome.scores["image_to_text_recall@1"] < 1
    assert "text_to_image_recall@20" in outcome.scores
    assert "text_to_image_recall@50" not in outcome.scores  # there are not so many images
    assert "text_to_image_recall@50" in outcome.details["undefined"]


def test_scores_one_can_check_by_eye():
    samples = [
        (noise_tile(0, "red"), ["red", "A red tile"], "a"),
        (noise_tile(1, "red"), ["Red"], "b"),  # equal to the first but for its case
        (noise_tile(2, "blue"), ["blue"], "c"),
        (noise_tile(2, "blue"), ["Stained blue"], "c"),  # the same image in another row
    ]
    outcome = Retrieval(DrawnPairs(samples), ks=[1, 2]).run(SetEncoder(ColourModel()))
    # The first tile has both red captions; the second has one of the two, which to the model are equal. Of the
    # captions, "A red tile" belongs to one of two equal tiles; the other three lead alone.
    assert dict(outcome.scores) == pytest.approx(
        {
            "image_to_text_recall@1": 2 / 3,
            "text_to_image_recall@1": 3 / 4,
            "image_to_text_recall@2": 1,
            "text_to_image_recall@2": 1,
            "image_to_text_median_rank": 1,
            "text_to_image_median_rank": 1,
            "image_to_text_mean_average_precision": (1 + 1 / 2 + 1) / 3,
            "text_to_image_mean_average_precision": (1 + 1 / 2 + 1 + 1) / 4,
        }
    )
    assert outcome.details["gallery"] == {"images": 3, "captions": 4}
    assert outcome.details["right_answers"] == {
        "image_to_text": {"mean": 5 / 3, "most": 2, "queries_without_a_wrong_answer": 0},
        "text_to_image": {"mean": 5 / 4, "most": 2, "queries_without_a_wrong_answer": 0},
    }


@pytest.mark.parametrize("gallery", ["unique", "rows"])
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value, gallery):
    scores = scores_of(many_to_many_pairs(40), BrokenModel(value), ks=(1, 5, 10), gallery=gallery)
    assert {value for metric, value in scores.items() if "recall" in metric} == {0.0}
    assert scores["image_to_text_median_rank"] > 10
    assert scores["text_to_image_mean_average_precision"] < 0.1
    assert np.isfinite(list(scores.values())).all()


def test_a_caption_that_all_share_is_right_by_definition():
    samples = [(noise_tile(seed), ["tissue"], f"image-{seed}") for seed in range(5)]
    outcome = Retrieval(DrawnPairs(samples), ks=[1, 2]).run(SetEncoder(ToyModel()))
    assert outcome.scores["image_to_text_recall@1"] == outcome.scores["text_to_image_recall@1"] == 1
    answers = outcome.details["right_answers"]
    assert answers["image_to_text"]["queries_without_a_wrong_answer"] == 5
    assert answers["text_to_image"] == {"mean": 5, "most": 5, "queries_without_a_wrong_answer": 1}
    assert list(outcome.details["undefined"]) == ["image_to_text_recall@2"]


def test_two_pairs():
    samples = [(noise_tile(0, "red"), ["red"], "a"), (noise_tile(1, "blue"), ["blue"], "b")]
    for captions, hits, rank in ((["red", "blue"], 1, 1), (["blue", "red"], 0, 2)):
        pairs = DrawnPairs(
            [(image, [caption], name) for (image, _, name), caption in zip(samples, captions, strict=True)]
        )
        scores = scores_of(pairs, ColourModel(), ks=[1])
        assert scores["image_to_text_recall@1"] == scores["text_to_image_recall@1"] == hits
        assert scores["image_to_text_median_rank"] == rank


def test_repeats_of_a_row_make_candidates_of_rows_but_no_wrong_ones():
    pairs = many_to_many_pairs(20)
    twice = DrawnPairs(pairs.samples * 2)
    assert scores_of(twice) == scores_of(pairs)
    rows = Retrieval(twice, gallery="rows").run(SetEncoder(ToyModel()))
    assert rows.details["gallery"]["images"] == 40
    # Each wrong candidate is there twice and each query too.
    once = Retrieval(pairs, gallery="rows").run(SetEncoder(ToyModel()))
    assert rows.scores["text_to_image_recall@10"] == once.scores["text_to_image_recall@5"]
    assert rows.scores["text_to_image_recall@5"] < once.scores["text_to_image_recall@5"]


def test_a_drawn_gallery():
    pairs = many_to_many_pairs(40)
    ids = [image_id for *_, image_id in pairs.samples]
    outcomes = [Retrieval(pairs, [1], gallery_size=12, seed=seed).run(SetEncoder(ToyModel())) for seed in (0, 0, 1)]
    assert outcomes[0].details["gallery"]["images"] == 12
    assert outcomes[0].scores == outcomes[1].scores
    assert outcomes[0].items == outcomes[1].items != outcomes[2].items
    everything = Retrieval(pairs, gallery_size=len(set(ids))).run(SetEncoder(ToyModel()))
    assert everything.scores == Retrieval(pairs).run(SetEncoder(ToyModel())).scores
    rows = Retrieval(pairs, gallery="rows", gallery_size=40).run(SetEncoder(ToyModel()))
    assert rows.details["gallery"]["images"] == 40
    with pytest.raises(UserError, match=f"show {len(set(ids))} different images"):
        Retrieval(pairs, gallery_size=40).run(SetEncoder(ToyModel()))


def test_intervals():
    pairs = many_to_many_pairs(60)
    outcome = Retrieval(pairs, ks=(1, 10)).run(SetEncoder(ToyModel()))
    assert outcome.replicates.keys() == outcome.scores.keys()
    for metric, (low, high) in outcome.intervals().items():
        assert outcome.replicates[metric].shape == (1000,)
        assert low <= outcome.scores[metric] <= high
        assert low < high
    assert paired_difference(outcome, outcome, "image_to_text_recall@10").value == 0
    collapsed = Retrieval(pairs, ks=(1, 10)).run(SetEncoder(BrokenModel(1.0)))
    assert collapsed.items == outcome.items
    assert paired_difference(outcome, collapsed, "image_to_text_mean_average_precision").is_clear


def test_repeated_rows_are_drawn_together():
    pairs = DrawnPairs([(noise_tile(seed), [f"finding {seed}"], f"image-{seed}") for seed in range(30)])
    once, often = (
        Retrieval(DrawnPairs(pairs.samples * times), ks=[1], gallery="rows").run(SetEncoder(ToyModel()))
        for times in (1, 10)
    )
    for direction in ("image_to_text", "text_to_image"):
        # Ten times the rows are no more independent images: drawn one by one, they would seem sqrt(10) times as sure.
        deviations = [found.replicates[f"{direction}_median_rank"].std().item() for found in (once, often)]
        assert deviations[1] / 10 == pytest.approx(deviations[0], rel=0.1)


def test_the_same_for_every_batch_size():
    pairs = many_to_many_pairs(30)
    assert scores_of(pairs, batch_size=1) == pytest.approx(scores_of(pairs, batch_size=64))


def test_describe():
    pairs = many_to_many_pairs(20)
    evaluator = Retrieval(pairs, ks=[1, 5])
    assert evaluator.split == "val"
    plain = {"pairs": 20, "split": "val", "ks": [1, 5], "gallery": "unique"}
    assert json.loads(json.dumps(evaluator.describe())) == plain
    drawn = Retrieval(pairs, ks=[1, 5], gallery_size=7, seed=3)
    assert drawn.describe() == {**plain, "gallery_size": 7, "seed": 3}


def test_door():
    with pytest.raises(UserError, match="all 1 or more"):
        Retrieval(many_to_many_pairs(9), ks=[0, 1])
    with pytest.raises(UserError, match="at least two"):
        Retrieval(DrawnPairs([]))
    with pytest.raises(UserError, match="must be one of unique, rows"):
        Retrieval(many_to_many_pairs(9), gallery="all")
    for size in (1, 10):
        with pytest.raises(UserError, match=f"gallery_size={size}"):
            Retrieval(many_to_many_pairs(9), gallery_size=size)
