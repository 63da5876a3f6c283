"""A model for people who have pictures and sentences in their hands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from quiltnet.model.contrastive import ContrastiveModel


class Embedder:
    """Unit vectors of PIL images and of strings, in one space: a dot product is their cosine similarity.

    Float32 throughout, open_clip's own evaluation transform, eval mode.
    """

    def __init__(self, model: ContrastiveModel, batch_size: int = 64) -> None:
        self.model = model.eval()
        self.batch_size = batch_size

    def to(self, device: str | torch.device) -> Embedder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N PIL images of any size and mode -> ``(N, D)`` float32, unit length, on the CPU."""
        batches = self._batches(images)
        encoded = [self.model.encode_image(self._stack([self.model.transform(i) for i in batch])) for batch in batches]
        return self._joined(encoded)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """N strings -> ``(N, D)`` float32, unit length, on the CPU."""
        batches = self._batches(captions)
        encoded = [self.model.encode_text(self.model.tokenize(batch).to(self.model.device)) for batch in batches]
        return self._joined(encoded)

    def _joined(self, encoded: Sequence[Tensor]) -> Tensor:
        """(N, D) on the CPU; of nothing (0, D)."""
        none = torch.empty(0, self.model.description.model_cfg["embed_dim"])
        return torch.cat([none, *(features.cpu() for features in encoded)])

    def _stack(self, images: list[Tensor]) -> Tensor:
        return torch.stack(images).to(self.model.device)

    def _batches(self, items: Sequence) -> list[Sequence]:
        if isinstance(items, str | Image.Image):
            items = [items]
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
