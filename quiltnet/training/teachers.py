"""Where the features of a frozen teacher come from: the shards, or the teacher itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StoredTeacher:
    """Features that lie in the shards beside their pairs: ``batch.teacher_image`` and ``batch.teacher_text``."""

    def __init__(self, logit_scale: float) -> None:
        self.logit_scale = logit_scale

    def __call__(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, D')``, ``(B, D')``, ``()``."""
        image, text = (
            F.normalize(part.to(device, torch.float32, non_blocking=True), dim=-1)  # stored in 16 bits
            for part in (batch.teacher_image, batch.teacher_text)
        )
        return image, text, torch.full((), self.logit_scale, device=device)


class OnlineTeacher:
    """A frozen model that encodes each batch as the student sees it, augmented.

    Args:
        model: a ``ContrastiveModel`` that takes the student's image size and tokens.
        micro_batch_size: pairs that it encodes at once; all of them by default.
        autocast: the precision it computes in; its features are float32 in any.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        micro_batch_size: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.micro_batch_size = micro_batch_size
        self.autocast = autocast

    @torch.no_grad()
    def __call__(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, D')``, ``(B, D')``, ``()``."""
        self.model.to(device)
        size = self.micro_batch_size or len(batch.text)
        with self.autocast():
            image = [self.model.encode_image(part.to(device)) for part in batch.image.split(size)]
            text = [self.model.encode_text(part.to(device)) for part in batch.text.split(size)]
        return torch.cat(image), torch.cat(text), self.model.logit_scale
