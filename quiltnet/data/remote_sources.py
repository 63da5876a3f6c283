"""Where the bytes of a remote file come from: web servers, object stores, and commands that a user allowed.

Everything goes through fsspec, except commands (``pipe:``), which go through webdataset's ``gopen``. What fsspec is
told in its own configuration (headers for a private server, an S3 endpoint) holds here too.
"""

from __future__ import annotations

import asyncio
import re
import select
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from webdataset.gopen import gopen

from quiltnet.errors import UserError

BLOCK_BYTES = 1 << 22  # of one request: large against its latency, small against memory

# Client errors that pass: request timeout, too early, too many requests.
PASSING_STATUS = (408, 425, 429)

EXTRAS = {"s3": "quiltnet[s3]", "s3a": "quiltnet[s3]", "gs": "quiltnet[gs]", "gcs": "quiltnet[gs]"}


@dataclass(frozen=True)
class Patience:
    """How long a bad connection is borne with.

    Attributes:
        retries: tries after the first that fails, before a MiB has been read in peace.
        timeout_s: without one byte, on connecting or reading.
        first_delay_s: before the first retry; each further one waits twice as long.
    """

    retries: int = 5
    timeout_s: float = 30.0
    first_delay_s: float = 0.5


class Source(Protocol):
    def fetch(self, offset: int) -> bytes:
        """Some bytes from ``offset`` on, none at the end. Raises what its library raises."""

    def close(self) -> None:
        """After a failure, or for good; ``fetch`` opens it again."""


def open_source(url: str, patience: Patience, *, allow_pipe: bool = False) -> Source:
    """Raises UserError for a protocol that cannot be read here, or a command that was not allowed."""
    if is_command(url):
        if not allow_pipe:
            raise UserError(
                f"{without_secrets(url)}: pipe: runs a command of the shell, so whoever writes the list of shards "
                "can do anything on this machine; where you wrote it, say data.allow_pipe=true on the command line"
            )
        return _Command(url, patience)
    if url.lower().startswith(("http://", "https://")):
        return _HttpFile(url, patience)
    return _StoredFile(url, patience)


def open_filesystem(url: str, patience: Patience) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system for a URL, and the path in it.

    A process that was forked gets one of its own, as fsspec needs it.

    Raises:
        UserError: its package is not installed, or nobody knows the protocol.
    """
    protocol = url.partition("://")[0].lower()
    if "::" in url:
        raise UserError(
            f"{without_secrets(url)}: chained URLs are not read; for local copies say data.stream.cache=FOLDER"
        )
    try:
        return fsspec.url_to_fs(url, **_options(protocol, patience))
    except ImportError as error:
        remedy = f"pip install {EXTRAS[protocol]}" if protocol in EXTRAS else str(error)
        raise UserError(f"{without_secrets(url)}: {protocol}:// needs a package that is missing; {remedy}") from error
    except ValueError as error:
        raise UserError(
            f"{without_secrets(url)}: {protocol}:// cannot be read ({without_secrets(str(error))}); "
            "use https://, s3://, gs:// or hf://"
        ) from error


def is_command(url: str) -> bool:
    return url.startswith("pipe:")


def without_secrets(text: str) -> str:
    """``text`` with user names, passwords and queries taken out of its URLs, and a command cut to its first word."""
    if is_command(text):
        return " ".join(["pipe:" + text[len("pipe:") :].split(maxsplit=1)[0], "…"]) if text[5:].strip() else text
    return re.sub(r"(\w+://)(?:[^\s/@'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


def is_refused(error: BaseException | None) -> bool:
    """Whether asking again would get the same answer."""
    status = status_of(error)
    if status is not None:
        return status < 500 and status not in PASSING_STATUS
    return isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError, _Replaced))


def status_of(error: BaseException | None) -> int | None:
    """Of an HTTP answer, where the error came from one."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _options(protocol: str, patience: Patience) -> dict[str, Any]:
    """Timeouts, in the words of each library. (huggingface_hub has its own, of 10 s.)"""
    if protocol in ("http", "https"):
        # aiohttp does not look at HTTPS_PROXY unless it is told to.
        said = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        return {"client_kwargs": {"trust_env": True, **said}}
    if protocol in ("s3", "s3a"):
        said = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        limits = {"connect_timeout": patience.timeout_s, "read_timeout": patience.timeout_s}
        return {"config_kwargs": {**limits, **said}}
    return {}


class _Replaced(Exception):
    """The file behind a URL is not the one that was begun."""


class _StoredFile:
    """A file of any store that fsspec reads by ranges."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._fs, self._path = open_filesystem(url, patience)
        self._size: int | None = None
        # For 4 MiB, ten times what may pass without a byte: for what no timeout of the library has caught.
        self._bound = {"timeout": 10 * patience.timeout_s} if isinstance(self._fs, AsyncFileSystem) else {}

    def fetch(self, offset: int) -> bytes:
        if self._size is None:
            self._size = self._fs.info(self._path, **self._bound)["size"]
        end = min(offset + BLOCK_BYTES, self._size)
        if offset >= end:
            return b""
        # By name: s3fs has the version of a file in third place.
        data = self._fs.cat_file(self._path, start=offset, end=end, **self._bound)
        if not data:
            raise EOFError(f"the file ends at {offset} of {self._size} bytes")
        return data

    def close(self) -> None:
        """Nothing stays open between two blocks."""


class _HttpFile:
    """A file on a web server: by ranges where the server knows them, so that no connection idles while a window of
    samples is used up; else as one long answer, which is read from its start again after a failure."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._fs, self._url = open_filesystem(url, patience)
        self._timeout_s = patience.timeout_s
        self._whole: aiohttp.ClientResponse | None = None  # an answer without ranges
        self._size: int | None = None
        self._pending: Exception | None = None  # what broke off the block before

    def fetch(self, offset: int) -> bytes:
        try:
            return sync(self._fs.loop, self._fetch, offset)
        except asyncio.TimeoutError as error:
            raise TimeoutError(f"not a byte in {self._timeout_s:g} s") from error

    def close(self) -> None:
        if self._whole is not None:
            self._fs.loop.call_soon_threadsafe(self._whole.close)
            self._whole = None

    async def _fetch(self, offset: int) -> bytes:
        if self._pending is not None:
            error, self._pending = self._pending, None
            raise error
        if self._whole is not None:
            return await self._whole.content.read(BLOCK_BYTES)
        if offset == self._size:
            return b""
        response = await self._request(offset)
        if response.status == 416:  # the file ends here, and the server had not said so
            response.release()
            return b""
        self._check(response)
        if response.status == 206:
            return await self._read_block(response, offset)
        self._whole = response
        await _skip(response, offset)
        return await response.content.read(BLOCK_BYTES)

    async def _request(self, offset: int) -> aiohttp.ClientResponse:
        session = await self._fs.set_session()
        seconds = self._timeout_s
        return await session.get(
            self._fs.encode_url(self._url),
            # If it were compressed on its way, ranges would count other bytes.
            headers={"Range": f"bytes={offset}-{offset + BLOCK_BYTES - 1}", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, connect=seconds, sock_connect=seconds, sock_read=seconds),
        )

    def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raises for a status of failure, and if this is no longer the file that was begun."""
        if response.status == 404:
            response.release()
            raise FileNotFoundError("404, there is no such file")
        response.raise_for_status()
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdigit() else response.content_length if response.status == 200 else None
        if self._size not in (None, size):
            response.close()
            raise _Replaced(f"had {self._size} bytes when it was begun, and has {size} now")
        self._size = size

    async def _read_block(self, response: aiohttp.ClientResponse, offset: int) -> bytes:
        """What comes before the connection breaks counts; the failure is raised when more is asked for."""
        begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if begin is None or int(begin[1]) != offset:
            response.close()
            raise OSError(f"the server was asked for the bytes from {offset} on and sent others")
        block = bytearray()
        try:
            async with response:
                async for chunk in response.content.iter_any():
                    block += chunk
        except (aiohttp.ClientError, OSError) as error:
            if not block:
                raise
            self._pending = error
        return bytes(block)


async def _skip(response: aiohttp.ClientResponse, size: int) -> None:
    while size > 0:
        data = await response.content.read(min(size, BLOCK_BYTES))
        if not data:
            raise EOFError(f"the file ends {size} bytes before the place where it was left")
        size -= len(data)


class _Command:
    """What a command of the shell writes."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._url = url
        self._timeout_s = patience.timeout_s
        self._pipe: Any = None
        self._position = 0

    def fetch(self, offset: int) -> bytes:
        if self._pipe is None:
            self._pipe = gopen(self._url, "rb", bufsize=0)
            self._position = 0
        while self._position < offset:
            if not self._read(min(offset - self._position, BLOCK_BYTES)):
                raise EOFError("the command wrote less than the first time")
        return self._read(BLOCK_BYTES)

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.proc.kill()
            self._pipe.stream.close()
            self._pipe.proc.wait()
            self._pipe = None

    def _read(self, size: int) -> bytes:
        waiting = select.poll()
        waiting.register(self._pipe.stream, select.POLLIN)
        if not waiting.poll(self._timeout_s * 1000):
            raise TimeoutError(f"the command wrote nothing in {self._timeout_s:g} s")
        data = self._pipe.stream.read(size)
        if not data and (status := self._pipe.proc.wait(self._timeout_s)):
            raise OSError(f"the command ended with status {status}")
        self._position += len(data)
        return data
