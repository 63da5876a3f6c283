"""How fast each parameter learns and whether it decays: the optimiser's parameter groups, and their table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from quiltnet.errors import UserError

# Parameter name -> (tower, layer, layers); ContrastiveModel.parameter_layers().
Layers = Mapping[str, tuple[str, int, int]]


class GroupRow(NamedTuple):
    """A line of the table of parameter groups."""

    name: str
    tensors: int
    parameters: int
    lr: float
    weight_decay: float


class _Setting(NamedTuple):
    """What parameters must share to share a group."""

    kind: str  # matrices | decay | no_decay
    lr: float


class _Member(NamedTuple):
    name: str
    parameter: nn.Parameter
    tower: str
    layer: int
    layers: int
    apart: bool  # a projection whose rate is not that of the rest of the head


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    image_lr_factor: float = 1.0,
    text_lr_factor: float = 1.0,
    projection_lr_factor: float = 1.0,
    logit_scale_lr_factor: float = 1.0,
    matrices_apart: bool = False,
) -> list[dict[str, Any]]:
    """As few groups as the settings allow, in an order that depends on nothing but the model and the arguments.

    A parameter learns at lr * factor of its tower * layer_decay ** (layers - layer), so projections learn at full rate
    and embeddings slowest (Clark et al. 2020, arXiv 2003.10555; Bao et al. 2021, arXiv 2106.08254). The rates stand in
    the groups' ``lr``, where every schedule finds them; timm's ``lr_scale`` is read by timm's schedulers only.
    Parameters that do not train are in no group; adapters are of the layer that they are in.

    Weight decay pulls towards zero, which means nothing for a norm's gain, a bias, ``logit_scale`` or a position
    embedding: vectors, scalars and the names in ``model.no_weight_decay()`` are left alone, whatever they are called.

    Args:
        model: a ContrastiveModel; another module has neither towers nor layers, and its groups are ``decay`` and
            ``no_decay``.
        image_lr_factor, text_lr_factor, logit_scale_lr_factor: the last is of ``logit_scale`` and ``logit_bias``.
        projection_lr_factor: of both towers' projections into the joint space, beside the factor of the tower: a
            projection that is new has more to learn than what is pretrained.
        matrices_apart: groups of the blocks' matrices, with ``use_fallback`` set on all others, as timm's Muon reads it
            (by shape alone it would take token and position embeddings too).

    Returns:
        Groups for any torch optimiser, with ``name`` and named parameters.
    """
    factors = {"image": image_lr_factor, "text": text_lr_factor, "": logit_scale_lr_factor}
    projections = model.projection_names() if projection_lr_factor != 1 and hasattr(model, "projection_names") else ()
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    places: Layers = model.parameter_layers() if hasattr(model, "parameter_layers") else {}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    members = [
        _Member(name, parameter, *places.get(name, ("model", 1, 1)), apart=name in projections)
        for name, parameter in trained
    ]
    _check(members, {**factors, "projection": projection_lr_factor}, layer_decay, matrices_apart)
    groups: dict[_Setting, list[_Member]] = {}
    for member in members:
        rate = lr * factors.get(member.tower, 1.0) * layer_decay ** (member.layers - member.layer)
        rate *= projection_lr_factor if member.apart else 1.0
        groups.setdefault(_Setting(_kind(member, exempt, matrices_apart), rate), []).append(member)
    kinds = ("matrices", "decay", "no_decay")
    return [
        {
            "name": _group_name(setting, groups, by_layer=layer_decay != 1),
            "params": [(member.name, member.parameter) for member in groups[setting]],
            "lr": setting.lr,
            "weight_decay": 0.0 if setting.kind == "no_decay" else weight_decay,
            **({"use_fallback": setting.kind != "matrices"} if matrices_apart else {}),
        }
        for setting in sorted(groups, key=lambda setting: (kinds.index(setting.kind), _first(groups[setting])))
    ]


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> list[GroupRow]:
    """A row for each of an optimiser's ``param_groups``, before its first step (later ``lr`` is the scheduled one)."""
    return [
        GroupRow(
            group["name"],
            len(group["params"]),
            sum(parameter.numel() for parameter in group["params"]),
            group["lr"],
            group["weight_decay"],
        )
        for group in groups
    ]


def group_table(groups: Sequence[Mapping[str, Any]], model: nn.Module | None = None) -> str:
    """``describe_groups`` as text, with a line of sums and, given the model, one of what is in no group."""
    rows = describe_groups(groups)
    lines = [("parameter group", "tensors", "parameters", "lr", "weight_decay")]
    lines += [(name, f"{n:,}", f"{size:,}", f"{lr:.3g}", f"{decay:g}") for name, n, size, lr, decay in rows]
    lines += [("all", f"{sum(row.tensors for row in rows):,}", f"{sum(row.parameters for row in rows):,}", "", "")]
    if model is not None:
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        frozen = [parameter.numel() for parameter in model.parameters() if id(parameter) not in trained]
        lines += [("frozen", f"{len(frozen):,}", f"{sum(frozen):,}", "", "")]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _kind(member: _Member, exempt: Collection[str], matrices_apart: bool) -> str:
    if member.parameter.ndim < 2 or member.name in exempt:
        return "no_decay"
    # "model" has no layers: all of its matrices count as a block's.
    in_block = 0 < member.layer < member.layers or member.tower == "model"
    return "matrices" if matrices_apart and in_block else "decay"


def _group_name(setting: _Setting, groups: Mapping[_Setting, list[_Member]], *, by_layer: bool) -> str:
    if sum(other.kind == setting.kind for other in groups) == 1:
        return setting.kind
    parts = dict.fromkeys(_place(member, by_layer) for member in sorted(groups[setting], key=_order))
    return f"{'+'.join(parts)}/{setting.kind}"


def _place(member: _Member, by_layer: bool) -> str:
    if member.apart:
        return f"{member.tower}.projection"
    if not by_layer or not member.tower:
        return member.tower or "logit_scale"
    if member.layer in (0, member.layers):
        return f"{member.tower}.{'head' if member.layer else 'embeddings'}"
    return f"{member.tower}.block{member.layer}"


def _order(member: _Member) -> tuple[bool, str, int, bool]:
    """``logit_scale`` last, a projection behind the rest of its head."""
    return not member.tower, member.tower, member.layer, member.apart


def _first(members: Sequence[_Member]) -> tuple[bool, str, int, bool]:
    return min(map(_order, members))


def _check(members: Sequence[_Member], factors: Mapping[str, float], layer_decay: float, matrices_apart: bool) -> None:
    if not 0 < layer_decay <= 1:
        raise UserError(
            f"layer_decay={layer_decay} must be greater than 0 and at most 1; 0.65 to 0.9 is usual, 1 is none"
        )
    for tower, factor in factors.items():
        if not factor > 0:
            raise UserError(
                f"{tower or 'logit_scale'}_lr_factor={factor} must be greater than 0; 1 is the optimiser's lr"
            )
    if layer_decay != 1 or matrices_apart:
        shapeless = sorted({member.tower for member in members if member.tower and not member.layers})
        if shapeless:
            raise UserError(
                f"layer_decay={layer_decay} and Muon need a tower's blocks, and those of the {' and '.join(shapeless)} "
                "tower cannot be told apart; use layer_decay=1 and adamw, or another tower"
            )
    towers = {member.tower for member in members}
    if "model" in towers and (layer_decay != 1 or any(factor != 1 for factor in factors.values())):
        raise UserError("layer_decay and the towers' lr factors need a ContrastiveModel; leave them at 1 for others")
