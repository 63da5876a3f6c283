"""What became of every row of a table: the counts of a manifest and the lines of rejected.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from quiltnet.data.pairs import ImageRows, PairRow, image_id


class Ledger:
    """Counts rows as packed, duplicate or rejected; a rejection is written down at once."""

    def __init__(self, rejected_file: TextIO) -> None:
        self._file = rejected_file
        self.rejected: Counter[str] = Counter()
        self.counts = Counter(rows=0, samples=0, captions=0, duplicate_captions=0)
        self._image_splits: set[tuple[str, str]] = set()  # (image_id, split)
        self._source_splits: set[tuple[str, str]] = set()

    def reject(self, rows: Sequence[PairRow], reason: str, detail: str = "") -> None:
        self.counts["rows"] += len(rows)
        self.rejected[reason] += len(rows)
        for row in rows:
            line = {"row": row.number, "image_path": row.image_path, "reason": reason, "detail": detail}
            self._file.write(json.dumps(line) + "\n")

    def accept(self, sample: ImageRows, distinct: Sequence[PairRow], duplicates: int) -> None:
        self.counts.update(
            rows=len(distinct) + duplicates, samples=1, captions=len(distinct), duplicate_captions=duplicates
        )
        self._image_splits.add((image_id(sample.image_path), sample.split))
        self._source_splits.add((distinct[0].source_id, sample.split))

    def totals(self) -> dict[str, Any]:
        images = Counter(image for image, _ in self._image_splits)
        sources = Counter(source for source, _ in self._source_splits)
        return {
            **self.counts,
            "images": len(images),
            "rejected": {reason: rows for reason, rows in sorted(self.rejected.items()) if rows},
            "in_several_splits": {
                "images": sum(splits > 1 for splits in images.values()),
                "sources": sum(splits > 1 for splits in sources.values()),
            },
        }
