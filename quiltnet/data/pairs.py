"""What names a pair, and the table rows that pairs are packed from.

Captions and images are many-to-many: what is equal is found by id, never by position in a table.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any


def image_id(path: str) -> str:
    """16 hex digits that name an image by its path within its source."""
    return short_hash(plain_path(path))


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
    return f"{hash_code(text):016x}"


def hash_code(text: str) -> int:
    """64 bits: the number that ``short_hash`` spells."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def plain_path(path: str) -> str:
    """``./a//b.jpg`` as ``a/b.jpg``: one spelling of a path."""
    # pathlib takes 3 microseconds; most paths have nothing that it would change
    is_plain = path and path[-1] != "/" and "//" not in path and "./" not in path and not path.endswith("/.")
    return path if is_plain and path != "." else PurePosixPath(path).as_posix()


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
        defect: why its source could not give the row whole, which rejects it; as a rule empty.
    """

    number: int
    image_path: str | None
    caption: str | None
    split: str
    source_id: str
    metadata: dict[str, Any] = field(default_factory=dict)
    defect: str = ""
