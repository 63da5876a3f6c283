from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from quiltnet.evaluation.retrieval_metrics import Ranks, medians, on_grid, retrieval_ranks


def unit_features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def some_pairs(images: int, texts: int, count: int, seed: int = 0) -> torch.Tensor:
    """Distinct, in no order; every image and every text has one at least."""
    rng = np.random.default_rng(seed)
    pairs = {(image, image % texts) for image in range(images)} | {(text % images, text) for text in range(texts)}
    pairs |= {(int(rng.integers(images)), int(rng.integers(texts))) for _ in range(count)}
    return torch.tensor(rng.permutation(sorted(pairs)))


def wrong_ahead(similarity: np.ndarray, is_right: np.ndarray) -> int:
    """Of one query: candidates one by one."""
    best = max(similarity[is_right])
    return sum(not value < best for value, right in zip(similarity, is_right, strict=True) if not right)


def average_precision(similarity: np.ndarray, is_right: np.ndarray) -> float:
    """Of one query, by walking down the list; of equals, wrong ones come first."""
    order = sorted(range(len(similarity)), key=lambda index: (-similarity[index], is_right[index]))
    right, precisions = 0, []
    for place, candidate in enumerate(order, start=1):
        if is_right[candidate]:
            right += 1
            precisions.append(right / place)
    return float(np.mean(precisions))


def by_definition(image: torch.Tensor, text: torch.Tensor, positives: torch.Tensor) -> list[tuple[list, list]]:
    """Both directions' (wrong ahead, average precision), from the whole matrix."""
    similarity = (on_grid(image) @ on_grid(text).T).numpy()
    is_right = np.zeros(similarity.shape, dtype=bool)
    is_right[tuple(positives.T.numpy())] = True
    return [
        (
            [wrong_ahead(*row) for row in zip(s, r, strict=True)],
            [average_precision(*row) for row in zip(s, r, strict=True)],
        )
        for s, r in ((similarity, is_right), (similarity.T, is_right.T))
    ]


def assert_equal(found: tuple[Ranks, Ranks], expected: list[tuple[list, list]]) -> None:
    for ranks, (ahead, precision) in zip(found, expected, strict=True):
        assert ranks.best().tolist() == ahead
        assert ranks.average_precision().tolist() == pytest.approx(precision, abs=1e-12)


@pytest.mark.parametrize("tile", [1, 7, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ranks_by_definition(tile, dtype):
    image, text = unit_features(31, 6, seed=0).to(dtype), unit_features(23, 6, seed=1).to(dtype)
    positives = some_pairs(31, 23, 60)
    expected = by_definition(image, text, positives)
    assert_equal(retrieval_ranks(image, text, positives, tile), expected)
    assert 0 < np.mean(np.equal(expected[0][0], 0)) < 1


@pytest.mark.parametrize("tile", [1, 5, 64])
def test_ranks_with_many_ties(tile):
    # Signs of 0.5 in four dimensions: similarities are -1, -0.5, 0, 0.5 and 1 only, and rows come several times.
    image, text = (unit_features(rows, 4, seed=rows).sign() / 2 for rows in (29, 34))
    positives = some_pairs(29, 34, 80)
    assert_equal(retrieval_ranks(image, text, positives, tile), by_definition(image, text, positives))


def test_ranks_one_can_check_by_eye():
    angles = torch.tensor([0.0, 0.1, 0.2, 0.5, 1.0])
    text = torch.stack([angles.cos(), angles.sin()], dim=1)
    image = text[:1]  # the nearer the text's angle is to 0, the more similar
    of_image, of_texts = retrieval_ranks(image, text, torch.tensor([[0, 1], [0, 3]]))
    assert of_image.wrong_ahead.tolist() == [1, 2]  # behind the first; behind the first and the third
    assert of_image.best().tolist() == [1]
    assert of_image.average_precision().tolist() == pytest.approx([(1 / 2 + 2 / 4) / 2])
    assert of_image.right_answers().tolist() == [2]
    assert of_texts.best().tolist() == [1, 0, 1, 0, 1]  # a text without a right image is no hit
    assert of_texts.average_precision().tolist() == [0, 1, 0, 1, 0]


def test_average_precision_is_that_of_sklearn():
    image, text = unit_features(40, 8, seed=0), unit_features(60, 8, seed=1)
    positives = some_pairs(40, 60, 150)
    is_right = np.zeros((40, 60), dtype=bool)
    is_right[tuple(positives.T.numpy())] = True
    similarity = (image.double() @ text.double().T).numpy()
    of_images, of_texts = retrieval_ranks(image, text, positives, tile=16)
    for ranks, scores, right in ((of_images, similarity, is_right), (of_texts, similarity.T, is_right.T)):
        expected = [average_precision_score(*row) for row in zip(right, scores, strict=True)]
        assert ranks.average_precision().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("width", [3, 64, 384, 513, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_features_tie_whatever_the_shape(width, dtype):
    # A float32 product gives equal columns unequal values: BLAS sums the last few in another order.
    for candidates in (5, 7, 100, 1003):
        feature = on_grid(unit_features(1, width, seed=candidates, dtype=dtype))
        similarity = feature.expand(3, -1) @ feature.expand(candidates, -1).contiguous().T
        one_by_one = (feature * feature).sum(dim=1)
        assert similarity.unique().tolist() == one_by_one.tolist()


def test_a_grid_so_fine_that_similarities_are_those_of_the_features():
    image, text = unit_features(200, 512, seed=0), unit_features(200, 512, seed=1)
    similarity = on_grid(image) @ on_grid(text).T / 2.0**52
    torch.testing.assert_close(similarity, image.double() @ text.double().T, rtol=0, atol=6e-8)


@pytest.mark.parametrize("tile", [1, 3, 64])
def test_collapsed_features_do_not_score(tile):
    # 29 equal features, each right for one: the one is behind all others.
    image = unit_features(1, 64, seed=0).expand(29, -1).contiguous()
    for ranks in retrieval_ranks(image, image, torch.arange(29)[:, None].expand(-1, 2), tile):
        assert set(ranks.best().tolist()) == {28}
        assert ranks.average_precision().tolist() == pytest.approx([1 / 29] * 29)


def test_equal_right_answers_do_not_stand_in_each_others_way():
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    of_image, _ = retrieval_ranks(torch.tensor([[1.0, 0.0]]), text, torch.tensor([[0, 0], [0, 1]]))
    assert of_image.best().tolist() == [0]
    assert of_image.average_precision().tolist() == [1.0]


def test_nan_never_scores():
    image, text = unit_features(9, 5, seed=0), unit_features(9, 5, seed=0)
    text[4], image[7] = torch.nan, torch.nan
    of_images, of_texts = retrieval_ranks(image, text, torch.arange(9)[:, None].expand(-1, 2), tile=4)
    # Of nine perfect pairs one has a NaN text and one a NaN image; to all others a NaN candidate is ahead.
    assert of_images.best().tolist() == [1, 1, 1, 1, 9, 1, 1, 9, 1]
    assert of_texts.best().tolist() == [1, 1, 1, 1, 9, 1, 1, 9, 1]
    assert of_images.average_precision().tolist() == [0.5, 0.5, 0.5, 0.5, 0, 0.5, 0.5, 0, 0.5]
    nan = torch.full((9, 5), torch.nan)
    for ranks in retrieval_ranks(nan, nan, some_pairs(9, 9, 20)):
        assert set(ranks.best().tolist()) == {9}
        assert set(ranks.average_precision().tolist()) == {0.0}


def test_a_nan_among_the_right_answers_is_a_miss():
    text = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [0.0, 1.0]])
    of_image, _ = retrieval_ranks(torch.tensor([[1.0, 0.0]]), text, torch.tensor([[0, 0], [0, 1]]))
    assert of_image.best().tolist() == [3]


def test_where_every_candidate_is_right():
    image, text = unit_features(5, 4, seed=0), unit_features(1, 4, seed=1)
    of_images, of_texts = retrieval_ranks(image, text, torch.tensor([[row, 0] for row in range(5)]), tile=2)
    assert of_images.best().tolist() == [0] * 5
    assert of_texts.best().tolist() == [0]
    assert of_texts.average_precision().tolist() == [1.0]
    collapsed = image[:1].expand(5, -1)
    assert retrieval_ranks(collapsed, collapsed[:1], torch.tensor([[0, 0]]))[1].best().tolist() == [4]


def test_features_of_another_length_are_refused():
    with pytest.raises(AssertionError, match="unit length"):
        on_grid(2 * unit_features(3, 4, seed=0))


@pytest.mark.parametrize("size", [1, 2, 9, 10])
def test_medians_of_resamples(size):
    rng = np.random.default_rng(size)
    values = rng.integers(1, 7, size)
    counts = rng.multinomial(size, np.full(size, 1 / size), 20)
    expected = [np.median(np.repeat(values, count)) for count in counts]
    assert medians(torch.tensor(values), torch.tensor(counts)).tolist() == expected
