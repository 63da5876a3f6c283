"""Images and texts of another size than the weights were trained with: checked, and position embeddings resized."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import CLIPVisionCfg, resize_text_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table, to_2tuple
from torch import Tensor, nn

from quiltnet.errors import UserError
from quiltnet.model.weights import REFUSALS

log = logging.getLogger(__name__)

_RESNET_STRIDE = 32


def check_image_size(vision_cfg: Mapping[str, Any]) -> None:
    """Refuse what is no size, and one that open_clip's own tower would cut off; of timm's see ``fit_image_size``."""
    image_size = vision_cfg.get("image_size", CLIPVisionCfg.image_size)
    sides = image_size if isinstance(image_size, (list, tuple)) else (image_size,) * 2
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"image_size={image_size} must be a side in pixels, such as 224, or [height, width]")
    if "timm_model_name" not in vision_cfg:
        is_resnet = isinstance(vision_cfg.get("layers"), (list, tuple))
        _check_patches(sides, _RESNET_STRIDE if is_resnet else vision_cfg.get("patch_size", CLIPVisionCfg.patch_size))


def check_context_length(context_length: int) -> None:
    if not isinstance(context_length, int) or context_length < 3:
        raise UserError(f"context_length={context_length} must be a number of tokens, 3 at least: start, one, end")


def fit_image_size(visual: TimmModel, image_size: int | tuple[int, int], *, is_pretrained: bool = False) -> None:
    """A timm tower is built at its own image size whatever the configuration says; set it, or say why not.

    Raises:
        UserError: the size is no multiple of the tower's patch, the architecture is for other sizes only, or its
            features are not those that open_clip's head expects.
    """
    sides, patches = to_2tuple(image_size), getattr(visual.trunk, "patch_embed", None)
    built_size = tuple(getattr(patches, "img_size", None) or visual.trunk.pretrained_cfg["input_size"][1:])
    if built_size == tuple(sides) and patches is not None:
        return
    if getattr(patches, "img_size", None) is not None:
        _check_patches(sides, patches.patch_size)
    before = getattr(patches, "grid_size", None)
    try:
        if built_size != tuple(sides):
            visual.set_input_size(sides)
        if before is None or not hasattr(visual.trunk, "set_input_size"):
            _see_one_image(visual, sides)
    except REFUSALS as error:
        if built_size == tuple(sides):
            raise UserError(f"open_clip has no use for this timm tower ({error}); choose another") from error
        raise UserError(
            f"image_size={image_size} does not suit this timm tower ({error}); it is made for {built_size[0]}"
        ) from error
    if is_pretrained and before is not None:
        after = visual.trunk.patch_embed.grid_size
        _tell("image tower", "timm's weights", "{} x {}".format(*before), "{} x {} patches".format(*after))


def _see_one_image(visual: TimmModel, sides: tuple[int, ...]) -> None:
    """What a tower cannot take it says at its first image, which would be that of the first batch."""
    was_training = visual.training
    with torch.no_grad():
        visual.eval()(torch.zeros(1, 3, *sides))
    visual.train(was_training)


def resize_positions(weights: dict[str, Tensor], clip: nn.Module, source: str) -> None:
    """Resize, in place, position embeddings of a whole model's weights to those of ``clip``, and say so.

    Bicubic over the image's grid, which in the weights is taken as square, and linear over a text's tokens.
    """
    if isinstance(clip.visual, TimmModel):
        resize_timm_positions(weights, clip.visual.trunk, source, prefix="visual.trunk.")
    elif isinstance(clip.visual, ModifiedResNet):
        side = clip.visual.image_size // _RESNET_STRIDE
        _resize_grid(weights, "visual.attnpool.positional_embedding", (side, side), 1, source)
    else:
        _resize_grid(weights, "visual.positional_embedding", clip.visual.grid_size, 1, source)
    text = getattr(clip, "text", clip)
    name = "text.positional_embedding" if text is not clip else "positional_embedding"
    if name in weights and getattr(text, "positional_embedding", None) is not None:
        before = len(weights[name])
        resize_text_pos_embed(weights, clip)
        if len(weights[name]) != before:
            _tell("text tower", source, f"{before}", f"{len(weights[name])} tokens")


def resize_timm_positions(weights: dict[str, Tensor], trunk: nn.Module, source: str, prefix: str = "") -> None:
    """As ``resize_positions``, of a timm tower: absolute positions, and the relative ones of Swin and BEiT."""
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if grid is not None:
        prefix_tokens = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 1)
        _resize_grid(weights, f"{prefix}pos_embed", grid, prefix_tokens, source)
    resized = [name for name, module in trunk.named_modules() if _resize_table(weights, f"{prefix}{name}", module)]
    if resized:
        window = trunk.get_submodule(resized[0]).window_size
        log.warning("image tower: position biases of %s are resized to windows of %d x %d", source, *window)


def _resize_table(weights: dict[str, Tensor], name: str, attention: nn.Module) -> bool:
    """Biases by relative position within a window."""
    own, key = getattr(attention, "relative_position_bias_table", None), f"{name}.relative_position_bias_table"
    if own is None or key not in weights:
        return False
    table = weights[key]
    if table.shape == own.shape or table.shape[1:] != own.shape[1:]:  # as it should be; or of another architecture
        return False
    weights[key] = resize_rel_pos_bias_table(table, attention.window_size, own.shape)
    return True


def _resize_grid(weights: dict[str, Tensor], name: str, grid: tuple[int, int], prefix_tokens: int, source: str) -> None:
    if name not in weights or weights[name].ndim not in (2, 3):
        return
    positions = weights[name]
    patches = positions.shape[-2] - prefix_tokens
    side = math.isqrt(max(patches, 0))
    if side**2 != patches or (side, side) == tuple(grid):
        return  # of another architecture, which loading will say; or as it should be
    rows = positions if positions.ndim == 3 else positions[None]
    resized = resample_abs_pos_embed(rows, list(grid), [side, side], num_prefix_tokens=prefix_tokens)
    weights[name] = resized if positions.ndim == 3 else resized[0]
    _tell("image tower", source, f"{side} x {side}", f"{grid[0]} x {grid[1]} patches")


def _check_patches(sides: tuple[int, ...], patch_size: int | tuple[int, int]) -> None:
    for side, patch in zip(sides, to_2tuple(patch_size), strict=True):
        if side % patch:
            near = sorted({max(side // patch, 1) * patch, (side // patch + 1) * patch})
            raise UserError(
                f"image_size={side} is not divisible by the patch of {patch} pixels; the nearest sizes: "
                f"{' and '.join(map(str, near))}"
            )


def _tell(tower: str, source: str, before: str, after: str) -> None:
    log.warning("%s: position embeddings of %s are resized from %s to %s", tower, source, before, after)
