"""Images with one label each. Class names are bound to the names of labels, never to their position in a list."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.image_opening import open_image

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
UNREADABLE = Exception  # a damaged file makes Pillow's plug-ins raise a dozen types


@runtime_checkable
class StoredImages(Protocol):
    """A lazy sequence of images: each is read when it is asked for, in any process (so it must survive pickling)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Path | bytes | np.ndarray: ...

    def content(self) -> list[str]:
        """A line an image that changes when the image may have."""
        ...


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Images with one label each.

    Args:
        images: N of a path, encoded bytes, or an array (H, W, 3) or (H, W) uint8. ``StoredImages`` where they do not
            fit memory, or are no files.
        labels: (N,) int64, indices into class_names.
        class_names: C names as they go into prompts. Some may have no image here, as in a split without a rare class.
        groups: N names of what must not be torn apart by a split (patient, slide, original tile).
        slides: N names of the slide whose label a tile has, for slide-level scores.
        names: N names that tell the images apart wherever the set lies: paths below its root. Their file names and
            positions where not given.
        split: what the images may be used for: nothing may be chosen on ``test``.
        is_ordered: whether the classes are grades, the least first.
        origin: where it comes from and what was chosen (root, version, dropped classes), for the record of a result.

    Raises:
        UserError: no image, a label without a class name, fewer than two classes among the labels, or two classes
            whose names differ in nothing but case and spaces.
    """

    images: Sequence[Path] | Sequence[bytes] | Sequence[np.ndarray] | StoredImages
    labels: Tensor
    class_names: Sequence[str]
    groups: Sequence[str] | None = None
    slides: Sequence[str] | None = None
    names: Sequence[str] | None = None
    split: Split = "test"
    is_ordered: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for items in (self.images, self.groups, self.slides, self.names):
            assert items is None or len(items) == len(self.labels)
        if self.split not in SPLITS:
            raise UserError(f"split={self.split!r} of {self._where()} must be one of {', '.join(SPLITS)}")
        if not len(self.images):
            raise UserError(f"no labelled image in {self._where()}; choose a set that has some")
        numbers = self.labels.unique().tolist()
        outside = [number for number in numbers if not 0 <= number < len(self.class_names)]
        if outside:
            raise UserError(
                f"label {outside[0]} of {self._where()} has no name: the {len(self.class_names)} class names are those "
                "of labels from 0 on; give each class its name"
            )
        present = [self.class_names[number] for number in numbers]
        if len(present) < 2:
            raise UserError(
                f"all {len(self)} images of {self._where()} belong to the single class {present[0]!r}, "
                "which any model names right; give at least two classes"
            )
        counts = Counter(_spoken(name) for name in self.class_names)
        repeated = [name for name in self.class_names if counts[_spoken(name)] > 1 or not _spoken(name)]
        if repeated:
            raise UserError(
                f"several classes of {self._where()} are called {repeated[0]!r}, so no prompt "
                "can tell them apart; give each its own name"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """RGB image and label.

        Raises:
            UserError: the file is no readable image, or has pixels of unknown range. A measurement on fewer images is
                another measurement.
        """
        image, label = self.images[index], int(self.labels[index])
        try:
            return read_rgb(image), label
        except UNREADABLE as error:
            where = image if isinstance(image, Path) else f"{self.name(index)} of {self._where()}"
            raise UserError(
                f"cannot read {where} ({error}); images to measure on are never left out silently: "
                "repair it, or take it out of the set"
            ) from error

    def select(self, rows: Tensor, split: Split | None = None) -> LabelledSet:
        """The images of these rows (indices, or N bools), all classes kept."""
        indices = torch.arange(len(self))[rows].tolist()

        def of(values: Sequence | None) -> list | None:
            return None if values is None else [values[index] for index in indices]

        return replace(
            self,
            images=_Selected(self.images, indices) if isinstance(self.images, StoredImages) else of(self.images),
            labels=self.labels[rows],
            groups=of(self.groups),
            slides=of(self.slides),
            names=[self.name(index) for index in indices],
            split=split or self.split,
        )

    def content(self) -> list[str]:
        """A line an image that changes when its pixels do: a file's name, size and time, otherwise a hash."""
        if isinstance(self.images, StoredImages):
            return self.images.content()
        return [_content(self.name(index), self.images[index]) for index in range(len(self))]

    def sha256(self) -> str:
        """Of the images' names and labels in their order: the same on every machine that has the same set."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:  # every outcome names its items by it
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels.tolist()):
            digest.update(f"{self.name(index)}\t{self.class_names[label]}\n".encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a reader of a result has to know of the set; JSON types only."""
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return {
            **self.origin,
            "split": self.split,
            "images": len(self),
            "images_per_class": dict(zip(self.class_names, counts, strict=True)),
            "sha256": self.sha256(),
        }

    def name(self, index: int) -> str:
        """What tells this image from the others of the set."""
        if self.names is not None:
            return self.names[index]
        image = None if isinstance(self.images, StoredImages) else self.images[index]
        return image.name if isinstance(image, Path) else str(index)

    def _where(self) -> str:
        facts = [f"{key} {value}" for key, value in self.origin.items() if isinstance(value, str)]
        return ", ".join(facts) or "the set"


class _Selected(Sequence):
    """Some of the images of a lazy sequence, as lazy as all of them."""

    def __init__(self, images: StoredImages, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Path | bytes | np.ndarray:
        return self.images[self.indices[index]]

    def content(self) -> list[str]:
        lines = self.images.content()
        return [lines[index] for index in self.indices]


def read_rgb(image: Path | bytes | np.ndarray) -> Image.Image:
    """The whole image, decoded by Pillow, in 8-bit RGB; its EXIF orientation is ignored, as in training.

    Raises:
        UNREADABLE: it is damaged, no image, of 32-bit pixels, or of more pixels than fit into memory.
    """
    if isinstance(image, np.ndarray):
        return _as_rgb(Image.fromarray(image))
    with open_image(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return _as_rgb(opened)


def _as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; 16-bit grey by v / 257, as images are read for training: Pillow would clip all above 255 to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # "I": Pillow 10
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, of which nobody knows what is white")
    return image.convert("RGB")


def _spoken(class_name: str) -> str:
    return " ".join(class_name.casefold().split())


def _content(name: str, image: Path | bytes | np.ndarray) -> str:
    if isinstance(image, Path):
        status = image.stat()
        return f"{image} {status.st_size} {status.st_mtime_ns}"
    data = image if isinstance(image, bytes) else repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()
    return f"{name} {hashlib.sha256(data).hexdigest()}"
