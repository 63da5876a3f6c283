"""Copies of a run's files at another place: an object store, or whatever else fsspec has a protocol for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path

import fsspec

from quiltnet.errors import UserError
from quiltnet.training.checkpoint_manifest import MANIFEST_NAME

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0
_CLOSING_S = 5.0


def check_copies_url(url: str) -> None:
    """Whether copies could go there, as far as that shows without the network.

    Raises:
        UserError: no such protocol, or a package that it needs is not installed.
    """
    try:
        fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"callbacks.copy_checkpoints_to={url}: {error}; give s3://bucket/folder, gs://bucket/folder or another URL "
            "of fsspec whose package is installed"
        ) from error


class CheckpointCopies:
    """A thread of its own that copies, tries again, and never makes training wait.

    A folder's manifest is copied last and deleted first, so that half a copy is not taken for a checkpoint.
    """

    def __init__(self, root: Path, url: str, *, attempts: int = 6, pause_s: float = 1.0) -> None:
        """
        Args:
            root: what is in it is copied to the same place below ``url``.
            url: of fsspec, such as ``s3://bucket/runs/b32``.
            attempts: for a file or folder, before it is given up.
            pause_s: after the first attempt that failed; twice as long after each other.
        """
        self.root = root
        self.url = url.rstrip("/")
        self.attempts = attempts
        self.pause_s = pause_s
        self.current: Path | None = None
        self._waiting: deque[tuple[str, Path]] = deque()
        self._failed: list[Path] = []
        self._changed = threading.Condition()
        self._is_ending = threading.Event()
        self._thread: threading.Thread | None = None

    def copy(self, path: Path) -> None:
        """Copy a file, or a folder, which may be gone again when its turn comes."""
        self._add("copy", path)

    def remove(self, path: Path) -> None:
        """Delete the copy of what was deleted here."""
        self._add("remove", path)

    def finish(self, limit_s: float) -> list[Path]:
        """Wait until all is copied, or the limit is over.

        Returns:
            What is not copied.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self.current is None, timeout=limit_s)
            left = [path for task, path in self._waiting if task == "copy"]
            current = [] if self.current is None else [self.current]
            self._waiting.clear()
            self._is_ending.set()
            self._changed.notify_all()
            return [path for path in (*self._failed, *current, *left) if path.exists()]

    def close(self) -> None:
        """Copy no more. The file that is under way may end, unless it takes longer than a few seconds."""
        with self._changed:
            self._waiting.clear()
            self._is_ending.set()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSING_S)

    def _add(self, task: str, path: Path) -> None:
        with self._changed:
            self._waiting.append((task, path))
            self._changed.notify_all()
            self._is_ending.clear()
            if self._thread is None:
                # A daemon: a connection that hangs must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name="checkpoint copies", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_ending.is_set())
                if not self._waiting:
                    self._thread = None  # seen by `_add` before this thread has quite ended
                    return
                task, path = self._waiting.popleft()
                self.current = path
            is_done = self._try(task, path)
            with self._changed:
                self.current = None
                self._failed = [failed for failed in self._failed if failed != path]
                if task == "copy" and not is_done:
                    self._failed.append(path)
                self._changed.notify_all()

    def _try(self, task: str, path: Path) -> bool:
        pause_s = self.pause_s
        for attempt in range(1, self.attempts + 1):
            try:
                self._copy(path) if task == "copy" else self._remove(path)
            except Exception as error:  # each protocol's package has errors of its own
                if task == "copy" and not path.exists():  # retention was faster
                    task = "remove"
                    continue
                if attempt == self.attempts:
                    log.warning("%s could not be copied to %s (%s); training goes on", path, self.url, error)
                elif self._is_ending.wait(pause_s):
                    return False
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                return True
        return False

    def _copy(self, path: Path) -> None:
        files, target = fsspec.url_to_fs(self._url_of(path))
        if path.is_file():
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
            files.put_file(str(path), target)
            return
        manifest, copied_manifest = path / MANIFEST_NAME, f"{target}/{MANIFEST_NAME}"
        described = manifest.read_bytes() if manifest.is_file() else None
        if described is not None and files.exists(copied_manifest):
            if files.cat_file(copied_manifest) == described:
                return
            files.rm_file(copied_manifest)
        for file in sorted(file for file in path.rglob("*") if file.is_file() and file != manifest):
            if self._is_ending.is_set():
                raise InterruptedError("the run has ended")
            copied = f"{target}/{file.relative_to(path).as_posix()}"
            files.makedirs(copied.rpartition("/")[0], exist_ok=True)
            files.put_file(str(file), copied)
            if files.size(copied) != file.stat().st_size:
                raise OSError(f"the copy of {file.name} is not as long as the file")
        if described is not None:
            if manifest.read_bytes() != described:
                raise OSError("it was saved anew meanwhile")
            files.pipe_file(copied_manifest, described)

    def _remove(self, path: Path) -> None:
        files, target = fsspec.url_to_fs(self._url_of(path))
        if files.exists(f"{target}/{MANIFEST_NAME}"):
            files.rm_file(f"{target}/{MANIFEST_NAME}")
        if files.exists(target):
            files.rm(target, recursive=True)

    def _url_of(self, path: Path) -> str:
        return f"{self.url}/{path.relative_to(self.root).as_posix()}"
