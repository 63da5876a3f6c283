"""CPU time of a caption's tokens: open_clip's tokenisers, and ours, which give the same ids.

.venv/bin/python benchmarks/tokens.py [captions] [rounds] [folder of a Hugging Face tokeniser]

Captions are drawn ones of one to three sentences, no two alike; one in ten has a character outside ASCII or an HTML
entity, which only ftfy may touch. "first sight" is a new tokeniser's first pass, "trimmed" what training takes.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from quiltnet.data.synthetic_captions import write_captions
from quiltnet.data.synthetic_tissue import PATTERNS, Attributes
from quiltnet.model.tokenizer import BatchTokenizer, bpe_tokenizer, hugging_face_tokenizer

BATCH = 256


def captions_of(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    captions = []
    for number in range(count):
        pattern = PATTERNS[number % len(PATTERNS)]
        sentences = write_captions(pattern, Attributes.draw(rng), rng)[: rng.integers(1, 4)]
        odd = ("µm", "&#181;m")[number // 10 % 2] if number % 10 == 0 else "um"
        captions.append(f"{' '.join(sentences)} Tile {number} at {rng.integers(1, 100) / 100:.2f} {odd}.")
    return captions


def microseconds(tokenize: Callable[[list[str]], Tensor], captions: list[str]) -> float:
    start = time.process_time()
    for first in range(0, len(captions), BATCH):
        tokenize(captions[first : first + BATCH])
    return (time.process_time() - start) / len(captions) * 1e6


def compare(name: str, roads: dict[str, Callable[[list[str]], Tensor]], captions: list[str], rounds: int) -> None:
    peer, ours = list(roads.values())[:2]
    assert torch.equal(peer(captions), ours(captions)), "ids differ"
    times: dict[str, list[float]] = {road: [] for road in roads}
    for _ in range(rounds + 1):
        for road in random.sample(list(roads), len(roads)):
            times[road].append(microseconds(roads[road], captions))
    print(f"{name}: {len(captions)} captions, ids equal")
    reference = statistics.median(next(iter(times.values()))[1:])
    for road, values in times.items():
        low, median, high = min(values[1:]), statistics.median(values[1:]), max(values[1:])
        print(f"  {road:22} min {low:6.1f}  median {median:6.1f}  max {high:6.1f} us  x{reference / median:.1f}")


def main(count: int = 4000, rounds: int = 7, folder: str | None = None) -> None:
    torch.set_num_threads(1)
    captions = captions_of(count)
    words = sum(len(caption.split()) for caption in captions) / count
    print(f"mean {sum(map(len, captions)) / count:.0f} characters, {words:.0f} words")
    tokenize = bpe_tokenizer(77)
    roads = {
        "open_clip (peer)": open_clip.SimpleTokenizer(),
        "quiltnet": tokenize,
        "quiltnet, trimmed": BatchTokenizer(tokenize, trim=True),
    }
    compare("CLIP, 77", roads, captions, rounds)
    first_sight = statistics.median(microseconds(bpe_tokenizer(77), captions) for _ in range(rounds))
    print(f"  {'quiltnet, first sight':22} median {first_sight:.1f} us")
    if folder:
        tokenize = hugging_face_tokenizer(folder, 256)
        roads = {
            "open_clip (peer)": HFTokenizer(folder, 256),
            "quiltnet": tokenize,
            "quiltnet, trimmed": BatchTokenizer(tokenize, trim=True),
        }
        compare(f"{folder}, 256", roads, captions, rounds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
