"""Packing at the size of Quilt-1M: memory and speed of the table part, and images a second of the rest.

.venv/bin/python benchmarks/pack.py [rows] [images packed]      a csv of 1,017,712 generated rows in Quilt's columns

The table part is everything before the first image: reading, grouping, hashing, ordering. The rest is run on a csv of
as many images, hard links to some drawn 512-pixel tiles. Memory is sampled five times a second over the process and
its children: what is theirs alone (USS), and with the pages of files that they map (RSS), which the system takes back.
"""

import csv
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil

from quiltnet.data.manifest import read_manifest
from quiltnet.data.planning import make_plan, open_plan
from quiltnet.data.quilt1m import quilt1m_source
from quiltnet.data.row_table import RowTable, write_rows
from quiltnet.data.synthetic import draw_pairs

ROWS = 1_017_712
IMAGES_A_ROW = 650_000 / ROWS
TEXT = (
    "the a of with and in shows gland glands tumour cells nuclei stroma epithelium section stained hematoxylin eosin "
    "carcinoma benign malignant lymphocytes infiltrate necrosis mucin duct here you can see this is high power view"
)
WORDS = TEXT.split()
COLUMNS = (
    *("", "caption", "image_path", "subset", "split", "pathology", "roi_text", "noisy_text", "corrected_text"),
    *("med_umls_ids", "magnification", "height", "width", "single_wsi", "not_histology"),
)


def write_table(path: Path, rows: int, rng: random.Random) -> None:
    """Captions of 23 words on average, images and captions many-to-many, as the release has them."""
    videos = ["".join(rng.choices("abcdefghijABCDEFGHIJ0123456789_-", k=11)) for _ in range(4500)]
    images = [
        f"{rng.choice(videos)}_image_{uuid.UUID(int=rng.getrandbits(128))}.jpg" for _ in range(int(rows * IMAGES_A_ROW))
    ]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(rows):
            image = images[number] if number < len(images) else rng.choice(images)
            caption = " ".join(rng.choices(WORDS, k=max(3, int(rng.gauss(22.8, 9)))))
            chunk = " ".join(rng.choices(WORDS, k=60))
            terms = [[{"entity": word} for word in rng.choices(WORDS, k=3)] for _ in range(2)]
            caption = f"{caption},\nand more." if number % 50 == 0 else caption
            split, roi = "val" if number % 75 == 0 else "train", str([" ".join(rng.choices(WORDS, k=8))])
            magnification = rng.choice(("0.0", "1.0", "2.0"))
            first = [number, caption, image, "quilt", split, "['Dermatopathology', 'Unknown']", roi]
            writer.writerow([*first, chunk, chunk, str(terms), magnification, 720, 1280, 1, 0])


class PeakMemory:
    """Highest memory of this process, or another, and its children, in bytes."""

    def __init__(self, process: psutil.Process | None = None) -> None:
        self._process = process or psutil.Process()
        self.uss = self.rss = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                taken = [process.memory_full_info() for process in family]
            except psutil.Error:
                continue
            self.uss = max(self.uss, sum(memory.uss for memory in taken))
            self.rss = max(self.rss, sum(memory.rss for memory in taken))


def measure_table(table: Path, work: Path, rows: int) -> None:
    with PeakMemory() as peak:
        start = time.perf_counter()
        write_rows(quilt1m_source(table), work, [])
        read = time.perf_counter()
        kept = RowTable(work)
        make_plan(kept, work, seed=0, layout="images", samples_per_shard=1000)
        end = time.perf_counter()
    plan = open_plan(work)
    print(f"table: {rows:,} rows, {table.stat().st_size / 2**30:.2f} GiB of csv, {len(plan.images):,} samples")
    print(f"  reading {rows / (read - start):,.0f} rows/s, planning {rows / (end - read):,.0f} rows/s, ", end="")
    print(f"together {rows / (end - start):,.0f} rows/s ({end - start:.1f} s)")
    print(f"  peak memory {peak.uss / 2**30:.2f} GiB of its own, {peak.rss / 2**30:.2f} GiB with mapped files")


def measure_packing(folder: Path, count: int, workers: int) -> None:
    images = folder / "images"
    if not images.exists():
        images.mkdir()
        tiles = [pair.jpeg() for pair in draw_pairs(100, 512)]
        for number, tile in enumerate(tiles):
            (folder / f"tile{number}.jpg").write_bytes(tile)
        with open(folder / "pairs.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_path", "caption"])
            for number in range(count):
                os.link(folder / f"tile{number % len(tiles)}.jpg", images / f"{number}.jpg")
                writer.writerow([f"{number}.jpg", f"A drawn tile, number {number} of several."])
    out = folder / f"out{workers}"
    command = [sys.executable, "-m", "quiltnet.cli.app", "shard", "--format", "csv", "--table", folder / "pairs.csv"]
    command += ["--images", images, "--workers", workers, "--out", out]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with PeakMemory(psutil.Process(process.pid)) as peak:
        if process.wait():
            raise SystemExit("packing failed")
    seconds = time.perf_counter() - start
    entry = read_manifest(out)
    size = sum(shard["bytes"] for split in entry["splits"].values() for shard in split["shards"])
    print(f"packing, {workers} workers: {count / seconds:,.0f} images/s, {size / seconds / 2**20:,.0f} MiB/s, ", end="")
    print(f"{peak.uss / 2**30:.2f} GiB of memory (whole command, {seconds:.1f} s, mean {size / count / 1024:.0f} KiB)")


def main(rows: int = ROWS, count: int = 10_000) -> None:
    with tempfile.TemporaryDirectory(prefix="quiltnet-pack-") as name:
        folder = Path(name)
        (folder / "work").mkdir()
        write_table(folder / "lookup.csv", rows, random.Random(0))
        measure_table(folder / "lookup.csv", folder / "work", rows)
        for workers in (0, 2):
            measure_packing(folder, count, workers)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
