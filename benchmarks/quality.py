"""Learning quality against open_clip: one start, the same real pairs, as many samples (docs/quality.md).

.venv/bin/python benchmarks/quality.py select|final|ablate|curve|table [--out /tmp/quality] [--data ../shared/data]
                                       [--threads 1]

    select  candidates on the inner fold of train, at 25 %; val is not looked at
    final   both arms, 25 % and 100 %, three seeds; each run scores val once
    ablate  our recipe with one part left out, on the inner fold, three seeds
    curve   WiSE-FT: narrow fine-tuning against what it forgets
    table   what docs/quality.md shows of the above

Every run is kept in ``--out``, so a stage that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from quality_curve import curve_table, draw_curve, trace_curve
from quality_data import View, final_part, inner_part, load_tiles
from quality_run import Recipe, Records, load_start, make_run, peer, without
from quality_table import ablation_table, comparison_table, composite, over_seeds

from quiltnet.evaluation.outcome import Outcome
from quiltnet.model.contrastive import ContrastiveModel

SEEDS = (0, 1, 2)
SHARES = (0.25, 1.0)
WEIGHTS = ("last", "average", "mixed")

FIRST = Recipe(
    lr=3e-4,
    view=View(by_rows=False, turned=True, hed_jitter=0.05),
    batchnorm="frozen",
    duplicates="positive",
    layer_decay=0.9,
    max_grad_norm=1.0,
    ema_decay=0.95,
)
SECOND = Recipe(
    lr=1e-3,
    view=View(by_rows=True, turned=True, hed_jitter=0.05),
    duplicates="positive",
    max_grad_norm=1.0,
    ema_decay=0.95,
)
THIRD = replace(SECOND, layer_decay=0.9)
OURS = replace(THIRD, batchnorm="adapted", lr=5e-4)
CROPPED = replace(OURS, view=replace(OURS.view, crop_scale=(0.5, 1.0)))
TWO_VIEWS = replace(CROPPED.view, views=2)
FASTER = replace(CROPPED, lr=1e-3)
FOURTH = replace(FASTER, logit_scale_lr_factor=10.0)
CANDIDATES = {
    "open_clip, lr 3e-4": peer(3e-4),
    "open_clip, lr 5e-4": peer(5e-4),
    "first": FIRST,
    "open_clip, lr 1e-3": peer(1e-3),
    "first, lr 1e-3": replace(FIRST, lr=1e-3),
    "second": SECOND,
    "open_clip, lr 3e-3": peer(3e-3),
    "second, frozen BatchNorm": replace(SECOND, batchnorm="frozen"),
    "third": THIRD,
    "third, every image once": replace(THIRD, view=replace(THIRD.view, by_rows=False)),
    "third, layer decay 0.8": replace(THIRD, layer_decay=0.8),
    "third, label smoothing 0.1": replace(THIRD, label_smoothing=0.1),
    "third, lr 2e-3": replace(THIRD, lr=2e-3),
    "first, every row once": replace(FIRST, view=THIRD.view),
    "third, frozen BatchNorm, image rate x0.3": replace(THIRD, batchnorm="frozen", image_lr_factor=0.3),
    "third, image rate x0.5": replace(THIRD, image_lr_factor=0.5),
    "third, adapted BatchNorm": replace(THIRD, batchnorm="adapted"),
    "third, adapted BatchNorm, lr 5e-4": OURS,
    "ours, crops of 50 to 100 %": CROPPED,
    "ours, projections x3": replace(OURS, projection_lr_factor=3.0),
    "ours, batches of 32": replace(OURS, batch_size=32),
    "ours, projections x10, towers after 512": replace(
        OURS, projection_lr_factor=10.0, image_thaw_samples=512, text_thaw_samples=512
    ),
    "ours, text rate x0.3": replace(OURS, text_lr_factor=0.3),
    "ours, text rate x0.1": replace(OURS, text_lr_factor=0.1),
    "ours, label smoothing 0.1": replace(OURS, label_smoothing=0.1),
    # "third, adapted BatchNorm" is ours at 1e-3.
    "ours, lr 1e-3, label smoothing 0.1": replace(OURS, lr=1e-3, label_smoothing=0.1),
    "ours, lr 1e-3, logit scale x10": replace(OURS, lr=1e-3, logit_scale_lr_factor=10.0),
    "ours, lr 1e-3, logit scale x10, batches of 32": replace(OURS, lr=1e-3, logit_scale_lr_factor=10.0, batch_size=32),
    "cropped, lr 1e-3": FASTER,
    "cropped, lr 1e-3, batches of 32": replace(FASTER, batch_size=32),
    "cropped, lr 1e-3, two views": replace(FASTER, image_image_weight=0.5, view=TWO_VIEWS),
    "cropped, lr 2e-3": replace(FASTER, lr=2e-3),
    "cropped, lr 1e-3, logit scale x10": FOURTH,
    "cropped, lr 1e-3, logit scale x30": replace(FOURTH, logit_scale_lr_factor=30.0),
    "cropped, lr 1e-3, logit scale x10, label smoothing 0.1": replace(FOURTH, label_smoothing=0.1),
    "cropped, lr 1e-3, logit scale x10, batches of 32": replace(FOURTH, batch_size=32),
    "cropped, lr 7e-4, logit scale x10, batches of 32": replace(FOURTH, lr=7e-4, batch_size=32),
    "cropped, lr 7e-4, logit scale x10, batches of 32, two views": replace(
        FOURTH, lr=7e-4, batch_size=32, image_image_weight=0.5, view=TWO_VIEWS
    ),
}
PEER = peer(1e-3)
PARTS = (
    "flips and rotations",
    "stain jitter",
    "duplicates",
    "layer decay",
    "adapted BatchNorm (it trains)",
    "adapted BatchNorm (ImageNet's stays)",
)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    records = Records(arguments.out)
    if arguments.stage == "table":
        print_tables(records)
        return
    stages = {"select": select, "final": score_val, "ablate": ablate, "curve": trace}
    stages[arguments.stage](records, arguments.data, load_start())


def select(records: Records, data: Path, start: ContrastiveModel) -> None:
    """One seed of each candidate; more seeds decide where two are close."""
    part = inner_part(load_tiles(data), 0.25)
    for recipe in CANDIDATES.values():
        make_run(records, "inner-25", start, part, recipe, 0, WEIGHTS)
        print("\n".join(choice_lines(records)), flush=True)


def score_val(records: Records, data: Path, start: ContrastiveModel) -> None:
    tiles = load_tiles(data)
    for share in SHARES:
        for seed in SEEDS:
            for recipe in (PEER, OURS):
                run = make_run(records, _fold(share), start, final_part(tiles, share), recipe, seed, (recipe.weights,))
                print(run, records.all()[run]["all_s"], "s", flush=True)


def ablate(records: Records, data: Path, start: ContrastiveModel, seeds: Sequence[int] = SEEDS) -> None:
    part = inner_part(load_tiles(data), 0.25)
    for seed in seeds:
        for recipe in (OURS, *_ablated().values()):
            weights = WEIGHTS if recipe == OURS else (recipe.weights,)
            run = make_run(records, "inner-25", start, part, recipe, seed, weights)
            print(run, records.all()[run]["all_s"], "s", flush=True)


def trace(records: Records, data: Path, start: ContrastiveModel) -> None:
    points = trace_curve(start, load_tiles(data), OURS, records.folder / "curve.json")
    draw_curve(points, Path(__file__).resolve().parents[1] / "docs/quality/wise_ft")
    print("\n".join(curve_table(points)))


def print_tables(records: Records) -> None:
    for share in SHARES:
        runs = {arm: [_name(_fold(share), recipe, seed) for seed in SEEDS] for arm, recipe in _arms().items()}
        if all(run in records.all() for of_arm in runs.values() for run in of_arm):
            outcomes = {arm: over_seeds(records, of_arm, _arms()[arm].weights) for arm, of_arm in runs.items()}
            print(f"\n{share:.0%} of train\n")
            print("\n".join(comparison_table(outcomes["ours"], outcomes["peer"])))
    print(f"\nablation\n\n{chr(10).join(_ablation(records))}\n\nchoice")
    print("\n".join(choice_lines(records)))


def choice_lines(records: Records) -> list[str]:
    """The candidates, the best first: mean of six metrics over the seeds there are."""
    known = records.all()
    rows = []
    for name, recipe in {**CANDIDATES, "open_clip": PEER, "ours": OURS, **_ablated()}.items():
        runs = [run for run in (_name("inner-25", recipe, seed) for seed in SEEDS) if run in known]
        for weights in known[runs[0]]["scores"] if runs else ():
            score, _ = composite(over_seeds(records, runs, weights))
            rows.append((score, f"{100 * score:.1f}  {len(runs)} seeds  {name}, {weights}"))
    return [line for _, line in sorted(rows, reverse=True)]


def _ablation(records: Records) -> list[str]:
    """Over the seeds that all of the recipes have."""
    known = records.all()
    recipes = {"ours": OURS, **{f"without {part}": recipe for part, recipe in _ablated().items()}}
    seeds = [s for s in SEEDS if all(_name("inner-25", recipe, s) in known for recipe in recipes.values())]
    if not seeds:
        return ["no seed has been through all of it"]

    def of(recipe: Recipe, weights: str) -> dict[str, Outcome]:
        return over_seeds(records, [_name("inner-25", recipe, seed) for seed in seeds], weights)

    ablated = {name: of(recipe, recipe.weights) for name, recipe in recipes.items() if name != "ours"}
    ablated |= {f"with {weights} weights": of(OURS, weights) for weights in WEIGHTS if weights != OURS.weights}
    return [f"{len(seeds)} seeds", "", *ablation_table(of(OURS, OURS.weights), ablated)]


def _arms() -> dict[str, Recipe]:
    return {"peer": PEER, "ours": OURS}


def _ablated() -> dict[str, Recipe]:
    changed = {part: without(OURS, part) for part in PARTS}
    return {part: recipe for part, recipe in changed.items() if recipe != OURS}


def _fold(share: float) -> str:
    return f"val-{100 * share:.0f}"


def _name(fold: str, recipe: Recipe, seed: int) -> str:
    return f"{fold}/{recipe.training_id()}/{seed}"


def _arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["select", "final", "ablate", "curve", "table"])
    parser.add_argument("--out", type=Path, default=Path("/tmp/quality"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QUILTNET_SHARED", "../shared")) / "data")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
