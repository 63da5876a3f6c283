"""Low-rank adapters of a tower's linear maps (LoRA: Hu et al. 2021, arXiv 2106.09685), by peft."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from quiltnet.errors import UserError
from quiltnet.model.tower_blocks import block_names, named_modules, projection_names

_ADAPTER = "default"  # peft's name of the only adapter a layer has; part of its parameters' names


class Lora(NamedTuple):
    """The size of a tower's adapters, which add ``alpha / rank * B @ A`` to a weight."""

    rank: int
    alpha: float
    dropout: float


def add_lora(tower: nn.Module, lora: Lora, targets: Sequence[str] | None = None) -> list[str]:
    """Put adapters, which change nothing yet, into a tower; what trains is left for the caller to say.

    Args:
        tower: of an open_clip model; a CLIP stands for its own native text tower.
        targets: names of modules or ends of them, such as ``attn`` or ``11.mlp.c_fc``; by default attention, linear
            layers and 1x1 convolutions in the tower's blocks.

    Returns:
        Names of the modules that have adapters now.

    Raises:
        UserError: a target that no module matches, or nothing to put adapters into (with what there is).
    """
    from peft import LoraConfig, inject_adapter_in_model

    from quiltnet.model.lora_attention import LoraAttention

    names = _chosen(tower, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, names)),  # peft takes it as a pattern of whole names
    )
    config._register_custom_module({nn.MultiheadAttention: LoraAttention})
    inject_adapter_in_model(config, tower, _ADAPTER)
    del tower.peft_config  # what a layer holds is all that is needed
    return names


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter's parameter."""
    return f".{_ADAPTER}." in name and re.search(r"\.lora_[AB]\.", name) is not None


def lora_layers(tower: nn.Module) -> dict[str, nn.Module]:
    """Layers with adapters, by the names of the modules in whose place they stand."""
    found: dict[str, nn.Module] = {}
    for name, module in named_modules(tower):
        # An attention's out_proj is a part of the attention.
        if _has_adapter(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def lora_size(layer: nn.Module) -> Lora:
    dropout = layer.lora_dropout[_ADAPTER]
    share = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
    return Lora(layer.r[_ADAPTER], layer.lora_alpha[_ADAPTER], share)


def merge_layers(tower: nn.Module) -> None:
    """Add adapters to the weights they belong to, in place; names are those of a tower without, and all can train."""
    layers = lora_layers(tower)
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(tower.get_submodule(parent), own, _plain(layer))
    if layers:
        for _, module in named_modules(tower):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


def _plain(layer: nn.Module) -> nn.Module:
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True)
    layer.merge()
    return layer.get_base_layer()


def _has_adapter(module: nn.Module) -> bool:
    return _ADAPTER in getattr(module, "lora_A", ())


def _chosen(tower: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the modules that get adapters, in the tower's order."""
    possible = _possible(tower)
    if targets is None:
        blocks = block_names(tower)
        chosen = [name for name in possible if any(name.startswith(f"{block}.") for block in blocks)]
        if not chosen:
            raise UserError(
                "lora finds no attention, linear layer or 1x1 convolution in the blocks of this tower; name modules "
                f"by lora_targets, there are {_short(possible)}; or tune it otherwise"
            )
        return chosen
    for target in targets:
        if not any(_matches(name, target) for name in possible):
            part = "; out_proj is a part of attn" if target.endswith("out_proj") else ""
            raise UserError(f"lora target {target!r} is no module of this tower{part}; there are {_short(possible)}")
    exact = set(targets) & set(possible)
    ends = set(targets) - exact
    return [name for name in possible if name in exact or any(_matches(name, target) for target in ends)]


def _possible(tower: nn.Module) -> list[str]:
    """Modules that adapters can be of and whose ``forward`` is called, which is where adapters act."""
    projections = projection_names(tower)
    names = []
    for name, module in named_modules(tower):
        parent = tower.get_submodule(name.rpartition(".")[0])
        inside = isinstance(parent, nn.MultiheadAttention) or type(parent).__name__ == "AttentionPool2d"
        if inside or not _can_adapt(module) or f"{name}.weight" in projections:
            continue
        names.append(name)
    return names


def _can_adapt(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module._qkv_same_embed_dim
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short(names: Iterable[str]) -> str:
    """Last parts of the names, with the one before a number."""
    ends = (re.search(r"[^.]*\.\d+$|[^.]*$", name).group() for name in names)
    return ", ".join(dict.fromkeys(ends)) or "none"
