from __future__ import annotations

import json
import tarfile

import pandas as pd
import pytest

from quiltnet.data.decoding import find_defect
from quiltnet.data.image_files import ImageFolder
from quiltnet.data.quilt1m import quilt1m_source, source_id
from quiltnet.data.row_table import RowTable, write_rows
from quiltnet.data.selection import OneOf
from quiltnet.data.shards import write_shards
from quiltnet.errors import UserError

FRAME = "_b_M_sOb4ZI_image_0760643c-9d0c-4bf2-8a6e-5f1a3b0c7d21.jpg"


@pytest.fixture
def table(tmp_path):
    frame = pd.DataFrame(
        {
            "caption": ['Line one,\nline "two".', "Plain.", None, "Four."],
            "image_path": [FRAME, FRAME, "case__HE_L1.jpg", "00001000010913.jpg"],
            "subset": ["quilt", "quilt", "pubmed", "laion"],
            "split": ["train", "train", "val", "train"],
            "pathology": ["['Dermatopathology', 'Unknown']", None, "[]", "not a list"],
            "med_umls_ids": ["[[{'entity': 'Nevus'}]]", None, None, "__import__('os')"],
            "magnification": [1.0, 1.0, None, None],
        }
    )
    path = tmp_path / "quilt_1M_lookup.csv"
    frame.to_csv(path)
    return path


@pytest.fixture
def rows_of(tmp_path):
    def read(table, subset=None, split=None):
        subsets = [subset] if isinstance(subset, str) else subset
        filters = [OneOf("filtered_subset", "subset", subsets)] if subset else []
        filters += [OneOf("filtered_split", "split", [split])] if split else []
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        write_rows(quilt1m_source(table), folder, filters)
        return list(RowTable(folder))

    return read


def test_rows_say_what_the_table_says(table, rows_of):
    rows = rows_of(table)
    assert [row.caption for row in rows] == ['Line one,\nline "two".', "Plain.", None, "Four."]
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert [row.source_id for row in rows] == ["_b_M_sOb4ZI", "_b_M_sOb4ZI", "case", "00001000010913"]
    assert rows[0].metadata == {
        "subset": "quilt",
        "pathology": ["Dermatopathology", "Unknown"],
        "med_umls_ids": [[{"entity": "Nevus"}]],
        "magnification": 1.0,
    }
    assert rows[2].metadata == {
        "subset": "pubmed",
        "pathology": [],
        "med_umls_ids": None,
        "magnification": None,
    }
    assert rows[3].metadata["pathology"] == "not a list"
    assert rows[3].metadata["med_umls_ids"] == "__import__('os')"


@pytest.mark.parametrize(
    ("subset", "split", "numbers"),
    [
        ("quilt", None, [0, 1]),
        (["pubmed", "laion"], None, [2, 3]),
        (None, "train", [0, 1, 3]),
        ("laion", "train", [3]),
        ("laion", "val", None),
        ("quilt2", None, None),
        (["quilt", "atlas"], None, None),
        (None, "test", None),
    ],
)
def test_subset_and_split_choose_rows(table, rows_of, subset, split, numbers):
    if numbers is None:
        with pytest.raises(UserError, match=r"has no (subset|split)"):
            rows_of(table, subset, split)
    else:
        assert [row.number for row in rows_of(table, subset, split)] == numbers


def test_unknown_subset_lists_those_there_are(table, rows_of):
    with pytest.raises(UserError, match="has no subset atlas; it has laion, pubmed, quilt"):
        rows_of(table, "atlas")


def test_missing_column_lists_those_there_are(tmp_path):
    (tmp_path / "t.csv").write_text("caption,image\nx,y\n")
    with pytest.raises(UserError, match=r"no column image_path, subset, split; its columns are caption, image"):
        quilt1m_source(tmp_path / "t.csv")


def test_source_of_other_names():
    assert source_id("mucinous__HE2__L16_1_2.jpg") == "mucinous__HE2"
    assert source_id("plain.jpg") == "plain"
    assert source_id("lc25000__colonca12.jpeg") == "lc25000__colonca12", "a name of a set is no case"
    assert source_id("short_image_0760643c-9d0c-4bf2-8a6e-5f1a3b0c7d21.jpg").startswith("short_image")


def test_quilt_like_release(shared_data, tmp_path):
    folder = shared_data / "quilt_like"
    manifest = write_shards(
        quilt1m_source(folder / "quilt_1M_lookup.csv"),
        tmp_path / "quilt",
        name="quilt1m",
        source={},
        images=ImageFolder(folder / "images"),
        check_image=find_defect,
        samples_per_shard=500,
    )
    splits = {name: (entry["samples"], entry["captions"]) for name, entry in manifest["splits"].items()}
    assert splits == {"train": (897, 1058), "val": (316, 385)}
    totals = manifest["totals"]
    assert (totals["rows"], totals["samples"], totals["captions"], totals["rejected"]) == (
        1443,
        1213,
        1443,
        {},
    )
    assert totals["in_several_splits"]["images"] == 0
    frame = pd.read_csv(folder / "quilt_1M_lookup.csv")
    expected = frame.groupby("image_path")["caption"].apply(list).to_dict()
    found = {}
    for path in (tmp_path / "quilt").rglob("*.tar"):
        with tarfile.open(path) as tar:
            images = {m.name.rsplit(".", 1)[0]: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.loads(tar.extractfile(member).read())
                    found[record["image_path"]] = record["captions"]
                    original = (folder / "images" / record["image_path"]).read_bytes()
                    assert images[member.name.rsplit(".", 1)[0]] == original
    assert found == expected
