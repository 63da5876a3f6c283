"""A web server on the loopback that can fail in the ways that real ones do, and small tars for it."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import tarfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from quiltnet.data.remote_shards import RemoteShard
from quiltnet.data.remote_sources import Patience

# Real patience is for real networks; HASTY is for servers that stall.
QUICK = Patience(retries=3, timeout_s=4.0, first_delay_s=0.01)
HASTY = Patience(retries=3, timeout_s=0.3, first_delay_s=0.01)


@dataclass
class Fault:
    """What goes wrong with a file.

    Attributes:
        kind: stall (keeps the connection and sends nothing more), reset (breaks the connection), refuse (answers
            ``status``).
        at: byte of the file that is not sent any more.
        times: how often; then the server is well again.
    """

    kind: str
    at: int = 0
    times: int = 1
    status: int = 503


@dataclass
class Server:
    """Attributes:
    files: contents by path.
    has_ranges: whether it answers requests for a part with that part.
    faults: by path, worked off one after another.
    requests: (path, first byte asked for) of all there were.
    """

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    has_ranges: bool = True
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: list[tuple[str, int]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def fault_of(self, path: str, end: int) -> Fault | None:
        """What is to go wrong with bytes before ``end``."""
        for fault in self.faults.get(path, []):
            if fault.times > 0:
                if fault.at >= end:
                    return None
                fault.times -= 1
                return fault
        return None


@contextmanager
def serving() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits for 40 ms

        def do_GET(self) -> None:
            _answer(self, state)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield state
        finally:
            state.stopped.set()
            server.shutdown()
            thread.join()


def _answer(handler: BaseHTTPRequestHandler, state: Server) -> None:
    path = handler.path.partition("?")[0].lstrip("/")
    data = state.files.get(path, b"")
    asked = re.match(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    state.requests.append((path, int(asked[1]) if asked else 0))
    first, end = (int(asked[1]), int(asked[2]) + 1) if asked and state.has_ranges else (0, len(data))
    fault = state.fault_of(path, end)
    if path not in state.files or (fault and fault.kind == "refuse"):
        handler.send_error(fault.status if fault else 404)
        return
    if asked and state.has_ranges:
        if first >= len(data):
            handler.send_error(416)
            return
        end = min(end, len(data))
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
    else:
        handler.send_response(200)
    handler.send_header("Content-Length", str(end - first))
    handler.end_headers()
    if fault is None:
        handler.wfile.write(data[first:end])
        return
    handler.wfile.write(data[first : max(first, fault.at)])
    handler.close_connection = True
    if fault.kind == "stall":
        state.stopped.wait(5)
    else:  # closing without waiting for anything sends a reset
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()


def pack_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pack_samples(shard: int, count: int, bad: dict[int, bytes] | None = None) -> bytes:
    """A tar of samples ``s<shard>-<number>``; ``bad``: json of some of them, by number."""
    members = []
    for number in range(count):
        record = (bad or {}).get(number, json.dumps({"caption": f"of {shard} {number}"}).encode())
        members += [
            (f"s{shard}-{number:03d}.jpg", b"\xff\xd8\xff" + bytes([shard, number]) * 300),
            (f"s{shard}-{number:03d}.json", record),
        ]
    return pack_tar(members)


def keys_of(counts: Iterable[int]) -> list[str]:
    return [f"s{shard}-{number:03d}" for shard, count in enumerate(counts) for number in range(count)]


def serve_shards(server: Server, counts: list[int], *, known: bool = True) -> list[RemoteShard]:
    """Shards with so many samples, at ``set/<number>.tar``."""
    for shard, count in enumerate(counts):
        server.files[f"set/{shard}.tar"] = pack_samples(shard, count)
    return [RemoteShard(server.url(f"set/{n}.tar"), count if known else None) for n, count in enumerate(counts)]
