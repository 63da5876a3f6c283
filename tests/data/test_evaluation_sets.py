from __future__ import annotations

import pandas as pd
import pytest

from quiltnet.data.checking import check_data
from quiltnet.errors import UserError
from tests.data.made_sets import write_set
from tests.data.test_checking import JPEGS, counts, good


def test_against_a_table_and_shards(tmp_path):
    folder = write_set(tmp_path / "set", {"train": [good(0, 1, 2)]})
    (tmp_path / "sets" / "images").mkdir(parents=True)
    (tmp_path / "sets" / "images" / "a.jpg").write_bytes(JPEGS[0])
    (tmp_path / "sets" / "images" / "unlabelled.jpg").write_bytes(JPEGS[1])
    table = tmp_path / "sets" / "labels.csv"
    table.write_text("image_path,label\na.jpg,gland\n")
    other = write_set(tmp_path / "other", {"test": [good(2, name="x")], "val": [good(0, 7)]})
    same_name = write_set(tmp_path / "deep" / "other", {"test": [good(1)]})
    check = check_data(folder, against=[str(table), str(other), str(other), str(same_name)])
    leaks = {name: count for name, count in counts(check).items() if name.startswith("leaks")}
    # Evaluation sets may share what they like, and each is counted for itself.
    assert leaks == {
        "leaks labels.csv in train": 1, "leaks other in train": 2, f"leaks {same_name} in train": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label\nx\n", r"has no column of images .*; its columns are label"),
        ("image_path\n../x.jpg\n", r"names \.\./x.jpg; image paths start from the table's folder"),
        ("image_path\n/etc/passwd\n", "names /etc/passwd"),
        ("image_path\ngone.jpg\n", r"are neither beside it nor in .*images \(as gone.jpg\)"),
        ("image_path\n", r"\(as it names none\)"),
    ],
)
def test_bad_tables_of_labels(tmp_path, content, message):
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        check_data(write_set(tmp_path / "set", {"train": [good(0)]}), against=[str(tmp_path / "labels.csv")])


def test_a_parquet_table_and_linked_folders(tmp_path):
    folder = write_set(tmp_path / "set", {"train": [good(0, 1, 2)]})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.JPG").write_bytes(JPEGS[0])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "class").symlink_to(elsewhere)
    table = elsewhere / "labels.parquet"
    pd.DataFrame({"filename": ["a.JPG", "a.JPG"], "label": [0, 1]}).to_parquet(table)
    check = check_data(folder, against=[str(table), str(tmp_path / "eval")])
    assert [f.of for f in check.findings if f.name.startswith("leaks")] == [1, 1]
    assert counts(check) == {"leaks labels.parquet in train": 1, "leaks eval in train": 1}


def test_an_evaluation_set_that_is_called_like_a_split(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", {"train": [good(0, 1, 2)], "val": []})
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.jpg").write_bytes(JPEGS[0])
    monkeypatch.chdir(tmp_path)
    assert counts(check_data(folder, against=["val", "./val/"])) == {f"leaks {tmp_path}/val in train": 1}


def test_a_file_that_is_no_set(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEGS[0])
    with pytest.raises(UserError, match=r"is no table \(.csv, .tsv, .parquet\) and no .tar; give one of them"):
        check_data(write_set(tmp_path / "set", {"train": [good(0)]}), against=[str(tmp_path / "a.jpg")])
