from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quiltnet.cli.hydra_main import train_main
from quiltnet.errors import UserError
from quiltnet.training import overfitting
from quiltnet.training.overfitting import distinct_batch
from tests.conftest import ROOT


@dataclass(frozen=True)
class Pairs:
    image: Tensor
    text: Tensor
    image_id: Tensor
    caption_id: Tensor
    key: list[str]
    rejected: list[tuple[str, str]]
    second_image: Tensor | None = None


def pairs(image_id: list[int], caption_id: list[int], length: int = 3) -> Pairs:
    ids = torch.tensor(image_id)
    return Pairs(
        image=ids.view(-1, 1, 1, 1).expand(-1, 3, 2, 2),
        text=torch.tensor(caption_id).view(-1, 1).expand(-1, length),
        image_id=ids,
        caption_id=torch.tensor(caption_id),
        key=[f"key-{number}" for number in image_id],
        rejected=[(f"broken-{image_id[0]}", "empty_image")],
    )


def test_no_two_pairs_share_anything_and_rows_stay_together():
    stream = iter([pairs([1, 1, 2], [1, 2, 1]), pairs([2, 3, 4], [4, 3, 5], length=5), pairs([9] * 3, [9] * 3)])
    batches = distinct_batch(stream, 4, pad_id=7)
    batch = next(batches)
    assert batch.image_id.tolist() == [1, 2, 3, 4] and batch.caption_id.tolist() == [1, 4, 3, 5]
    assert batch.image[:, 0, 0, 0].tolist() == [1, 2, 3, 4] and batch.key == ["key-1", "key-2", "key-3", "key-4"]
    assert batch.text[0].tolist() == [1, 1, 1, 7, 7] and batch.text[1].tolist() == [4] * 5
    assert batch.second_image is None
    assert batch.rejected == [("broken-1", "empty_image"), ("broken-2", "empty_image")]
    again, third = next(batches), next(batches)
    assert again is third and again.image is batch.image and again.rejected == []


def repeated() -> Iterator[Pairs]:
    while True:
        yield pairs([1, 2, 3], [1, 2, 2])


def test_too_few_distinct_pairs_are_said():
    with pytest.raises(UserError, match=r"global_batch_size=4 .* 50 batches hold 2; take global_batch_size=2 or less"):
        next(distinct_batch(repeated(), 4))


def test_pairs_are_distinct_over_all_ranks(monkeypatch):
    """Both ranks are offered the same pairs."""
    monkeypatch.setattr(overfitting, "world_size", lambda: 2)
    monkeypatch.setattr(overfitting, "all_gather_object", lambda value: [value, value])
    taken = []
    for rank in range(2):
        monkeypatch.setattr(overfitting, "rank", lambda rank=rank: rank)
        stream = iter([pairs([1, 2, 3], [1, 2, 3]), pairs([4, 5, 6], [4, 5, 6])])
        taken.append(next(distinct_batch(stream, 4)).image_id.tolist())
        with pytest.raises(UserError, match="hold 2; take global_batch_size=2 or less"):
            next(distinct_batch(repeated(), 4))
    assert taken == [[1, 2], [3, 4]]


def test_a_run_learns_its_batch_by_heart(drawn_shards, work):
    options = ["model=tiny", "debug=overfit", "run_name=x", f"data.train.shards={drawn_shards}/train"]
    train_main(options, conf=str(ROOT / "conf"))
    lines = [json.loads(line) for line in (work / "outputs/x/metrics.jsonl").read_text().splitlines()]
    losses = {line["samples_seen"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert losses[160] > 0.5 and losses[1600] < 0.001
