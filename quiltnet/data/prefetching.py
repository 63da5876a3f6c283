"""Batches on the device, one step before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quiltnet.data.batches import FOR_DEVICE, Batch
from quiltnet.data.device_decoding import DeviceDecoder, JoinedTiles
from quiltnet.errors import UserError


def on_device(
    batches: Iterator[Batch],
    device: torch.device,
    *,
    augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    decoder: DeviceDecoder | None = None,
) -> Iterator[Batch]:
    """``batches`` with images, texts and teacher's features on ``device``, decoded and augmented there.

    On CUDA the next batch is copied and augmented on a stream of its own while the step works on this one, from pinned
    memory; so one batch more is asked for than is used. Elsewhere nothing is done in advance.

    Args:
        augment: images (B, 3, H, W) uint8 and draws (B, P) -> images, as ``DeviceAugment``.
        decoder: for batches whose images are files still.
    """

    def prepare(batch: Batch) -> Batch:
        if decoder is not None:
            batch = _decoded(batch, decoder)
        moved = {name: part.to(device, non_blocking=True) for name, part in _for_device(batch).items()}
        draws, second_draws = moved.pop("draws"), moved.pop("second_draws", None)
        if augment is not None:
            moved["image"] = augment(moved["image"], draws)
            if second_draws is not None:
                moved["second_image"] = augment(moved["second_image"], second_draws)
        return replace(batch, **moved)

    return _overlapped(batches, prepare, device) if device.type == "cuda" else map(prepare, batches)


def _for_device(batch: Batch) -> dict[str, Tensor]:
    parts = {name: getattr(batch, name) for name in FOR_DEVICE}
    return {name: part for name, part in parts.items() if part is not None}


def _decoded(batch: Batch, decoder: DeviceDecoder) -> Batch:
    """In place of a file that turns out to be broken stands the whole pair before it, so nothing false is learned."""
    files = {name: part for name, part in _for_device(batch).items() if isinstance(part, JoinedTiles)}
    decoded = {name: decoder(part.split()) for name, part in files.items()}
    images = {name: image for name, (image, _) in decoded.items()}
    broken = {row for _, rows in decoded.values() for row in rows}
    if not broken:
        return replace(batch, **images)
    rows = list(range(len(batch.key)))
    good = [row for row in rows if row not in broken]
    if not good:
        raise UserError(f"not one image of a batch can be decoded, the first is {batch.key[0]}; look at the shards")
    for row in sorted(broken):
        rows[row] = max((other for other in good if other < row), default=good[0])
    order = torch.tensor(rows)
    tensors = {**{name: part for name, part in vars(batch).items() if isinstance(part, Tensor)}, **images}
    return replace(
        batch,
        **{name: part[order.to(part.device)] for name, part in tensors.items()},
        key=[batch.key[row] for row in rows],
        rejected=[*batch.rejected, *((batch.key[row], "broken_image") for row in sorted(broken))],
    )


def _overlapped(batches: Iterator[Batch], prepare: Callable[[Batch], Batch], device: torch.device) -> Iterator[Batch]:
    side = torch.cuda.Stream(device)

    def start() -> Batch:
        with torch.cuda.stream(side):
            return prepare(next(batches))

    upcoming = start()
    while True:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for part in _for_device(upcoming).values():
            if part.is_cuda:
                part.record_stream(current)  # its memory may be used again once this stream has passed
        batch, upcoming = upcoming, start()
        yield batch
