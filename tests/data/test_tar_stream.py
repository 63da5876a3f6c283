from __future__ import annotations

import gzip
import io
import random
import tarfile

import pytest

from quiltnet.data import tar_stream
from quiltnet.data.tar_index import TarIndex, write_index
from quiltnet.data.tar_stream import BrokenTar, TarSample, read_samples
from tests.data.http_server import pack_tar
from tests.data.test_tar_members import LIES, member


class OnlyOnce(io.RawIOBase):
    """A stream as a network gives it: short reads, and no way back."""

    def __init__(self, data: bytes) -> None:
        self._rest = data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        size = min(len(buffer), 777, len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def read(data: bytes, *, wanted: object = ("jpg", "json"), first: int = 0) -> tuple[list[TarSample], str | None]:
    samples = []
    try:
        for sample in read_samples(OnlyOnce(data), wanted, first):
            samples.append(sample)
    except BrokenTar as error:
        return samples, error.reason
    return samples, None


def contents(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    samples, reason = read(data)
    assert reason is None
    return [(sample.key, sample.members) for sample in samples]


THREE = [(f"k{n}.{extension}", bytes([n]) * 700) for n in range(3) for extension in ("jpg", "json")]


def test_samples_are_those_of_the_index(tmp_path):
    members = [
        ("v1.0/a.JPG", b"1"),
        ("v1.0/a.seg.png", b"2"),
        ("v1.0/a.json", b"3"),
        ("README", b"4"),
        ("v1.0/a.json", b"5"),
        ("twice.jpg", b"6"),
        ("twice.json", b"7"),
        ("twice.jpg", b"8"),
        ("empty.jpg", b""),
        ("folder/" * 30 + "long.jpg", b"9"),
        ("../../etc/passwd.jpg", b"10"),
        ("/root/x.jpg", b"11"),
    ]
    data = pack_tar(members)
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    index = TarIndex(path, write_index(path))
    assert contents(data) == [(index.key(n), index.read(n, ("jpg", "json"))) for n in range(len(index))]


def test_links_devices_and_folders_are_passed_over():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("c.jpg", tarfile.CHRTYPE), ("s.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ok"))
    assert contents(buffer.getvalue()) == [("a", {"jpg": b"ok"})]


def test_gzip_is_known_by_its_bytes():
    data = pack_tar(THREE)
    assert contents(gzip.compress(data)) == contents(data)
    # pigz and concatenation write several members
    assert contents(gzip.compress(data[:4000]) + gzip.compress(data[4000:])) == contents(data)
    samples, reason = read(gzip.compress(pack_tar([("a.jpg", random.Random(0).randbytes(50_000))]))[:-20_000])
    assert [(s.key, s.defect) for s in samples] == [("a", "truncated_tar")] and reason == "truncated_tar"


@pytest.mark.parametrize("first", range(4))
def test_begins_at_any_sample_and_reads_only_what_is_wanted(first):
    samples, reason = read(pack_tar(THREE), wanted={"json"}, first=first)
    assert reason is None
    assert [(s.key, s.members) for s in samples] == [(f"k{n}", {"json": bytes([n]) * 700}) for n in range(first, 3)]


def test_every_cut_is_noticed():
    whole = pack_tar(THREE)
    sample_bytes = 2 * (512 + 1024)
    for size in range(0, 3 * sample_bytes + 1, 100):
        samples, reason = read(whole[:size])
        if size < 512:
            assert (samples, reason) == ([], "not_a_tar")
            continue
        assert reason == "truncated_tar"
        intact = size // sample_bytes
        assert len(samples) in (intact, intact + 1)
        assert [s.members for s in samples[:intact]] == [
            {e: bytes([n]) * 700 for e in ("jpg", "json")} for n in range(intact)
        ]
        assert [s.is_last_before_cut for s in samples] == [False] * (len(samples) - 1) + [True]
        for sample in samples[intact:]:
            assert all(len(data) == 700 for data in sample.members.values())  # never a part of a file
            cut_in_padding = size % sample_bytes >= sample_bytes - 324
            assert sample.defect == "truncated_tar" or len(sample.members) < 2 or cut_in_padding


@pytest.mark.parametrize("data", [b"", b"<html>no such page</html>" * 100, bytes(100)])
def test_what_is_no_tar(data):
    assert read(data) == ([], "not_a_tar")


def test_an_empty_tar_has_no_samples():
    assert read(pack_tar([])) == ([], None)


def test_a_giant_is_not_read(monkeypatch):
    monkeypatch.setattr(tar_stream, "MAX_MEMBER_BYTES", 1000)
    samples, reason = read(pack_tar([("a.jpg", bytes(1001)), ("a.json", b"{}"), ("b.jpg", bytes(1000))]))
    assert [(s.key, s.defect, list(s.members)) for s in samples] == [
        ("a", "too_many_bytes", ["json"]),
        ("b", None, ["jpg"]),
    ]
    assert reason is None


def test_damaged_bytes_never_raise_anything_else():
    rng = random.Random(0)
    whole = pack_tar(
        [(f"k{n}.{e}", rng.randbytes(300)) for n in range(6) for e in ("jpg", "json")] + [("é" * 99 + ".jpg", b"")]
    )
    packed = gzip.compress(whole)
    for number in range(600):
        data = bytearray(packed if number % 4 == 0 else whole)
        for _ in range(rng.randrange(1, 6)):
            data[
                rng.randrange(len(data)) // 512 * 512 + rng.randrange(512) if number % 2 else rng.randrange(len(data))
            ] = rng.randrange(256)
        read(bytes(data))


def test_what_the_stream_raises_is_passed_on():
    class Breaks(OnlyOnce):
        def readinto(self, buffer: memoryview) -> int:
            if not self._rest:
                raise ConnectionResetError("gone")
            return super().readinto(buffer)

    samples = read_samples(Breaks(pack_tar(THREE)[:5000]), ("jpg",))
    assert next(samples).key == "k0"
    with pytest.raises(ConnectionResetError, match="gone"):
        list(samples)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("is_first", [False, True])
def test_headers_that_lie_end_the_stream(lie, is_first):
    """At once: what they announce is not waited for when the stream has ended."""
    data = (b"" if is_first else member("a.txt", b"x")) + LIES[lie] + bytes(1024)
    samples, reason = read(data, wanted=("txt",))
    assert [sample.key for sample in samples][: 1 - is_first] == ["a"][is_first:] and len(samples) <= 2
    assert reason in ("truncated_tar", "not_a_tar" if is_first else "truncated_tar")
