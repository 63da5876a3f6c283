from __future__ import annotations

import io
import os
import random
import resource
import tarfile
import time
from pathlib import Path

import pytest

from quiltnet.data import tar_index
from quiltnet.data.tar_index import TarIndex, ensure_index, find_index, write_index
from quiltnet.errors import UserError
from tests.data.test_tar_members import LIES, member


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def index_of(path: Path) -> TarIndex:
    return TarIndex(path, ensure_index(path))


def everything(index: TarIndex) -> list[tuple[str, dict[str, bytes]]]:
    return [(key, index.read(i, index.members(i))) for i, key in ((i, index.key(i)) for i in range(len(index)))]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_was_written(tmp_path, format):
    rng = random.Random(0)
    samples = {f"k{n}": {"jpg": rng.randbytes(rng.randrange(2000)), "json": rng.randbytes(3)} for n in range(20)}
    members = {f"{key}.{ext}": data for key, sample in samples.items() for ext, data in sample.items()}
    index = index_of(write_tar(tmp_path / "a.tar", members, format))
    assert everything(index) == list(samples.items())
    assert not index.is_truncated


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    long = "folder/" * 20 + "x" * 150
    index = index_of(write_tar(tmp_path / "a.tar", {f"{long}.jpg": b"1", "gewebe-\u00e4\u7d44.jpg": b"2"}, format))
    assert everything(index) == [(long, {"jpg": b"1"}), ("gewebe-\u00e4\u7d44", {"jpg": b"2"})]


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path):
    members = {
        "v1.0/a.JPG": b"1",
        "v1.0/a.seg.png": b"2",
        "a.txt": b"3",
        "v1.0/a.txt": b"4",
        "README": b"5",
        "._v.jpg": b"6",
        "b.jpg": b"7",
    }
    index = index_of(write_tar(tmp_path / "a.tar", members))
    assert everything(index) == [
        ("v1.0/a", {"jpg": b"1", "seg.png": b"2"}),
        ("a", {"txt": b"3"}),
        ("v1.0/a", {"txt": b"4"}),
        ("b", {"jpg": b"7"}),
    ]


def test_a_repeated_member_begins_a_new_sample(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for data in (b"1", b"2"):
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"same.{extension}")
                info.size = 1
                tar.addfile(info, io.BytesIO(data))
    assert everything(index_of(path)) == [("same", {"jpg": d, "txt": d}) for d in (b"1", b"2")]


def test_only_files_count(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("d.jpg", tarfile.DIRTYPE),
            ("c.jpg", tarfile.CHRTYPE),
            ("f.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        for name, kind in (("s.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(info)
        info = tarfile.TarInfo("../../escape.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ok"))
    # A name that leads out of the folder is a key like any other: nothing is ever opened by it.
    assert everything(index_of(path)) == [("../../escape", {"txt": b"ok"})]


def test_only_wanted_members_are_read(tmp_path):
    index = index_of(write_tar(tmp_path / "a.tar", {"a.jpg": b"1", "a.npy": b"2", "a.txt": b"3"}))
    assert index.members(0) == ["jpg", "npy", "txt"]
    assert index.read(0, {"txt", "jpg"}) == {"jpg": b"1", "txt": b"3"}


def test_empty_tars(tmp_path):
    assert len(index_of(write_tar(tmp_path / "a.tar", {}))) == 0
    (tmp_path / "nothing.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"not a tar" * 200)
    for name in ("nothing.tar", "text.tar"):
        with pytest.raises(tarfile.ReadError):
            index_of(tmp_path / name)


def test_every_cut_is_noticed(tmp_path):
    samples = {f"k{n}": {"jpg": bytes([n]) * 700, "json": b"{}"} for n in range(3)}
    members = {f"{key}.{ext}": data for key, sample in samples.items() for ext, data in sample.items()}
    whole = write_tar(tmp_path / "a.tar", members, tarfile.USTAR_FORMAT).read_bytes()
    sample_bytes = 512 + 1024 + 512 + 512
    for size in range(1, 3 * sample_bytes, 100):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:size])
        if size < 512:  # not even one header
            with pytest.raises(tarfile.ReadError):
                index_of(path)
            continue
        index = index_of(path)
        assert index.is_truncated
        whole_samples = size // sample_bytes
        assert len(index) in (whole_samples, whole_samples + 1)
        for n in range(whole_samples):
            assert index.read(n, {"jpg", "json"}) == samples[f"k{n}"]
        if len(index) > whole_samples:
            try:
                last = index.read(whole_samples, {"jpg", "json"})
            except EOFError:
                continue
            # all that was cut is padding, or the other member
            assert last.items() <= samples[f"k{whole_samples}"].items()


def test_file_that_shrinks_or_grows_stale_comes_back_short(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"1" * 5000, "b.jpg": b"2" * 5000})
    index = index_of(path)
    os.truncate(path, 3000)
    with pytest.raises(EOFError, match="ends 2512 bytes early"):
        index.read(0, {"jpg"})
    with pytest.raises(EOFError):
        index.read(1, {"jpg"})


def test_an_index_is_small_and_holds_no_file(tmp_path):
    names = [f"{n:08d}.{e}" for n in range(2000) for e in ("jpg", "json")]
    tar = write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
    before = len(os.listdir("/proc/self/fd"))
    index = TarIndex(tar, write_index(tar))
    assert index.read(1234, {"jpg"}) == {"jpg": b"x"} and index.key(1234) == "00001234"
    assert len(os.listdir("/proc/self/fd")) == before
    assert index.file == tmp_path / "a.tar.index" and index.file.stat().st_size < 2000 * 70


def test_an_index_is_found_where_it_was_left(tmp_path, monkeypatch):
    monkeypatch.setenv("QUILTNET_CACHE", str(tmp_path / "cache"))
    tar = write_tar(tmp_path / "set" / "a.tar", {"a.jpg": b"1"})
    assert find_index(tar) is None
    cached = ensure_index(tar)
    assert cached.parent == tmp_path / "cache/index" and find_index(tar) == cached
    beside = write_index(tar)
    assert find_index(tar) == beside
    other = write_tar(tmp_path / "other" / "a.tar", {"a.jpg": b"1"})
    assert ensure_index(other) != cached


@pytest.mark.parametrize("cached", [False, True])
def test_a_tar_that_was_packed_again_has_a_new_index(tmp_path, cached):
    """One sample in the middle is other than it was; size and both ends are the same."""
    names = [f"{n:03d}.{e}" for n in range(60) for e in ("jpg", "txt")]
    members = {name: b"x" * 300 for name in names}
    tar = write_tar(tmp_path / "a.tar", members)
    old = TarIndex(tar, ensure_index(tar) if cached else write_index(tar))
    time.sleep(0.02)  # the clock of a file system is coarse
    write_tar(tar, {**members, "030.txt": b"y" * 200})
    assert tar_index._identity(tar) == old.identity
    assert find_index(tar) is None
    assert index_of(tar).read(30, {"txt"}) == {"txt": b"y" * 200}


@pytest.mark.parametrize("damage", ["other content", "cut", "garbage", "empty"])
def test_an_index_that_does_not_fit_is_made_again(tmp_path, damage):
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    file = write_index(tar)
    if damage == "other content":
        write_tar(tar, {"c.jpg": b"3", "d.jpg": b"4"})  # of the same size
    elif damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_bytes(b"garbage" * 99 if damage == "garbage" else b"")
    assert find_index(tar) is None
    found = everything(index_of(tar))
    assert [key for key, _ in found] == (["c", "d"] if damage == "other content" else ["a", "b"])


def test_an_index_follows_a_copy(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    write_index(tar)
    (tmp_path / "copy").mkdir()
    for name in ("a.tar", "a.tar.index"):  # the tar first, as tools that go by name do
        (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
    assert find_index(tmp_path / "copy" / "a.tar") == tmp_path / "copy" / "a.tar.index"


def test_nothing_half_written_is_left(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(tarfile.ReadError):
        write_index(tmp_path / "a.tar")
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_member_that_claims_more_than_there_is_memory_for_is_a_cut(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.jpg", b"1") + LIES["more than there is memory for"])
    index = index_of(path)
    assert index.key(1) == "b" and index.is_truncated
    with pytest.raises(EOFError):
        index.read(1, {"txt"})
    assert index.read(0, {"jpg"}) == {"jpg": b"1"}


def test_large_members_are_read_piece_by_piece(tmp_path, monkeypatch):
    data = random.Random(0).randbytes(1000)
    index = index_of(write_tar(tmp_path / "a.tar", {"a.jpg": data}))
    monkeypatch.setattr(tar_index, "PIECE_BYTES", 300)
    assert index.read(0, {"jpg"}) == {"jpg": data}


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    monkeypatch.setenv("QUILTNET_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match=r"kept in /proc/nowhere \(No such file .*; set QUILTNET_CACHE"):
        ensure_index(tar)


def test_a_cache_without_room_is_told(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"1" for n in range(2000)})
    monkeypatch.setenv("QUILTNET_CACHE", str(tmp_path / "cache"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a disk that fills up
    try:
        with pytest.raises(UserError, match=r"cannot be kept in .*cache \(.*too large.*set QUILTNET_CACHE"):
            ensure_index(tar)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "cache" / "index") == []
