"""The wires of the test hub: requests read and logged, answers sent, errors and cut connections on demand."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """One line of the log; ``received`` counts the bytes of its body that arrived."""

    method: str
    path: str
    status: int
    received: int


@dataclass
class Fault:
    """What to do to the next ``times`` requests whose ``METHOD /path`` the pattern is found in."""

    pattern: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body


class Refused(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **more: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.more = status, code, headers or {}, more


class Cut(Exception):
    """The connection was broken on purpose."""


class Connection(BaseHTTPRequestHandler):
    """One connection of a client; what is answered to which address is its subclass's."""

    log: ClassVar[list[Request]]
    faults: ClassVar[list[Fault]]
    routes: ClassVar[list[tuple[str, str, Callable[..., None]]]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """The hub keeps its own log."""

    def _serve(self) -> None:
        self.address = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(self.address.query).items()}
        self.received, self.status = 0, 0
        line = f"{self.command} {self.address.path}"
        try:
            fault = self._next_fault(line)
            self.body = self._read_body(None if fault is None else fault.cut_after)
            if fault is not None and fault.cut_after is not None:
                raise Cut
            if fault is not None:
                raise Refused(fault.status, "told to fail", headers=fault.headers)
            for method, pattern, answer in self.routes:
                if method == self.command and (found := re.fullmatch(pattern, self.address.path)):
                    answer(self, *map(unquote, found.groups()))
                    break
            else:
                raise Refused(404, "no such address")
        except Refused as error:
            named = {"X-Error-Code": error.code, "X-Error-Message": str(error), **error.headers}
            headers = {name: value for name, value in named.items() if value}
            self.answer({"error": str(error), **error.more}, error.status, headers)
        except Cut:
            # Reset, as when a cable is pulled: what was sent and not yet read is lost.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        finally:
            self.log.append(Request(self.command, self.address.path, self.status, self.received))

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _next_fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                fault.times -= 1
                return fault
        return None

    def _read_body(self, cut_after: int | None) -> bytes:
        pieces = []
        for piece in self._pieces(int(self.headers.get("Content-Length") or 0)):
            pieces.append(piece)
            self.received += len(piece)
            if cut_after is not None and self.received >= cut_after:
                raise Cut
        return b"".join(pieces)

    def _pieces(self, length: int) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        while length > 0:
            piece = self.rfile.read(min(length, 4096))
            if not piece:
                raise Cut
            length -= len(piece)
            yield piece

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
