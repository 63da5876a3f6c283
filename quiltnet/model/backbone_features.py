"""What an image tower finds before it is projected into the joint space: what linear probes are trained on."""

from __future__ import annotations

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from quiltnet.errors import UserError

_REMEDY = "take its projected features"


def backbone_features(visual: nn.Module, image: Tensor) -> Tensor:
    """Pooled features of an open_clip image tower, neither projected nor normalised.

    Radford et al. 2021 (sec. 3.2) probe vision transformers so.

    Args:
        visual: ``clip.visual``.
        image: (B, 3, H, W), normalised.

    Returns:
        (B, width of the tower).

    Raises:
        UserError: the tower's pooling is its projection, or gives no single vector.
    """
    if isinstance(visual, VisionTransformer):
        # As its forward, which ends with ``pooled @ proj``.
        features, _ = visual._pool(visual.transformer(visual._embeds(image)))
    elif isinstance(visual, TimmModel):
        features = _timm_features(visual, image)
    elif isinstance(visual, ModifiedResNet):
        raise UserError(f"the attention pooling of CLIP's ResNets holds their projection; {_REMEDY}")
    else:
        raise UserError(f"it is not known where the projection of a {type(visual).__name__} begins; {_REMEDY}")
    if features.ndim != 2:
        raise UserError(f"the image tower gives {tuple(features.shape[1:])} features an image, not one row; {_REMEDY}")
    return features


def _timm_features(visual: TimmModel, image: Tensor) -> Tensor:
    if hasattr(visual.head, "pool"):
        raise UserError(f"the {type(visual.head.pool).__name__} of this timm tower holds its projection; {_REMEDY}")
    if len(visual.head):
        return visual.trunk(image)
    # Without a head of open_clip's, the projection is timm's own classifier, or there is none.
    return visual.trunk.forward_head(visual.trunk.forward_features(image), pre_logits=True)
