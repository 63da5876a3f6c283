"""Time and memory of recall@{1,5,10,50,200} in both directions, ours and by CLIP_benchmark's method: d=512, one thread.

.venv/bin/python benchmarks/retrieval.py [--pairs 5000] [--rounds 3]    # about 6 minutes, 3 GiB
.venv/bin/python benchmarks/retrieval.py --large 50000                  # ours alone: below 600 MiB above the features?

Every measurement is a process of its own, in random turns. Seconds are CPU time. The peak is that of resident memory
(VmHWM, reset before) above what features and libraries hold; Linux only. Ratios are of medians.

CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark, metrics/zeroshot_retrieval.py) holds the (N, N) scores and a mask of
positives, and for each k and each batch of 64 queries the top k as one-hot (64, k, N) int64. Its method is written out
here with one positive a query. No two scores are equal, since it leaves open what a tie counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

OURS, THEIRS = "tiled rank counting", "CLIP_benchmark's one-hot"
WIDTH, KS, BATCH = 512, (1, 5, 10, 50, 200), 64
LARGE_LIMIT_MIB = 600
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Measurement = dict[str, float]


def features_of(pairs: int) -> tuple[Tensor, Tensor]:
    """Unit features of images, and of texts that are found by some of them."""
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(pairs, WIDTH, generator=generator) for _ in range(2))
    return F.normalize(image, dim=-1), F.normalize(image.mul_(0.13).add_(noise), dim=-1)


def our_recalls(image: Tensor, text: Tensor) -> list[float]:
    from quiltnet.evaluation.retrieval_metrics import retrieval_ranks

    positives = torch.arange(len(image))[:, None].expand(-1, 2)
    ahead = [ranks.best() for ranks in retrieval_ranks(image, text, positives)]
    return [(of_queries < k).double().mean().item() for k in KS for of_queries in ahead]


def their_recalls(image: Tensor, text: Tensor) -> list[float]:
    scores = image @ text.T
    is_positive = torch.zeros_like(scores, dtype=torch.bool)
    is_positive[torch.arange(len(image)), torch.arange(len(image))] = True
    recalls = []
    for k in KS:
        for of_queries, right in ((scores, is_positive), (scores.T, is_positive.T)):
            parts = []
            for some, some_right in zip(of_queries.split(BATCH), right.split(BATCH), strict=True):
                best = some.topk(k, dim=1).indices  # (64, k)
                one_hot = F.one_hot(best, num_classes=some.shape[1])  # (64, k, N)
                found = (one_hot * some_right[:, None, :]).sum(dim=(1, 2))
                parts.append(found / some_right.sum(dim=1) > 0)
            recalls.append(torch.cat(parts).double().mean().item())
    return recalls


def resident_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def measure(name: str, pairs: int) -> None:
    """In a process of its own; prints a JSON."""
    torch.set_num_threads(1)
    recalls_of = our_recalls if name == OURS else their_recalls
    recalls_of(*features_of(2 * max(KS)))  # loads what is loaded at first use
    inputs = features_of(pairs)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and not given back would be taken again without being counted
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    held, begun = resident_mib("VmRSS"), time.process_time()
    recalls = recalls_of(*inputs)
    told = {"seconds": time.process_time() - begun, "peak_mib": resident_mib("VmHWM") - held, "recalls": recalls}
    print(json.dumps(told))


def measure_apart(name: str, pairs: int) -> Measurement:
    command = [sys.executable, __file__, "--only", name, "--pairs", str(pairs)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD})
    return json.loads(told.stdout)


def compare(pairs: int, rounds: int) -> bool:
    """Whether both find the same recalls."""
    names = [THEIRS, OURS]
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in random.sample(names, len(names)):
            found[name].append(measure_apart(name, pairs))
    print(f"{pairs:,} x {pairs:,}, {rounds} rounds: min / median / max")
    for name in names:
        print(f"  {name:24} {spread(found[name], 'seconds', '.2f')} s   {spread(found[name], 'peak_mib', '.0f')} MiB")
    faster, smaller = (median(found[THEIRS], what) / median(found[OURS], what) for what in ("seconds", "peak_mib"))
    ours, theirs = (found[name][0]["recalls"] for name in (OURS, THEIRS))
    print(
        f"  x{faster:.0f} faster, x{smaller:.0f} less memory; recalls {'equal' if ours == theirs else 'DIFFER'}: {ours}"
    )
    return ours == theirs


def measure_large(pairs: int) -> bool:
    """Whether ours stays within the limit."""
    told = measure_apart(OURS, pairs)
    print(f"{pairs:,} x {pairs:,}: {told['seconds']:.0f} s, {told['peak_mib']:.0f} MiB (limit {LARGE_LIMIT_MIB})")
    return told["peak_mib"] < LARGE_LIMIT_MIB


def median(found: list[Measurement], what: str) -> float:
    return statistics.median(one[what] for one in found)


def spread(found: list[Measurement], what: str, form: str) -> str:
    values = [one[what] for one in found]
    return " / ".join(f"{value:{form}}" for value in (min(values), statistics.median(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, metavar="N")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args.only, args.pairs)
    else:
        sys.exit(not (measure_large(args.large) if args.large else compare(args.pairs, args.rounds)))


if __name__ == "__main__":
    main()
