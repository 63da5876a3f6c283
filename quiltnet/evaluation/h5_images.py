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
        UserError: no HDF5 file, one that was cut short, or one without that data set.
    """
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"cannot open {path} as HDF5 ({error}); unpack its .gz file, or get it anew") from error
    if key not in file:
        raise UserError(f"{path} has no data set {key!r}; it has {', '.join(file)}")
    return file[key]
