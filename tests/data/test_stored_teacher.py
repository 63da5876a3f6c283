from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from quiltnet.data.batches import Batch
from quiltnet.data.captions import CaptionChoice
from quiltnet.data.prefetching import on_device
from quiltnet.data.reading import build_loader
from quiltnet.data.sentences import SentenceLimit
from quiltnet.data.teacher_features import TEACHER_EXTENSION, pack_features, parse_features
from quiltnet.data.transforms import TrainTransform
from quiltnet.errors import UserError
from tests.data.made_sets import encoded, pair, tissue, write_set

WIDTH = 6


def features(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Of an image and its two captions; 16 bits hold them exactly."""
    image = np.arange(WIDTH, dtype=np.float32) + number
    return image, np.stack([image * 2, image * 4])


def tokenize(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 2): number of the sample and of the caption."""
    numbers = torch.tensor([[int(word) for word in caption.split()[1:]] for caption in captions])
    return numbers, torch.zeros(len(captions), dtype=torch.bool)


def members(numbers: range, taught: range) -> dict[str, bytes | str]:
    made = {}
    for number in numbers:
        made |= pair(f"tile{number}", encoded(tissue(number, 30, 30)), f"caption {number} 0", f"caption {number} 1")
        if number in taught:
            made[f"tile{number}.{TEACHER_EXTENSION}"] = pack_features(*features(number))
    return made


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    tars = [members(range(5), range(5)), members(range(5, 10), range(5, 9))]  # the last has no features
    return write_set(tmp_path_factory.mktemp("taught"), {"train": tars}) / "train"


def read(shards, count: int = 5, **options) -> list[Batch]:
    options = {"teacher": True, "workers": 0, **options}
    loader = build_loader(shards, TrainTransform(24), tokenize, global_batch_size=4, seed=3, **options)
    stream = iter(loader)
    try:
        return list(islice(stream, count))
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["random", "first", "longest"])
def test_features_are_those_of_the_image_and_the_caption_that_was_chosen(shards, policy, workers):
    seen = set()
    for batch in read(shards, choose_caption=CaptionChoice(policy), workers=workers):
        assert batch.teacher_image.dtype == batch.teacher_text.dtype == torch.float32
        for row in range(4):
            number, caption = batch.text[row].tolist()
            image, texts = features(number)
            assert batch.key[row] == f"tile{number}"
            np.testing.assert_array_equal(batch.teacher_image[row], image)
            np.testing.assert_array_equal(batch.teacher_text[row], texts[caption])
            seen.add(caption)
    assert seen == ({0, 1} if policy == "random" else {0})


def test_a_sample_without_features_is_replaced_and_told(shards):
    batches = read(shards)
    rejected = [entry for batch in batches for entry in batch.rejected]
    assert rejected and set(rejected) == {("tile9", "no_teacher_features")}
    assert "tile9" not in {key for batch in batches for key in batch.key}
    plain = read(shards, teacher=False)
    assert not any(batch.rejected for batch in plain) and plain[0].teacher_image is plain[0].teacher_text is None


def test_remote_shards_give_the_same_features(shards):
    for batch in read(f"file://{shards}"):
        numbers = batch.text[:, 0].tolist()
        np.testing.assert_array_equal(batch.teacher_image, np.stack([features(number)[0] for number in numbers]))


def test_they_go_to_the_device(shards):
    batch = next(on_device(iter(read(shards, 1)), torch.device("cpu")))
    assert batch.teacher_image.shape == batch.teacher_text.shape == (4, WIDTH)


@pytest.mark.parametrize(
    "choice",
    [
        CaptionChoice("joined"),
        CaptionChoice({"weighted": {"caption": 1.0}}),
        CaptionChoice(sentences=SentenceLimit(len, 4)),
    ],
)
def test_texts_that_are_made_up_are_refused_at_the_door(shards, choice):
    with pytest.raises(UserError, match=r"captions as they are; use data.train.caption_policy=random"):
        read(shards, choose_caption=choice)


def test_teachers_of_different_width_do_not_mix(tmp_path):
    made = members(range(4), range(3))
    made[f"tile3.{TEACHER_EXTENSION}"] = pack_features(np.zeros(3), np.zeros((2, 3)))
    with pytest.raises(UserError, match="are 3 and 6 wide in one batch"):
        read(write_set(tmp_path, {"train": [made]}) / "train", 1)


@pytest.mark.parametrize(
    "data",
    [
        b"not safetensors",
        pack_features(np.zeros(4), np.zeros((2, 4)))[:-4],
        pack_features(np.zeros(4), np.zeros((1, 4))),  # of another number of captions
        pack_features(np.zeros(4), np.zeros((2, 5))),
        pack_features(np.full(4, np.nan), np.zeros((2, 4))),
        pack_features(np.zeros(4), np.full((2, 4), np.inf)),
        save({"image": np.zeros(4, np.float16)}),
    ],
)
def test_damaged_features_make_a_broken_sample(tmp_path, data):
    made = {**members(range(4), range(4)), f"tile2.{TEACHER_EXTENSION}": data}
    batches = read(write_set(tmp_path, {"train": [made]}) / "train", 3)
    assert {entry for batch in batches for entry in batch.rejected} == {("tile2", "broken_teacher_features")}


def test_half_precision_is_enough_for_a_cosine():
    image, texts = np.random.default_rng(0).normal(size=512), np.random.default_rng(1).normal(size=(3, 512))
    image, texts = image / np.linalg.norm(image), texts / np.linalg.norm(texts, axis=1, keepdims=True)
    data = pack_features(image, texts)
    stored_image, stored_texts = parse_features(data, 3)
    assert np.abs(stored_texts @ stored_image - texts @ image).max() < 1e-4
    assert len(data) < 4 * 2 * 512 + 200
