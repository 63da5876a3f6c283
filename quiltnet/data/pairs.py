"""What names a pair, and the table rows that pairs are packed from.

Captions and images are many-to-many: what is equal is found by id, never by position in a table.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any


def image_id(path: str) -> str:
    """16 hex digits that name an image by its path within its source."""
    return short_hash(PurePosixPath(path).as_posix())


def caption_id(caption: str) -> str:
    """16 hex digits; captions that differ in case, white space, HTML escapes or Unicode form share them."""
    # Escaped twice is common in captions from the web; open_clip's tokeniser unescapes twice as well.
    cleaned = unicodedata.normalize("NFC", html.unescape(html.unescape(caption)))
    return short_hash(" ".join(cleaned.lower().split()))


def id_to_int64(hex_id: str) -> int:
    """The first 63 bits of an id, which a tensor can carry."""
    return int(hex_id, 16) >> 1


def sample_key(path: str) -> str:
    """Readable and unique: the end of the path without dots and slashes, and half of the image id."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", str(PurePosixPath(path).with_suffix("")))[-64:].strip("-")
    return f"{readable or 'image'}_{image_id(path)[:8]}"


def short_hash(text: str) -> str:
    """16 hex digits."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class PairRow:
    """One row of a table: an image, one caption of it, and what else the table says.

    Attributes:
        number: of the row in its table, from 0.
        image_path: relative to the folder of images; None where the table has none.
        caption: None where the table has no text.
        split: becomes a folder of shards.
        source_id: the video, article, slide or case that the image was taken from.
        metadata: JSON values by column.
    """

    number: int
    image_path: str | None
    caption: str | None
    split: str
    source_id: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageRows:
    """All rows of one image in one split, in table order: what becomes a sample."""

    split: str
    image_path: str | None
    rows: list[PairRow] = field(default_factory=list)


def group_by_image(rows: Iterable[PairRow]) -> list[ImageRows]:
    """Many-to-many rows -> one entry per split and image, in order of first appearance."""
    groups: dict[tuple[str, str | None], ImageRows] = {}
    for row in rows:
        path = PurePosixPath(row.image_path).as_posix() if row.image_path else None
        groups.setdefault((row.split, path), ImageRows(row.split, path)).rows.append(row)
    return list(groups.values())
