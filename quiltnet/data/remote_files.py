"""A remote file as a stream of bytes, however often its connection fails."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable

from quiltnet.data.remote_sources import Patience, is_refused, open_source, status_of, without_secrets

STEADY_BYTES = 1 << 20  # read without a failure: what failed before is forgiven
MAX_RETRY_AFTER_S = 60.0

Report = Callable[[str, str], None]  # (stage, where)


class Unreachable(Exception):
    """A file, or the rest of it, cannot be had. reason: missing_shard or unreachable_shard."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Stopped(Exception):
    """Whoever reads was told to end, or its process ends."""


class RemoteFile(io.RawIOBase):
    """A remote file, to be read once. A connection that stalls, breaks, or is told to come back later is opened again
    at the byte where it was left.

    Args:
        url: as fsspec takes it, or ``pipe:command``.
        allow_pipe: the user said that commands may run.
        report: told of every retry, in the thread that reads.
        stop: set by another thread, it ends waiting and reading.

    Attributes:
        place: the URL without its secrets.

    Raises:
        UserError: on construction, for a protocol that cannot be read here, or a command that was not allowed.
        Unreachable: by ``read``, when patience is at its end.
        Stopped: by ``read``, after ``stop``.
    """

    def __init__(
        self,
        url: str,
        patience: Patience,
        *,
        allow_pipe: bool = False,
        report: Report | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.place = without_secrets(url)
        self._source = open_source(url, patience, allow_pipe=allow_pipe)
        self._patience = patience
        self._report = report
        self._stop = stop or threading.Event()
        self._block = memoryview(b"")
        self._offset = self._failures = self._steady_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self._block:
            self._block = memoryview(self._fetch())
        size = min(len(buffer), len(self._block))
        buffer[:size] = self._block[:size]
        self._block = self._block[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()

    def _fetch(self) -> bytes:
        while True:
            self._check_stop()
            try:
                data = self._source.fetch(self._offset)
            except Exception as error:  # each store's client raises types of its own
                self._source.close()
                self._check_stop()
                self._bear(error)
                continue
            self._offset += len(data)
            self._steady_bytes += len(data)
            if self._steady_bytes >= STEADY_BYTES:
                self._failures = 0
            return data

    def _check_stop(self) -> None:
        # At the end of a process, libraries fail in ways that say nothing of the file.
        if self._stop.is_set() or not threading.main_thread().is_alive():
            raise Stopped(f"reading {self.place} was stopped")

    def _bear(self, error: Exception) -> None:
        """Wait before the next try, or raise Unreachable."""
        self._failures += 1
        self._steady_bytes = 0
        what = f"{self.place}: {without_secrets(str(error)) or type(error).__name__}"
        if isinstance(error, FileNotFoundError):
            raise Unreachable("missing_shard", what) from error
        if is_refused(error) or self._failures > self._patience.retries:
            raise Unreachable("unreachable_shard", what) from error
        delay_s = self._patience.first_delay_s * 2 ** (self._failures - 1)
        # Drawn by the system: many readers must not come back in one instant, and no seed may be touched.
        delay_s = max(delay_s * random.SystemRandom().uniform(0.75, 1.25), _asked_delay_s(error))
        if self._report is not None:
            stage = f"retry {self._failures} of {self._patience.retries} in {delay_s:.1f} s"
            self._report(f"{stage} ({type(error).__name__})", self.place)
        self._stop.wait(delay_s)


def read_whole(url: str, patience: Patience) -> bytes | None:
    """All bytes of a small file, None where there is none. Raises Unreachable."""
    try:
        with RemoteFile(url, patience) as file:
            return file.readall()
    except Unreachable as error:
        # A bucket that may not be listed answers 403 for what it lacks.
        if error.reason == "missing_shard" or is_refused(error.__cause__):
            return None
        raise


def _asked_delay_s(error: Exception) -> float:
    """What the server's Retry-After says, up to a minute."""
    headers = getattr(error, "headers", None) or {}
    asked = str(headers.get("Retry-After", "")) if status_of(error) else ""
    return min(float(asked), MAX_RETRY_AFTER_S) if asked.isdigit() else 0.0
