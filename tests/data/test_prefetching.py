from __future__ import annotations

from itertools import islice

import pytest
import torch

from quiltnet.data.batches import Batch
from quiltnet.data.prefetching import on_device


def numbered_batches():
    number = 0
    while True:
        ids = torch.full((2,), number)
        image = torch.full((2, 3, 4, 4), number % 256, dtype=torch.uint8)
        cut, draws = torch.zeros(2, dtype=torch.bool), torch.tensor([[1.0], [2.0]])
        yield Batch(image, torch.full((2, 5), number), ids, ids, ids, cut, draws, ["a", "b"], [])
        number += 1


def brighten(image: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    return image + draws.to(torch.uint8).view(-1, 1, 1, 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_come_in_order_and_augmented(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for number, batch in enumerate(islice(on_device(numbered_batches(), torch.device(device), augment=brighten), 20)):
        assert batch.image.device.type == batch.text.device.type == device
        assert batch.image[:, 0, 0, 0].tolist() == [number + 1, number + 2] and int(batch.text[0, 0]) == number
        assert batch.number.tolist() == [number, number] and batch.number.device.type == "cpu"


def test_nothing_is_asked_for_in_advance_on_a_cpu():
    asked = []

    def telling():
        for batch in numbered_batches():
            asked.append(1)
            yield batch

    next(on_device(telling(), torch.device("cpu")))
    assert len(asked) == 1
