"""What a run may change of a model that it begins with: image size, context length, SigLIP's bias, BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from quiltnet.errors import UserError
from quiltnet.model.contrastive import BatchNormMode, Description
from quiltnet.model.image_size import check_context_length


@dataclass(frozen=True)
class Changes:
    """Of a model's description, before it is assembled; None leaves things as they are.

    Attributes:
        image_size, context_length: position embeddings are resized to them.
        init_logit_bias: of the bias that SigLIP's loss adds, unless the weights bring one.
        batchnorm: ``frozen`` keeps pretrained statistics in training, ``adapted`` those of the training images, which
            ``train.py`` measures before the first step (``quiltnet.training.batchnorm``), ``train`` updates them.
    """

    image_size: int | None = None
    context_length: int | None = None
    init_logit_bias: float | None = None
    batchnorm: BatchNormMode = "frozen"

    def __post_init__(self) -> None:
        if self.batchnorm not in get_args(BatchNormMode):
            raise UserError(f"batchnorm={self.batchnorm!r}: choose one of {', '.join(get_args(BatchNormMode))}")
        if self.context_length is not None:
            check_context_length(self.context_length)

    @property
    def resize(self) -> bool:
        """Whether position embeddings may be of another size than those of the weights."""
        return self.image_size is not None or self.context_length is not None

    def apply(self, description: Description) -> None:
        """In place."""
        model_cfg = description.model_cfg
        if self.image_size is not None:
            model_cfg["vision_cfg"]["image_size"] = self.image_size
        if self.context_length is not None:
            model_cfg["text_cfg"]["context_length"] = self.context_length
        if self.init_logit_bias is not None:
            model_cfg["init_logit_bias"] = self.init_logit_bias
