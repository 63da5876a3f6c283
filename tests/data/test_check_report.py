from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quiltnet.data.check_report import spread, write_report
from quiltnet.data.checking import check_data
from quiltnet.errors import UserError
from tests.data.made_sets import write_set
from tests.data.test_checking import JPEGS, counts, good


def test_report_and_sheet(tmp_path):
    folder = write_set(tmp_path / "set", {"train": [good(*range(9)) | {"bad.jpg": b"x", "bad.txt": "y"}]})
    check = check_data(folder)
    written = write_report(check, tmp_path / "out", examples=3)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == written
    assert written["findings"]["broken"] == {
        "count": 1, "of": 10, "unit": "samples", "share": 0.1, "limit": 0.01, "limit_is_share": True,
        "above_limit": True, "details": {"not_an_image": 1},
        "examples": [
            {"key": "bad", "set": "train", "shard": "made-000000.tar", "number": 9, "width": 0, "height": 0,
             "reason": "not_an_image"}
        ],
    }  # fmt: skip
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 1000
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "contact_sheet.png"}


def test_names_that_are_not_text(tmp_path):
    folder = write_set(tmp_path / "set", {"train": [good(0) | {"caf\udce9.jpg": b"x", "caf\udce9.txt": "x"}]})
    (tmp_path / "eval").mkdir()
    for name, data in ((b"na\xefve.jpg", JPEGS[0]), (b"bad\xff.jpg", b"x")):
        (tmp_path / "eval" / os.fsdecode(name)).write_bytes(data)
    check = check_data(folder, against=[str(tmp_path / "eval")])
    report = write_report(check, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert counts(check)["leaks eval in train"] == 1 and counts(check)["broken"] == 1


def test_an_image_that_can_no_longer_be_read_is_named(tmp_path):
    (tmp_path / "eval").mkdir()
    image = tmp_path / "eval" / "a.jpg"
    image.write_bytes(JPEGS[0])
    check = check_data(write_set(tmp_path / "set", {"train": [good(0)]}), against=[str(tmp_path / "eval")])
    image.unlink()
    image.symlink_to("/proc/self/mem")  # a file whose first byte is an error
    examples = write_report(check, tmp_path / "out")["findings"]["leaks eval in train"]["examples"]
    assert examples[0]["key"] == str(image) and examples[0]["copy_of"]["key"] == "tile0"


def test_examples_are_spread():
    assert spread(np.arange(1000), 5).tolist() == [0, 249, 499, 749, 999]
    assert spread(np.arange(3), 5).tolist() == [0, 1, 2]


def test_a_folder_that_cannot_be_written(tmp_path):
    check = check_data(write_set(tmp_path / "set", {"train": [good(0)]}))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; give a folder with --out"):
        write_report(check, Path(tmp_path / "file" / "check"))
