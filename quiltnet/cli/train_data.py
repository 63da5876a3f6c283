"""The data half of a training config -> the loader, and what is done to its batches on the device."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from quiltnet.cli.options import SHARDS
from quiltnet.data.augmentation import DeviceAugment
from quiltnet.data.batches import Batch
from quiltnet.data.captions import CaptionChoice
from quiltnet.data.device_decoding import DeviceDecoder, device_decoder_reason
from quiltnet.data.prefetching import on_device
from quiltnet.data.reading import PairLoader, Source, build_loader
from quiltnet.data.sentences import SentenceLimit
from quiltnet.data.shard_cache import ShardCache
from quiltnet.data.transforms import TrainTransform
from quiltnet.distributed import is_main
from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.training.data_statistics import DataStatistics
from quiltnet.training.overfitting import distinct_batch

STORED_TEACHER = "stored"  # objective.teacher: features that lie in the shards


def open_loader(cfg: DictConfig, model: ContrastiveModel) -> PairLoader:
    """The training stream that ``cfg.data`` asks for, as the model wants its pairs.

    Raises:
        UserError: an option is not usable, or the shards are not.
    """
    train, stream = cfg.data.train, plain(cfg.data.stream)
    limit = SentenceLimit(model.tokenize.count_tokens, model.tokenize.context_length) if train.sentences else None
    cache, limit_gib = stream.pop("cache"), stream.pop("cache_gib")
    stream["cache"] = ShardCache(Path(cache), int(limit_gib * 2**30)) if cache else None
    with indexing_progress() as report:
        return build_loader(
            train_sources(train),
            _transform(cfg, model),
            model.batch_tokenizer(),
            global_batch_size=cfg.global_batch_size,
            seed=cfg.seed,
            choose_caption=CaptionChoice(plain(train.caption_policy), sentences=limit),
            augment=DeviceAugment(**plain(cfg.data.augment)),
            views=views(cfg),
            teacher=bool(cfg.objective.distillation_weight) and cfg.objective.teacher == STORED_TEACHER,
            workers=train.workers,
            report=report,
            stream={**stream, "allow_pipe": cfg.data.allow_pipe},
        )


def device_batches(
    cfg: DictConfig, model: ContrastiveModel, loader: PairLoader, position: int, device: torch.device
) -> Iterator[Batch]:
    """The loader's batches from ``position`` on, decoded where that is left to the device, and augmented."""
    decoder = None
    if loader.leaves_decoding:
        decoder = DeviceDecoder(device, model.image_size, interpolation=model.interpolation)
    augment = DeviceAugment(**plain(cfg.data.augment))
    # The one batch of overfit=true is the same after a resume.
    batches = on_device(loader.start(0 if cfg.overfit else position), device, augment=augment, decoder=decoder)
    return distinct_batch(batches, cfg.global_batch_size, pad_id=model.tokenize.pad_id or 0) if cfg.overfit else batches


def views(cfg: DictConfig) -> int:
    """Tiles of each image that a step needs."""
    return 2 if cfg.objective.image_image_weight else 1


def _transform(cfg: DictConfig, model: ContrastiveModel) -> TrainTransform:
    train, decode = cfg.data.train, cfg.data.decode
    reason = device_decoder_reason() if decode == "cuda" else None
    if reason is not None:
        decode = "exact"
        if is_main():
            print(f"data.decode=cuda is not possible: {reason}; decoding by decode=exact", file=sys.stderr)
    return TrainTransform(
        model.image_size,
        scale=tuple(train.crop_scale),
        horizontal_flip=train.horizontal_flip,
        vertical_flip=train.vertical_flip,
        right_angle_rotations=train.right_angle_rotations,
        interpolation=model.interpolation,
        decode=decode,
        exif=cfg.data.exif,
    )


@contextmanager
def indexing_progress() -> Iterator[Callable[[int, int], None]]:
    """``report`` of ``build_loader``: a line on a terminal, else one for every 10 seconds."""
    console = Console(stderr=True, quiet=not is_main())
    said = time.monotonic()

    with console.status("looking at the shards") as status:

        def report(done: int, of: int) -> None:
            nonlocal said
            status.update(f"looking at the shards: {done} of {of}")
            if not console.is_terminal and time.monotonic() - said > 10:
                said = time.monotonic()
                console.print(f"looking at the shards: {done} of {of}")

        yield report


def data_statistics(loader: PairLoader, position: int, duplicates: str | None) -> DataStatistics:
    """An account of the stream that goes on at ``position``, for a loss that treats ``duplicates`` so."""
    seen = loader.seen(position)
    return DataStatistics(loader.samples_per_epoch, seen, loader.source_counts, duplicates=duplicates)


def train_sources(train: DictConfig) -> Any:
    """What ``data.train`` names, as ``build_loader`` takes it."""
    given, sources = plain(train.shards), plain(train.sources)
    if bool(given) == bool(sources):
        raise UserError(
            "data.train.shards is not set; say data.train.shards=quilt/train, a folder made by `quiltnet shard`"
            if not given
            else "data.train.shards and data.train.sources are two ways to say the same; give one of them"
        )
    if given:
        return given
    if not isinstance(sources, Mapping):
        raise UserError(f"data.train.sources={sources} must be {{name: {{shards: …}}, …}}")
    for name, source in sources.items():
        if not isinstance(source, Mapping) or not set(source) <= {"shards", "weight"} or "shards" not in source:
            raise UserError(f"data.train.sources.{name}={source} must be {{shards: …}}, or {{shards: …, weight: 2}}")
        are_shards, words = SHARDS
        if not are_shards(source["shards"]):
            raise UserError(f"data.train.sources.{name}.shards={source['shards']} must be {words}")
    return {str(name): Source(**source) for name, source in sources.items()}


def plain(value: Any) -> Any:
    """Lists and dicts in place of a config's."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
