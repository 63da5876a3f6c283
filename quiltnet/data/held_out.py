"""Held-out pairs for evaluation."""

from __future__ import annotations

from PIL import Image
from torch.utils.data import Dataset

from quiltnet.data.decoding import BrokenSample, decode_pil
from quiltnet.data.shard_files import ShardSpec, resolve_shards
from quiltnet.data.stored_pairs import StoredPairs
from quiltnet.errors import UserError


class ShardPairs(Dataset):
    """Held-out pairs of local shards, all or the first ``limit``, in shard order.

    ``[i]`` is (RGB image, all captions, image id). A broken sample is an error: what is measured must not depend
    silently on what could be read.

    Args:
        split: ``val``, or ``test`` where nothing may be chosen on them.

    Raises:
        UserError: no shards; they hold fewer samples than their manifest says.
    """

    def __init__(self, shards: ShardSpec | None, limit: int | None = None, split: str = "val") -> None:
        if shards is None:
            raise UserError("no held-out pairs are named; say data.val.shards=…, or in Python shards=…")
        self.split = split
        self._pairs = StoredPairs(resolve_shards(shards))
        if self._pairs.missing:
            raise UserError(
                f"held-out shards lack samples that their manifest lists ({self._pairs.missing}); "
                "bring back the whole tars, or pack them again"
            )
        self._length = min(len(self._pairs), limit if limit is not None else len(self._pairs))

    def __len__(self) -> int:
        return self._length

    def content(self) -> list[str]:
        """Lines that differ where the pairs do."""
        return [*self._pairs.identities, str(self._length)]

    def __getitem__(self, number: int) -> tuple[Image.Image, list[str], str]:
        place = range(self._length)[number]
        try:
            pair = self._pairs[place]
            return decode_pil(pair.image), pair.captions, pair.image_id
        except BrokenSample as error:
            raise UserError(
                f"held-out pair {error.key or self._pairs.key(place)} cannot be read ({error.reason}); "
                "pack the shards again, which rejects it and says so"
            ) from error
