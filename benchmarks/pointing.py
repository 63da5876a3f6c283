"""Pointing game: does the relevance map lie on what the text names, where that is known?

.venv/bin/python -m quiltnet.cli.app shard --format synthetic --samples 2000 --size 128 --out shards/synthetic
.venv/bin/python train.py run_name=demo experiment=demo
.venv/bin/python benchmarks/pointing.py outputs/demo [more models ...] [--tiles 200] --grid 4
.venv/bin/python benchmarks/pointing.py outputs/lc25000 outputs/lc25000_start --data ../shared/data --tiles 60 \
    --image-size 320 --grid 10 [--occlude 20]
.venv/bin/python benchmarks/pointing.py outputs/lc25000_start outputs/lc25000 --data ../shared/data --image-size 320 \
    --figure docs/images/explain.jpg

Drawn tiles: two patterns of ``quiltnet.data.synthetic`` side by side or one above the other, each in its half and in
the same stain, which no model was trained on; the text names one of them. With ``--data``: mosaics of real tiles
(benchmarks/mosaics.py), of whose four tissues each is asked for in turn.
A hit: the maximum of the map lies on the named part (Zhang et al. 2018, International Journal of Computer Vision 126;
there within a tolerance, here none). "Mass" is the share of the map on that part. Beside each model are the same
architecture with random weights and a map of random numbers, as coarse as the model's. Intervals: percentile bootstrap
over pictures, 2,000 draws, 95 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from mosaics import FIGURE_ROWS, SIDE, Question, draw_figure, mosaics, occlusion_maps
from PIL import Image
from torch import nn

from quiltnet.data.synthetic_captions import CLASS_NAMES
from quiltnet.data.synthetic_tissue import PATTERNS, Attributes, draw_tile
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.release.explaining import explain
from quiltnet.release.hub import load_model

TEMPLATE = "Histopathology of {}."
STREAM = 7  # first word of the seeds, of no other use of the drawings


def drawn(count: int, size: int) -> list[Question]:
    """Tiles of two patterns; which one is named, and on which side it lies, are drawn evenly."""
    tiles = []
    for index in range(count):
        rng = np.random.default_rng([STREAM, index])
        named, other = rng.choice(len(PATTERNS), 2, replace=False)
        attributes = replace(Attributes.draw(rng), inflammation="absent")  # lymphocytes would be in both halves
        one, two = (
            draw_tile(PATTERNS[p], attributes, size, np.random.default_rng([STREAM, index, 1])) for p in (named, other)
        )
        where = np.zeros((size, size), bool)
        where[:, : size // 2] = True
        where = np.rot90(where, rng.integers(4))
        picture = Image.fromarray(np.where(where[..., None], one, two))
        tiles.append(Question(picture, TEMPLATE.format(CLASS_NAMES[PATTERNS[named]]), where))
    return tiles


def point(maps: Sequence[np.ndarray], questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
    """Hits (N,) and masses (N,). Of several maxima each counts its share; a map of zeros points anywhere."""
    hits, masses = [], []
    for image_map, (_, _, where) in zip(maps, questions, strict=True):
        highest = image_map == image_map.max()
        hits.append(where[highest].mean())
        masses.append(image_map[where].sum() / image_map.sum() if image_map.any() else where.mean())
    return np.array(hits), np.array(masses)


def model_maps(model: ContrastiveModel, questions: Sequence[Question]) -> list[np.ndarray]:
    return [explain(model, picture, text).image_map for picture, text, _ in questions]


def random_maps(side: int, size: int, count: int) -> list[np.ndarray]:
    """Even noise on a grid of ``side``, upsampled as the maps are."""
    noise = torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(0))
    return list(nn.functional.interpolate(noise, size=(size, size), mode="bilinear")[:, 0].numpy())


def untrained(model: ContrastiveModel) -> ContrastiveModel:
    """In place: every layer as its constructor draws it, by torch's seed."""
    torch.manual_seed(0)
    for module in model.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    for name, parameter in model.clip.named_parameters():
        if parameter.ndim > 1 and not name.endswith("weight"):  # positions, projections
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def interval(values: np.ndarray) -> str:
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def report(name: str, maps: Sequence[np.ndarray], questions: Sequence[Question], per_picture: int) -> None:
    """per_picture: questions in a row about one picture, which are one draw."""
    hits, masses = (values.reshape(-1, per_picture).mean(axis=1) for values in point(maps, questions))
    print(f"| {name} | {interval(hits)} | {interval(masses)} |", flush=True)


def report_occlusion(name: str, model: ContrastiveModel, questions: Sequence[Question], per_picture: int) -> None:
    """Maps by occlusion, and how much the method's are like them."""
    window, maps = model.image_size // 5, []
    for first in range(0, len(questions), per_picture):
        texts = [question.text for question in questions[first : first + per_picture]]
        maps += occlusion_maps(model.eval(), questions[first].picture, texts, window, window // 2)
    report(f"{name}, occlusion", maps, questions, per_picture)
    alike = np.array([_correlation(*pair) for pair in zip(maps, model_maps(model, questions), strict=True)])
    print(f"{name}, correlation with occlusion: {interval(alike.reshape(-1, per_picture).mean(axis=1))}", flush=True)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of two maps; 0 where one is the same everywhere, as occlusion's is of a text that no place supports."""
    return np.corrcoef(one.ravel(), other.ravel())[0, 1] if one.std() and other.std() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tiles", type=int, default=200, help="drawn tiles, or mosaics")
    parser.add_argument("--data", type=Path, help="folder of quilt_like: mosaics of its held-out tiles")
    parser.add_argument("--image-size", type=int, help="in place of the model's")
    parser.add_argument("--grid", type=int, default=8, help="of the random map")
    parser.add_argument("--occlude", type=int, default=0, help="so many pictures, for comparison")
    parser.add_argument("--figure", type=Path, help="draw the first mosaics, explained by one model or two")
    args = parser.parse_args()
    if args.figure:
        models = {Path(source).name: load_model(source, image_size=args.image_size) for source in args.models}
        size = next(iter(models.values())).image_size
        draw_figure(models, mosaics(args.data, FIGURE_ROWS, size), args.figure)
        return
    per_picture = 1 if args.data is None else SIDE * SIDE
    print("| model | hits | mass |\n|---|---|---|")
    for source in args.models:
        model = load_model(source, image_size=args.image_size)
        size = model.image_size
        questions = drawn(args.tiles, size) if args.data is None else mosaics(args.data, args.tiles, size)
        report(source, model_maps(model, questions), questions, per_picture)
        if args.occlude:
            some = questions[: args.occlude * per_picture]
            report(f"{source}, the first {args.occlude}", model_maps(model, some), some, per_picture)
            report_occlusion(source, model, some, per_picture)
        if args.data is None:
            report(f"{source}, random weights", model_maps(untrained(model), questions), questions, per_picture)
    report("random map", random_maps(args.grid, size, len(questions)), questions, per_picture)


if __name__ == "__main__":
    main()
