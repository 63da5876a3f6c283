"""Time of augmentation for a uint8 batch, on the CPU and on CUDA where there is one.

.venv/bin/python benchmarks/stain.py [batch] [rounds]       drawn 224-pixel tiles, one thread
"""

import statistics
import sys
import time

import numpy as np
import torch

from quiltnet.data.augmentation import DeviceAugment
from quiltnet.data.decoding import decode_image
from quiltnet.data.synthetic import draw_pairs

AUGMENTS = {
    "colour jitter": DeviceAugment(color_jitter=(0.4, 0.4, 0.4, 0.1)),
    "HED jitter": DeviceAugment(hed_jitter=0.05),
    "Reinhard": DeviceAugment(stain_normalization="reinhard"),
    "Macenko": DeviceAugment(stain_normalization="macenko"),
}


def main(batch: int = 32, rounds: int = 5) -> None:
    torch.set_num_threads(1)
    tiles = np.stack([decode_image(pair.jpeg()) for pair in draw_pairs(min(batch, 16), 224)])
    images = torch.from_numpy(np.resize(tiles, (batch, 224, 224, 3))).permute(0, 3, 1, 2).contiguous()
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        image = images.to(device)
        for name, augment in AUGMENTS.items():
            draws = torch.from_numpy(np.stack([augment.draw(np.random.default_rng(n)) for n in range(batch)]))
            milliseconds = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                augment(image, draws)
                if device == "cuda":
                    torch.cuda.synchronize()
                milliseconds.append((time.perf_counter() - start) / batch * 1000)
            low, median, high = min(milliseconds[1:]), statistics.median(milliseconds[1:]), max(milliseconds[1:])
            print(f"{device:5} {name:14} min {low:.3f}  median {median:.3f}  max {high:.3f} ms an image")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
