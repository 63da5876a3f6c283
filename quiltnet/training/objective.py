"""What a step minimises: the contrastive loss, and the terms that may be added to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.training.distillation import Distillation
from quiltnet.training.losses import InfoNCE


class Features(Protocol):
    """Of one rank: see ``PairFeatures`` in ``quiltnet.model.contrastive``."""

    image_features: Tensor  # (B, D)
    text_features: Tensor  # (B, D)
    logit_scale: Tensor  # ()
    logit_bias: Tensor | None  # ()
    second_image_features: Tensor | None  # (B, D)


class MarkedPairs(Protocol):
    image_id: Tensor  # (B,) int64
    caption_id: Tensor  # (B,) int64


class Teacher(Protocol):
    """Where the features of a frozen teacher come from."""

    def __call__(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, D')`` of the images, ``(B, D')`` of the texts, unit length, and the teacher's logit scale ``()``."""


class Objective:
    """``contrastive + image_image_weight * image_image + distillation_weight * distillation``.

    Args:
        contrastive: ``InfoNCE`` or ``SigLIP``.
        image_image_weight: of an InfoNCE between two views of each image, the addition of SLIP (Mu et al. 2022,
            arXiv 2112.12750), here in the joint space and without a head of its own; views of the same image by
            another pair are left out of the denominator.
        image_image_logit_scale: of that term; 10 is SimCLR's temperature of 0.1.
        distillation_weight: of the cross-entropy against the softmax of a frozen teacher, rows and columns.
        teacher: what gives its features.
    """

    def __init__(
        self,
        contrastive: Callable[..., Tensor],
        *,
        image_image_weight: float = 0.0,
        image_image_logit_scale: float = 10.0,
        distillation_weight: float = 0.0,
        teacher: Teacher | None = None,
    ) -> None:
        if distillation_weight and teacher is None:
            raise UserError(
                f"objective.distillation_weight={distillation_weight} needs a teacher; "
                "say objective.teacher=stored, or the folder of a model"
            )
        self.contrastive = contrastive
        self.image_image_weight = image_image_weight
        self.image_image_logit_scale = image_image_logit_scale
        self.distillation_weight = distillation_weight
        self.teacher = teacher
        self._between_views = InfoNCE(duplicates="mask")
        self._distillation = Distillation()

    def __call__(self, features: Features, batch: MarkedPairs) -> dict[str, Tensor]:  # all ranks
        """This rank's share: ``loss``, the mean of which over ranks is that of the global batch, and its parts."""
        image_features, text_features = features.image_features, features.text_features
        device = image_features.device
        image_id, caption_id = (part.to(device, non_blocking=True) for part in (batch.image_id, batch.caption_id))
        contrastive = self.contrastive(
            image_features,
            text_features,
            features.logit_scale,
            features.logit_bias,
            image_id=image_id,
            caption_id=caption_id,
        )
        parts = {"contrastive_loss": contrastive}
        loss = contrastive
        if self.image_image_weight:
            scale = torch.full((), self.image_image_logit_scale, device=device)
            between = self._between_views(
                image_features, features.second_image_features, scale, image_id=image_id, caption_id=image_id
            )
            parts["image_image_loss"] = between
            loss = loss + self.image_image_weight * between
        if self.distillation_weight:
            distillation = self._distillation(
                image_features, text_features, features.logit_scale, *self.teacher(batch, device)
            )
            parts["distillation_loss"] = distillation
            loss = loss + self.distillation_weight * distillation
        return {"loss": loss, **{name: part.detach() for name, part in parts.items() if len(parts) > 1}}
