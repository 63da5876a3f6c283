"""CPU time of the training loader a sample, tars to batches, beside open_clip 3.3.0's own, in alternation.

.venv/bin/python benchmarks/loader.py --peer-webdataset DIR [--samples 2000] [--rounds 5] [--images FOLDER]

open_clip 3.3.0 cannot read with webdataset 1.0, so the peer runs with 0.2.86 from a folder of its own, made once by
    pip install --no-deps --target DIR webdataset==0.2.86
Each loader is a process that waits to be asked for a round (an epoch, or as many samples), so that rounds alternate in
random order. Images are 512-pixel JPEGs: those of --images (repeated under new keys up to --samples), or drawn ones.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

BATCH, SHARDS, SIZE = 100, 12, 224
PREFETCHED = 6  # batches that two workers may have ready, and two in their hands
PATHS = {
    "exact": {},
    "exact, 2 workers": {"workers": 2},
    "scaled": {"decode": "scaled"},
    "prepared JPEG": {"shards": "prepared-jpeg"},
    "prepared raw": {"shards": "prepared-raw"},
}


# --- the loaders: each yields batches without end ---------------------------------------------------------------------


def peer_batches(folder: Path, samples: int, workers: int) -> Iterator:
    """open_clip 3.3.0's get_wds_dataset with its own training transform and tokenizer."""
    from open_clip import get_tokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from open_clip_train.data import get_wds_dataset

    arguments = SimpleNamespace(
        train_data=str(folder / "tars" / f"{{00000..{SHARDS - 1:05d}}}.tar"),
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    transform = image_transform_v2(PreprocessCfg(size=SIZE), is_train=True)
    data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=get_tokenizer("ViT-B-32"))
    epoch = 0
    while True:
        data.set_epoch(epoch)
        yield from data.dataloader
        epoch += 1


def our_batches(folder: Path, shards: str = "tars", decode: str = "exact", workers: int = 0) -> Iterator:
    from quiltnet.data.reading import build_loader
    from quiltnet.data.transforms import TrainTransform
    from quiltnet.model.tokenizer import BatchTokenizer, bpe_tokenizer

    transform = TrainTransform(SIZE, decode=decode)
    tokenize = BatchTokenizer(bpe_tokenizer(77), trim=False)
    place = folder / shards
    return iter(build_loader(place, transform, tokenize, global_batch_size=BATCH, seed=0, workers=workers))


def serve(batches: Iterator, samples: int) -> None:
    """A round for every line on stdin; answers with CPU and wall milliseconds a sample, loader processes included."""
    import psutil
    import torch

    torch.set_num_threads(1)
    process = psutil.Process()

    def cpu_s() -> float:
        used = [part.cpu_times() for part in (process, *process.children(recursive=True))]
        return sum(times.user + times.system for times in used)

    for _ in sys.stdin:
        for _ in islice(batches, PREFETCHED):  # made while others were measured
            pass
        cpu, wall = cpu_s(), time.perf_counter()
        for _ in islice(batches, samples // BATCH):
            pass
        per_sample = 1000 / (samples // BATCH * BATCH)
        answer = {"cpu_ms": (cpu_s() - cpu) * per_sample, "wall_ms": (time.perf_counter() - wall) * per_sample}
        print(json.dumps(answer), flush=True)


# --- what they read ---------------------------------------------------------------------------------------------------


def write_tars(folder: Path, images: Path | None, samples: int) -> float:
    """Tars as img2dataset lays them out; returns the mean KiB of an image."""
    from quiltnet.data.synthetic import draw_pairs

    files = [path.read_bytes() for path in sorted(images.glob("*.jpg"))] if images else []
    files = files or [pair.jpeg() for pair in draw_pairs(200, 512)]
    captions = [" ".join(pair.captions[:2]) for pair in draw_pairs(100, 48)]
    (folder / "tars").mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / "tars" / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard, samples, SHARDS):
                caption = f"{captions[number % len(captions)]} Field {number}."
                members = {"jpg": files[number % len(files)], "txt": caption.encode()}
                for extension, data in {**members, "json": json.dumps({"caption": caption}).encode()}.items():
                    info = tarfile.TarInfo(f"{number:08d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return statistics.mean(len(files[number % len(files)]) for number in range(samples)) / 1024


def prepare(folder: Path) -> None:
    for name, options in {"prepared-jpeg": ["--jpeg", "95"], "prepared-raw": ["--raw"]}.items():
        command = [sys.executable, "-m", "quiltnet.cli.app", "prepare", str(folder / "tars"), str(folder / name)]
        subprocess.run([*command, "--size", "256", *options], check=True, stdout=subprocess.DEVNULL)


# --- what is compared beside time -------------------------------------------------------------------------------------


def decode_floor_ms(folder: Path) -> float:
    """CPU of decoding alone, by the fastest decoder at hand."""
    import simplejpeg

    with tarfile.open(folder / "tars" / "00000.tar") as tar:
        files = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    best = []
    for _ in range(5):
        start = time.process_time()
        for data in files:
            simplejpeg.decode_jpeg(data, "RGB")
        best.append((time.process_time() - start) / len(files) * 1000)
    return statistics.median(best)


def count_equal_tokens(folder: Path) -> tuple[int, int]:
    from open_clip import get_tokenizer

    from quiltnet.model.tokenizer import BatchTokenizer, bpe_tokenizer

    captions = []
    for path in sorted((folder / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            captions += [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")]
    ours = BatchTokenizer(bpe_tokenizer(77), trim=False)(captions)[0]
    return int((ours == get_tokenizer("ViT-B-32")(captions)).all(1).sum()), len(captions)


def report_pixels(folder: Path, images: int = 100) -> None:
    """Error of each path against open_clip's pixels of the same crop."""
    from decode import report_errors

    from quiltnet.data.shard_files import resolve_shards
    from quiltnet.data.stored_pairs import StoredPairs

    def images_of(name: str) -> list[bytes]:
        pairs = StoredPairs(resolve_shards(folder / name))
        return [pairs[number].image for number in range(images)]

    originals = images_of("tars")
    for path, (decode, name) in {
        "exact": ("exact", "tars"),
        "scaled": ("scaled", "tars"),
        "prepared JPEG": ("exact", "prepared-jpeg"),
        "prepared raw": ("exact", "prepared-raw"),
    }.items():
        print(path)
        report_errors(decode, originals if name == "tars" else images_of(name), originals)


# --- the comparison ---------------------------------------------------------------------------------------------------


def start(role: str, folder: Path, samples: int, environment: dict[str, str]) -> Callable[[], dict[str, float]]:
    command = [sys.executable, __file__, "--serve", role, "--folder", str(folder), "--samples", str(samples)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask() -> dict[str, float]:
        process.stdin.write("round\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    return ask


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kib = write_tars(folder, arguments.images, arguments.samples)
        prepare(folder)
        equal, captions = count_equal_tokens(folder)
        floor = decode_floor_ms(folder)
        print(f"{arguments.samples} JPEGs, mean {kib:.0f} KiB; decoding alone {floor:.2f} ms")
        print(f"tokens equal for {equal} of {captions} captions", flush=True)
        report_pixels(folder)
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        peer = {**quiet, "PYTHONPATH": str(arguments.peer_webdataset)}
        roles = {f"open_clip 3.3.0{suffix}": peer for suffix in ("", ", 2 workers")} | dict.fromkeys(PATHS, quiet)
        askers = {role: start(role, folder, arguments.samples, environment) for role, environment in roles.items()}
        rounds: dict[str, list[dict[str, float]]] = {role: [] for role in roles}
        for number in range(arguments.rounds + 1):
            for role in random.sample(list(roles), len(roles)):
                answer = askers[role]()
                if number:  # the first is for warming up
                    rounds[role].append(answer)
        report(rounds)


def report(rounds: dict[str, list[dict[str, float]]]) -> None:
    baseline = statistics.median(answer["cpu_ms"] for answer in rounds["open_clip 3.3.0"])
    print(f"{'':26} CPU ms a sample: min / median / max     x peer    wall ms, median")
    for role, answers in rounds.items():
        cpu = sorted(answer["cpu_ms"] for answer in answers)
        wall = statistics.median(answer["wall_ms"] for answer in answers)
        median = statistics.median(cpu)
        print(f"{role:26} {cpu[0]:18.3f} / {median:.3f} / {cpu[-1]:.3f} {baseline / median:10.2f} {wall:14.3f}")
    for one, two in (("open_clip 3.3.0", "open_clip 3.3.0, 2 workers"), ("exact", "exact, 2 workers")):
        walls = [statistics.median(answer["wall_ms"] for answer in rounds[role]) for role in (one, two)]
        print(f"two workers, {one}: x{walls[0] / walls[1]:.2f} the rate of one process (wall)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-webdataset", type=Path)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=Path, help="folder of 512-pixel JPEGs (*.jpg)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is None:
        main(given)
    elif given.serve.startswith("open_clip"):
        serve(peer_batches(given.folder, given.samples, 2 if "2 workers" in given.serve else 0), given.samples)
    else:
        serve(our_batches(given.folder, **PATHS[given.serve]), given.samples)
