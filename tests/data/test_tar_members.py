"""The quick reader of headers against tarfile itself."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from quiltnet.data.tar_members import TarMembers

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    """The definition: regular files as the standard library lists them."""
    found = []
    with tarfile.open(path, "r:", errors="replace") as tar:
        try:
            while (member := tar.next()) is not None:
                if member.isreg() and not member.issparse():
                    found.append((member.name, member.offset_data, member.size))
        except tarfile.ReadError:
            pass  # cut here: what came before counts
    return found


def write_wild_tar(path: Path, rng: random.Random, format: int) -> Path:
    names = ["a", "k.jpg", "ordner/gewebe-\u00e4.txt", "x" * 99, "y" * 100, "d/" * 60 + "z.json", "n" * 180, "s/"]
    kinds = [tarfile.REGTYPE] * 12 + [tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE]
    kinds += [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE]
    with tarfile.open(path, "w", format=format, pax_headers={"comment": "wild"} if rng.random() < 0.1 else {}) as tar:
        for number in range(rng.randrange(1, 12)):
            name = rng.choice(names)
            info = tarfile.TarInfo(
                f"{number}{name}" if format != tarfile.USTAR_FORMAT or len(name) < 90 else f"{number}"
            )
            info.type = rng.choice(kinds)
            info.mtime = rng.choice([0, 1.25, 1_700_000_000])  # a fraction is an extended header
            if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = rng.choice(["../../etc/passwd", "l" * 150 if format != tarfile.USTAR_FORMAT else "l"])
            elif info.isreg() and not info.name.endswith("/"):  # which would be a folder's name
                info.size = rng.choice([0, 1, 511, 512, 513, 5000])
            if rng.random() < 0.1 and format == tarfile.PAX_FORMAT:
                info.pax_headers = {"path": f"renamed-{number}.txt"}
            tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    return path


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(60))
def test_finds_what_tarfile_finds(tmp_path, seed, format):
    path = write_wild_tar(tmp_path / "a.tar", random.Random(seed), format)
    members = TarMembers(path)
    assert [tuple(member) for member in members] == by_tarfile(path)
    assert not members.is_truncated


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_met_as_tarfile_meets_it(tmp_path, seed):
    rng = random.Random(seed)
    path = write_wild_tar(tmp_path / "a.tar", rng, rng.choice(FORMATS))
    data = bytearray(path.read_bytes())
    for _ in range(3):
        data[rng.randrange(512, len(data)) if len(data) > 512 else 0] ^= 1 << rng.randrange(8)
    path.write_bytes(data[: rng.randrange(513, len(data) + 1)])
    try:
        tarfile.open(path, "r:").close()
    except tarfile.ReadError:  # the damage is at the very front
        with pytest.raises(tarfile.ReadError):
            list(TarMembers(path))
        return
    assert [tuple(member) for member in TarMembers(path)] == by_tarfile(path)


def test_what_starts_like_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(tarfile.ReadError):
        list(TarMembers(tmp_path / "a.tar"))


def header(name: str, size: int | bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One block; a size given as bytes is written as it is."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size if isinstance(size, int) else 0
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if isinstance(size, bytes):
        block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


# Headers with a sound checksum that say what cannot be.
LIES = {
    "a size below zero": header("b.txt", (2**96 - 1536).to_bytes(12, "big")),
    "more than a file can hold": header("b.txt", b"\x80" + (1 << 80).to_bytes(11, "big")),
    "more than a disk can hold": header("b.txt", b"\x80" + (1 << 62).to_bytes(11, "big")),
    "more than there is memory for": header("b.txt", b"\x80" + (1 << 45).to_bytes(11, "big")),
    "an extended size below zero": member("p", b"14 size=-3000\n", b"x") + member("b.txt", b"y"),
    "an extended size that is no number": member("p", b"11 size=abc", b"x") + member("b.txt", b"y"),
    "an extended header without end": header("p", b"\x80" + (1 << 60).to_bytes(11, "big"), b"x"),
    "names upon names": member("p", b"abcde", b"L") * 3000 + member("b.txt", b"y"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("is_first", [False, True])
def test_headers_that_lie_end_the_tar(tmp_path, lie, is_first):
    """Python's tarfile went in circles, without end, until 3.11.14; others of these it answers with other errors."""
    path = tmp_path / "a.tar"
    path.write_bytes((b"" if is_first else member("a.txt", b"x")) + LIES[lie] + bytes(1024))
    members = TarMembers(path)
    try:
        names = [found.name for found in members]
    except tarfile.ReadError:
        assert is_first
        return
    assert names[: 1 - is_first] == ["a.txt"][is_first:] and set(names) <= {"a.txt", "b.txt"}
    assert members.is_truncated
