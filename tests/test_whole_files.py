"""Files that are whole or as before, and that others may read; and what is said where a disk refuses."""

from __future__ import annotations

import errno
import os

import pytest

from quiltnet.cli.door import message_for_user
from quiltnet.whole_files import as_any_file, whole_file, write_whole


def test_a_file_is_as_it_was_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_whole(path, "one\n")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "two\n")
    assert path.read_text() == "one\n"
    write_whole(path, "\udcff\n")  # of a file's name that is not Unicode
    assert path.read_text() == "\\udcff\n" and [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_a_file_that_a_library_writes_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figure.png"
    with whole_file(path) as unfinished:
        assert unfinished.suffix == ".png" and not path.exists()
        unfinished.write_text("one")
    with pytest.raises(ZeroDivisionError), whole_file(path) as unfinished:
        unfinished.write_text("two")
        raise ZeroDivisionError
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_a_file_gets_the_mode_of_any_other(tmp_path, umask, mode):
    path = tmp_path / "weights"
    path.touch(0o600)
    before = os.umask(umask)
    try:
        as_any_file(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; give a place that you may"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 999), "aaa: File name too long; give a shorter name"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/x"), "f/x: Not a directory; a part of the path is a"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room"),
        (OSError(errno.EBADF, "Bad file descriptor"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), None),
    ],
)
def test_what_a_disk_refuses_is_said_and_our_own_mistakes_are_not(error, message):
    said = message_for_user(error)
    assert said is None if message is None else message in said and len(said) < 300
