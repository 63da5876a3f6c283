"""A whole evaluation set to features, the work shared over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quiltnet.distributed import all_gather_object, gather_rows, rank, world_size
from quiltnet.errors import UserError


class EncodesImagesAndText(Protocol):
    """All that an evaluator knows of a model. Its caller sets ``eval()``, ``no_grad`` and the precision."""

    @property
    def device(self) -> torch.device: ...

    @property
    def logit_scale(self) -> Tensor:
        """(), the exponential, not its logarithm."""
        ...

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """RGB image -> (3, H, W) float32, normalised."""
        ...

    def tokenize(self, captions: list[str]) -> Tensor:
        """N captions -> (N, L) int64."""
        ...

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32, unit length."""
        ...

    def encode_text(self, text: Tensor) -> Tensor:
        """(B, L) -> (B, D) float32, unit length."""
        ...


class ImageSamples(Protocol):
    """Tuples by index whose first item is an RGB image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...


class LabelledImages(ImageSamples, Protocol):
    """(image, label) by index; all labels (N,) int64 at once."""

    @property
    def labels(self) -> Tensor: ...


class HeldOutPairs(ImageSamples, Protocol):
    """(image, captions, image_id) by index: Image, list[str], str."""


def encode_labelled(
    model: EncodesImagesAndText, dataset: LabelledImages, *, batch_size: int, workers: int = 0
) -> tuple[Tensor, Tensor]:  # all ranks
    """Features of all images and their labels, in the set's order, the same on every rank.

    Returns:
        image_features (N, D) float32 and labels (N,) int64, both on the CPU.
    """
    image_features, _ = _encode_images(model, dataset, batch_size, workers)
    return image_features, dataset.labels


def encode_pair_images(
    model: EncodesImagesAndText, pairs: HeldOutPairs, *, batch_size: int, workers: int = 0
) -> tuple[Tensor, list[list[str]], list[str]]:  # all ranks
    """Image features of all pairs, and what belongs to each, in the set's order, the same on every rank.

    Returns:
        image_features (N, D) float32 on the CPU, captions (N lists) and image_id (N).
    """
    image_features, rest = _encode_images(model, pairs, batch_size, workers)
    rest = list(chain.from_iterable(all_gather_object(rest)))
    return image_features, [list(captions) for captions, _ in rest], [image_id for _, image_id in rest]


def encode_captions(model: EncodesImagesAndText, captions: Sequence[str], *, batch_size: int) -> Tensor:  # all ranks
    """Text features (N, D) float32 on the CPU, in the order of captions, the same on every rank."""
    indices, own = _share(len(captions))
    features = []
    for start in range(0, len(indices), batch_size):
        text = model.tokenize([captions[index] for index in indices[start : start + batch_size]])  # (B, L)
        features.append(model.encode_text(text.to(model.device)).float())
    return gather_rows(torch.cat(features)[:own]).cpu()


def _encode_images(
    model: EncodesImagesAndText, samples: ImageSamples, batch_size: int, workers: int
) -> tuple[Tensor, list[tuple[Any, ...]]]:  # all ranks
    """Image features (N, D) of all samples, and of this rank's own samples what comes with their images."""
    indices, own = _share(len(samples))
    loader = DataLoader(
        _Transformed(samples, model.transform),
        batch_size=batch_size,
        sampler=indices,
        num_workers=workers,
        collate_fn=_stack_images,
        pin_memory=model.device.type == "cuda",
        # A loader draws its workers' seed; evaluating must not move the random numbers of training.
        generator=torch.Generator(),
    )
    features, rest = [], []
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        image, rest_of_batch = batch
        features.append(model.encode_image(image.to(model.device, non_blocking=True)).float())  # (B, D)
        rest.extend(rest_of_batch)
    return gather_rows(torch.cat(features)[:own]).cpu(), rest[:own]


def _share(count: int) -> tuple[list[int], int]:
    """This rank's contiguous part of range(count), padded with the last index, and how many are its own.

    Padded, so that every rank makes the same forward passes: sharded parameters are gathered by all ranks
    together, and a rank with nothing to do still learns D. The padding is cut off before the gathering.
    """
    per_rank = math.ceil(count / world_size())
    start = rank() * per_rank
    own = max(0, min(per_rank, count - start))
    return [min(index, count - 1) for index in range(start, start + per_rank)], own


class _Transformed(Dataset):
    """Samples whose first item, the image, has been transformed."""

    def __init__(self, samples: ImageSamples, transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Any, ...]] | UserError:
        try:
            image, *rest = self.samples[index]
        except UserError as error:
            return error  # raised in a worker, it would reach the user inside a traceback
        return self.transform(image), tuple(rest)


def _stack_images(
    batch: list[tuple[Tensor, tuple[Any, ...]] | UserError],
) -> tuple[Tensor, list[tuple[Any, ...]]] | UserError:
    broken = next((item for item in batch if isinstance(item, UserError)), None)
    if broken is not None:
        return broken
    images, rest = zip(*batch, strict=True)
    return torch.stack(images), list(rest)
