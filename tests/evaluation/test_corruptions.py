from __future__ import annotations

import io
import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from quiltnet.data.stain import hed_jitter
from quiltnet.errors import UserError
from quiltnet.evaluation.corruptions import CorruptedImages, GaussianBlur, JPEGCompression, Rotation, StainJitter
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet
from tests.evaluation.toy import ToyModel, noise_tile

CORRUPTIONS = [GaussianBlur(1.5), JPEGCompression(30), Rotation(90), StainJitter(hed_jitter, 0.1)]


def noise(size: int = 32) -> Image.Image:
    return Image.fromarray(noise_tile(0, size=size))


def noise_set(count: int = 4) -> LabelledSet:
    return LabelledSet([noise_tile(index) for index in range(count)], torch.arange(count) % 2, ["benign", "malignant"])


def difference(first: Image.Image, second: Image.Image) -> float:
    return np.abs(np.array(first).astype(float) - np.array(second)).mean()


def darker(image: torch.Tensor, factors: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """What a user may hand in instead; at module level, so that it pickles."""
    return image * 0.5


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: type(corruption).__name__)
def test_images_keep_mode_and_size_and_are_the_same_each_time(corruption):
    image = noise()
    corrupted = corruption(image, 3)
    assert (corrupted.mode, corrupted.size) == ("RGB", image.size)
    assert difference(corrupted, image) > 1
    assert difference(corrupted, corruption(image, 3)) == 0
    assert difference(image, noise()) == 0  # the original is left alone
    json.dumps(corruption.describe())


def test_blur_takes_contrast():
    spreads = [np.array(GaussianBlur(radius)(noise(), 0)).std() for radius in (0.5, 1, 3)]
    assert spreads == sorted(spreads, reverse=True)
    flat = Image.new("RGB", (32, 32), (200, 100, 150))
    assert difference(GaussianBlur(2)(flat, 0), flat) == 0


def test_jpeg_is_what_a_file_of_that_quality_holds():
    written = io.BytesIO()
    noise().save(written, "JPEG", quality=30)
    assert difference(JPEGCompression(30)(noise(), 0), Image.open(written)) == 0
    assert difference(JPEGCompression(10)(noise(), 0), noise()) > difference(JPEGCompression(90)(noise(), 0), noise())


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_loses_nothing(degrees):
    tall = Image.fromarray(np.array(noise())[:, :20])
    assert np.array_equal(np.array(Rotation(degrees)(tall, 0)), np.rot90(np.array(tall), degrees // 90))


def test_stain_jitter_is_the_function_with_the_images_own_draws():
    seen = []

    def spy(image, factors, shifts):
        seen.append((factors, shifts))
        return hed_jitter(image, factors, shifts)

    image = noise()
    corrupted = StainJitter(spy, 0.2)(image, 5)
    factors, shifts = seen[0]
    assert ((factors - 1).abs() <= 0.2).all() and (shifts.abs() <= 0.2).all()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    expected = hed_jitter(pixels, factors, shifts)[0].permute(1, 2, 0) * 255
    np.testing.assert_allclose(np.array(corrupted), expected, atol=0.51)
    StainJitter(spy, 0.1)(image, 5)
    StainJitter(spy, 0.2)(image, 6)
    StainJitter(spy, 0.2, seed=1)(image, 5)
    torch.testing.assert_close(seen[1][0] - 1, (factors - 1) / 2)  # the same direction, half as far
    torch.testing.assert_close(seen[1][1], shifts / 2)
    assert not torch.equal(seen[2][0], factors)
    assert not torch.equal(seen[3][0], factors)


def test_stronger_is_further():
    distances = [
        sum(difference(StainJitter(hed_jitter, strength)(noise(), index), noise()) for index in range(8))
        for strength in (0.05, 0.1, 0.2)
    ]
    assert distances == sorted(distances)


def test_a_stain_function_is_recorded_by_its_name():
    for jitter in (hed_jitter, partial(hed_jitter)):
        assert StainJitter(jitter, 0.1).describe()["jitter"] == "quiltnet.data.stain.hed_jitter"


def test_lazy_images_are_those_of_the_set_corrupted_by_their_places():
    dataset = noise_set()
    corruption = StainJitter(hed_jitter, 0.2)
    images = CorruptedImages(dataset, corruption)
    assert len(images) == 4
    for index in range(4):
        assert np.array_equal(images[index], np.array(corruption(dataset[index][0], index)))
    assert np.array_equal(images[-1], images[3])
    with pytest.raises(IndexError):
        images[4]
    copied = pickle.loads(pickle.dumps(images))
    assert np.array_equal(copied[2], images[2])
    assert copied.content() == images.content()


def test_content_tells_corruptions_apart():
    dataset = noise_set()
    stronger = [GaussianBlur(1.6), JPEGCompression(31), Rotation(180), StainJitter(hed_jitter, 0.11)]
    others = [StainJitter(hed_jitter, 0.1, seed=1), StainJitter(darker, 0.1)]
    contents = [tuple(CorruptedImages(dataset, one).content()) for one in [*CORRUPTIONS, *stronger, *others]]
    assert len({*contents, tuple(dataset.content())}) == 11
    assert all(len(set(lines)) == len(dataset) for lines in contents)


def test_content_sees_another_function_of_the_same_name():
    def make(share: float):
        def fade(image, factors, shifts):
            return image * share

        return fade

    first, second = (CorruptedImages(noise_set(), StainJitter(make(share), 0.1)) for share in (0.5, 0.6))
    assert first.corruption.describe() == second.corruption.describe()
    assert first.content() != second.content()


def test_an_encoder_encodes_them_once_in_any_process():
    dataset, model = noise_set(), ToyModel()
    encoder = SetEncoder(model)
    corrupted = LabelledSet(CorruptedImages(dataset, StainJitter(hed_jitter, 0.2)), dataset.labels, dataset.class_names)
    clean, found = (encoder.images(one, batch_size=2) for one in (dataset, corrupted))
    assert not torch.equal(clean, found)
    assert torch.equal(SetEncoder(model).images(corrupted, batch_size=2, workers=1), found)
    calls = len(model.encoded)
    encoder.images(corrupted, batch_size=4)
    assert len(model.encoded) == calls


def test_an_unreadable_image_is_named(tmp_path):
    path = tmp_path / "torn.png"
    path.write_bytes(b"no image")
    dataset = LabelledSet([path, path], torch.tensor([0, 1]), ["benign", "malignant"])
    with pytest.raises(UserError, match=r"torn\.png"):
        CorruptedImages(dataset, Rotation(90))[0]


def test_door():
    with pytest.raises(UserError, match="above 0, in pixels"):
        GaussianBlur(0)
    with pytest.raises(UserError, match="from 1"):
        JPEGCompression(0)
    with pytest.raises(UserError, match="90, 180 or 270"):
        Rotation(45)
    for strength in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match="at most 1"):
            StainJitter(hed_jitter, strength)
