"""CPU time and pixel error of one training image, bytes to tensor, by each road; one thread, roads in random turns.

.venv/bin/python benchmarks/decode.py [images] [rounds]

512-pixel JPEGs to 224 pixels: real tiles where they are at hand (../shared/data, or $QUILTNET_SHARED/data), drawn ones
elsewhere. Errors are in levels of 255 against open_clip's pixels of the same crop (by Pillow); of the prepared roads,
against the crop of the original at the same place.
"""

import io
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from quiltnet.data.decoding import jpeg_size
from quiltnet.data.synthetic import draw_pairs
from quiltnet.data.transforms import TrainTransform

SIZE, PREPARED = 224, 256
SHARED = Path(__file__).parents[1] / os.environ.get("QUILTNET_SHARED", "../shared") / "data/quilt_like/images"


def load_files(images: int) -> tuple[str, list[bytes]]:
    real = [path.read_bytes() for path in sorted(SHARED.iterdir())] if SHARED.is_dir() else []
    real = [data for data in real if jpeg_size(data) == (512, 512)]
    if not real:
        return "drawn tiles", [pair.jpeg() for pair in draw_pairs(images, 512)]
    return "real tiles", [
        real[number * len(real) // min(images, len(real))] for number in range(min(images, len(real)))
    ]


def prepare(data: bytes) -> tuple[bytes, bytes]:
    """The image at 256 pixels, as a JPEG and as raw pixels."""
    small = Image.open(io.BytesIO(data)).convert("RGB").resize((PREPARED, PREPARED), Image.Resampling.BICUBIC)
    jpeg, raw = io.BytesIO(), io.BytesIO()
    small.save(jpeg, "JPEG", quality=95, subsampling=0)
    np.save(raw, np.asarray(small))
    return jpeg.getvalue(), raw.getvalue()


def into_rows(decode: str, files: list[bytes], batch: torch.Tensor) -> Callable[[int, np.random.Generator], None]:
    transform = TrainTransform(SIZE, decode=decode)
    return lambda number, rng: transform.into(files[number], rng, batch[number])


def measure(roads: dict[str, Callable[[int, np.random.Generator], object]], images: int, rounds: int) -> None:
    milliseconds: dict[str, list[float]] = {name: [] for name in roads}
    for _ in range(rounds + 1):
        for name in random.sample(list(roads), len(roads)):
            rng = np.random.default_rng(0)
            start = time.process_time()
            for number in range(images):
                roads[name](number, rng)
            milliseconds[name].append((time.process_time() - start) / images * 1000)
    reference = statistics.median(milliseconds["open_clip (peer)"][1:])
    for name, values in milliseconds.items():
        low, median, high = min(values[1:]), statistics.median(values[1:]), max(values[1:])
        print(f"{name:34} min {low:.3f}  median {median:.3f}  max {high:.3f} ms  x{reference / median:.2f}")


def report_errors(decode: str, files: list[bytes], originals: list[bytes]) -> None:
    """The crop of each file against Pillow's of its original, at the same place."""
    road, pil = TrainTransform(SIZE, decode=decode), TrainTransform(SIZE, decode="pil")
    draw = road.draw
    errors = []
    for number, (data, original) in enumerate(zip(files, originals, strict=True)):
        height, width = (512, 512) if data is original else (PREPARED, PREPARED)
        framing = draw(height, width, np.random.default_rng(number))
        box = tuple(side * 512 // height for side in framing.box)
        road.draw, pil.draw = (lambda *_, f=framing: f), (lambda *_, f=framing, b=box: f._replace(box=b))
        errors.append((road(data, None).int() - pil(original, None)).abs().numpy())
    errors = np.stack(errors)
    squared = (errors.astype(np.float64) ** 2).mean()
    psnr = 10 * np.log10(255**2 / squared) if squared else np.inf
    share = (errors > 1).mean()
    print(
        f"  error {errors.mean():.4f} mean, {np.percentile(errors, 99):.0f} p99, {errors.max()} max, "
        f"{share * 1e6:.1f} in a million above 1, PSNR {psnr:.1f} dB"
    )


def main(images: int = 115, rounds: int = 7) -> None:
    torch.set_num_threads(1)
    kind, files = load_files(images)
    images = len(files)
    small, raw = zip(*map(prepare, files), strict=True)
    batch = torch.empty((images, 3, SIZE, SIZE), dtype=torch.uint8).to(memory_format=torch.channels_last)
    peer = image_transform_v2(PreprocessCfg(size=SIZE), is_train=True)
    tables = {"pil": ("pil", files), "exact": ("exact", files), "scaled": ("scaled", files)}
    tables |= {"exact, prepared JPEG 256 q95 444": ("exact", small), "exact, prepared raw 256": ("exact", raw)}
    roads = {"open_clip (peer)": lambda number, _: peer(Image.open(io.BytesIO(files[number])))}
    roads |= {name: into_rows(decode, data, batch) for name, (decode, data) in tables.items()}
    roads["decode only: whole (the floor)"] = lambda number, _: simplejpeg.decode_jpeg(files[number], "RGB")
    roads["decode only: prepared JPEG"] = lambda number, _: simplejpeg.decode_jpeg(small[number], "RGB")
    kib, small_kib = (sum(map(len, data)) / images / 1024 for data in (files, small))
    print(f"{images} {kind}, mean {kib:.0f} KiB; prepared as JPEG {small_kib:.0f} KiB")
    measure(roads, images, rounds)
    for name, (decode, data) in tables.items():
        print(name)
        report_errors(decode, list(data), files)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
