"""Images in an HDF5 file, read one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quiltnet.errors import UserError


class H5Images(Sequence[np.ndarray]):
    """N images (H, W, 3) uint8 of one HDF5 data set; each process opens the file for itself, when it needs it.

    Args:
        path: the file.
        key: its data set (N, H, W, 3).

    Raises:
        UserError: no HDF5 file, one that was cut short, or one without that data set.
    """

    def __init__(self, path: str | Path, key: str = "x") -> None:
        self.path = Path(path)
        self.key = key
        self._opened: tuple[int, Any] | None = None  # process, data set
        self._count = len(self._images())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return self._images()[range(self._count)[index]]
        except OSError as error:
            raise UserError(f"cannot read image {index} of {self.path} ({error}); get the file anew") from error

    def content(self) -> list[str]:
        """A line an image that changes when the file does."""
        status = self.path.stat()
        return [f"{self.path} {status.st_size} {status.st_mtime_ns} {index}" for index in range(self._count)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _images(self) -> Any:
        # HDF5 handles do not survive a fork, and loader processes may be forks.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_h5(self.path, self.key)
        return self._opened[1]


def open_h5(path: Path, key: str) -> Any:
    """A data set of an HDF5 file, open for reading.

    Raises:
        UserError: no HDF5 file, one that was cut short, one without that data set, or whose data set is a reference to
            another file.
    """
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"cannot open {path} as HDF5 ({error}); unpack its .gz file, or get it anew") from error
    if key not in file:
        raise UserError(f"{path} has no data set {key!r}; it has {', '.join(file)}")
    found = None if _leads_out(file, key) else file[key]
    if not isinstance(found, h5py.Dataset) or found.external is not None or found.is_virtual:
        raise UserError(
            f"{key} of {path} is no data set of its own, but a group or a reference to another file; get a file that "
            "holds its images"
        )
    return found


def _leads_out(file: Any, key: str) -> bool:
    """Whether a part of the key is a link to another file, which h5py would open."""
    import h5py

    parts = key.strip("/").split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(file.get(part, getclass=True, getlink=True) is not h5py.HardLink for part in above)
