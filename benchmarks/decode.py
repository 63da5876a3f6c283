"""CPU time of one training image, bytes to tensor: open_clip's transform, and ours by both of its roads.

.venv/bin/python benchmarks/decode.py [images] [rounds]       drawn 512-pixel JPEGs to 224 pixels, one thread
"""

import io
import random
import statistics
import sys
import time

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from quiltnet.data.synthetic import draw_pairs
from quiltnet.data.transforms import TrainTransform


def main(images: int = 60, rounds: int = 7) -> None:
    torch.set_num_threads(1)
    files = [pair.jpeg() for pair in draw_pairs(images, 512)]
    peer = image_transform_v2(PreprocessCfg(size=224), is_train=True)
    fast, pil = TrainTransform(224), TrainTransform(224, decode="pil")
    roads = {
        "open_clip (peer)": lambda data, rng: peer(Image.open(io.BytesIO(data))),
        "quiltnet decode=pil": pil,
        "quiltnet decode=fast": fast,
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in roads}
    for _ in range(rounds + 1):
        for name in random.sample(list(roads), len(roads)):
            rng = np.random.default_rng(0)
            start = time.process_time()
            for data in files:
                roads[name](data, rng)
            milliseconds[name].append((time.process_time() - start) / images * 1000)
    print(f"{images} images, mean {sum(map(len, files)) / images / 1024:.0f} KiB")
    reference = statistics.median(milliseconds["open_clip (peer)"][1:])
    for name, values in milliseconds.items():
        warm = values[1:]
        median = statistics.median(warm)
        print(f"{name:22} min {min(warm):.2f}  median {median:.2f}  max {max(warm):.2f} ms  x{reference / median:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
