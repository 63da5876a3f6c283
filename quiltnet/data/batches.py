"""Pairs of one rank as tensors, and how they are made from stored pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from quiltnet.data.decoding import BrokenSample
from quiltnet.data.device_decoding import JoinedTiles
from quiltnet.data.pairs import caption_id, id_to_int64
from quiltnet.data.stored_pairs import StoredPair
from quiltnet.data.teacher_features import parse_features
from quiltnet.data.transforms import EncodedTile
from quiltnet.errors import UserError

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]  # -> (B, L) int64, (B,) bool: was it cut

# If half of all samples are broken, 16 in a row are once in 65,000: then something else is wrong, and is
# said.
MAX_ATTEMPTS = 16

AS_STORED = (
    "the features of a teacher are stored for captions as they are; "
    "use data.train.caption_policy=random, first or longest, and data.train.sentences=false"
)

# Tensors of a few bytes a pair. From worker to trainer a tensor crosses as an open file, which takes 0.3 ms and stays
# open as long as the batch is kept; these cross by value.
SMALL = ("image_id", "caption_id", "number", "truncated", "draws", "second_draws")

# What the step needs on the device; None where a run does not ask for it.
FOR_DEVICE = ("image", "text", "draws", "second_image", "second_draws", "teacher_image", "teacher_text")

SAMPLE_STREAM = 1  # second word of the key, so that orders and samples are drawn independently


@dataclass(frozen=True)
class Batch:
    """Pairs of one rank.

    Attributes:
        image: (B, 3, H, W) uint8, not normalised; or B files that the device is to decode.
        text: (B, L) int64.
        image_id: (B,) int64; equal where the image is the same.
        caption_id: (B,) int64; equal where the caption is the same but for case and white space.
        number: (B,) int64, of the samples in the data set; -1 where it is not known.
        truncated: (B,) bool, captions longer than the model's context.
        draws: (B, P) float32, what the augmentation on the device needs.
        key: B sample keys.
        rejected: (key, reason) of samples that were broken, and that others in this batch stand in for.
        second_image, second_draws: as ``image`` and ``draws``, of a second view of each image; None where there is one.
        teacher_image: (B, D') float32, a frozen teacher's features of the stored images, not of these views of them.
        teacher_text: (B, D') float32, its features of these captions; both None where they are not asked for.
    """

    image: Tensor | JoinedTiles
    text: Tensor
    image_id: Tensor
    caption_id: Tensor
    number: Tensor
    truncated: Tensor
    draws: Tensor
    key: list[str]
    rejected: list[tuple[str, str]]
    second_image: Tensor | JoinedTiles | None = None
    second_draws: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: part.numpy() if _crosses_by_value(name, part) else part for name, part in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            (name, torch.from_numpy(part) if _crosses_by_value(name, part) else part) for name, part in state.items()
        )

    def pin_memory(self) -> Batch:
        """Called by DataLoader."""
        parts = {name: getattr(self, name) for name in FOR_DEVICE}
        return replace(self, **{name: part.pin_memory() for name, part in parts.items() if part is not None})


class Transform(Protocol):
    """Bytes of an image and a generator -> a tile, as ``TrainTransform``."""

    height: int
    width: int
    decode: str

    def into(self, data: bytes, rng: np.random.Generator, out: Tensor) -> None: ...

    def plan(self, data: bytes, rng: np.random.Generator) -> EncodedTile | Tensor: ...


class Supply(Protocol):
    """Where the pairs of a batch come from.

    Attributes:
        rejected: (key, reason) of samples that were lost before they could be handed over.
    """

    rejected: list[tuple[str, str]]

    def first(self, row: int) -> tuple[StoredPair, int]:
        """The pair that belongs there and its number. Raises BrokenSample."""

    def another(self, row: int, rng: np.random.Generator) -> tuple[StoredPair, int]:
        """One to stand in for a broken one. Raises BrokenSample."""


@dataclass(frozen=True)
class BatchMaker:
    """Positions of the stream -> Batch: a pure function of the seed, the positions and what is stored.

    A broken sample is replaced by another one, drawn from a generator that is seeded by seed, position and attempt.

    Attributes:
        choose_caption: captions, json of the sample, generator -> one text.
        augment: anything with ``draws`` (numbers a sample) and ``draw(rng)``; None for no augmentation on the device.
        views: 2 decodes each image again, with draws that come after all others of its sample.
        teacher: take the stored features of a teacher; a sample without them is broken.
    """

    transform: Transform
    tokenize: Tokenize
    choose_caption: Callable[[Sequence[str], Mapping[str, Any], np.random.Generator], str]
    seed: int
    augment: Any = None
    views: int = 1
    teacher: bool = False

    @property
    def leaves_decoding(self) -> bool:
        """Whether files are handed on to the device."""
        return self.transform.decode == "cuda"

    def __call__(self, positions: Sequence[int], supply: Supply) -> Batch:
        """Raises UserError when 16 samples in a row are broken."""
        draft = _Draft(self, len(positions))
        for row, position in enumerate(positions):
            draft.fill(row, position, supply)
        return draft.finish(supply.rejected)


class _Draft:
    """A batch in the making."""

    def __init__(self, maker: BatchMaker, rows: int) -> None:
        self.maker = maker
        self.generators = SampleGenerators(maker.seed)
        self.views = [_View(maker, rows) for _ in range(maker.views)]
        self.captions: list[str] = []
        self.pairs: list[tuple[str, int]] = []  # image id and number
        self.keys: list[str] = []
        self.taught: list[tuple[np.ndarray, np.ndarray]] = []  # features of the image and of the caption
        self.rejected: list[tuple[str, str]] = []

    def fill(self, row: int, position: int, supply: Supply) -> None:
        reasons = []
        for attempt in range(MAX_ATTEMPTS):
            rng = self.generators.at(position, attempt)
            try:
                stored, number = supply.first(row) if attempt == 0 else supply.another(row, rng)
                return self._put(row, stored, number, rng)
            except BrokenSample as error:
                reasons.append(error.reason)
                self.rejected.append((error.key, error.reason))
        told = ", ".join(f"{reason} ({times})" for reason, times in Counter(reasons).items())
        raise UserError(
            f"{MAX_ATTEMPTS} samples in a row are broken: {told}; the last is {self.rejected[-1][0]}; "
            "look at the shards, or pack them again"
        )

    def finish(self, lost: list[tuple[str, str]]) -> Batch:
        text, truncated = self.maker.tokenize(self.captions)
        first, *others = self.views
        second = {"second_image": others[0].image(), "second_draws": others[0].drawn()} if others else {}
        return Batch(
            image=first.image(),
            text=text,
            image_id=torch.tensor([id_to_int64(image_id) for image_id, _ in self.pairs]),
            caption_id=torch.tensor([id_to_int64(caption_id(caption)) for caption in self.captions]),
            number=torch.tensor([number for _, number in self.pairs]),
            truncated=truncated,
            draws=first.drawn(),
            key=self.keys,
            rejected=[*lost, *self.rejected],
            **second,
            **(self._lessons() if self.maker.teacher else {}),
        )

    def _put(self, row: int, stored: StoredPair, number: int, rng: np.random.Generator) -> None:
        caption = self.maker.choose_caption(stored.captions, stored.record, rng)
        try:
            taught = _lesson(stored, caption) if self.maker.teacher else None
            for view in self.views:
                view.put(row, stored.image, rng)
        except BrokenSample as error:
            raise BrokenSample(error.reason, stored.key) from error
        self.captions.append(caption)
        self.pairs.append((stored.image_id, number))
        self.keys.append(stored.key)
        if taught is not None:
            self.taught.append(taught)

    def _lessons(self) -> dict[str, Tensor]:
        widths = {len(image) for image, _ in self.taught}
        if len(widths) > 1:
            raise UserError(
                f"the stored features of teachers are {' and '.join(map(str, sorted(widths)))} wide in one batch; "
                "all sources need the same teacher: write their features again with `quiltnet teach`"
            )
        image, text = (torch.from_numpy(np.stack(part)) for part in zip(*self.taught, strict=True))
        return {"teacher_image": image, "teacher_text": text}


class _View:
    """One tile of each image of a batch, and what is drawn for it."""

    def __init__(self, maker: BatchMaker, rows: int) -> None:
        self._maker = maker
        self._tiles: list[EncodedTile | Tensor | None] = [None] * rows
        self._pixels = None if maker.leaves_decoding else _empty(rows, maker.transform.height, maker.transform.width)
        self._draws = np.zeros((rows, maker.augment.draws if maker.augment else 0), np.float32)

    def put(self, row: int, data: bytes, rng: np.random.Generator) -> None:
        """Raises BrokenSample."""
        maker = self._maker
        if self._pixels is None:
            self._tiles[row] = maker.transform.plan(data, rng)
        else:
            maker.transform.into(data, rng, self._pixels[row])
        if maker.augment:
            self._draws[row] = maker.augment.draw(rng)

    def image(self) -> Tensor | JoinedTiles:
        return JoinedTiles.join(self._tiles) if self._pixels is None else self._pixels

    def drawn(self) -> Tensor:
        return torch.from_numpy(self._draws)


def _lesson(stored: StoredPair, caption: str) -> tuple[np.ndarray, np.ndarray]:
    """A teacher's features of a sample's image and of one of its captions, (D',) float32 each."""
    if caption not in stored.captions:
        raise UserError(f"{stored.key}: {AS_STORED}")
    image, texts = parse_features(stored.teacher, len(stored.captions))
    return image, texts[stored.captions.index(caption)]


def _crosses_by_value(name: str, part: Any) -> bool:
    return name in SMALL and part is not None


def _empty(rows: int, height: int, width: int) -> Tensor:
    """``(rows, 3, height, width)`` uint8 to be filled, laid out as files decode (channels_last)."""
    shape = (rows, height, width, 3)
    if get_worker_info() is None:
        image = torch.empty(shape, dtype=torch.uint8)
    else:
        # Made in the memory by which a worker hands it over, it need not be copied there; so does default_collate.
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
        image = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
    return image.permute(0, 3, 1, 2)


class SampleGenerators:
    """A generator for each position and attempt, without the 12 microseconds that a new one costs.

    Philox is a function of a key and a counter (Salmon et al. 2011): the same one is set to another place.
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=np.array([seed, SAMPLE_STREAM], np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._start = self._philox.state

    def at(self, position: int, attempt: int) -> np.random.Generator:
        """Valid until the next call. Draws of different places do not overlap before 2**64 of them."""
        self._start["state"]["counter"][:] = (0, attempt, position, 0)
        self._philox.state = self._start
        return self._generator
