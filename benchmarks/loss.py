"""Time and memory of a contrastive loss and its gradients, ours and open_clip's: d=512, float32, one thread.

.venv/bin/python benchmarks/loss.py [--batches 8192 16384] [--rounds 3]    # about 10 minutes, 6 GiB
.venv/bin/python benchmarks/loss.py --large 65536                          # ours alone: whole process below 2 GiB?

Every measurement is a process of its own, in random turns. Seconds are CPU time of forward and backward together. The
peak is that of resident memory (VmHWM, reset before) above what features and libraries hold, gradients among it; Linux
only. Ratios are of open_clip's medians to ours.
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
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

OURS = {"InfoNCE": "open_clip ClipLoss", "SigLIP": "open_clip SigLipLoss"}
WIDTH = 512
LARGE_LIMIT_MIB = 2048
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Measurement = dict[str, float]


def named_loss(name: str) -> Callable[..., Tensor]:
    if name == "InfoNCE":
        from quiltnet.training.losses import InfoNCE

        return InfoNCE()
    if name == "SigLIP":
        from quiltnet.training.siglip import SigLIP

        return SigLIP()
    from open_clip import loss  # here, so that what it holds is not held where ours is measured

    return getattr(loss, name.removeprefix("open_clip "))()


def inputs_of(name: str, pairs: int) -> tuple[Tensor, ...]:
    """Unit features, the scale, and SigLIP's bias; at the values that training starts from."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(pairs, WIDTH, generator=generator) for _ in range(2)]
    scalars = [torch.tensor(10.0), torch.tensor(-10.0)] if "Sig" in name else [torch.tensor(1 / 0.07)]
    return tuple(part.requires_grad_() for part in (*(F.normalize(part, dim=-1) for part in features), *scalars))


def resident_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def measure(name: str, pairs: int) -> None:
    """In a process of its own; prints a JSON."""
    torch.set_num_threads(1)
    loss = named_loss(name)
    loss(*inputs_of(name, 64)).backward()  # loads what is loaded at first use
    inputs = inputs_of(name, pairs)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and not given back would be taken again without being counted
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    held, begun = resident_mib("VmRSS"), time.process_time()
    value = loss(*inputs)
    value.backward()
    seconds, peak = time.process_time() - begun, resident_mib("VmHWM")
    assert all(part.grad is not None for part in inputs)
    told = {"loss": value.item(), "seconds": seconds, "peak_mib": peak - held, "process_mib": peak}
    print(json.dumps(told))


def measure_apart(name: str, pairs: int) -> Measurement:
    command = [sys.executable, __file__, "--only", name, "--batches", str(pairs)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD})
    return json.loads(told.stdout)


def compare(pairs: int, rounds: int) -> None:
    names = [*OURS, *OURS.values()]
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in random.sample(names, len(names)):
            found[name].append(measure_apart(name, pairs))
    print(f"B={pairs:,}, {rounds} rounds: min / median / max")
    for ours, theirs in OURS.items():
        for name in (theirs, ours):
            print(
                f"  {name:22} {spread(found[name], 'seconds', '.3f')} s   {spread(found[name], 'peak_mib', '.0f')} MiB"
            )
        faster, smaller = (median(found[theirs], what) / median(found[ours], what) for what in ("seconds", "peak_mib"))
        apart = abs(found[ours][0]["loss"] / found[theirs][0]["loss"] - 1)
        print(f"  {ours}: x{faster:.2f} faster, x{smaller:.1f} less memory; losses differ by {apart:.1e}", flush=True)


def measure_large(pairs: int) -> bool:
    """Whether each of our losses stays within the limit, libraries and features and all."""
    fits = True
    for name in OURS:
        told = measure_apart(name, pairs)
        fits &= told["process_mib"] < LARGE_LIMIT_MIB
        print(
            f"B={pairs:,} {name:8} {told['seconds']:.1f} s, {told['peak_mib']:.0f} MiB above the features, "
            f"{told['process_mib']:.0f} MiB the whole process (limit {LARGE_LIMIT_MIB})",
            flush=True,
        )
    return fits


def median(found: list[Measurement], what: str) -> float:
    return statistics.median(one[what] for one in found)


def spread(found: list[Measurement], what: str, form: str) -> str:
    values = [one[what] for one in found]
    return " / ".join(f"{value:{form}}" for value in (min(values), statistics.median(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, metavar="B")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args.only, args.batches[0])
    elif args.large:
        sys.exit(not measure_large(args.large))
    else:
        for pairs in args.batches:
            compare(pairs, args.rounds)


if __name__ == "__main__":
    main()
