"""One batch for ever: what cannot learn a few pairs by heart will not learn from a million."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.distributed import all_gather_object, rank, world_size
from quiltnet.errors import UserError

_BATCHES = 50  # looked at before it is said that there are not enough distinct pairs


def distinct_batch(batches: Iterator[Any], global_batch_size: int, *, pad_id: int = 0) -> Iterator[Any]:  # all ranks
    """A batch of pairs of which no two, on whatever ranks, share their image or their caption, without end.

    Two pairs with the same image cannot be told apart, so with them the loss would stop above zero.

    Args:
        batches: of this rank, dataclasses as ``quiltnet.data.batches.Batch``, decoded.
        global_batch_size: pairs over all ranks.
        pad_id: what shorter texts are filled up with, where batches differ in length.

    Raises:
        UserError: 50 batches hold too few such pairs.
    """
    choice = _Choice(global_batch_size // world_size())
    while not choice.is_complete:
        if len(choice.parts) == _BATCHES:
            found = sum(choice.counts) // world_size() * world_size()
            raise UserError(
                f"overfit=true needs global_batch_size={global_batch_size} pairs that share neither image nor caption, "
                f"and {_BATCHES} batches hold {sum(choice.counts)}; take global_batch_size={max(found, 1)} or less"
            )
        choice.look_at(next(batches))
    batch = choice.joined(pad_id)
    yield batch
    batch = dataclasses.replace(batch, rejected=[])  # broken samples are counted once
    while True:
        yield batch


class _Choice:
    """Pairs that were taken so far; the same on all ranks but for the parts."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.counts = [0] * world_size()
        self.parts: list[Any] = []  # of each batch of this rank, the rows that were taken
        self._images: set[int] = set()
        self._captions: set[int] = set()

    @property
    def is_complete(self) -> bool:
        return all(count == self.batch_size for count in self.counts)

    def look_at(self, batch: Any) -> None:  # all ranks
        of_ranks = all_gather_object((batch.image_id.tolist(), batch.caption_id.tolist()))
        rows: list[list[int]] = [[] for _ in of_ranks]
        for other, (image_ids, caption_ids) in enumerate(of_ranks):
            for row, (image_id, caption_id) in enumerate(zip(image_ids, caption_ids, strict=True)):
                is_new = image_id not in self._images and caption_id not in self._captions
                if is_new and self.counts[other] < self.batch_size:
                    self._images.add(image_id)
                    self._captions.add(caption_id)
                    self.counts[other] += 1
                    rows[other].append(row)
        self.parts.append(_select(batch, rows[rank()]))

    def joined(self, pad_id: int) -> Any:
        joined: dict[str, Any] = {}
        for name in _names(self.parts[0]):
            values = [getattr(part, name) for part in self.parts]
            if name == "text":
                joined[name] = _cat_texts(values, pad_id)
            elif isinstance(values[0], Tensor):
                joined[name] = torch.cat(values)
            elif values[0] is not None:
                joined[name] = [entry for value in values for entry in value]
        return dataclasses.replace(self.parts[0], **joined)


def _names(batch: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(batch)]


def _select(batch: Any, rows: list[int]) -> Any:
    """Some rows of a batch, and all that was rejected on the way to it."""
    selected: dict[str, Any] = {}
    for name in _names(batch):
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            selected[name] = value[torch.tensor(rows, dtype=torch.int64, device=value.device)]
        elif value is not None and name != "rejected":
            selected[name] = [value[row] for row in rows]
    return dataclasses.replace(batch, **selected)


def _cat_texts(texts: list[Tensor], pad_id: int) -> Tensor:
    """``(B, L)``, L the longest there is."""
    texts = [text for text in texts if len(text)]
    length = max(text.shape[1] for text in texts)
    return torch.cat([F.pad(text, (0, length - text.shape[1]), value=pad_id) for text in texts])
