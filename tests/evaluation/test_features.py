from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.evaluation.datasets import LabelledSet, in_memory
from quiltnet.evaluation.features import encode_captions, encode_labelled, encode_pair_images
from quiltnet.evaluation.linear_probe import LinearProbe
from quiltnet.evaluation.prompts import PromptSet
from quiltnet.evaluation.retrieval import Retrieval
from quiltnet.evaluation.val_pairs import ValPairs
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from tests.evaluation.toy import ToyModel, many_to_many_pairs, noise_tile
from tests.ranks import run_ranks

COUNT = 23  # over 2 and 3 ranks, and in batches of 4, nothing comes out even


def noise_set(count: int = COUNT, seed: int = 0) -> LabelledSet:
    tiles = [noise_tile(1000 * seed + index) for index in range(count)]
    return in_memory((tiles, [index % 3 for index in range(count)], ["ape", "cat", "dog"]))


def encode_one_by_one(dataset: LabelledSet) -> torch.Tensor:
    model = ToyModel()
    return torch.cat([model.encode_image(model.transform(dataset[i][0])[None]) for i in range(len(dataset))])


@pytest.mark.parametrize("workers", [0, 2])
def test_encode_labelled_keeps_order(workers):
    dataset = noise_set()
    image_features, labels = encode_labelled(ToyModel(), dataset, batch_size=4, workers=workers)
    assert image_features.dtype == torch.float32
    torch.testing.assert_close(image_features, encode_one_by_one(dataset), rtol=0, atol=1e-6)
    assert torch.equal(labels, dataset.labels)


def test_batches_are_as_large_as_asked_for():
    model = ToyModel()
    encode_labelled(model, noise_set(), batch_size=10)
    assert model.encoded == [10, 10, 3]


def test_encode_captions_keeps_order():
    model, captions = ToyModel(), [f"word{i} and word{i + 1}" for i in range(COUNT)]
    expected = torch.cat([model.encode_text(model.tokenize([caption])) for caption in captions])
    found = encode_captions(model, captions, batch_size=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_encode_pair_images_hands_on_what_belongs_to_them():
    pairs = many_to_many_pairs(COUNT)
    image_features, captions, image_ids = encode_pair_images(ToyModel(), pairs, batch_size=4)
    assert len(image_features) == COUNT
    assert captions == [sample[1] for sample in pairs.samples]
    assert image_ids == [sample[2] for sample in pairs.samples]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_random_number_is_drawn(workers):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    encode_labelled(ToyModel(), noise_set(5), batch_size=2, workers=workers)
    encode_captions(ToyModel(), ["a", "b"], batch_size=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_evaluation(tmp_path, workers):
    Image.fromarray(noise_tile(0)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    dataset = LabelledSet([tmp_path / "good.png", tmp_path / "broken.png"], torch.tensor([0, 1]), ["a", "b"])
    with pytest.raises(UserError, match=r"broken\.png"):
        encode_labelled(ToyModel(), dataset, batch_size=2, workers=workers)


def evaluate_all(batch_size: int) -> tuple[list[torch.Tensor], dict[str, float], list[int]]:
    """Features, all evaluators' numbers, and the sizes of the batches that this rank encoded."""
    model, dataset, pairs = ToyModel(), noise_set(), many_to_many_pairs(COUNT)
    prompts = PromptSet(["a {}", "the {}"])
    features = [
        encode_labelled(model, dataset, batch_size=batch_size)[0],
        encode_captions(model, ["one", "two"], batch_size=batch_size),  # of three ranks one has nothing to do
        encode_pair_images(model, pairs, batch_size=batch_size)[0],
    ]
    evaluators = {
        "zeroshot": ZeroShotClassification(dataset, prompts, batch_size),
        "linear_probe": LinearProbe(noise_set(40, seed=1), dataset, c_values=[0.1, 10], batch_size=batch_size),
        "retrieval": Retrieval(pairs, batch_size=batch_size),
        "val_pairs": ValPairs(pairs, batch_size=batch_size),
    }
    numbers = {f"{name}/{key}": value for name, evaluator in evaluators.items() for key, value in evaluator.run(model)}
    return features, numbers, model.encoded


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size):
    features, numbers, _ = evaluate_all(4)
    on_ranks = run_ranks(evaluate_all, world_size, 4)
    for features_of_rank, numbers_of_rank, encoded in on_ranks:
        for found, expected in zip(features_of_rank, features, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert numbers_of_rank == pytest.approx(numbers, abs=1e-6)
        # The same forward passes everywhere: a model with sharded parameters would wait for ever otherwise.
        assert encoded == on_ranks[0][2]
