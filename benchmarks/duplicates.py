"""What to do with duplicates in a batch: the measurement behind the default of ``duplicates`` (ignore, mask, positive).

.venv/bin/python benchmarks/duplicates.py --part atlas|drawn|lc25000 [--seeds 3] [--steps 300] [--batch 128] [--full]
                                          [--data ../shared/data]

The towers of conf/model/effnet-lite0-minilm.yaml are FROZEN: they encode all tiles and captions once, and what is
trained, by the real loss, are two linear projections into 256 dimensions and the logit scale. So a difference shows
in seconds, but not what it would do to a tower; ``--full`` trains everything, and takes minutes a run on a CPU.

Every mode sees the same batches from the same initial weights; seeds differ in both. ``recall`` is the mean of
recall@1, 5 and 10 in both directions on held-out pairs, right answers by id; "against ignore" are differences seed by
seed. A default is supported where these keep their sign over the seeds. Where equal ids come with equal features (a
caption whose text tower has no dropout, a tile shown alike), ``ignore`` and ``positive`` are one loss: k twin rows with
a target each among k equal columns sum to what k rows with a k-th of it on each column do. They differ by crops, by
dropout, and in chains (a tile of one pair and the caption of another).

  atlas    161 training tiles of 23 cases, two captions a tile, each shared by all tiles of its case (real).
  drawn    1,000 drawn cases. Of a batch's pairs 2, 10 or 30 % have a twin: by turns one tile (in two crops) with two
           captions, and two tiles with one caption that is true of both. Equal captions by chance come on top.
  lc25000  736 training tiles that share 20 captions (real): nothing like a set of image-caption pairs.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn

from quiltnet.data.pairs import caption_id
from quiltnet.data.synthetic import draw_pairs, labelled_tiles
from quiltnet.data.synthetic_tissue import draw_tile
from quiltnet.data.transforms import TrainTransform
from quiltnet.evaluation.metrics import balanced_accuracy, predict
from quiltnet.evaluation.prompts import PromptSet, class_features
from quiltnet.evaluation.retrieval_metrics import retrieval_ranks
from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.text_forward import encode_text
from quiltnet.training.losses import InfoNCE

ROOT = Path(__file__).resolve().parents[1]
MODES = ("ignore", "mask", "positive")
KS = (1, 5, 10)
VIEWS, DRAWN_VIEWS = 4, 2  # random crops of each training tile; a drawn case has two tiles
LEARNING_RATE, FULL_LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4, 0.1

Batches = Callable[[np.random.Generator], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]  # tile, image, caption


@dataclass
class Task:
    """Inputs of the student: (N, …) tiles or their features, (C, …) tokens or their features.

    Attributes:
        batches: generator -> endless (rows of ``tiles``, image ids, rows of ``captions``), B each.
        positives: (P, 2), of a held-out tile and a held-out caption that belong together.
        prompts: (classes, templates, …) and the labels of ``labelled``; None where there are no classes.
    """

    name: str
    tiles: Tensor
    captions: Tensor
    batches: Batches
    held_tiles: Tensor
    held_captions: Tensor
    positives: Tensor
    prompts: Tensor | None = None
    labelled: Tensor | None = None
    labels: Tensor | None = None


class Heads(nn.Module):
    """What is trained over frozen towers."""

    def __init__(self, image_width: int, text_width: int, embed_dim: int = 256) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, embed_dim, bias=False)
        self.text = nn.Linear(text_width, embed_dim, bias=False)
        self.log_logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    @property
    def logit_scale(self) -> Tensor:
        return self.log_logit_scale.exp()

    def encode_image(self, features: Tensor) -> Tensor:
        return F.normalize(self.image(features), dim=-1)

    def encode_text(self, features: Tensor) -> Tensor:
        return F.normalize(self.text(features), dim=-1)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        self.log_logit_scale.clamp_(min=0, max=np.log(100))


class Encoder:
    """Pictures and sentences -> what a student takes: features of the frozen towers, or pixels and tokens."""

    def __init__(self, *, full: bool) -> None:
        config = yaml.safe_load((ROOT / "conf/model/effnet-lite0-minilm.yaml").read_text())
        del config["_target_"]
        torch.manual_seed(0)
        self.model: ContrastiveModel = build_model(**config).eval()
        self.full = full
        self._towers = deepcopy(self.model.clip)
        self._towers.visual.head = self._towers.text.proj = nn.Identity()

    def new_student(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if not self.full:
            return Heads(self.model.clip.visual.head.proj.in_features, self.model.clip.text.proj.in_features)
        student = deepcopy(self.model)
        for projection in (student.clip.visual.head.proj, student.clip.text.proj):
            projection.reset_parameters()
        return student.train()

    @torch.no_grad()
    def tiles(self, images: list[Image.Image]) -> Tensor:
        pixels = [self.model.transform(image) for image in images]
        if self.full:
            return torch.stack(pixels).half()  # 8 bits of a tile need no more
        return torch.cat(
            [self._towers.encode_image(torch.stack(pixels[at : at + 32])) for at in range(0, len(pixels), 32)]
        )

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        tokens, _ = self.model.batch_tokenizer()(captions)
        return tokens if self.full else torch.cat([encode_text(self._towers, part) for part in tokens.split(64)])

    def prompts(self, class_names: list[str]) -> Tensor:
        templates = yaml.safe_load((ROOT / "conf/prompts/quilt4.yaml").read_text())["templates"]
        prompts = PromptSet(templates).fill(class_names).values()
        encoded = self.captions([prompt for of_class in prompts for prompt in of_class])
        return encoded.view(len(class_names), len(templates), -1)


def real_task(encoder: Encoder, data: Path, subset: str, batch: int) -> Task:
    folder = data / "quilt_like"
    rows = [row for row in _table(folder / "quilt_1M_lookup.csv") if row["subset"] == subset]
    spelling = {caption_id(row["caption"]): row["caption"] for row in rows}
    place = {name: number for number, name in enumerate(spelling)}
    captions_of = {split: defaultdict(list) for split in ("train", "val")}
    for row in rows:
        captions_of[row["split"]][row["image_path"]].append(place[caption_id(row["caption"])])
    train, held = captions_of["train"], captions_of["val"]
    stored = [(folder / "images" / name).read_bytes() for name in train]
    held_tiles = encoder.tiles([Image.open(folder / "images" / name).convert("RGB") for name in held])
    labels = {row["image_path"]: row for row in _table(folder / "lc25000_labels.csv")}
    names = sorted({row["class_name"] for row in labels.values()})
    has_labels = subset == "lc25000"
    captions = encoder.captions(list(spelling.values()))

    def batches(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        of_image = list(train.values())
        while True:
            order = rng.permutation(len(of_image))
            for image in order[: len(order) // batch * batch].reshape(-1, batch):
                caption = np.array([rng.choice(of_image[number]) for number in image])
                yield image * VIEWS + rng.integers(VIEWS, size=batch), image, caption

    return Task(
        name=subset,
        tiles=encoder.tiles(_crops(stored, VIEWS)),
        captions=captions,
        batches=batches,
        held_tiles=held_tiles,
        held_captions=captions,
        positives=torch.tensor(
            [[number, caption] for number, of_tile in enumerate(held.values()) for caption in of_tile]
        ),
        prompts=encoder.prompts(names) if has_labels else None,
        labelled=held_tiles if has_labels else None,
        labels=torch.tensor([names.index(labels[name]["class_name"]) for name in held]) if has_labels else None,
    )


def drawn_tasks(encoder: Encoder, batch: int, cases: int = 1000, held: int = 400) -> Iterator[Task]:
    """One for each rate, over the same tiles: case i has the tiles 2i and 2i + 1, and captions that suit both."""
    pairs = list(draw_pairs(cases + held, 128, seed=0))
    spelling = {caption_id(caption): caption for pair in pairs for caption in pair.captions}
    place = {name: number for number, name in enumerate(spelling)}
    of_case = [[place[caption_id(caption)] for caption in dict.fromkeys(pair.captions)] for pair in pairs]
    drawn = []
    for number, pair in enumerate(pairs[:cases]):
        again = draw_tile(pair.pattern, pair.attributes, 128, np.random.default_rng([7, number]))
        drawn += [pair.jpeg(), replace(pair, image=again).jpeg()]
    tiles = encoder.tiles(_crops(drawn, DRAWN_VIEWS))
    captions = encoder.captions(list(spelling.values()))
    held_tiles = encoder.tiles([Image.fromarray(pair.image) for pair in pairs[cases:]])
    held_names = sorted({name for of_tile in of_case[cases:] for name in of_tile})
    right = [[n, held_names.index(name)] for n, of_tile in enumerate(of_case[cases:]) for name in of_tile]
    labelled, labels, class_names = labelled_tiles(200, 128, seed=0)
    zeroshot = {
        "prompts": encoder.prompts(class_names),
        "labelled": encoder.tiles([Image.fromarray(image) for image in labelled]),
        "labels": torch.tensor(labels),
    }
    for rate in (0.02, 0.1, 0.3):
        yield Task(
            name=f"drawn, {rate:.0%} twins",
            tiles=tiles,
            captions=captions,
            batches=_with_twins(of_case[:cases], round(rate * batch / 2), batch),
            held_tiles=held_tiles,
            held_captions=captions[held_names],
            positives=torch.tensor(right),
            **zeroshot,
        )


def _with_twins(captions_of: list[list[int]], doubled: int, batch: int) -> Batches:
    """doubled: cases that come twice in a batch; every other one with the same tile, the rest with the same caption."""

    def batches(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        while True:
            image, view, caption = [], [], []
            for place, case in enumerate(rng.permutation(len(captions_of))[: batch - doubled]):
                one, other = 2 * case + rng.permutation(2)
                first, second = rng.permutation(captions_of[case])[:2]
                crops = rng.permutation(DRAWN_VIEWS)
                is_tile_twin = place % 2 == 0
                times = 2 if place < doubled else 1
                image += [one, one if is_tile_twin else other][:times]
                caption += [first, second if is_tile_twin else first][:times]
                view += [*crops[:times]]
            yield np.array(image) * DRAWN_VIEWS + view, np.array(image), np.array(caption)

    return batches


def _crops(stored: list[bytes], views: int) -> list[Image.Image]:
    """Each tile ``views`` times, cropped and mirrored as training does it."""
    rng = np.random.default_rng(0)
    crop = TrainTransform(224, scale=(0.5, 1.0), horizontal_flip=True, vertical_flip=True)
    return [Image.fromarray(crop(data, rng).permute(1, 2, 0).numpy()) for data in stored for _ in range(views)]


def train(encoder: Encoder, task: Task, mode: str, seed: int, steps: int) -> dict[str, float]:
    """A student from ``seed``, and what it scores on held-out pairs."""
    student = encoder.new_student(seed)
    rate = FULL_LEARNING_RATE if encoder.full else LEARNING_RATE
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss, batches = InfoNCE(duplicates=mode), task.batches(np.random.default_rng(seed))
    for _ in range(steps):
        tile, image, caption = map(torch.from_numpy, next(batches))
        image_features = student.encode_image(task.tiles[tile].float())
        text_features = student.encode_text(task.captions[caption])
        value = loss(image_features, text_features, student.logit_scale, image_id=image, caption_id=caption)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        student.clamp_logit_scale()
    return score(student.eval(), task)


@torch.no_grad()
def score(student: nn.Module, task: Task) -> dict[str, float]:
    def encode(encode_some: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        parts = inputs.split(64)
        return torch.cat([encode_some(part.float() if part.is_floating_point() else part) for part in parts])

    image_features = encode(student.encode_image, task.held_tiles)
    text_features = encode(student.encode_text, task.held_captions)
    ranks = retrieval_ranks(image_features, text_features, task.positives)
    to_text, to_image = ({k: (found.best() < k).double().mean().item() for k in KS} for found in ranks)
    scores = {
        "recall": float(np.mean([*to_text.values(), *to_image.values()])),
        "image to text @5": to_text[5],
        "text to image @5": to_image[5],
    }
    if task.prompts is not None:
        prompt_features = encode(student.encode_text, task.prompts.flatten(0, 1))
        of_classes = class_features(prompt_features.unflatten(0, task.prompts.shape[:2]))
        predicted = predict(encode(student.encode_image, task.labelled) @ of_classes.T)
        scores["zero-shot"] = balanced_accuracy(predicted, task.labels)
    return scores


def shared_rate(task: Task, count: int = 50) -> float:
    """Share of a batch's pairs that have their image or their caption in common with another."""
    shares, batches = [], task.batches(np.random.default_rng(0))
    for _ in range(count):
        _, image, caption = next(batches)
        common = (image[:, None] == image) | (caption[:, None] == caption)
        shares.append((common.sum(1) > 1).mean())
    return float(np.mean(shares))


def compare(encoder: Encoder, task: Task, seeds: int, steps: int, batch: int) -> None:
    towers = "everything trained" if encoder.full else "frozen towers"
    print(
        f"\n{task.name}: {len(task.held_tiles)} held-out tiles, {len(task.held_captions)} captions; "
        f"{shared_rate(task):.1%} of a batch share an id; {batch} pairs x {steps} steps, {towers}, {seeds} seeds; "
        "% as mean [least, most]",
        flush=True,
    )
    runs = {mode: [train(encoder, task, mode, seed, steps) for seed in range(seeds)] for mode in MODES}
    rows = {mode: {name: [run[name] for run in runs[mode]] for name in runs[mode][0]} for mode in MODES}
    for mode in MODES:
        for name in ("recall", "zero-shot"):
            if name in rows[mode]:
                pairs = zip(runs[mode], runs["ignore"], strict=True)
                rows[mode][f"{name} against ignore"] = [run[name] - other[name] for run, other in pairs]
    print("  duplicates  " + "".join(f"{name:>25}" for name in rows["ignore"]))
    for mode, columns in rows.items():
        print(f"  {mode:<12}" + "".join(f"{_spread(values):>25}" for values in columns.values()), flush=True)


def _spread(values: list[float]) -> str:
    percent = 100 * np.array(values)
    return f"{percent.mean():.2f} [{percent.min():.2f}, {percent.max():.2f}]"


def _table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def main() -> None:
    shared = Path(os.environ.get("QUILTNET_SHARED", ROOT.parent / "shared")) / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("atlas", "drawn", "lc25000"), required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, help="pairs; 64 of the atlas, which has 161 tiles, else 128")
    parser.add_argument("--full", action="store_true", help="train the towers too")
    parser.add_argument("--data", type=Path, default=shared)
    options = parser.parse_args()
    encoder = Encoder(full=options.full)
    batch = options.batch or (64 if options.part == "atlas" else 128)
    real = () if options.part == "drawn" else [real_task(encoder, options.data, options.part, batch)]
    for task in real or drawn_tasks(encoder, batch):
        compare(encoder, task, options.seeds, options.steps, batch)


if __name__ == "__main__":
    main()
