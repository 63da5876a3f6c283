"""Where depth is in a model: the repeated blocks of each tower, and which of them a parameter belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

from quiltnet.errors import UserError

# timm's mark on what follows the blocks: final norms and convolutions, which it counts to the last block.
_AFTER_BLOCKS = (99999,)
# What open_clip's own towers have before their blocks, beside embeddings.
_STEM = {"conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "ln_pre"}


def tower_blocks(clip: nn.Module) -> dict[str, list[nn.Module]]:
    """The repeated blocks of the ``image`` and the ``text`` tower, in order of depth: residual blocks, layers.

    Args:
        clip: an open_clip model: native, with a timm image tower or a Hugging Face text tower.

    Raises:
        UserError: a tower has no blocks that could be told apart.
    """
    blocks = {}
    for kind, tower in towers(clip).items():
        names = block_names(tower)
        if not names:
            raise UserError(
                f"the {kind} tower ({_type_name(tower)}) has no repeated blocks that could be told apart, which "
                "sharding and activation checkpointing need; use placement=ddp or another tower"
            )
        blocks[kind] = [tower.get_submodule(name) for name in names]
    return blocks


def parameter_layers(clip: nn.Module, prefix: str = "clip.") -> dict[str, tuple[str, int, int]]:
    """Of every parameter: its tower, its layer from 0 to ``layers``, and ``layers``.

    0 is what embeds, then come the blocks, ``layers`` is the final norm and the projection, as BEiT counts them (Bao
    et al. 2021, arXiv 2106.08254). Where a tower has no recognisable blocks both are 0. ``logit_scale`` and
    ``logit_bias`` belong to no tower: ``("", 0, 0)``.

    Args:
        prefix: put before the names, which are those of ``clip.named_parameters()``.
    """
    layers_of = {kind: _layers(tower) for kind, tower in towers(clip).items()}
    found = {}
    for name, _ in clip.named_parameters():
        if name in ("logit_scale", "logit_bias"):
            found[prefix + name] = ("", 0, 0)
            continue
        kind = "image" if name.startswith("visual.") else "text"
        layers, head = layers_of[kind]
        found[prefix + name] = (kind, layers[name.removeprefix("visual.").removeprefix("text.")], head)
    return found


def towers(clip: nn.Module) -> dict[str, nn.Module]:
    """The ``image`` and the ``text`` tower. open_clip's CLIP is its own text tower, CustomTextCLIP has ``text``."""
    return {"image": clip.visual, "text": getattr(clip, "text", clip)}


def named_modules(tower: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``tower.named_modules()``; of a CLIP as its own text tower without the image tower that is in it."""
    for name, module in tower.named_modules():
        if not (hasattr(tower, "visual") and f"{name}.".startswith("visual.")):
            yield name, module


def projection_names(tower: nn.Module) -> set[str]:
    """Parameters of a tower that take its features into the joint space; empty where it has none.

    They are open_clip's own projection: a matrix, or all of a timm tower's ``head`` with its pooling by attention. A
    timm tower without ``head`` projects by its classifier, a ModifiedResNet by the last layer of its pooling.
    """
    if isinstance(tower, TimmModel):
        head = _names_under(tower, "head")
        return head or _timm_classifier(tower)
    if isinstance(tower, ModifiedResNet):
        return _names_under(tower, "attnpool.c_proj")
    if isinstance(tower, HFTextEncoder):
        return _names_under(tower, "proj")
    return _names_under(tower, "text_projection" if hasattr(tower, "text_projection") else "proj")


def _names_under(tower: nn.Module, name: str) -> set[str]:
    return {other for other, _ in tower.named_parameters() if other == name or other.startswith(f"{name}.")}


def _timm_classifier(tower: TimmModel) -> set[str]:
    classifier = {id(parameter) for parameter in tower.trunk.get_classifier().parameters()}
    return {name for name, parameter in tower.named_parameters() if id(parameter) in classifier}


def _layers(tower: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of each parameter of a tower, and that of the head."""
    names = [name for name, _ in tower.named_parameters()]
    blocks = block_names(tower)
    if not blocks:
        return dict.fromkeys(names, 0), 0
    if isinstance(tower, TimmModel):
        return _timm_layers(tower, names, blocks)
    head = len(blocks) + 1
    depth = {block: number for number, block in enumerate(blocks, start=1)}
    layers = {}
    for name in names:
        block = next((block for block in _parents(name) if block in depth), None)
        layers[name] = depth[block] if block else 0 if _embeds(tower, name) else head
    return layers, head


def _timm_layers(tower: TimmModel, names: list[str], blocks: list[str]) -> tuple[dict[str, int], int]:
    """What stands between two stages, such as a downsampling, is of the block behind it."""
    matcher = {group: patterns for group, patterns in _matcher(tower.trunk).items() if patterns}
    of_trunk = group_parameters(tower.trunk, matcher, reverse=True)
    within = {block.removeprefix("trunk.") for block in blocks}
    head = 1 + max(layer for name, layer in of_trunk.items() if within & set(_parents(name)))
    return {name: min(of_trunk.get(name.removeprefix("trunk."), head), head) for name in names}, head


def block_names(tower: nn.Module) -> list[str]:
    """Names of the repeated blocks, in order of depth; empty where none could be told apart."""
    if isinstance(tower, TimmModel):
        return [f"trunk.{name}" for name in _timm_block_names(tower.trunk)]
    if isinstance(tower, HFTextEncoder):
        return [f"transformer.{name}" for name in _longest_list(tower.transformer)]
    if isinstance(tower, ModifiedResNet):
        stages = [f"layer{stage}" for stage in range(1, 5)]
        return [f"{stage}.{block}" for stage in stages for block, _ in tower.get_submodule(stage).named_children()]
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", ())
    return [f"transformer.resblocks.{block}" for block in range(len(blocks))]


def _timm_block_names(trunk: nn.Module) -> list[str]:
    """The modules that timm's ``group_matcher`` of this architecture numbers."""
    patterns = [(re.compile(pattern), joins) for group in _matcher(trunk).values() for pattern, joins in group]
    names = []
    for name, module in trunk.named_modules():
        pattern, joins = next((entry for entry in patterns if entry[0].match(name)), (None, None))
        is_numbered = pattern is not None and joins is None and pattern.groups and pattern.fullmatch(name)
        if is_numbered and next(module.parameters(), None) is not None:
            names.append(name)
    return names


def _matcher(trunk: nn.Module) -> dict[str, list[tuple[str, tuple[int, ...] | None]]]:
    """timm's patterns of layers, each with the block of its stage that it joins, if any; empty where timm has none."""
    try:
        matcher = trunk.group_matcher()
    except (AttributeError, AssertionError, NotImplementedError):
        return {}
    if not isinstance(matcher, dict):
        return {}
    patterns = {}
    for group, given in matcher.items():
        entries = [(given, None)] if isinstance(given, str) else given or []
        patterns[group] = [(pattern, joins) for pattern, joins in entries if joins != _AFTER_BLOCKS]
    return patterns


def _longest_list(transformer: nn.Module) -> list[str]:
    """Hugging Face encoders keep their layers in an ``nn.ModuleList``, the longest that is in no other."""
    lists = {name: len(module) for name, module in transformer.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {name: size for name, size in lists.items() if not lists.keys() & set(_parents(name))}
    longest = max(outermost, key=outermost.get, default=None)
    return [] if longest is None else [f"{longest}.{layer}" for layer in range(outermost[longest])]


def _embeds(tower: nn.Module, name: str) -> bool:
    if isinstance(tower, HFTextEncoder):
        return "embed" in name
    first = name.split(".")[0]  # not attnpool.positional_embedding, which is behind the blocks
    return first in _STEM or "emb" in first


def _parents(name: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b``, ``a``."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _type_name(tower: nn.Module) -> str:
    return type(getattr(tower, "trunk", getattr(tower, "transformer", tower))).__name__
