"""Whole evaluation sets to features, each set once, the work shared over ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quiltnet.distributed import all_gather_object, broadcast_object, gather_rows, rank, world_size
from quiltnet.errors import UserError
from quiltnet.evaluation.feature_cache import FeatureCache
from quiltnet.worker_signals import leave_signals_to_parent


class EncodesImagesAndText(Protocol):
    """All that is known of a model here. Its caller sets ``eval()``, ``no_grad`` and the precision."""

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

    def encode_image(self, image: Tensor, *, projected: bool = True) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32: unit length, or as the tower has them before its projection."""
        ...

    def encode_text(self, text: Tensor) -> Tensor:
        """(B, L) -> (B, D) float32, unit length."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that its features depend on but their input, weights by hash; JSON types only."""
        ...


class ImageSamples(Protocol):
    """Tuples by index whose first item is an RGB image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...

    def content(self) -> list[str]:
        """Lines that differ where the samples do."""
        ...


class HeldOutPairs(ImageSamples, Protocol):
    """(image, captions, image_id) by index: Image, list[str], str."""

    @property
    def split(self) -> str:
        """``val``, or ``test`` where nothing may be chosen on them."""
        ...


class PairImages(NamedTuple):
    """Held-out pairs in their order.

    Attributes:
        image_features: (N, D) float32, unit length.
        captions: N lists.
        image_ids: N.
    """

    image_features: Tensor
    captions: list[list[str]]
    image_ids: list[str]


class SetEncoder:
    """One model's features of whole sets, the same on every rank; a set that is asked for twice is encoded once.

    Args:
        model: as its caller has set it: eval mode, no gradients, precision.
        cache: where features outlive the process; None to keep them for as long as this object lives.
        dtype: what the towers compute in, for the record and the cache; features are float32 in any case.
        between: called between batches, by all ranks as often; what it raises ends the encoding.
        waiting: entered while a loader is waited for, which is at this rank's own pace.
    """

    def __init__(
        self,
        model: EncodesImagesAndText,
        cache: FeatureCache | None = None,
        dtype: torch.dtype = torch.float32,
        between: Callable[[], None] | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.cache = cache
        self.dtype = dtype
        self.between = between or (lambda: None)
        self.waiting = waiting
        self._kept: dict[str, tuple[Tensor, list[Any]]] = {}
        self._contents: dict[int, tuple[ImageSamples, str]] = {}  # by id, which the reference keeps from being reused

    @property
    def logit_scale(self) -> Tensor:
        """() float32 on the CPU."""
        return self.model.logit_scale.detach().float().cpu()

    def images(
        self, samples: ImageSamples, *, batch_size: int, workers: int = 0, projected: bool = True
    ) -> Tensor:  # all ranks
        """(N, D) float32 on the CPU, in the set's order: unit length, or raw and before the projection."""
        features, _ = self._encoded(samples, batch_size, workers, projected, with_rest=False)
        return features

    def pairs(self, pairs: HeldOutPairs, *, batch_size: int, workers: int = 0) -> PairImages:  # all ranks
        """Image features of all pairs, and what belongs to each."""
        features, rest = self._encoded(pairs, batch_size, workers, projected=True, with_rest=True)
        return PairImages(features, [list(captions) for captions, _ in rest], [image_id for _, image_id in rest])

    def texts(self, captions: Sequence[str], *, batch_size: int) -> Tensor:  # all ranks
        """(N, D) float32 on the CPU, unit length, in the order of captions."""
        indices, own = _share(len(captions))
        features = []
        for start in range(0, len(indices), batch_size):
            text = self.model.tokenize([captions[index] for index in indices[start : start + batch_size]])  # (B, L)
            features.append(self.model.encode_text(text.to(self.model.device)).float())
            self.between()
        return gather_rows(torch.cat(features)[:own]).cpu()

    def _encoded(
        self, samples: ImageSamples, batch_size: int, workers: int, projected: bool, with_rest: bool
    ) -> tuple[Tensor, list[Any]]:  # all ranks
        # Rank 0's key: a file's time may differ between the machines that see it, and all must agree on what to do.
        key = broadcast_object(self._key(samples, projected, with_rest) if rank() == 0 else None)
        if key not in self._kept:
            found = broadcast_object(self.cache.load(key) if self.cache is not None and rank() == 0 else None)
            if found is None:
                found = self._encode_images(samples, batch_size, workers, projected, with_rest)
                if self.cache is not None and rank() == 0:
                    self.cache.save(key, *found)
            self._kept[key] = found
        return self._kept[key]

    def _encode_images(
        self, samples: ImageSamples, batch_size: int, workers: int, projected: bool, with_rest: bool
    ) -> tuple[Tensor, list[Any]]:  # all ranks
        """Image features (N, D) of all samples on the CPU, and what comes with their images if that is wanted."""
        indices, own = _share(len(samples))
        loader = DataLoader(
            _Transformed(samples, self.model.transform),
            batch_size=batch_size,
            sampler=indices,
            num_workers=workers,
            collate_fn=_stack_images,
            pin_memory=self.model.device.type == "cuda",
            # A loader draws its workers' seed; evaluating must not move the random numbers of training.
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_parent,
        )
        features, rest = [], []
        for image, rest_of_batch in self._awaited(loader):
            image = image.to(self.model.device, non_blocking=True)
            features.append(self.model.encode_image(image, projected=projected).float())  # (B, D)
            rest.extend(rest_of_batch)
            self.between()
        everything = list(chain.from_iterable(all_gather_object(rest[:own]))) if with_rest else []
        return gather_rows(torch.cat(features)[:own]).cpu(), everything

    def _awaited(self, loader: DataLoader) -> Iterator[tuple[Tensor, list[tuple[Any, ...]]]]:
        batches = iter(loader)
        for _ in range(len(loader)):
            with self.waiting():
                batch = next(batches)
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _key(self, samples: ImageSamples, projected: bool, with_rest: bool) -> str:
        model = self._model if self.cache is not None else None  # within one object it is the same
        facts = (model, str(self.dtype), projected, with_rest, self._content(samples))
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @cached_property
    def _model(self) -> dict[str, Any]:
        return self.model.describe()  # hashing weights takes seconds

    def _content(self, samples: ImageSamples) -> str:
        """Hash of what the samples say they are, which for files means to look at each."""
        if id(samples) not in self._contents:
            digest = hashlib.sha256()
            for line in samples.content():
                digest.update(f"{line}\n".encode())
            self._contents[id(samples)] = samples, digest.hexdigest()
        return self._contents[id(samples)][1]


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
