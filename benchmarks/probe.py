"""CPU time of the linear probe for 45 C, ours and scikit-learn's LogisticRegression: 20,000 x 512 float32, 9 classes.

.venv/bin/python benchmarks/probe.py [--rounds 3] [--quick]    # about 15 minutes; --quick: 4,000 rows, one round
.venv/bin/python benchmarks/probe.py --only-ours               # also 3 fractions x 5 seeds, and what runs in training

Every measurement is a process of its own with one thread, in random turns; seconds are CPU time. Features are drawn:
unit length, variance that falls as CLIP's does, 4 % wrong labels. scikit-learn has its default tolerance (1e-4) and
max_iter=1000. The gap is how far an objective is above the optimum (our solver to 1e-12), as a share of it, the
largest of all C >= 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.evaluation import probe as probe_module
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.linear_probe import C_VALUES, LinearProbe
from quiltnet.evaluation.probe import Probe, fit_probes

CLASSES, WIDTH, ROWS, QUICK_ROWS = 9, 512, 20_000, 4_000
PEER, OURS = "scikit-learn", "ours"
FEWEST_TO_COUNT = 1e-3  # C from which the gap is counted
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

Measurement = dict[str, float]


def drawn(rows: int, width: int = WIDTH, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit features (N, D) float32 and labels (N,)."""
    generator = np.random.default_rng(0)
    scale = (np.arange(1, width + 1) ** -0.45).astype(np.float32)
    mean = generator.standard_normal(width).astype(np.float32) * 0.6
    centres = generator.standard_normal((classes, width)).astype(np.float32) * 0.12
    generator = np.random.default_rng([1, seed])
    labels = generator.integers(0, classes, rows)
    noise = generator.standard_normal((rows, width)).astype(np.float32)
    features = torch.from_numpy((noise + centres[labels]) * scale + mean * scale[0])
    labels = np.where(generator.random(rows) < 0.04, generator.integers(0, classes, rows), labels)
    return F.normalize(features, dim=-1), torch.from_numpy(labels)


def fit_peer(features: Tensor, labels: Tensor) -> list[Probe]:
    from sklearn.linear_model import LogisticRegression

    probes = []
    for c in C_VALUES:
        solver = LogisticRegression(C=c, max_iter=1000).fit(features.numpy(), labels.numpy())
        weights, bias = (torch.from_numpy(part).double() for part in (solver.coef_, solver.intercept_))
        probes.append(Probe(c, weights, bias))
    return probes


def fit_ours(features: Tensor, labels: Tensor) -> list[Probe]:
    return fit_probes(features, labels, num_classes=CLASSES, c_values=C_VALUES)


def objective(probe: Probe, features: Tensor, labels: Tensor) -> float:
    losses = F.cross_entropy(probe.logits(features), labels, reduction="sum")
    return (probe.c * losses + probe.weights.square().sum() / 2).item()


def cpu_seconds(work: Callable[[], object]) -> tuple[float, object]:
    begun = time.process_time()
    result = work()
    return time.process_time() - begun, result


def measure(name: str, rows: int) -> None:
    """In a process of its own; prints a JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    features, labels = drawn(rows)
    fit = fit_ours if name == OURS else fit_peer
    fit(features[:200], labels[:200])  # loads what is loaded at first use
    seconds, probes = cpu_seconds(lambda: fit(features, labels))
    with mock.patch.object(probe_module, "TOLERANCE", 1e-12):
        optima = fit_ours(features, labels)
    gaps = [
        objective(probe, features, labels) / objective(optimum, features, labels) - 1
        for probe, optimum in zip(probes, optima, strict=True)
        if probe.c >= FEWEST_TO_COUNT
    ]
    test_features, test_labels = drawn(5000, seed=1)
    accuracies = [
        [(one.logits(test_features).argmax(-1) == test_labels).double().mean().item() for one in both]
        for both in zip(probes, optima, strict=True)
    ]
    told = {"seconds": seconds, "gap": max(gaps), "accuracy": max(abs(one - other) for one, other in accuracies)}
    print(json.dumps(told))


def measure_apart(name: str, rows: int) -> Measurement:
    command = [sys.executable, __file__, "--only", name, "--rows", str(rows)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD})
    return json.loads(told.stdout)


def compare(rows: int, rounds: int) -> None:
    names = [PEER, OURS]
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in random.sample(names, len(names)):
            found[name].append(measure_apart(name, rows))
    print(f"{rows:,} x {WIDTH}, {CLASSES} classes, {len(C_VALUES)} C, {rounds} rounds: CPU s, min / median / max")
    for name in names:
        gap, accuracy = (max(one[what] for one in found[name]) for what in ("gap", "accuracy"))
        print(
            f"  {name:14} {spread([one['seconds'] for one in found[name]])}   largest gap {gap:.1e}, "
            f"test accuracy at most {accuracy:.4f} from the optimum's"
        )
    faster = median(found[PEER]) / median(found[OURS])
    print(f"  x{faster:.1f} faster", flush=True)


class Encoded:
    """What an encoder says of sets whose features are given."""

    def __init__(self, *features: tuple[LabelledSet, Tensor]) -> None:
        self.features = features

    def images(self, samples: LabelledSet, **_: object) -> Tensor:
        return next(features for dataset, features in self.features if dataset is samples)


def evaluate(rows: int, test_rows: int, width: int, classes: int, **options: object) -> float:
    """CPU seconds of an evaluator without the encoding."""
    features = [drawn(count, width, classes, seed) for seed, count in enumerate((rows, test_rows))]
    names = [f"class {number}" for number in range(classes)]
    train, test = (LabelledSet([b""] * len(labels), labels, names) for _, labels in features)
    encoded = Encoded((train, features[0][0]), (test, features[1][0]))
    return cpu_seconds(lambda: LinearProbe(train, test, **options).run(encoded))[0]


def measure_ours(rows: int) -> None:
    torch.set_num_threads(1)
    evaluate(100, 50, 32, 3)  # loads what is loaded at first use
    for width in (640, 1280):
        seconds = [evaluate(736, 247, width, 5) for _ in range(3)]
        print(
            f"736 x {width}, 5 classes, the evaluator's defaults, 247 test images: {spread(seconds)} CPU s", flush=True
        )
    many = {"fractions": [0.01, 0.1, 1.0], "seeds": range(5)}
    print(f"{rows:,} x {WIDTH}, 3 fractions x 5 seeds: {evaluate(rows, 5000, WIDTH, CLASSES, **many):.1f} CPU s")


def median(found: list[Measurement]) -> float:
    return statistics.median(one["seconds"] for one in found)


def spread(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in (min(values), statistics.median(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args.only, args.rows)
    elif args.only_ours:
        measure_ours(QUICK_ROWS if args.quick else args.rows)
    elif args.quick:
        compare(QUICK_ROWS, 1)
    else:
        compare(args.rows, args.rounds)


if __name__ == "__main__":
    main()
