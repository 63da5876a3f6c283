"""Which checkpoints a run keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quiltnet.training.checkpoint import check_checkpoint, delete_folder, list_checkpoints, merits, samples_of


@dataclass(frozen=True)
class Retention:
    """A checkpoint stays as long as one of these wants it.

    Attributes:
        newest: so many of the newest.
        best: so many of those with the best monitored metric; of equal ones the earliest.
        every_samples: the first at or after each multiple of so many samples, for ever.
    """

    newest: int = 2
    best: int = 0
    every_samples: int | None = None

    def kept(self, samples: Sequence[int], merit: Mapping[int, float]) -> set[int]:
        """Which of ``samples``, in rising order, stay.

        Args:
            merit: more is better; of those that were measured, in rising order of samples.
        """
        kept = set(samples[-self.newest :])
        kept.update(sorted(merit, key=merit.__getitem__, reverse=True)[: self.best])
        if self.every_samples is not None:
            first = {seen // self.every_samples: seen for seen in reversed(samples)}
            first.pop(0, None)
            kept.update(first.values())
        return kept

    def is_among_best(self, merit: float, others: Collection[float]) -> bool:
        """Whether a new checkpoint of that merit would be one of the best."""
        return merit == merit and sum(other >= merit for other in others) < self.best


def remove_unwanted(root: Path, newest: Path, retention: Retention, *, spare: Collection[Path] = ()) -> list[Path]:
    """Delete what ``retention`` does not want of the checkpoints up to ``newest``, the damaged among them.

    Later ones, which were passed over when the run was resumed, are not looked at.

    Args:
        newest: the checkpoint that was just written.
        spare: left alone, though unwanted.

    Returns:
        What was deleted.
    """
    passed = [folder for folder in list_checkpoints(root) if samples_of(folder) <= samples_of(newest)]
    # A damaged one must not take the place of one that loads. Contents are not read again: sizes tell, at no cost.
    whole = [folder for folder in passed if check_checkpoint(folder, contents=()) is None]
    merit = {samples_of(folder): value for folder, value in merits(whole).items()} if retention.best else {}
    kept = retention.kept([samples_of(folder) for folder in whole], merit)
    unwanted = [folder for folder in passed if samples_of(folder) not in kept and folder not in spare]
    return [folder for folder in unwanted if delete_folder(folder)]
