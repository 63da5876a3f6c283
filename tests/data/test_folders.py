from __future__ import annotations

import json
from pathlib import Path

import pytest

from quiltnet.data.folders import folder_source
from quiltnet.data.pairs import PairRow
from quiltnet.data.row_table import RowTable, write_rows
from quiltnet.errors import UserError


def write(root: Path, **files: bytes | str | dict) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def rows_of(root, tmp_path, **options):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    write_rows(folder_source(root, **options), work, [])
    return list(RowTable(work))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "pairs"


def test_captions_beside_images(root, tmp_path):
    write(
        root,
        **{
            "b.jpg": b"",
            "b.txt": "\ufeffA gland,\nand stroma.\n",
            "a.PNG": b"",
            "a.txt": "Not this.",
            "a.json": {"caption": "This.", "stain": "H&E"},
            "deep/er/c.tif": b"",
            "deep/er/c.json": {"captions": ["One.", " ", None, "Two."], "url": None},
            "d.jpeg": b"",
            "e.webp": b"",
            "e.txt": " \n",
            "f.jpg": b"",
            "f.txt": "A caption.",
            "f.json": {"stain": "IHC"},
            "g.jpg": b"",
            "g.json": "[1]",
            "h.jpg": b"",
            "h.json": "{",
            "i.jpg": b"",
            "i.txt": b"caf\xe9",
            "readme.txt": "no image",
            ".hidden.jpg": b"",
            "b.jpg.bak": b"",
        },
    )
    rows = rows_of(root, tmp_path, source_of=lambda path: path.partition("/")[0])
    assert rows == [
        PairRow(0, "a.PNG", "This.", "train", "a.PNG", {"stain": "H&E"}),
        PairRow(1, "b.jpg", "A gland,\nand stroma.\n", "train", "b.jpg"),
        PairRow(2, "d.jpeg", None, "train", "d.jpeg"),
        PairRow(3, "e.webp", None, "train", "e.webp"),
        PairRow(4, "f.jpg", "A caption.", "train", "f.jpg", {"stain": "IHC"}),
        PairRow(5, "g.jpg", None, "train", "g.jpg", {}, "unreadable_json"),
        PairRow(6, "h.jpg", None, "train", "h.jpg", {}, "unreadable_json"),
        PairRow(7, "i.jpg", "caf\ufffd", "train", "i.jpg"),
        PairRow(8, "deep/er/c.tif", "One.", "train", "deep", {"url": None}),
        PairRow(9, "deep/er/c.tif", "Two.", "train", "deep", {"url": None}),
    ]


def test_splits_are_folders(root, tmp_path):
    files = {f"{name}.jpg": b"" for name in ("train/x", "val/deep/y", "z", "other/w")}
    write(root, **files, **{name.replace("jpg", "txt"): "A caption." for name in files})
    found = {row.image_path: (row.split, row.defect) for row in rows_of(root, tmp_path)}
    assert found == {
        "train/x.jpg": ("train", ""),
        "val/deep/y.jpg": ("val", ""),
        "z.jpg": ("train", "no_split"),
        "other/w.jpg": ("train", "no_split"),
    }
    assert [row.image_path for row in rows_of(root, tmp_path, split="val")] == ["val/deep/y.jpg"]
    with pytest.raises(UserError, match="has no folder test; its splits are train, val"):
        folder_source(root, split="test")


def test_without_folders_of_splits(root, tmp_path):
    write(root, **{"case/x.jpg": b"", "case/x.txt": "A caption."})
    assert [row.split for row in rows_of(root, tmp_path, split="test")] == ["test"]


def test_no_folder(root):
    with pytest.raises(UserError, match="is no folder; give one of images"):
        folder_source(root)


def test_links_are_followed_and_endings_have_any_case(root, tmp_path):
    write(tmp_path / "elsewhere", **{"x.JPG": b"", "x.TXT": "Linked.", "x.Json": {"stain": "H&E"}})
    write(root, **{"val/y.jpg": b"", "val/z.jpg": b""})
    (root / "train").symlink_to(tmp_path / "elsewhere")
    (root / "val" / "again").symlink_to(root)  # leads back
    (root / "val" / "y.txt").symlink_to("nowhere")
    (root / "val" / "z.txt").symlink_to("z.txt")
    assert rows_of(root, tmp_path) == [
        PairRow(0, "train/x.JPG", "Linked.", "train", "train/x.JPG", {"stain": "H&E"}),
        PairRow(1, "val/y.jpg", None, "val", "val/y.jpg", {}, "unreadable_text"),
        PairRow(2, "val/z.jpg", None, "val", "val/z.jpg", {}, "unreadable_text"),
    ]
