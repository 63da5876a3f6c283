from __future__ import annotations

import zipfile

import numpy as np
import pytest

from quiltnet.data.image_files import ImageFolder, find_files, find_images
from quiltnet.data.zipped_images import ZippedImages
from quiltnet.errors import UserError


def write_zip(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (members or {"a.jpg": b"a"}).items():
            file.writestr(name, data)


def test_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jpg").write_bytes(b"bytes")
    images = find_images([str(tmp_path)])
    images.prepare(tmp_path, np.zeros(0, np.uint64))
    assert (images.read("deep/a.jpg"), images.size("deep/a.jpg")) == (b"bytes", 5)
    assert images.size("gone.jpg") == images.size("a\0.jpg") == 0
    with pytest.raises(FileNotFoundError):
        images.read("gone.jpg")


def test_what_names_zips(tmp_path):
    for name in ("part_1.zip", "part_2.zip", "other.zip"):
        write_zip(tmp_path / name)
    folder = str(tmp_path)
    everything = [tmp_path / "other.zip", tmp_path / "part_1.zip", tmp_path / "part_2.zip"]
    for named, zips in [
        ([folder], everything),
        ([f"{folder}/part_*.zip"], everything[1:]),
        ([f"{folder}/part_{{1..2}}.zip"], everything[1:]),
        ([f"{folder}/part_1.zip"], everything[1:2]),
        ([f"{folder}/part_2.zip", f"{folder}/part_1.zip", folder], everything),
    ]:
        images = find_images(named)
        assert isinstance(images, ZippedImages) and images.zips == zips


def test_an_archive_among_images_does_not_count(tmp_path):
    write_zip(tmp_path / "backup.zip")
    (tmp_path / "a.JPG").write_bytes(b"x")
    assert isinstance(find_images([tmp_path]), ImageFolder)


@pytest.mark.parametrize("name", ["nowhere", "nowhere/*.zip", "nowhere_{1..2}.zip", "open{.zip"])
def test_nothing_is_there(tmp_path, name):
    with pytest.raises(UserError, match="is no folder, and names no zip"):
        find_images([str(tmp_path / name)])
    with pytest.raises(UserError, match="is no folder; give the one"):
        ImageFolder(tmp_path / name)


def test_names_with_braces_and_brackets(tmp_path):
    path = tmp_path / "odd{.tar"
    path.write_bytes(b"")
    assert find_files([path], (".tar",), "") == [path]


def test_zips_with_capitals_behind_links_and_beside_a_folder_called_zip(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_zip(tmp_path / "elsewhere" / "b.Zip")
    folder = tmp_path / "zips"
    folder.mkdir()
    write_zip(folder / "A.ZIP")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder)
    assert find_images([folder]).zips == [folder / "A.ZIP", folder / "more" / "b.Zip"]
    assert find_images([f"{folder}/*"]).zips == [folder / "A.ZIP"]
    (tmp_path / "images" / "zip").mkdir(parents=True)
    assert isinstance(find_images([tmp_path / "images"]), ImageFolder)
