"""Batches on the device, one step before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quiltnet.data.batches import Batch
from quiltnet.data.device_decoding import DeviceDecoder
from quiltnet.errors import UserError


def on_device(
    batches: Iterator[Batch],
    device: torch.device,
    *,
    augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    decoder: DeviceDecoder | None = None,
) -> Iterator[Batch]:
    """``batches`` with images and texts on ``device``, decoded and augmented there.

    On CUDA the next batch is copied and augmented on a stream of its own while the step works on this one, from pinned
    memory; so one batch more is asked for than is used. Elsewhere nothing is done in advance.

    Args:
        augment: images (B, 3, H, W) uint8 and draws (B, P) -> images, as ``DeviceAugment``.
        decoder: for batches whose images are files still.
    """

    def prepare(batch: Batch) -> Batch:
        if decoder is not None:
            batch = _decoded(batch, decoder)
        image, draws, text = (part.to(device, non_blocking=True) for part in (batch.image, batch.draws, batch.text))
        return replace(batch, image=augment(image, draws) if augment else image, text=text)

    return _overlapped(batches, prepare, device) if device.type == "cuda" else map(prepare, batches)


def _decoded(batch: Batch, decoder: DeviceDecoder) -> Batch:
    """In place of a file that turns out to be broken stands the whole pair before it, so nothing false is learned."""
    image, broken = decoder(batch.image.split())
    if not broken:
        return replace(batch, image=image)
    rows = list(range(len(image)))
    good = [row for row in rows if row not in broken]
    if not good:
        raise UserError(f"not one image of a batch can be decoded, the first is {batch.key[0]}; look at the shards")
    for row in broken:
        rows[row] = max((other for other in good if other < row), default=good[0])
    order = torch.tensor(rows)
    names = ("text", "image_id", "caption_id", "number", "truncated", "draws")
    return replace(
        batch,
        image=image[order.to(image.device)],
        **{name: getattr(batch, name)[order] for name in names},
        key=[batch.key[row] for row in rows],
        rejected=[*batch.rejected, *((batch.key[row], "broken_image") for row in broken)],
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
        for part in (upcoming.image, upcoming.text):
            part.record_stream(current)  # its memory may be used again once this stream has passed
        batch, upcoming = upcoming, start()
        yield batch
