"""Patch dropout: in training, a vision transformer sees a random part of each image's patches."""

from __future__ import annotations

from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from timm.layers import PatchDropout
from timm.layers.patch_dropout import PatchDropoutWithIndices
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from quiltnet.errors import UserError


def set_patch_dropout(clip: nn.Module, share: float) -> None:
    """Leave out ``share`` of the patches in training (FLIP, Li et al. 2023, arXiv 2212.00794); may be called again.

    Class and register tokens stay. Evaluation sees all patches, and the state dict keeps its keys. open_clip's towers
    get timm's module too: their own draws on the CPU, and the device waits for what was drawn.

    Args:
        clip: an open_clip model.
        share: in [0, 1).

    Raises:
        UserError: the share is no such number, or the image tower has no patches that could be left out.
    """
    if not 0 <= share < 1:
        raise UserError(f"patch_dropout={share} must be at least 0 and less than 1; 0.5 to 0.75 is usual")
    place = _place(clip)
    if place is None:
        if share:
            tower = type(getattr(clip.visual, "trunk", clip.visual)).__name__
            raise UserError(
                f"patch_dropout={share} needs a vision transformer (of open_clip, or timm's ViT and EVA), the image "
                f"tower is a {tower}; use patch_dropout=0"
            )
        return
    if share != patch_dropout_of(clip):
        tower, name = place
        setattr(tower, name, _dropout(tower, share))


def patch_dropout_of(clip: nn.Module) -> float:
    """The share of patches that training leaves out."""
    place = _place(clip)
    return getattr(getattr(*place), "prob", 0.0) if place else 0.0


def _place(clip: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that holds patch dropout, and what it calls it."""
    trunk = getattr(clip.visual, "trunk", None)
    if isinstance(trunk, VisionTransformer | Eva):
        return trunk, "patch_drop"
    return (clip.visual, "patch_dropout") if isinstance(clip.visual, OpenClipVisionTransformer) else None


def _dropout(tower: nn.Module, share: float) -> nn.Module | None:
    """What the tower's own constructor would have put there."""
    if isinstance(tower, Eva):
        return PatchDropoutWithIndices(share, tower.num_prefix_tokens).train(tower.training) if share else None
    prefix = getattr(tower, "num_prefix_tokens", 1)  # open_clip's has its class token
    return PatchDropout(share, prefix).train(tower.training) if share else nn.Identity()
