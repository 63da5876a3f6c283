from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.evaluation.labelled_set import LabelledSet
from tests.evaluation.tiles import encoded_tile, save_tile
from tests.evaluation.toy import noise_tile


class CountedImages:
    """A lazy sequence that knows what was asked of it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> bytes:
        self.asked.append(index)
        return encoded_tile(index)

    def content(self) -> list[str]:
        return [f"archive {index}" for index in range(self.count)]


def two_images(image, **options) -> LabelledSet:
    return LabelledSet([image, image], torch.tensor([0, 1]), ["a", "b"], **options)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_images_are_rgb(tmp_path, mode):
    path = tmp_path / ("tile.png" if mode not in ("CMYK", "YCbCr") else "tile.tif")
    save_tile(path, mode=mode)
    image, label = two_images(path)[1]
    assert (image.mode, image.size, label) == ("RGB", (8, 8), 1)
    expected = np.array(Image.fromarray(noise_tile(0)).convert(mode).convert("RGB"))
    assert np.array_equal(np.array(image), expected)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", None])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    grey = np.array([[0, 128, 129, 257], [32768, 65535 - 257, 65406, 65535]], dtype=np.uint16)
    if name is not None:
        Image.fromarray(grey).save(tmp_path / name)
    image, _ = two_images(grey if name is None else tmp_path / name)[0]
    assert np.array(image)[..., 0].tolist() == [[0, 0, 1, 1], [128, 254, 254, 255]]  # v / 257, rounded


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((4, 4), 300, dtype)).save(tmp_path / "tile.tif")
    for image in (tmp_path / "tile.tif", np.full((4, 4), 300, dtype)):
        with pytest.raises(UserError, match="nobody knows what is white"):
            two_images(image)[0]
    with pytest.raises(UserError, match="cannot read 0"):
        two_images(np.zeros((4, 4, 3), dtype))[0]


@pytest.mark.parametrize("damage", ["truncated.jpg", "truncated.png", "truncated.tif", "text.png", "empty.jpg"])
def test_a_broken_image_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / damage
    save_tile(path)
    whole = path.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}
    path.write_bytes(broken[path.stem])
    with pytest.raises(UserError, match=damage):
        two_images(path)[0]
    with pytest.raises(UserError, match="cannot read b, bytes of source a test"):
        two_images(path.read_bytes(), names=["a, bytes", "b, bytes"], origin={"source": "a test"})[1]
    path.unlink()
    with pytest.raises(UserError, match=damage):
        two_images(path)[0]


def test_door():
    tiles = [noise_tile(0), noise_tile(1)]
    with pytest.raises(UserError, match="no labelled image in source x"):
        LabelledSet([], torch.zeros(0, dtype=torch.int64), ["a", "b"], origin={"source": "x"})
    with pytest.raises(UserError, match="single class 'b'"):
        LabelledSet(tiles, torch.tensor([1, 1]), ["a", "b"])
    for label in (2, -1):  # -1 would be the last class to Python
        with pytest.raises(UserError, match=rf"label {label} of the set has no name"):
            LabelledSet(tiles, torch.tensor([0, label]), ["a", "b"])
    for names in (["Tumour", "stroma", "tumour"], ["tumour", "stroma", " tumour"], ["a b", "c", "a  b"]):
        with pytest.raises(UserError, match="no prompt can tell them apart"):
            LabelledSet(tiles, torch.tensor([0, 1]), names)
    with pytest.raises(UserError, match="called ' '"):
        LabelledSet(tiles, torch.tensor([0, 1]), ["a", "b", " "])
    with pytest.raises(UserError, match="split='fit'"):
        two_images(tiles[0], split="fit")


def test_select_keeps_what_belongs_to_an_image():
    tiles = [noise_tile(seed) for seed in range(4)]
    dataset = LabelledSet(
        tiles, torch.tensor([0, 1, 2, 1]), ["a", "b", "c"], groups=list("wxyz"), slides=list("stuv"), split="train"
    )
    for rows in (torch.tensor([3, 0]), torch.tensor([True, False, False, True])):
        part = dataset.select(rows, split="val")
        order = [3, 0] if rows.dtype == torch.int64 else [0, 3]
        assert part.labels.tolist() == [[0, 1, 2, 1][row] for row in order]
        assert part.groups == ["wxyz"[row] for row in order]
        assert part.slides == ["stuv"[row] for row in order]
        assert part.names == [str(row) for row in order]
        assert all(np.array_equal(np.array(part[at][0]), tiles[row]) for at, row in enumerate(order))
        assert (part.class_names, part.split, dataset.split) == (["a", "b", "c"], "val", "train")
    assert dataset.select(torch.tensor([0, 1])).split == "train"


def test_a_lazy_sequence_is_read_where_it_is_asked():
    images = CountedImages(6)
    dataset = LabelledSet(images, torch.tensor([0, 1] * 3), ["a", "b"])
    part = dataset.select(torch.tensor([5, 2, 0])).select(torch.tensor([2, 0]))
    dataset.describe(), dataset.sha256(), part.describe()
    assert (dataset.content()[5], part.content()) == ("archive 5", ["archive 0", "archive 5"])
    assert images.asked == []
    assert np.array_equal(np.array(part[1][0]), noise_tile(5))
    assert images.asked == [5]
    assert pickle.loads(pickle.dumps(part)).content() == part.content()


def test_content_differs_where_pixels_do(tmp_path):
    path = tmp_path / "tile.png"
    save_tile(path)
    of_file = two_images(path).content()
    assert two_images(path).content() == of_file
    path.write_bytes(encoded_tile(1) + b" ")
    assert two_images(path).content() != of_file
    assert two_images(encoded_tile(0)).content() == two_images(encoded_tile(0)).content()
    assert two_images(encoded_tile(0)).content() != two_images(encoded_tile(1)).content()
    tile = noise_tile(0)
    assert two_images(tile).content() == two_images(tile.copy()).content()
    assert two_images(tile).content() != two_images(tile.reshape(4, 16, 3)).content()
    assert two_images(tile).content() != two_images(tile[::-1]).content()


def test_sha256_is_of_names_and_labels_in_their_order(tmp_path):
    def hash_of(names: list[str], labels: list[int], class_names=("a", "b"), folder: Path = tmp_path) -> str:
        return LabelledSet([folder / name for name in names], torch.tensor(labels), class_names, names=names).sha256()

    base = hash_of(["x/1.png", "y/1.png"], [0, 1])
    assert hash_of(["x/1.png", "y/1.png"], [0, 1], folder=tmp_path / "moved") == base
    assert hash_of(["x/1.png", "y/1.png"], [1, 0], ("b", "a")) == base  # how classes are numbered is no matter
    assert hash_of(["x/1.png", "y/1.png"], [1, 0]) != base
    assert hash_of(["y/1.png", "x/1.png"], [1, 0]) != base
    assert hash_of(["x/1.png", "z/1.png"], [0, 1]) != base
