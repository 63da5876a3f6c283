from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.evaluation.datasets import in_memory
from quiltnet.evaluation.feature_cache import FeatureCache
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet
from tests.evaluation.toy import ColourModel, ToyModel, many_to_many_pairs, noise_tile

COUNT = 23  # over 2 and 3 ranks, and in batches of 4, nothing comes out even


def noise_set(count: int = COUNT, seed: int = 0) -> LabelledSet:
    tiles = [noise_tile(1000 * seed + index) for index in range(count)]
    return in_memory((tiles, [index % 3 for index in range(count)], ["ape", "cat", "dog"]))


def encode_one_by_one(dataset: LabelledSet) -> torch.Tensor:
    model = ToyModel()
    return torch.cat([model.encode_image(model.transform(dataset[i][0])[None]) for i in range(len(dataset))])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_keep_their_order(workers):
    dataset = noise_set()
    image_features = SetEncoder(ToyModel()).images(dataset, batch_size=4, workers=workers)
    assert image_features.dtype == torch.float32
    torch.testing.assert_close(image_features, encode_one_by_one(dataset), rtol=0, atol=1e-6)


def test_features_before_the_projection_are_others():
    encoder, dataset = SetEncoder(ToyModel()), noise_set()
    before = encoder.images(dataset, batch_size=4, projected=False)
    assert before.shape == (COUNT, 24)
    assert encoder.images(dataset, batch_size=4).shape == (COUNT, 16)
    assert torch.equal(encoder.images(dataset, batch_size=4, projected=False), before)


def test_batches_are_as_large_as_asked_for():
    model = ToyModel()
    SetEncoder(model).images(noise_set(), batch_size=10)
    assert model.encoded == [10, 10, 3]


def test_texts_keep_their_order():
    model, captions = ToyModel(), [f"word{i} and word{i + 1}" for i in range(COUNT)]
    expected = torch.cat([model.encode_text(model.tokenize([caption])) for caption in captions])
    found = SetEncoder(model).texts(captions, batch_size=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_pairs_bring_what_belongs_to_them():
    pairs = many_to_many_pairs(COUNT)
    image_features, captions, image_ids = SetEncoder(ToyModel()).pairs(pairs, batch_size=4)
    assert len(image_features) == COUNT
    assert captions == [sample[1] for sample in pairs.samples]
    assert image_ids == [sample[2] for sample in pairs.samples]


def test_equal_sets_are_encoded_once():
    model = ToyModel()
    encoder = SetEncoder(model)
    first = encoder.images(noise_set(), batch_size=10)
    assert torch.equal(encoder.images(noise_set(), batch_size=5), first)  # another object, the same pixels
    assert model.encoded == [10, 10, 3]
    encoder.images(noise_set(seed=1), batch_size=10)
    assert len(model.encoded) == 6


def test_the_cache_outlives_the_process_and_tells_models_apart(tmp_path):
    dataset, pairs, cache = noise_set(), many_to_many_pairs(COUNT), FeatureCache(tmp_path / "features")
    first = SetEncoder(ToyModel(), cache)
    expected, expected_pairs = first.images(dataset, batch_size=10), first.pairs(pairs, batch_size=10)
    model = ToyModel()
    again = SetEncoder(model, cache)
    assert torch.equal(again.images(dataset, batch_size=10), expected)
    found = again.pairs(pairs, batch_size=10)
    assert torch.equal(found.image_features, expected_pairs.image_features)
    assert found[1:] == expected_pairs[1:]
    assert model.encoded == []
    other = SetEncoder(ColourModel(), cache).images(dataset, batch_size=10)
    assert other.shape != expected.shape
    half = SetEncoder(ToyModel(), cache, torch.bfloat16)
    half.images(dataset, batch_size=10)
    assert len(list(cache.folder.iterdir())) == 4  # images of two models, of one in two precisions, and pairs


def test_the_cache_sees_a_changed_file(tmp_path):
    for index in range(2):
        Image.fromarray(noise_tile(index)).save(tmp_path / f"{index}.png")
    paths, cache = [tmp_path / "0.png", tmp_path / "1.png"], FeatureCache(tmp_path / "cache")
    dataset = LabelledSet(paths, torch.tensor([0, 1]), ["a", "b"])
    before = SetEncoder(ToyModel(), cache).images(dataset, batch_size=2)
    Image.fromarray(noise_tile(9)).save(paths[1])
    os.utime(paths[1], ns=(1, 1))
    after = SetEncoder(ToyModel(), cache).images(dataclasses.replace(dataset), batch_size=2)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_a_cut_cache_file_is_encoded_again(tmp_path):
    cache = FeatureCache(tmp_path)
    expected = SetEncoder(ToyModel(), cache).images(noise_set(), batch_size=10)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert torch.equal(SetEncoder(ToyModel(), cache).images(noise_set(), batch_size=10), expected)
    assert SetEncoder(ToyModel(), cache).cache.load(file.stem) is not None  # whole again


@pytest.mark.parametrize("workers", [0, 1])
def test_no_random_number_is_drawn(workers):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    encoder = SetEncoder(ToyModel())
    encoder.images(noise_set(5), batch_size=2, workers=workers)
    encoder.texts(["a", "b"], batch_size=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_evaluation(tmp_path, workers):
    Image.fromarray(noise_tile(0)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    dataset = LabelledSet([tmp_path / "good.png", tmp_path / "broken.png"], torch.tensor([0, 1]), ["a", "b"])
    with pytest.raises(UserError, match=r"broken\.png"):
        SetEncoder(ToyModel()).images(dataset, batch_size=2, workers=workers)
