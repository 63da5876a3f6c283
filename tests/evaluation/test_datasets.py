from __future__ import annotations

import csv
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quiltnet.errors import UserError
from quiltnet.evaluation.datasets import csv_labels, folder_per_class, in_memory
from quiltnet.evaluation.labelled_set import LabelledSet
from tests.evaluation.tiles import save_tile
from tests.evaluation.toy import noise_tile

NAMES = {"TUM": "tumour", "ADI": "adipose"}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "folders"
    for folder, names in {"TUM": ["p1_a.png", "deep/p2_b.TIF"], "ADI": ["p1_c.jpg"], "BACK": ["d.png"]}.items():
        for seed, name in enumerate(names):
            save_tile(root / folder / name, seed)
    (root / "TUM" / "Thumbs.db").write_bytes(b"no image")
    (root / "TUM" / "._p1_a.png").write_bytes(b"of macOS, no image")
    (root / ".cache").mkdir()
    return root


def test_folder_names_bind_to_class_names(folders):
    dataset = folder_per_class(folders, NAMES, drop=["BACK"])
    assert dataset.class_names == ["adipose", "tumour"]
    assert dataset.names == ["ADI/p1_c.jpg", "TUM/deep/p2_b.TIF", "TUM/p1_a.png"]
    assert list(dataset.images) == [folders / name for name in dataset.names]
    assert read_names(dataset) == ["adipose", "tumour", "tumour"]
    description = dataset.describe()
    assert description.pop("sha256") == dataset.sha256()
    assert description == {
        "root": str(folders),
        "class_names": {"ADI": "adipose", "TUM": "tumour"},
        "dropped": ["BACK"],
        "split": "test",
        "images": 3,
        "images_per_class": {"adipose": 1, "tumour": 2},
    }


def test_folder_names_as_they_are(folders):
    assert folder_per_class(folders).class_names == ["ADI", "BACK", "TUM"]


def test_the_same_folders_elsewhere_are_the_same_items(folders, tmp_path):
    here = folder_per_class(folders)
    folders.rename(tmp_path / "moved")
    there = folder_per_class(tmp_path / "moved")
    assert there.sha256() == here.sha256()
    (tmp_path / "moved" / "ADI" / "p1_c.jpg").rename(tmp_path / "moved" / "TUM" / "p1_c.jpg")
    save_tile(tmp_path / "moved" / "ADI" / "p1_a.png")
    assert folder_per_class(tmp_path / "moved").sha256() != here.sha256()


def test_groups_of_folders_cross_classes(folders):
    dataset = folder_per_class(folders, NAMES, drop=["BACK"], group_pattern=r"(?:^|/)(p\d+)_")
    assert dataset.groups == ["p1", "p2", "p1"]
    assert folder_per_class(folders, group_pattern=r"^[^.]+").groups == ["p1_c", "d", "deep/p2_b", "p1_a"]
    with pytest.raises(UserError, match=r"finds no group in 2 of 4 .*first: d\.png"):
        folder_per_class(folders, group_pattern=r"^(p\d+)_")
    with pytest.raises(UserError, match="no regular expression"):
        folder_per_class(folders, group_pattern="(p")


def test_folders_of_grades(tmp_path):
    for folder in ("10", "9", "0"):
        save_tile(tmp_path / folder / "a.png")
    assert folder_per_class(tmp_path, ordered=True).class_names == ["0", "9", "10"]
    save_tile(tmp_path / "high" / "a.png")
    with pytest.raises(UserError, match="the least grade first"):
        folder_per_class(tmp_path, ordered=True)
    names = {"0": "benign", "9": "low", "high": "high", "10": "middle"}
    graded = folder_per_class(tmp_path, names, ordered=True)
    assert graded.class_names == ["benign", "low", "high", "middle"] and graded.is_ordered


def test_folders_of_splits_are_no_classes(folders, tmp_path):
    (tmp_path / "set").mkdir()
    folders.rename(tmp_path / "set" / "train")
    with pytest.raises(UserError, match=r"holds splits \(train\).*set/train"):
        folder_per_class(tmp_path / "set")
    assert folder_per_class(tmp_path / "set" / "train", split="train").split == "train"
    with pytest.raises(UserError, match="split='fit'"):
        folder_per_class(tmp_path / "set" / "train", split="fit")


def test_links_are_followed_but_not_round_in_circles(folders, tmp_path):
    save_tile(tmp_path / "elsewhere" / "e.png")
    (folders / "ADI" / "more").symlink_to(tmp_path / "elsewhere")
    (folders / "ADI" / "round").symlink_to(folders / "ADI")
    names = folder_per_class(folders, NAMES, drop=["BACK"]).names
    assert names == ["ADI/more/e.png", "ADI/p1_c.jpg", "TUM/deep/p2_b.TIF", "TUM/p1_a.png"]


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


ROWS = [
    {"image_path": "1.png", "label": "2", "name": "zebra", "split": "train", "case": "A"},
    {"image_path": "2.png", "label": "10", "name": "ape", "split": "train", "case": "B"},
    {"image_path": "3.png", "label": "10", "name": "ape", "split": "val", "case": "C"},
    {"image_path": "deep/4.png", "label": "2", "name": "zebra", "split": "val", "case": "C"},
    {"image_path": "5.png", "label": "3", "name": "cat, small", "split": "val", "case": "C"},
]  # fmt: skip


def write_table(folder: Path, rows: list[dict[str, str]] = ROWS, name: str = "labels.csv") -> Path:
    for row in rows:
        save_tile(folder / "images" / (row["image_path"] or "1.png"))
    table = folder / name
    if table.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
        return table
    with open(table, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if table.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return table


def read_names(dataset: LabelledSet) -> list[str]:
    return [dataset.class_names[label] for label in dataset.labels.tolist()]


@pytest.mark.parametrize("table_name", ["labels.csv", "labels.tsv", "labels.parquet", "LABELS.CSV"])
def test_labels_of_a_table_bind_to_names(tmp_path, table_name):
    table = write_table(tmp_path, name=table_name)
    from_column = csv_labels(table, tmp_path / "images", name_column="name", group_column="case", slide_column="case")
    given = csv_labels(table, tmp_path / "images", class_names={10: "ape", 3: "cat, small", 2: "zebra"})
    for dataset in (from_column, given):
        assert dataset.class_names == ["zebra", "cat, small", "ape"]  # numbers by value: 2, 3, 10
        assert read_names(dataset) == [row["name"] for row in ROWS]
        assert dataset.names == [row["image_path"] for row in ROWS]
        assert list(dataset.images) == [tmp_path / "images" / row["image_path"] for row in ROWS]
    assert from_column.groups == from_column.slides == ["A", "B", "C", "C", "C"]
    assert given.groups is None
    assert csv_labels(table, tmp_path / "images").class_names == ["2", "3", "10"]
    assert csv_labels(table, tmp_path / "images", label_column="name").class_names == ["ape", "cat, small", "zebra"]


def test_a_parquet_table_may_have_numbers_and_categories(tmp_path):
    write_table(tmp_path)
    table = tmp_path / "labels.parquet"
    columns = {
        "image_path": pa.array([row["image_path"] for row in ROWS]),
        "label": pa.array([int(row["label"]) for row in ROWS]),
        "name": pa.array([row["name"] for row in ROWS]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), table)
    assert csv_labels(table, tmp_path / "images", name_column="name").class_names == ["zebra", "cat, small", "ape"]
    columns["label"] = pa.array([2, 10, None, 2, 3])
    pq.write_table(pa.table(columns), table)
    with pytest.raises(UserError, match=r"1 rows of .* have no label \(first: row 3\)"):
        csv_labels(table, tmp_path / "images")
    table.write_bytes(table.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be read as a table"):
        csv_labels(table, tmp_path / "images")


def test_all_splits_of_a_table_number_classes_alike(tmp_path):
    table = write_table(tmp_path)
    train, val = (
        csv_labels(table, tmp_path / "images", name_column="name", split_column="split", split=split)
        for split in ("train", "val")
    )
    assert train.class_names == val.class_names == ["zebra", "cat, small", "ape"]  # train has no small cat
    assert read_names(train) == ["zebra", "ape"]
    assert read_names(val) == ["ape", "zebra", "cat, small"]
    assert train.describe()["images_per_class"] == {"zebra": 1, "cat, small": 0, "ape": 1}
    assert train.describe()["rows"] == {"split": "train"}


@pytest.mark.parametrize(
    ("publisher", "used_as", "role"),
    [
        ("train", None, "train"),
        ("Training", None, "train"),
        ("valid", None, "val"),
        ("validation", None, "val"),
        ("DEV", None, "val"),
        ("testing", None, "test"),
        ("1", None, "test"),
        ("1", "train", "train"),
        ("train", "test", "test"),
    ],
)
def test_what_a_split_may_be_used_for(tmp_path, publisher, used_as, role):
    table = write_table(tmp_path, [row | {"split": publisher} for row in ROWS])
    dataset = csv_labels(table, tmp_path / "images", split_column="split", split=publisher, used_as=used_as)
    assert dataset.split == role
    assert csv_labels(table, tmp_path / "images").split == "test"


def test_a_split_may_be_a_number_as_yaml_reads_it(tmp_path):
    table = write_table(tmp_path, [row | {"split": "1"} for row in ROWS])
    assert len(csv_labels(table, tmp_path / "images", split_column="split", split=1)) == 5


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
        ({"class_names": {"2": "zebra", "3": "cat", "10": ""}}, "'10'.*no class name"),
        ({"name_column": "case"}, "label '10' is called both 'B' and 'C'"),
        ({"label_column": "name", "ordered": True}, "the least grade first"),
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
    with pytest.raises(UserError, match="read by their ending"):
        csv_labels(tmp_path / "labels.xlsx", images)
    for empty in ("", "  "):
        with pytest.raises(UserError, match=r"1 rows of .* have no label \(first: row 2\)"):
            csv_labels(write_table(tmp_path, [ROWS[0], ROWS[1] | {"label": empty}]), images)
    with pytest.raises(UserError, match="single class '2'"):
        csv_labels(write_table(tmp_path, [ROWS[0], ROWS[3]]), images)
    with pytest.raises(UserError, match=r"lists 1 images more than once \(first: 2\.png\)"):
        csv_labels(write_table(tmp_path, [*ROWS, ROWS[1] | {"image_path": "./2.png", "split": "val"}]), images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'image_path'"),
        ("image_path,label\n", "has no row"),
        ("image_path;label\n1.png;2\n", "told apart by commas"),
        ("image_path,label,label\n1.png,2,3\n", "several columns 'label'"),
        ("image_path,label\n1.png,2\n2.png,tumour, necrotic\n", "line 3 .* has 3 cells, its header 2"),
        ('image_path,label\n1.png,"2\n2.png,3\n', "each quote closed"),
        ("image_path,label\n1.png,Ödem\n".encode("latin-1"), "save it as UTF-8"),
    ],
)
def test_a_csv_that_is_not_as_it_should_be(tmp_path, text, message):
    table = tmp_path / "labels.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        csv_labels(table, tmp_path)


def test_a_csv_as_excel_writes_it(tmp_path):
    for name in ("1.png", "a, b.png"):
        save_tile(tmp_path / name)
    table = tmp_path / "labels.csv"
    table.write_bytes(b'\xef\xbb\xbfimage_path, label\r\n1.png, tumour\r\n\r\n"a, b.png","say ""benign"""\r\n')
    dataset = csv_labels(table, tmp_path)
    assert (dataset.names, read_names(dataset)) == (["1.png", "a, b.png"], ["tumour", 'say "benign"'])


def test_an_incomplete_download_is_counted(tmp_path):
    table, images = write_table(tmp_path), tmp_path / "images"
    (images / "deep" / "4.png").unlink()
    (images / "5.png").unlink()
    (images / "5.png").mkdir()
    with pytest.raises(UserError, match=r"2 of 5 images .* \(first: deep/4\.png\)"):
        csv_labels(table, images)
    csv_labels(table, images, split_column="split", split="train")  # what another split lacks is not asked for
    with pytest.raises(UserError, match="5 of 5 images"):
        csv_labels(table, tmp_path / "elsewhere")


@pytest.mark.parametrize("path", ["../1.png", "/etc/1.png", "a/../../1.png", ".."])
def test_images_stay_below_their_folder(tmp_path, path):
    table = tmp_path / "labels.csv"
    table.write_text(f"image_path,label\n{path},2\n")
    with pytest.raises(UserError, match="stay below it"):
        csv_labels(table, tmp_path)


def test_a_large_table_is_described_without_asking_for_each_image(tmp_path, monkeypatch):
    """Folders are listed: what it costs to know that all is there does not grow with the images."""
    rows = [f"case{index % 7}/{index}.png,{'ab'[index % 2]}" for index in range(3000)]
    for row in rows:
        path = tmp_path / row.partition(",")[0]
        path.parent.mkdir(exist_ok=True)
        path.touch()
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["image_path,label", *rows]))
    listed, asked, scandir, isfile = [], [], os.scandir, os.path.isfile
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(Path(path)) or isfile(path))
    dataset = csv_labels(table, tmp_path)
    assert dataset.describe()["images_per_class"] == {"a": 1500, "b": 1500}
    assert (len(listed), set(asked) - {table}) == (7, set())


def test_in_memory():
    tiles = [noise_tile(0), noise_tile(1)]
    dataset = in_memory((tiles, [1, 0], ["a", "b"]), source="synthetic")
    image, label = dataset[0]
    assert np.array_equal(np.array(image), tiles[0])
    assert (label, len(dataset), dataset.class_names) == (1, 2, ["a", "b"])
    assert dataset.describe()["source"] == "synthetic"
    assert in_memory((tiles, [1, 0], ["a", "b"]), split="train").split == "train"
    assert in_memory((tiles, [1, 0], ["a", "b"]), source="drawn anew").sha256() != dataset.sha256()


def test_loader_processes_get_the_same_set(folders):
    dataset = folder_per_class(folders)
    copy = pickle.loads(pickle.dumps(dataset))
    assert (copy.content(), copy.sha256()) == (dataset.content(), dataset.sha256())


def test_lc25000(shared_data):
    root = shared_data / "quilt_like"
    sets = {
        split: csv_labels(
            root / "lc25000_labels.csv", root / "images",
            name_column="class_name", group_column="group_id", split_column="split", split=split,
        )
        for split in ("train", "val")
    }  # fmt: skip
    assert {split: (len(dataset), dataset.split) for split, dataset in sets.items()} == {
        "train": (736, "train"),
        "val": (247, "val"),
    }
    assert not set(sets["train"].groups) & set(sets["val"].groups)
    assert sets["val"].class_names == [
        "colon adenocarcinoma",
        "benign colonic tissue",
        "lung adenocarcinoma",
        "benign lung tissue",
        "lung squamous cell carcinoma",
    ]
    assert sets["val"][0][0].size == (224, 224)
