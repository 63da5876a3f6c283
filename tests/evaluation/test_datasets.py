from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.evaluation.datasets import LabelledSet, csv_labels, folder_per_class, in_memory
from tests.evaluation.toy import noise_tile


def save_tile(path: Path, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise_tile(seed)).convert(mode).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "folders"
    for folder, names in {"TUM": ["a.png", "deep/b.TIF"], "ADI": ["c.jpg"], "BACK": ["d.png"]}.items():
        for seed, name in enumerate(names):
            save_tile(root / folder / name, seed)
    (root / "TUM" / "Thumbs.db").write_bytes(b"no image")
    (root / ".cache").mkdir()
    return root


NAMES = {"TUM": "tumour", "ADI": "adipose"}


def test_folder_names_bind_to_class_names(folders):
    dataset = folder_per_class(folders, NAMES, drop=["BACK"])
    assert dataset.class_names == ["adipose", "tumour"]
    found = [
        (path.relative_to(folders).as_posix(), dataset.class_names[label])
        for path, label in zip(dataset.images, dataset.labels.tolist(), strict=True)
    ]
    assert found == [("ADI/c.jpg", "adipose"), ("TUM/a.png", "tumour"), ("TUM/deep/b.TIF", "tumour")]
    assert dataset.describe() == {
        "root": str(folders),
        "class_names": {"ADI": "adipose", "TUM": "tumour"},
        "dropped": ["BACK"],
        "images": 3,
        "images_per_class": {"adipose": 1, "tumour": 2},
    }


def test_folder_names_as_they_are(folders):
    assert folder_per_class(folders).class_names == ["ADI", "BACK", "TUM"]


def test_folder_errors(folders, tmp_path):
    with pytest.raises(UserError, match=r"'BACK'.*no class name.*drop"):
        folder_per_class(folders, NAMES)
    with pytest.raises(UserError, match="'LYM'"):
        folder_per_class(folders, NAMES | {"LYM": "lymphocytes"}, drop=["BACK"])
    with pytest.raises(UserError, match="single class 'tumour'"):
        folder_per_class(folders, {"TUM": "tumour"}, drop=["BACK", "ADI"])
    with pytest.raises(UserError, match="called 'tumour'"):
        folder_per_class(folders, {"TUM": "tumour", "ADI": "tumour"}, drop=["BACK"])
    with pytest.raises(UserError, match="is not a folder"):
        folder_per_class(tmp_path / "nowhere")
    (folders / "EMPTY").mkdir()
    with pytest.raises(UserError, match="EMPTY holds no image"):
        folder_per_class(folders)
    with pytest.raises(UserError, match="holds no folder"):
        folder_per_class(folders / "EMPTY")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_are_rgb(tmp_path, mode):
    save_tile(tmp_path / "tile.png", mode=mode)
    dataset = LabelledSet([tmp_path / "tile.png"] * 2, torch.tensor([0, 1]), ["a", "b"])
    image, label = dataset[1]
    assert (image.mode, image.size, label) == ("RGB", (8, 8), 1)


@pytest.mark.parametrize("damage", ["truncated.jpg", "truncated.png", "text.png", "empty.jpg"])
def test_a_broken_image_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / damage
    save_tile(path)
    whole = path.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}
    path.write_bytes(broken[path.stem])
    with pytest.raises(UserError, match=damage):
        LabelledSet([path, path], torch.tensor([0, 1]), ["a", "b"])[0]


ROWS = [
    {"image_path": "1.png", "label": "2", "name": "zebra", "split": "train", "case": "A"},
    {"image_path": "2.png", "label": "10", "name": "ape", "split": "train", "case": "B"},
    {"image_path": "3.png", "label": "10", "name": "ape", "split": "val", "case": "C"},
    {"image_path": "4.png", "label": "2", "name": "zebra", "split": "val", "case": "C"},
    {"image_path": "5.png", "label": "3", "name": "cat, small", "split": "val", "case": "C"},
]  # fmt: skip


def write_table(folder: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    for row in rows:
        save_tile(folder / "images" / (row["image_path"] or "1.png"))
    table = folder / "labels.csv"
    with open(table, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


def read_names(dataset: LabelledSet) -> list[str]:
    return [dataset.class_names[label] for label in dataset.labels.tolist()]


def test_csv_labels_bind_to_names(tmp_path):
    table = write_table(tmp_path)
    from_column = csv_labels(table, tmp_path / "images", name_column="name", group_column="case")
    given = csv_labels(table, tmp_path / "images", class_names={10: "ape", 3: "cat, small", 2: "zebra"})
    for dataset in (from_column, given):
        assert dataset.class_names == ["ape", "zebra", "cat, small"]  # labels sorted as text: 10, 2, 3
        assert read_names(dataset) == [row["name"] for row in ROWS]
    assert from_column.groups == ["A", "B", "C", "C", "C"]
    assert given.groups is None
    assert csv_labels(table, tmp_path / "images").class_names == ["10", "2", "3"]


def test_all_splits_of_a_table_number_classes_alike(tmp_path):
    table = write_table(tmp_path)
    train, val = (
        csv_labels(table, tmp_path / "images", name_column="name", split_column="split", split=split)
        for split in ("train", "val")
    )
    assert train.class_names == val.class_names == ["ape", "zebra", "cat, small"]  # train has no small cat
    assert read_names(train) == ["zebra", "ape"]
    assert read_names(val) == ["ape", "zebra", "cat, small"]
    assert train.describe()["images_per_class"] == {"ape": 1, "zebra": 1, "cat, small": 0}
    assert train.describe()["split"] == "train"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_column": "diagnosis"}, r"no column 'diagnosis'.*image_path, label, name, split, case"),
        ({"split_column": "split", "split": "test"}, "there are train, val"),
        ({"split": "test"}, "both or neither"),
        ({"class_names": {"2": "zebra"}, "name_column": "name"}, "one of them"),
        ({"class_names": {"2": "zebra", "3": "cat"}}, "'10'.*no class name"),
        ({"class_names": {"2": "z", "3": "c", "10": "a", "11": "b"}}, "'11'"),
        ({"class_names": {"2": "zebra", "3": "zebra", "10": "ape"}}, "called 'zebra'"),
        ({"name_column": "case"}, "label '10' is called both 'B' and 'C'"),
    ],
)
def test_csv_door(tmp_path, arguments, message):
    table = write_table(tmp_path)
    with pytest.raises(UserError, match=message):
        csv_labels(table, tmp_path / "images", **arguments)


def test_csv_door_of_what_is_in_the_table(tmp_path):
    images = tmp_path / "images"
    with pytest.raises(UserError, match=r"labels\.csv is not a file"):
        csv_labels(tmp_path / "labels.csv", images)
    with pytest.raises(UserError, match=r"1 rows of .* have no label \(first: row 2\)"):
        csv_labels(write_table(tmp_path, [ROWS[0], ROWS[1] | {"label": ""}]), images)
    with pytest.raises(UserError, match="single class '2'"):
        csv_labels(write_table(tmp_path, [ROWS[0], ROWS[3]]), images)
    table = write_table(tmp_path)
    (images / "4.png").unlink()
    with pytest.raises(UserError, match=r"1 of 5 images .* \(first: .*4\.png\)"):
        csv_labels(table, images)
    csv_labels(table, images, split_column="split", split="train")  # what another split lacks is not asked for
    table.write_text("image_path,label\n")
    with pytest.raises(UserError, match="no labelled image"):
        csv_labels(table, images)


def test_in_memory():
    tiles = [noise_tile(0), noise_tile(1)]
    dataset = in_memory((tiles, [1, 0], ["a", "b"]), source="synthetic")
    image, label = dataset[0]
    assert np.array_equal(np.array(image), tiles[0])
    assert (label, len(dataset), dataset.class_names) == (1, 2, ["a", "b"])
    assert dataset.describe()["source"] == "synthetic"


def test_lc25000(shared_data):
    root = shared_data / "quilt_like"
    sets = {
        split: csv_labels(
            root / "lc25000_labels.csv", root / "images",
            name_column="class_name", group_column="group_id", split_column="split", split=split,
        )
        for split in ("train", "val")
    }  # fmt: skip
    assert {split: len(dataset) for split, dataset in sets.items()} == {"train": 736, "val": 247}
    assert not set(sets["train"].groups) & set(sets["val"].groups)
    assert sets["val"].class_names == [
        "colon adenocarcinoma",
        "benign colonic tissue",
        "lung adenocarcinoma",
        "benign lung tissue",
        "lung squamous cell carcinoma",
    ]
    assert sets["val"][0][0].size == (224, 224)
