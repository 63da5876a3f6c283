"""What of an image and of a text makes a model find them similar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.image_relevance import ImageTrace
from quiltnet.model.text_relevance import TextTrace


@dataclass(frozen=True)
class Relevance:
    """Where the similarity of one image and one text comes from; on the CPU.

    Attributes:
        similarity: their cosine.
        image_map: (H, W) float32 in [0, 1], of the image as the tower takes it; all 0 if nothing speaks for the text.
        token_scores: (L,) float32 of any scale, for every place of the text, special tokens and padding too. At least
            0, but for a text tower without attention that can be read.
    """

    similarity: float
    image_map: Tensor
    token_scores: Tensor


def relevance(model: ContrastiveModel, image: Tensor, text: Tensor) -> Relevance:
    """One forward and one backward pass; the model is left as it was (modes, gradients, what trains, buffers).

    Works in any precision of the weights, on frozen models, and where gradients are switched off.

    Args:
        image: (1, 3, H, W), from ``model.transform``.
        text: (1, L) int64, from ``model.tokenize``.

    Raises:
        UserError: no method is known of this image tower.
    """
    with _evaluating(model), torch.inference_mode(False), torch.enable_grad():
        # A copy that inference mode has no hold on.
        image = image.to(model.device, _input_dtype(model.clip.visual), copy=True)
        of_image = ImageTrace(model.clip.visual, image)
        of_text = TextTrace(model.clip, text.to(model.device, copy=True))
        similarity = (_unit(of_image.features) * _unit(of_text.features)).sum()
        points = [*of_image.points, *of_text.points]
        # Of the logit, as in the authors' notebook on CLIP: the rule adds gradients to the identity.
        gradients = torch.autograd.grad(model.logit_scale.detach() * similarity, points, allow_unused=True)
    with torch.no_grad():
        # Without any gradient: a layer whose output nobody pools.
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(points, gradients, strict=True)]
        place = len(of_image.points)
        image_map = of_image.relevance(gradients[:place])[None, None]
        image_map = F.interpolate(image_map, size=image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
        token_scores = of_text.relevance(gradients[place:])
        return Relevance(similarity.item(), _from_0_to_1(image_map).cpu(), token_scores.cpu())


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _from_0_to_1(values: Tensor) -> Tensor:
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def _input_dtype(visual: nn.Module) -> torch.dtype:
    """Of the first convolution, which meets the pixels."""
    return next((p.dtype for p in visual.parameters() if p.ndim == 4), torch.float32)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without recomputation in the backward pass; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    recomputing = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    try:
        for module, _ in modes:
            module.training = False
        for module in recomputing:
            module.grad_checkpointing = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module in recomputing:
            module.grad_checkpointing = True
