"""The data of benchmarks/quality.py: real tiles, what is trained on and what is scored, batches of pairs."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from quiltnet.data.augmentation import DeviceAugment
from quiltnet.data.batches import Batch, BatchMaker
from quiltnet.data.captions import CaptionChoice
from quiltnet.data.pairs import image_id
from quiltnet.data.stored_pairs import StoredPair
from quiltnet.data.transforms import TrainTransform
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.linear_probe import LinearProbe
from quiltnet.evaluation.measuring import Evaluator
from quiltnet.evaluation.pair_tables import FilePairs
from quiltnet.evaluation.prompts import PromptSet
from quiltnet.evaluation.retrieval import Retrieval
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from quiltnet.model.contrastive import ContrastiveModel

INNER_LC25000, INNER_ATLAS = 200, 46  # tiles of train that are held out to choose recipes on
QUILT4 = (
    "a histopathology slide showing {}",
    "histopathology image of {}",
    "pathology tissue showing {}",
    "presence of {} tissue on image",
)


@dataclass(frozen=True)
class Tile:
    """An image of the table with all its captions.

    Attributes:
        stratum: of what equal parts are drawn: the class of an LC25000 tile, the case of an atlas tile.
        source: what must not be torn apart: the original tile of LC25000, the place on the slide of the atlas.
        class_name: of LC25000; None in the atlas.
        column: x on the slide, of the atlas.
    """

    path: Path
    captions: tuple[str, ...]
    split: str
    stratum: str
    source: str
    class_name: str | None
    column: int = 0


@dataclass(frozen=True)
class Part:
    """What is trained on, and what is scored."""

    train: list[Tile]
    held_out: list[Tile]


def load_tiles(data: Path) -> list[Tile]:
    """The tiles of ``quilt_like``, in the order of their names."""
    root = data / "quilt_like"
    with (root / "lc25000_labels.csv").open(encoding="utf-8", newline="") as file:
        labels = {row["image_path"]: row for row in csv.DictReader(file)}
    captions, splits = defaultdict(list), {}
    with (root / "quilt_1M_lookup.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            captions[row["image_path"]].append(row["caption"])
            splits[row["image_path"]] = row["split"]
    return [_tile(root / "images", name, captions[name], splits[name], labels.get(name)) for name in sorted(captions)]


def _tile(images: Path, name: str, captions: Sequence[str], split: str, label: dict[str, str] | None) -> Tile:
    texts = tuple(captions)
    if label is not None:
        return Tile(images / name, texts, split, label["class_name"], label["group_id"], label["class_name"])
    case, x = re.match(r"(.+?)__.*_(\d+)_\d+\.jpg", name).groups()
    return Tile(images / name, texts, split, case, name, None, int(x))


def final_part(tiles: Sequence[Tile], share: float) -> Part:
    """A fixed share of train, and all of val."""
    train = [tile for tile in tiles if tile.split == "train"]
    return Part(_share_of(train, train, share), [tile for tile in tiles if tile.split == "val"])


def inner_part(tiles: Sequence[Tile], share: float) -> Part:
    """Both of train: held out are other original tiles of LC25000, and the right-hand end of each slide of the atlas.

    As in val, which is the right-hand end of the whole slide. ``share`` is of the whole of train, as in ``final_part``.
    """
    train = [tile for tile in tiles if tile.split == "train"]
    held_out = _evenly(_of(train, "lc25000"), INNER_LC25000, key=lambda tile: _hash(tile.source))
    held_out += _evenly(_of(train, "atlas"), INNER_ATLAS, key=lambda tile: (-tile.column, tile.source))
    sources = {tile.source for tile in held_out}
    return Part(_share_of([tile for tile in train if tile.source not in sources], train, share), held_out)


def _share_of(some: Sequence[Tile], train: Sequence[Tile], share: float) -> list[Tile]:
    chosen = []
    for kind in ("lc25000", "atlas"):
        count = round(share * len(_of(train, kind)))
        chosen += _evenly(_of(some, kind), count, key=lambda tile: _hash(f"share {tile.source}"))
    return chosen


def _evenly(tiles: Sequence[Tile], count: int, key) -> list[Tile]:
    """``count`` tiles, as many of each stratum as possible; within one by ``key``."""
    seen: Counter[str] = Counter()
    ranked = []
    for tile in sorted(tiles, key=key):
        ranked.append((seen[tile.stratum], _hash(tile.source), tile))
        seen[tile.stratum] += 1
    return [tile for _, _, tile in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def _of(tiles: Sequence[Tile], kind: str) -> list[Tile]:
    return [tile for tile in tiles if (tile.class_name is not None) == (kind == "lc25000")]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class View:
    """How training shows a tile.

    Attributes:
        by_rows: an epoch has every row of the table once, so that an image with two captions comes twice, and the rows
            that do not fill a batch are left out, as in open_clip. Otherwise every image once, with a random caption.
        turned: both flips and right-angle rotations.
        views: 2 for a loss between two views of an image.
    """

    by_rows: bool
    turned: bool = False
    crop_scale: tuple[float, float] = (0.9, 1.0)
    hed_jitter: float = 0.0
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    views: int = 1


OPEN_CLIP_VIEW = View(by_rows=True)


def batches(
    tiles: Sequence[Tile], model: ContrastiveModel, view: View, *, batch_size: int, seed: int
) -> Iterator[Batch]:
    """Batches without end, a new order each epoch."""
    transform = TrainTransform(
        model.image_size,
        scale=view.crop_scale,
        horizontal_flip=view.turned,
        vertical_flip=view.turned,
        right_angle_rotations=view.turned,
        interpolation=model.interpolation,
    )
    augment = DeviceAugment(hed_jitter=view.hed_jitter, color_jitter=view.color_jitter)
    make = BatchMaker(transform, model.batch_tokenizer(), CaptionChoice("random"), seed, augment, view.views)
    pairs = _stored(tiles, by_rows=view.by_rows)
    order = _order(len(pairs), batch_size, seed, drops_last=view.by_rows)
    position = 0
    while True:
        chosen = [pairs[next(order)] for _ in range(batch_size)]
        batch = make(range(position, position + batch_size), _Supply(chosen))
        position += batch_size
        second = {}
        if batch.second_image is not None:
            second = {"second_image": augment(batch.second_image, batch.second_draws)}
        yield replace(batch, image=augment(batch.image, batch.draws), **second)


def _stored(tiles: Sequence[Tile], *, by_rows: bool) -> list[StoredPair]:
    pairs = []
    for tile in tiles:
        groups = [[caption] for caption in tile.captions] if by_rows else [list(tile.captions)]
        data = tile.path.read_bytes()
        pairs += [StoredPair(tile.path.stem, data, captions, image_id(tile.path.name)) for captions in groups]
    return pairs


def _order(count: int, batch_size: int, seed: int, *, drops_last: bool) -> Iterator[int]:
    rng = np.random.default_rng([seed, count])
    kept = count - count % batch_size if drops_last else count
    while True:
        yield from rng.permutation(count)[:kept].tolist()


class _Supply:
    """The pairs of one batch; all of them can be read."""

    def __init__(self, pairs: Sequence[StoredPair]) -> None:
        self.pairs = pairs
        self.rejected: list[tuple[str, str]] = []

    def first(self, row: int) -> tuple[StoredPair, int]:
        return self.pairs[row], -1

    def another(self, row: int, rng: np.random.Generator) -> tuple[StoredPair, int]:
        raise AssertionError(f"{self.pairs[row].key} cannot be read")


def evaluators(part: Part) -> dict[str, Evaluator]:
    """Zero-shot and probe on LC25000, retrieval on it and on the atlas; the probe learns from what is trained on."""
    train, held_out = _labelled(part.train, "train"), _labelled(part.held_out, "val")
    return {
        "zeroshot": ZeroShotClassification(held_out, PromptSet(QUILT4, name="quilt4")),
        "probe": LinearProbe(train, held_out),
        "lc25000": Retrieval(_file_pairs(_of(part.held_out, "lc25000")), ks=(1, 5)),
        "atlas": Retrieval(_file_pairs(_of(part.held_out, "atlas")), ks=(1, 5)),
    }


def _labelled(tiles: Sequence[Tile], split: str) -> LabelledSet:
    tiles = sorted(_of(tiles, "lc25000"), key=lambda tile: tile.path.name)
    names = sorted({tile.class_name for tile in tiles})
    return LabelledSet(
        images=[tile.path for tile in tiles],
        labels=torch.tensor([names.index(tile.class_name) for tile in tiles]),
        class_names=names,
        groups=[tile.source for tile in tiles],
        names=[tile.path.name for tile in tiles],
        split=split,
    )


def _file_pairs(tiles: Sequence[Tile]) -> FilePairs:
    tiles = sorted(tiles, key=lambda tile: tile.path.name)
    return FilePairs(
        [tile.path for tile in tiles],
        [list(tile.captions) for tile in tiles],
        [tile.path.name for tile in tiles],
        "val",
    )
