"""Where in an image its similarity to a text comes from, for the kinds of image towers there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from quiltnet.errors import UserError
from quiltnet.model.attention_relevance import RecordAttention, token_relevance


class ImageTrace:
    """One image through an image tower, with what its relevance is computed from.

    Attributes:
        features: (1, D), not normalised.
        points: tensors of the graph at which gradients are wanted.

    Raises:
        UserError: neither attention relevance nor Grad-CAM is known of such a tower.
    """

    def __init__(self, visual: nn.Module, image: Tensor) -> None:
        self._visual = visual
        self._size = tuple(image.shape[-2:])
        with RecordAttention() as attention:
            self.features, self._last = _encode(visual, image)
        if self._last.ndim not in (3, 4):
            raise _unknown(visual)
        self._weights = attention.weights if self._last.ndim == 3 else []
        self.points = [self._last, *self._weights]

    def relevance(self, gradients: list[Tensor]) -> Tensor:
        """``(h, w)``, never negative, by the gradients at ``points``.

        Transformers: relevance by attention and its gradient (``token_relevance``) of the patches. Towers that end in
        a feature map: Grad-CAM of it (Selvaraju et al. 2017, arXiv 1610.02391): channels weighted by their mean
        gradient, what speaks against the text left out.
        """
        last_gradient, *attention_gradients = gradients
        if self._last.ndim == 4:
            return _grad_cam(self._channels_first(self._last), self._channels_first(last_gradient))
        row = token_relevance(self._weights, attention_gradients, self._last, last_gradient)
        grid, prefix = self._grid()
        if row is None or len(row) != prefix + grid[0] * grid[1]:
            raise _unknown(self._visual)
        return row[prefix:].reshape(grid)

    def _channels_first(self, features: Tensor) -> Tensor:
        trunk = getattr(self._visual, "trunk", None)
        return features.permute(0, 3, 1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else features

    def _grid(self) -> tuple[tuple[int, int], int]:
        """Rows and columns of patches, and how many tokens (class, registers) come before them."""
        if isinstance(self._visual, VisionTransformer):
            return self._visual.grid_size, 1
        trunk = self._visual.trunk
        embed = getattr(trunk, "patch_embed", None)
        if not hasattr(embed, "dynamic_feat_size"):
            raise _unknown(self._visual)
        return embed.dynamic_feat_size(self._size), getattr(trunk, "num_prefix_tokens", 0)


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """What ``module`` gives, in a list: a part of the graph, whether or not anything before it trains."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Tensor) -> None:
        output = getattr(output, "last_hidden_state", output)  # of transformers' encoders
        found.append(in_graph(output))

    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def in_graph(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.requires_grad_()


def _encode(visual: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Features (1, D) and what they are pooled from: tokens (1, N, width), or a map of four dimensions."""
    if isinstance(visual, TimmModel):
        last = in_graph(visual.trunk.forward_features(image))
        return visual.head(visual.trunk.forward_head(last)), last
    if isinstance(visual, VisionTransformer):
        after_norm = visual.attn_pool is not None or not visual.final_ln_after_pool
        module = visual.ln_post if after_norm else visual.transformer
    elif isinstance(visual, ModifiedResNet):
        module = visual.layer4
    else:
        raise _unknown(visual)
    with captured(module) as found:
        features = visual(image)
    return features[0] if isinstance(features, tuple) else features, found[-1]


def _grad_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """features, gradient: (1, C, h, w) -> (h, w)."""
    features, gradient = features[0].float(), gradient[0].float()
    return torch.einsum("c,chw->hw", gradient.mean(dim=(1, 2)), features).clamp(min=0)


def _unknown(visual: nn.Module) -> UserError:
    name = type(getattr(visual, "trunk", visual)).__name__
    return UserError(
        f"how a {name} arrives at its features cannot be traced back to the image: that is known of vision "
        "transformers (open_clip's, timm's ViT, EVA, BEiT) and of towers that end in a feature map (convolutional "
        "nets, Swin); choose a model with such an image tower"
    )
