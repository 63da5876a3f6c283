"""Time to index a tar, and to read a sample through the index; tarfile and webdataset in turns.

.venv/bin/python benchmarks/index.py [samples] [rounds]       jpg + json of 40 KB, in memory's page cache
"""

import io
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset

from quiltnet.data.tar_index import TarIndex, write_index


def write_tar(path: Path, samples: int, *, extended: bool) -> None:
    """extended: with a header of its own for the fraction of a time, as older webdataset writers put before members."""
    format, mtime = (tarfile.PAX_FORMAT, 1.5) if extended else (tarfile.USTAR_FORMAT, 0)
    with tarfile.open(path, "w", format=format) as tar:
        for number in range(samples):
            for extension, size in (("jpg", 40_000), ("json", 500)):
                info = tarfile.TarInfo(f"sample_{number:06d}.{extension}")
                info.size, info.mtime = size, mtime
                tar.addfile(info, io.BytesIO(bytes(size)))


def by_tarfile(path: Path) -> None:
    with tarfile.open(path) as tar:
        while tar.next() is not None:
            tar.members.clear()


def by_webdataset(path: Path) -> None:
    for _ in webdataset.WebDataset(str(path), shardshuffle=False):
        pass


def at_random(path: Path) -> None:
    index = TarIndex(path, path.with_name(f"{path.name}.index"))
    for number in random.sample(range(len(index)), len(index)):
        index.read(number, {"jpg", "json"})


def main(samples: int = 5000, rounds: int = 5) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain, extended = Path(folder, "plain.tar"), Path(folder, "extended.tar")
        write_tar(plain, samples, extended=False)
        write_tar(extended, samples, extended=True)
        jobs: dict[str, Callable[[], object]] = {
            "index": lambda: write_index(plain),
            "index, extended headers": lambda: write_index(extended),
            "headers by tarfile": lambda: by_tarfile(plain),
            "read at random by the index": lambda: at_random(plain),
            "read in order by webdataset": lambda: by_webdataset(plain),
        }
        microseconds: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(rounds + 1):
            for name in random.sample(list(jobs), len(jobs)) if microseconds["index"] else jobs:
                start = time.process_time()
                jobs[name]()
                microseconds[name].append((time.process_time() - start) / samples * 1e6)
    for name, values in microseconds.items():
        warm = values[1:]
        print(f"{name:28} min {min(warm):.1f}  median {statistics.median(warm):.1f}  max {max(warm):.1f} us a sample")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
