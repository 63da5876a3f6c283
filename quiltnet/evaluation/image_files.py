"""Image files below a folder: those that are there, and whether those that a table names are."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from quiltnet.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class ImageFiles(Sequence[Path]):
    """Files by their names below a folder; a path is made when it is asked for.

    Args:
        folder: where they lie.
        names: N paths from it, with ``/``.
    """

    def __init__(self, folder: str | Path, names: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return self.folder / self.names[index]

    def content(self) -> list[str]:
        """Path, size and time of each."""
        lines = []
        for name in self.names:
            path = os.path.join(self.folder, name)
            status = os.stat(path)
            lines.append(f"{path} {status.st_size} {status.st_mtime_ns}")
        return lines


def find_images(folder: Path) -> list[str]:
    """Paths (with ``/``) of all images at any depth, from the folder, sorted.

    Hidden files and folders are passed over: macOS leaves a ``._tile.png`` beside each tile on foreign disks. Links to
    folders are followed, but for those to a folder that they lie in.

    Raises:
        UserError: a folder cannot be listed.
    """
    found = []
    for place, below, names in os.walk(folder, followlinks=True, onerror=_refuse):
        below[:] = [name for name in below if not name.startswith(".") and not _leads_back(place, name)]
        start = os.path.relpath(place, folder).replace(os.sep, "/") + "/"
        found += [f"{start}{name}".removeprefix("./") for name in names if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, and not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def relative_names(names: Sequence[str], of: str | Path) -> list[str]:
    """Paths as a table has them, in one spelling each (``./a.png`` is ``a.png``).

    Raises:
        UserError: one is absolute or leads out of the folder that it starts from.
    """
    relative = [posixpath.normpath(name) for name in names]
    outside = [name for name in relative if name.startswith(("/", "../")) or name == ".."]
    if outside:
        raise UserError(
            f"{of} names {outside[0]}; image paths start from the folder of images, and stay below it: "
            "then the same set has the same names on every machine"
        )
    return relative


def existing_images(folder: str | Path, names: Sequence[str], of: str | Path) -> ImageFiles:
    """The files of these names, each of which is there.

    Folders are listed, each once: on a network drive, asking for a file by itself costs a round trip.

    Raises:
        UserError: some do not exist; the message counts them and names the first.
    """
    root = str(folder)
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, _, file = name.rpartition("/")
        if parent not in present:
            present[parent] = _files_in(os.path.join(root, parent))
        # Asked for by itself, a file may yet be found: some file systems know it under several spellings.
        if file not in present[parent] and not os.path.isfile(os.path.join(root, name)):
            missing.append(name)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} images that {of} names do not exist in {folder} (first: {missing[0]}); "
            "give the folder that these paths start from, or complete the download"
        )
    return ImageFiles(folder, names)


def require_once(names: Iterable[str], of: str | Path) -> None:
    """Raises UserError for an image that is listed twice: it would be counted twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(
            f"{of} lists {len(repeated)} images more than once (first: {repeated[0]}), so they would be counted more "
            "than once; keep one row an image"
        )


def groups_in(names: Sequence[str], pattern: str | None, of: str | Path) -> list[str] | None:
    """What the pattern finds in each name: its first bracket, or all of it where it has none.

    Args:
        pattern: regular expression, searched for anywhere in a name; None for no groups.

    Raises:
        UserError: it is no regular expression, or is not found in a name.
    """
    if pattern is None:
        return None
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"group_pattern={pattern!r} is no regular expression ({error}); see Python's re") from error
    found = [search(name) for name in names]
    groups = [None if match is None else match[min(1, match.re.groups)] for match in found]
    unmatched = [name for name, group in zip(names, groups, strict=True) if not group]
    if unmatched:
        raise UserError(
            f"group_pattern={pattern!r} finds no group in {len(unmatched)} of {len(names)} names of {of} "
            f"(first: {unmatched[0]}); every image belongs to a group, or give no pattern"
        )
    return groups


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _leads_back(folder: str, name: str) -> bool:
    place = os.path.join(folder, name)
    return os.path.islink(place) and Path(place).resolve() in (Path(folder).resolve() / name).parents


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot list {error.filename} ({error.strerror}), so images would be left out; make it readable")
