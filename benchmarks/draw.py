"""CPU time of drawing one synthetic tile of 128 pixels, by pattern, one thread.

.venv/bin/python benchmarks/draw.py [tiles] [size]
"""

import statistics
import sys
import time

import numpy as np

from quiltnet.data.synthetic import PATTERNS
from quiltnet.data.synthetic_tissue import Attributes, draw_tile


def main(tiles: int = 40, size: int = 128) -> None:
    medians = []
    for pattern in PATTERNS:
        milliseconds = []
        for number in range(tiles):
            rng = np.random.default_rng(number)
            attributes = Attributes.draw(rng)
            start = time.process_time()
            draw_tile(pattern, attributes, size, rng)
            milliseconds.append((time.process_time() - start) * 1000)
        medians.append(statistics.median(milliseconds))
        print(f"{pattern:22} min {min(milliseconds):.1f}  median {medians[-1]:.1f}  max {max(milliseconds):.1f} ms")
    print(f"{'mean of medians':22} {statistics.mean(medians):.1f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
