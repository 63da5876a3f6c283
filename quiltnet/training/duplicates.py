"""Which pairs of the global batch belong together, and which captions take part in a step.

Image-text sets are many-to-many: two pairs may show one image, or say one sentence. Two pairs *share* where their
image ids or their caption ids are equal, and a pair shares with itself. All of this is found without an (N, N) mask
for the N pairs of all ranks, and without waiting for the device.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from quiltnet.distributed import gather_rows, world_size
from quiltnet.errors import UserError

Duplicates = Literal["ignore", "mask", "positive"]


@dataclass(frozen=True)
class PairOptions:
    """The options that all contrastive losses have; see ``quiltnet.training.losses.InfoNCE``.

    Raises:
        UserError: an option out of its range.
    """

    duplicates: Duplicates
    label_smoothing: float
    hardness: float
    caption_dropout: float

    def __post_init__(self) -> None:
        modes = get_args(Duplicates)
        if self.duplicates not in modes:
            close = difflib.get_close_matches(str(self.duplicates), modes, n=1, cutoff=0.0)[0]
            raise UserError(f"loss.duplicates={self.duplicates} is none of {', '.join(modes)}; did you mean {close}?")
        for name in ("label_smoothing", "caption_dropout"):
            share = getattr(self, name)
            if not (isinstance(share, (int, float)) and 0 <= share < 1):
                raise UserError(
                    f"loss.{name}={share} must be at least 0 and less than 1; 0 leaves it out, 0.1 is usual"
                )
        if not (isinstance(self.hardness, (int, float)) and 0 <= self.hardness < float("inf")):
            raise UserError(f"loss.hardness={self.hardness} must be a number of at least 0; 0 leaves it out")

    def of_step(self, text_features: Tensor, sizes: Sequence[int] | None) -> dict[str, Any]:  # all ranks
        """Arguments of a streamed loss for one step, with the captions that were drawn to take part in it."""
        kept = None
        if self.caption_dropout:
            kept = draw_kept(text_features, self.caption_dropout, sizes or [len(text_features)] * world_size())
        return {
            "duplicates": self.duplicates,
            "label_smoothing": self.label_smoothing,
            "hardness": self.hardness,
            "kept": kept,
            "sizes": sizes,
        }


def require_ids(duplicates: str, image_id: Tensor | None, caption_id: Tensor | None) -> None:
    """Raises a ValueError where ``duplicates`` asks for ids that were not given."""
    if duplicates != "ignore" and (image_id is None or caption_id is None):
        raise ValueError(f"duplicates={duplicates} compares ids: pass image_id and caption_id, (B,) int64 each")


def draw_kept(text_features: Tensor, caption_dropout: float, sizes: Sequence[int]) -> Tensor:  # all ranks
    """The captions of all ranks that take part in this step; each sits out with probability ``caption_dropout``.

    Drawn from torch's global generator on the device of the features, of which each rank has its own. If all were to
    sit out, all take part.

    Args:
        text_features: ``(B, D)`` of this rank.
        sizes: B of each rank.

    Returns:
        ``(N,)`` bool, the same on every rank.
    """
    kept = torch.rand(len(text_features), device=text_features.device) >= caption_dropout
    return all_if_none(gather_rows(kept, sizes))


def all_if_none(kept: Tensor) -> Tensor:
    """``(N,)`` bool: ``kept``, or all where none is; without waiting for the device."""
    return kept | ~kept.any()


def sharing(row_image_id: Tensor, row_caption_id: Tensor, image_id: Tensor, caption_id: Tensor) -> Tensor:
    """Which rows share with which columns: ``(n,)`` and ``(N,)`` ids -> ``(n, N)`` bool."""
    return (row_image_id[:, None] == image_id) | (row_caption_id[:, None] == caption_id)


def sharing_counts(image_id: Tensor, caption_id: Tensor, kept: Tensor | None = None) -> Tensor:
    """With how many of the N pairs each pair shares, itself among them; of those that are kept, if that is given.

    By sorting: images alike, and captions alike, less both alike. O(N log N) time, O(N) memory.

    Args:
        image_id, caption_id: ``(N,)`` int64, any values.
        kept: ``(N,)`` bool.

    Returns:
        ``(N,)`` int64.
    """
    # Position of the first equal id in sorted order: a number below N, so two of them make one exact key.
    both = _first_equal(image_id) * len(image_id) + _first_equal(caption_id)
    return _equal_counts(image_id, kept) + _equal_counts(caption_id, kept) - _equal_counts(both, kept)


def partners(own: slice, counts: Tensor, image_id: Tensor, caption_id: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the pairs ``own`` share with other pairs ``(p,)``, counted from the first of them, and with which.

    Args:
        counts: ``sharing_counts`` of all pairs.

    Returns:
        ``(p,)`` int64, and ``(p, N)`` bool, in which no pair shares with itself.
    """
    counts = counts[own]
    if counts.device.type == "cpu":
        rows = (counts > 1).nonzero().squeeze(1)
    else:  # to ask for fewer would wait for the device
        rows = torch.arange(len(counts), device=counts.device)
    pairs = own.start + rows
    shared = sharing(image_id[pairs], caption_id[pairs], image_id, caption_id)
    shared[torch.arange(len(pairs), device=pairs.device), pairs] = False
    return rows, shared


def _first_equal(ids: Tensor) -> Tensor:
    return torch.searchsorted(ids.sort().values, ids)


def _equal_counts(ids: Tensor, kept: Tensor | None) -> Tensor:
    ordered, order = ids.sort()
    first, last = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)
    if kept is None:
        return last - first
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept[order].cumsum(0)])  # (N + 1,)
    return before[last] - before[first]
