from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path

import pytest

from quiltnet.errors import UserError
from quiltnet.evaluation.pathology_tables import mhist, osteosarcoma, sicapv2, skin_cancer, skin_tumor
from tests.evaluation import miniatures
from tests.evaluation.miniatures import labels_of, save_tile, write_xlsx


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    miniatures.make_mhist(root / "MHIST")
    miniatures.make_sicapv2(root / "SICAPv2")
    miniatures.make_osteosarcoma(root / "Osteosarcoma-UT")
    miniatures.make_skin(root / "SkinCancer")
    return root


@pytest.fixture
def broken(data_root, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(data_root, tmp_path / "broken"))


def test_mhist_parts(data_root):
    train, test = (mhist(data_root / "MHIST", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 4)
    assert (train.split, test.split) == ("train", "test")
    with open(data_root / "MHIST" / "annotations.csv", newline="") as file:
        label_of = {f"images/{row['Image Name']}": row["Majority Vote Label"] for row in csv.DictReader(file)}
    assert labels_of(train) + labels_of(test) == [label_of[name] for name in [*train.names, *test.names]]


def test_tables_that_are_not_as_published(broken):
    table = broken / "MHIST" / "annotations.csv"
    content = table.read_text()
    table.write_text(content.replace("SSA,6,test", "TA,6,test"))
    with pytest.raises(UserError, match=r"the label 'TA', and known are HP, SSA.*bmirds"):
        mhist(broken / "MHIST")
    table.write_text(content.replace("Partition", "Split"))
    with pytest.raises(UserError, match=r"no column 'Partition'.*bmirds"):
        mhist(broken / "MHIST")
    table.write_text(content[: content.rindex(",")])
    with pytest.raises(UserError, match="bmirds"):
        mhist(broken / "MHIST")
    xlsx = broken / "SICAPv2" / "partition" / "Test" / "Test.xlsx"
    whole = xlsx.read_bytes()
    xlsx.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"Test\.xlsx cannot be read as a table.*mendeley"):
        sicapv2(broken / "SICAPv2")
    shutil.copy(broken / "SICAPv2" / "wsi_labels.xlsx", xlsx)
    with pytest.raises(UserError, match=r"no column 'image_name'.*slide_id.*mendeley"):
        sicapv2(broken / "SICAPv2")


def test_sicapv2_parts_and_patients(data_root):
    root = data_root / "SICAPv2"
    test, train = sicapv2(root), sicapv2(root, "train")
    assert labels_of(test) == ["G4", "NC", "G5", "G3"]  # not the order of the columns
    assert test.labels.tolist() == [2, 0, 3, 1]
    assert set(test.groups) == {"3"}
    assert Counter(train.groups) == {"1": 8, "2": 4}  # patient 1 has two slides
    assert test.origin["without_single_label"] == 0
    fold_train, fold_val = sicapv2(root, "train", fold=1), sicapv2(root, "val", fold=1)
    assert (set(fold_train.groups), set(fold_val.groups)) == ({"1"}, {"2"})
    assert (fold_train.split, fold_val.split) == ("train", "val")
    assert fold_val.origin["split_of"] == "partition/Validation/Val1/Test.xlsx"
    with pytest.raises(UserError, match="fold=5"):
        sicapv2(root, "val", fold=5)


def test_sicapv2_label_is_the_first_of_the_greatest_columns_and_g4c_is_none(broken):
    root = broken / "SICAPv2"
    names = sicapv2(root).names
    marks = [(0, 1, 1, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, 1, 1), (0, 0, 1, 0, 1)]
    rows = [
        dict(zip(miniatures.SICAPV2_COLUMNS, [name.removeprefix("images/"), *mark], strict=True))
        for name, mark in zip(names, marks, strict=True)
    ]
    write_xlsx(root / "partition" / "Test" / "Test.xlsx", rows)
    dataset = sicapv2(root)
    assert labels_of(dataset) == ["G3", "NC", "G5", "G4"]
    assert dataset.origin["without_single_label"] == 2
    write_xlsx(root / "wsi_labels.xlsx", [{"slide_id": "16B0001851", "patient_id": 1}])
    with pytest.raises(UserError, match="no patient for slide 18B0001159D"):
        sicapv2(root)


def test_osteosarcoma_finds_each_tile_by_its_whole_name(data_root, broken):
    dataset = osteosarcoma(data_root / "Osteosarcoma-UT")
    assert dict(zip(dataset.names, labels_of(dataset), strict=True)) == {
        "Training-Set-1/set1/Case-3-A10-10547-25283.jpg": "Non-Tumor",
        "Training-Set-1/set1/Case-3-A10-10547-2528.jpg": "Viable",
        "Training-Set-1/set2/Case-4-C21-39089-14210.jpg": "Non-Viable-Tumor",
        "Training-Set-2/set8/Case-48-P5-C13-24121-14200.jpg": "Viable",
        "Training-Set-2/set9/P9-B11-10159-22267.jpg": "Non-Tumor",
        "Training-Set-2/set9/P9-B12-14159-22267.jpg": "Non-Viable-Tumor",
    }
    assert dataset.groups == ["Case-3", "Case-3", "Case-4", "Case-48", "P9", "P9"]
    assert dataset.origin["dropped"] == ["viable: non-viable"]
    save_tile(broken / "Osteosarcoma-UT" / "Training-Set-2" / "set1" / "P9 B11-10159-22267.JPG", 0, 0)
    with pytest.raises(UserError, match="are one tile"):
        osteosarcoma(broken / "Osteosarcoma-UT")


def test_skin_parts_and_cases(data_root, broken):
    root = data_root / "SkinCancer"
    sets = {split: skin_cancer(root, split) for split in ("train", "val", "test")}
    assert {split: len(dataset) for split, dataset in sets.items()} == {"train": 64, "val": 32, "test": 32}
    assert [dataset.split for dataset in sets.values()] == ["train", "val", "test"]
    assert set(sets["train"].groups) == {"train-0", "train-1"}
    tumor = skin_tumor(root, "val")
    assert len(tumor) == 8
    assert tumor.origin["set"] == "SkinTumor"
    for dataset in (*sets.values(), tumor):
        assert labels_of(dataset) == [name.split("/")[2] for name in dataset.names]
    table = broken / "SkinCancer" / "data" / "tiles-v2.csv"
    table.write_text(table.read_text().replace(",case,", ",patient,"))
    with pytest.raises(UserError, match=r"no column 'case'; its columns are .*patient"):
        skin_cancer(broken / "SkinCancer")
    assert skin_cancer(broken / "SkinCancer", group_column=None).groups is None
    assert set(skin_cancer(broken / "SkinCancer", group_column="patient").groups) == {"test-0", "test-1"}
