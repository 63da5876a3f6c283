"""The Quilt-1M release (``quilt_1M_lookup.csv`` and its images) -> rows for the shard writer.

Columns and file names as released at https://github.com/wisdomikezogwo/quilt1m; ``single_wsi`` and
``not_histology`` came later, so tables with and without them are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from quiltnet.data.tables import TableSource

REQUIRED_COLUMNS = ("caption", "image_path", "subset", "split")
LIST_COLUMNS = ("pathology", "roi_text", "med_umls_ids")  # lists written out as Python source

VIDEO_FRAME = re.compile(r"(?P<video>[\w-]{11})_image_[0-9a-fA-F-]{36}", re.ASCII)
SLIDE_TILE = re.compile(r"(?P<case>.+)__(?:\w+_)?L\d+(?:_\d+)*", re.ASCII)


def quilt1m_source(
    table: str | Path, *, source_of: Callable[[str], str] | None = None, encoding: str = "utf-8"
) -> TableSource:
    """Rows of the release's lookup table, one for each image-caption pair.

    Captions hold line breaks, so only a csv reader will do. ``source_of``: ``source_id`` where it is None.

    Raises:
        UserError: the table cannot be read, or lacks a column.
    """
    return TableSource(
        table,
        image_column="image_path",
        caption_column="caption",
        split_column="split",
        source_of=source_of or source_id,
        list_columns=LIST_COLUMNS,
        required=REQUIRED_COLUMNS,
        encoding=encoding,
    )


def source_id(image_path: str) -> str:
    """What an image was taken from: its video, its case (``case__slide_L16_x_y``), or else itself."""
    stem = PurePosixPath(image_path).stem
    found = VIDEO_FRAME.fullmatch(stem) or SLIDE_TILE.fullmatch(stem)
    return found[1] if found else stem
