from __future__ import annotations

import builtins
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.label_archives import huggingface_labels, npz_labels, webdataset_labels
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.stored_images import read_members
from tests.evaluation.tiles import encoded_tile, save_tile
from tests.evaluation.toy import ToyModel, noise_tile

NAMES = {0: "adipose", 1: "debris", 2: "mucus"}


def read_names(dataset: LabelledSet) -> list[str]:
    return [dataset.class_names[label] for label in dataset.labels.tolist()]


def check_lazy_and_whole(dataset: LabelledSet, seeds: list[int]) -> None:
    """Each image is the tile of its seed: in this process, in a loader's, and where only some are selected."""
    expected = [noise_tile(seed) for seed in seeds]
    assert all(np.array_equal(np.array(dataset[row][0]), tile) for row, tile in enumerate(expected))
    assert len(set(dataset.content())) == len(dataset) == len(seeds)
    last = len(seeds) - 1
    other = next(row for row in range(last) if dataset.labels[row] != dataset.labels[last])
    copy = pickle.loads(pickle.dumps(dataset.select(torch.tensor([last, other]))))
    assert np.array_equal(np.array(copy[0][0]), expected[last])
    assert np.array_equal(np.array(copy[1][0]), expected[other])
    assert copy.content() == [dataset.content()[last], dataset.content()[other]]
    assert copy.names == [dataset.names[last], dataset.names[other]]


# npz


def save_npz(path: Path, *, save=np.savez, **changes) -> Path:
    arrays = {
        "train_images": np.stack([noise_tile(seed) for seed in range(4)]),
        "train_labels": np.array([[0], [1], [2], [2]], dtype=np.uint8),
        "test_images": np.stack([noise_tile(seed) for seed in (7, 8, 9)]),
        "test_labels": np.array([[2], [0], [2]], dtype=np.uint8),
    }
    save(path, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    file = save_npz(tmp_path / "set.npz", save=save)
    dataset = npz_labels(file, NAMES)
    assert (dataset.class_names, read_names(dataset)) == (["adipose", "debris", "mucus"], ["mucus", "adipose", "mucus"])
    assert (dataset.names, dataset.split) == (["test/0", "test/1", "test/2"], "test")
    check_lazy_and_whole(dataset, [7, 8, 9])
    train = npz_labels(file, list(NAMES.values()), split="train", ordered=True)
    assert (train.split, train.is_ordered, train.class_names) == ("train", True, dataset.class_names)
    check_lazy_and_whole(train, [0, 1, 2, 3])
    assert npz_labels(file, NAMES, split="train", used_as="test").split == "test"


def test_npz_of_grey_images_in_any_memory_order(tmp_path):
    grey = np.asfortranarray(np.stack([noise_tile(seed)[..., 0] for seed in range(3)]))
    dataset = npz_labels(save_npz(tmp_path / "set.npz", test_images=grey), NAMES)
    assert np.array_equal(np.array(dataset[2][0]), np.repeat(grey[2][..., None], 3, axis=2))


def test_images_of_an_npz_are_not_read_to_describe_it(tmp_path, monkeypatch):
    file = save_npz(tmp_path / "set.npz", save=np.savez_compressed)
    read = []
    getitem = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda archive, key: read.append(key) or getitem(archive, key)
    )
    dataset = npz_labels(file, NAMES)
    dataset.describe(), dataset.content(), pickle.dumps(dataset)
    assert read == ["train_labels", "test_labels"]
    dataset[0], dataset[1]
    assert read[2:] == ["test_images"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": np.zeros((3, 14), np.uint8)}, "choose one of several labels"),
        ({"test_labels": np.array([0.5, 1, 2])}, "choose one of several labels"),
        ({"test_labels": np.array([[0], [1]])}, "3 images and 2 labels"),
        ({"test_labels": None}, "no split 'test'; it has train"),
        ({"test_labels": np.array([0, 1, 3])}, "'3'.*no class name"),
        ({"test_labels": np.array([0, 1, -1])}, "'-1'.*no class name"),
        ({"test_images": None}, "cannot read test_images"),
        ({"test_images": np.zeros((3, 8, 8, 3))}, "convert them"),
        ({"test_images": np.zeros((3, 8, 8, 4), np.uint8)}, "convert them"),
        ({"test_labels": np.array(["a", None], dtype=object)}, "cannot read .* as an npz file"),
    ],
)
def test_npz_door(tmp_path, changes, message):
    file = save_npz(tmp_path / "set.npz", **changes)
    with pytest.raises(UserError, match=message):
        npz_labels(file, NAMES)


def test_an_npz_that_is_not_whole(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        npz_labels(tmp_path / "set.npz", NAMES)
    file = save_npz(tmp_path / "set.npz")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="get it anew, whole"):
        npz_labels(file, NAMES)
    damaged = bytearray(save_npz(tmp_path / "set.npz", save=np.savez_compressed).read_bytes())
    place = damaged.index(b"test_images.npy")
    damaged[place + 200 : place + 400] = bytes(200)
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="cannot read test_images"):
        npz_labels(file, NAMES)[0]


# WebDataset


def save_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, seed: int, label: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", encoded_tile(seed)), (f"{key}.json", b"{}"), (f"{key}.cls", label.encode())]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    save_tar(folder / "t-10.tar", sample("p2_a", 4, "0\n"))
    save_tar(folder / "t-2.tar", [*sample("p1_b", 2, "2"), *sample("deep/p1_b", 3, "0")])
    save_tar(
        folder / "t-1.tar", [("._p1_a.png", b"of macOS"), *reversed(sample("p1_a", 0, "2")), *sample("p1_c", 1, "0")]
    )
    return folder


def test_webdataset(shards):
    dataset = webdataset_labels(shards, NAMES, group_pattern=r"(p\d)_", split="val")
    assert dataset.names == ["t-1.tar/p1_a", "t-1.tar/p1_c", "t-10.tar/p2_a", "t-2.tar/p1_b", "t-2.tar/deep/p1_b"]
    assert dataset.class_names == ["adipose", "debris", "mucus"]  # no debris here
    assert read_names(dataset) == ["mucus", "adipose", "adipose", "mucus", "adipose"]
    assert (dataset.groups, dataset.split) == (["p1", "p1", "p2", "p1", "p1"], "val")
    check_lazy_and_whole(dataset, [0, 1, 4, 2, 3])
    assert dataset.describe()["tars"] == 3
    assert webdataset_labels(shards, ["adipose", "debris", "mucus"]).sha256() == dataset.sha256()


def test_ways_to_name_shards(shards):
    first = ["t-1.tar/p1_a", "t-1.tar/p1_c"]
    assert webdataset_labels(shards / "t-1.tar", NAMES).names == first
    rest = ["t-2.tar/p1_b", "t-2.tar/deep/p1_b"]
    for given in (shards / "t-{1..2}.tar", shards / "t-?.tar*", [shards / "t-1.tar", shards / "t-2.tar"]):
        assert webdataset_labels(given, NAMES).names == first + rest
    (shards / "more").mkdir()
    (shards / "t-2.tar").rename(shards / "more" / "t-1.tar")
    both = webdataset_labels([shards / "t-1.tar", shards / "more"], NAMES)
    assert both.names == [*first, "more/t-1.tar/p1_b", "more/t-1.tar/deep/p1_b"]


def test_labels_of_tars_may_be_text(tmp_path):
    members = [*sample("a", 0, "tumour"), *sample("b", 1, "stroma")]
    tar = save_tar(tmp_path / "t.tar", [(name.replace(".cls", ".Label.txt"), data) for name, data in members])
    assert read_names(webdataset_labels(tar, label_ending="label.txt")) == ["tumour", "stroma"]
    named = webdataset_labels(
        tar, {"stroma": "tumour stroma", "tumour": "carcinoma"}, label_ending="label.txt", ordered=True
    )
    assert named.class_names == ["tumour stroma", "carcinoma"]
    with pytest.raises(UserError, match=r"'tumour'.*no class name"):
        webdataset_labels(tar, {"stroma": "tumour stroma"}, label_ending="label.txt")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"1")], "sample a of .* has png; it needs one image and its label"),
        ([("a.cls", b"1")], "sample a of .* has cls; it needs"),
        ([("a.png", b"1"), ("a.jpg", b"1"), ("a.cls", b"1")], "has png, jpg, cls; it needs"),
        ([("a.png", b"1"), ("a.png", b"1"), ("a.cls", b"1")], r"two members a\.png"),
        ([("a.png", b"1"), ("a.cls", b" \n")], r"a\.cls of .* is empty"),
        ([("a.png", b"1"), ("a.cls", b"\xff")], r"a\.cls of .* is no text"),
        ([("a.png", b"1"), ("a.cls", b"3")], "'3'.*no class name"),
        ([], "no labelled image in shards"),
    ],
)
def test_webdataset_door_of_samples(tmp_path, members, message):
    with pytest.raises(UserError, match=message):
        webdataset_labels(save_tar(tmp_path / "t.tar", members), NAMES)


def test_webdataset_door_of_shards(shards, tmp_path):
    with pytest.raises(UserError, match=r"3 of 5 shards do not exist \(first: .*t-3\.tar\)"):
        webdataset_labels(shards / "t-{1..5}.tar", NAMES)
    with pytest.raises(UserError, match="brace that is not closed"):
        webdataset_labels(shards / "t-{1..5.tar", NAMES)
    with pytest.raises(UserError, match="download the shards"):
        webdataset_labels("https://host/t-1.tar", NAMES)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="names no tar"):
        webdataset_labels(tmp_path / "none", NAMES)
    with pytest.raises(UserError, match="more than once"):
        webdataset_labels([shards, shards / "t-1.tar"], NAMES)
    with tarfile.open(tmp_path / "t.tar", "w:gz") as tar:
        tar.add(shards / "t-1.tar")
    with pytest.raises(UserError, match="uncompressed tar"):
        webdataset_labels(tmp_path / "t.tar", NAMES)


def test_a_tar_that_breaks_off_anywhere_is_an_error(shards, tmp_path):
    whole = (shards / "t-2.tar").read_bytes()
    last = list(read_members(shards / "t-2.tar"))[-1]
    end = last.offset + 512  # of the last member, which is short; blocks of zeros follow
    cut = tmp_path / "cut.tar"
    for size in [*range(0, end + 1, 512), *range(700, end, 1234), end + 511]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar.*get it anew"):
            list(read_members(cut))
    cut.write_bytes(whole[:512] + b"?" * 512 + whole[1024:])  # pixels are not looked at
    assert len(list(read_members(cut))) == 6
    cut.write_bytes(whole[:1024] + b"?" * 512 + whole[1536:])
    with pytest.raises(UserError, match="breaks off at byte 1024"):
        list(read_members(cut))


# Hugging Face


@pytest.fixture
def hugging_face():
    return pytest.importorskip("datasets")


def save_rows(hugging_face, folder: Path, image_folder: Path, labels=(2, 0, 2), **columns):
    """Tiles of seeds 0, 1, 2 and their labels; a Dataset, saved to folder."""
    for seed in range(3):
        save_tile(image_folder / f"{seed}.png", seed)
    features = {"image": hugging_face.Image(), "label": hugging_face.ClassLabel(names=["ADI", "DEB", "MUC"])}
    if isinstance(labels[0], str):
        features["label"] = hugging_face.Value("string")
    features |= {name: hugging_face.Value("string") for name in columns}
    images = [str(image_folder / f"{seed}.png") for seed in range(3)]
    rows = hugging_face.Dataset.from_dict(
        {"image": images, "label": list(labels), **columns}, features=hugging_face.Features(features)
    )
    rows.save_to_disk(str(folder))
    return rows


def test_hugging_face(hugging_face, tmp_path):
    save_rows(hugging_face, tmp_path / "set", tmp_path / "tiles", patient=["p", "q", "p"])
    dataset = huggingface_labels(tmp_path / "set", group_column="patient", slide_column="patient", used_as="val")
    assert (dataset.class_names, read_names(dataset)) == (["ADI", "DEB", "MUC"], ["MUC", "ADI", "MUC"])
    assert (dataset.groups, dataset.slides, dataset.split) == (["p", "q", "p"], ["p", "q", "p"], "val")
    check_lazy_and_whole(dataset, [0, 1, 2])
    named = huggingface_labels(tmp_path / "set", {"MUC": "mucus", "ADI": "adipose", "DEB": "debris"})
    assert (named.class_names, named.split) == (["adipose", "debris", "mucus"], "test")


def test_splits_of_hugging_face(hugging_face, tmp_path):
    rows = save_rows(hugging_face, tmp_path / "set", tmp_path / "tiles", labels=["b", "a", "b"])
    parts = {"validation": rows, "test": rows.select([2, 1])}  # a selection: rows are looked up through indices
    hugging_face.DatasetDict(parts).save_to_disk(str(tmp_path / "parts"))
    dataset = huggingface_labels(tmp_path / "parts", split="test")
    assert (dataset.split, read_names(dataset), dataset.names) == ("test", ["b", "a"], ["test/0", "test/1"])
    check_lazy_and_whole(dataset, [2, 1])
    assert huggingface_labels(tmp_path / "parts", split="validation").split == "val"
    for split in (None, "train"):
        with pytest.raises(UserError, match="choose one of validation, test"):
            huggingface_labels(tmp_path / "parts", split=split)
    with pytest.raises(UserError, match="without splits"):
        huggingface_labels(tmp_path / "set", split="test")


def test_hugging_face_door(hugging_face, tmp_path):
    folder = tmp_path / "set"
    save_rows(hugging_face, folder, tmp_path / "tiles", patient=["p", "", "p"])
    with pytest.raises(UserError, match="no column 'diagnosis'; its columns are image, label, patient"):
        huggingface_labels(folder, label_column="diagnosis")
    with pytest.raises(UserError, match=r"patient of .* is no column of images"):
        huggingface_labels(folder, image_column="patient")
    with pytest.raises(UserError, match=r"no text and no whole number in patient \(first: row 1"):
        huggingface_labels(folder, group_column="patient")
    with pytest.raises(UserError, match=r"'DEB'.*no class name"):
        huggingface_labels(folder, {"MUC": "mucus", "ADI": "adipose"})
    with pytest.raises(UserError, match="'LYM', which is not among"):
        huggingface_labels(folder, {"MUC": "mucus", "ADI": "adipose", "DEB": "debris", "LYM": "lymphocytes"})
    with pytest.raises(UserError, match="save_to_disk"):
        huggingface_labels(tmp_path / "tiles")
    save_rows(hugging_face, tmp_path / "hidden", tmp_path / "tiles", labels=[-1, -1, -1])
    with pytest.raises(UserError, match=r"3 rows of .* have no label"):
        huggingface_labels(tmp_path / "hidden")


def test_hugging_face_is_not_installed(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_datasets(name, *rest):
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(UserError, match="pip install datasets"):
        huggingface_labels(tmp_path)


def test_archives_encode_alike_in_loader_processes(shards, tmp_path):
    """Two loader processes read what one process does."""
    for dataset in (webdataset_labels(shards, NAMES), npz_labels(save_npz(tmp_path / "set.npz"), NAMES)):
        alone, helped = (SetEncoder(ToyModel()).images(dataset, batch_size=2, workers=workers) for workers in (0, 2))
        assert torch.equal(alone, helped)
