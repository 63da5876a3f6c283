"""The Quilt-1M release (``quilt_1M_lookup.csv`` and a folder of images) -> rows for the shard writer.

Columns and file names as released at https://github.com/wisdomikezogwo/quilt1m; ``single_wsi`` and
``not_histology`` came later, so tables with and without them are read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from quiltnet.data.pairs import PairRow
from quiltnet.data.tables import (
    plain_records,
    read_table,
    require_columns,
    require_text,
    select_rows,
    text_column,
)

REQUIRED_COLUMNS = ("caption", "image_path", "subset", "split")
LIST_COLUMNS = ("pathology", "roi_text", "med_umls_ids")  # lists written out as Python source

VIDEO_FRAME = re.compile(r"(?P<video>[\w-]{11})_image_[0-9a-fA-F-]{36}", re.ASCII)


def quilt1m_rows(
    table: str | Path, *, subset: str | Sequence[str] | None = None, split: str | None = None
) -> Iterator[PairRow]:
    """Rows of the release's lookup table, one for each image-caption pair.

    Args:
        table: the csv. Captions hold line breaks, so only a csv reader will do.
        subset: one or several of the table's subsets (``quilt``, ``openpath``, ``pubmed``, ``laion``); None
            for all.
        split: ``train`` or ``val``; None for both.

    Raises:
        UserError: the table cannot be read, lacks a column, or has no such subset or split.
    """
    frame = read_table(table, text_columns=["image_path", "subset", "split"])
    require_columns(frame, table, REQUIRED_COLUMNS)
    frame = select_rows(frame, table, "subset", subset)
    frame = select_rows(frame, table, "split", split)
    splits = require_text(frame, table, "split")
    dropped = [
        "caption",
        "image_path",
        "split",
        *(name for name in frame.columns if name.startswith("Unnamed")),
    ]
    facts = frame.drop(columns=dropped)
    for column in set(LIST_COLUMNS) & set(facts.columns):
        facts[column] = facts[column].map(parse_list)
    paths, captions = text_column(frame, "image_path"), text_column(frame, "caption")
    columns = zip(frame.index, paths, captions, splits, plain_records(facts), strict=True)
    return (
        PairRow(int(number), path, caption, of_split, source_id(path or ""), metadata)
        for number, path, caption, of_split, metadata in columns
    )


def source_id(image_path: str) -> str:
    """What an image was taken from: its video, its case (all before the last ``__``), or else itself."""
    stem = PurePosixPath(image_path).stem
    frame = VIDEO_FRAME.fullmatch(stem)
    return frame["video"] if frame else stem.rpartition("__")[0] or stem


def parse_list(cell: Any) -> Any:
    """The list that a cell spells out in Python; a cell that spells none stays as it is."""
    if not isinstance(cell, str):
        return cell
    try:
        value = ast.literal_eval(cell)
    except (
        ValueError,
        SyntaxError,
        TypeError,
        MemoryError,
        RecursionError,
    ):  # all that literal_eval documents
        return cell
    return value if isinstance(value, list) else cell
