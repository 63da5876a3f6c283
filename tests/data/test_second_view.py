from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from quiltnet.data.augmentation import DeviceAugment
from quiltnet.data.batches import Batch, SampleGenerators
from quiltnet.data.device_decoding import DeviceDecoder, JoinedTiles
from quiltnet.data.prefetching import on_device
from quiltnet.data.reading import build_loader
from quiltnet.data.transforms import TrainTransform
from tests.data.made_sets import encoded, pair, tissue, write_set

SEED = 5
JITTER = DeviceAugment(color_jitter=(0.4, 0.4, 0.4, 0.1), hed_jitter=0.05)


def tokenize(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[len(caption)] for caption in captions]), torch.zeros(len(captions), dtype=torch.bool)


def transform(decode: str = "exact") -> TrainTransform:
    return TrainTransform(24, scale=(0.3, 1.0), horizontal_flip=True, decode=decode)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    members = {}
    for number in range(12):
        data = encoded(tissue(number)) if number != 3 else encoded(tissue(number))[:-200]  # the 4th breaks off
        members |= pair(f"tile{number}", data, f"caption {number}", f"another caption {number}")
    return write_set(tmp_path_factory.mktemp("views"), {"train": [members]}) / "train"


def read(shards, count: int = 4, decode: str = "exact", **options) -> list[Batch]:
    options = {"augment": JITTER, "workers": 0, **options}
    loader = build_loader(shards, transform(decode), tokenize, global_batch_size=6, seed=SEED, **options)
    stream = iter(loader)
    try:
        return list(islice(stream, count))
    finally:
        loader.close()


def test_one_view_is_what_it_was_and_the_second_comes_after_it(shards):
    for one, two in zip(read(shards), read(shards, views=2), strict=True):
        assert one.second_image is None and one.second_draws is None
        for name in ("image", "text", "image_id", "caption_id", "number", "truncated", "draws"):
            torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=0, atol=0)
        assert two.key == one.key and two.rejected == one.rejected
        assert two.second_image.shape == two.image.shape and two.second_draws.shape == two.draws.shape
        assert all((first != second).any() for first, second in zip(two.image, two.second_image, strict=True))
        assert not torch.isclose(two.draws, two.second_draws).all(dim=1).any()


def test_draws_of_the_second_view_follow_those_of_the_first(shards):
    """By hand: caption, tile, augmentation, tile, augmentation, all by the generator of the position."""
    batch = read(shards, 1, views=2)[0]
    row, number = 1, int(batch.number[1])
    rng = SampleGenerators(SEED).at(row, 0)
    rng.integers(2)
    for image, draws in ((batch.image, batch.draws), (batch.second_image, batch.second_draws)):
        torch.testing.assert_close(transform()(encoded(tissue(number)), rng), image[row], rtol=0, atol=0)
        np.testing.assert_array_equal(JITTER.draw(rng), draws[row].numpy())


def test_processes_change_nothing(shards):
    alone, shared = read(shards, views=2), read(shards, views=2, workers=2)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.second_image, other.second_image) and torch.equal(one.second_draws, other.second_draws)


def test_both_views_are_augmented(shards):
    batch = read(shards, 1, views=2)[0]
    ready = next(on_device(iter([batch]), torch.device("cpu"), augment=JITTER))
    assert torch.equal(ready.second_image, JITTER(batch.second_image, batch.second_draws))
    assert torch.equal(ready.image, JITTER(batch.image, batch.draws))
    assert not torch.equal(ready.second_image, batch.second_image)


def test_both_views_are_decoded_by_the_device(shards):
    """A broken file is found by the device alone; both views of its row are those of the pair that stands in."""
    batches, direct = read(shards, views=2, decode="cuda"), read(shards, views=2)
    assert all(isinstance(part, JoinedTiles) for part in (batches[0].image, batches[0].second_image))
    decoder = DeviceDecoder("cpu", 24)
    replaced = 0
    for ready, expected in zip(on_device(iter(batches), torch.device("cpu"), decoder=decoder), direct, strict=True):
        for row, (key, wanted) in enumerate(zip(ready.key, expected.key, strict=True)):
            if key == wanted:
                for name in ("image", "second_image"):
                    difference = getattr(ready, name)[row].int() - getattr(expected, name)[row].int()
                    assert difference.abs().max() <= 1
            else:
                replaced += 1
                instead = row - 1 if row else 1
                assert ("tile3", "broken_image") in ready.rejected and key == ready.key[instead]
                assert torch.equal(ready.second_image[row], ready.second_image[instead])
    assert replaced


def test_pinning_leaves_out_what_is_not_there(shards, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    one, two = read(shards, 1)[0].pin_memory(), read(shards, 1, views=2)[0].pin_memory()
    assert one.second_image is None and one.teacher_text is None
    assert two.second_image is not None and two.second_draws is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_views_reach_the_gpu(shards):
    ready = next(on_device(iter(read(shards, 3, views=2)), torch.device("cuda"), augment=JITTER))
    assert ready.second_image.is_cuda and ready.image.is_cuda and not ready.draws.is_cuda
