"""What trains of a model, a tower at a time: all, nothing, the last blocks, low-rank adapters, the projection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.lora import Lora, add_lora, is_adapter, lora_layers, lora_size, merge_layers
from quiltnet.model.tower_blocks import block_names, parameter_layers, projection_names, towers

Mode = Literal["full", "frozen", "last_n", "lora", "projection_only"]
TOWERS = ("image", "text")
ADAPTERS_NAME = "adapters.json"


@dataclass(frozen=True)
class Tuning:
    """What trains, by tower; all options are checked when it is made.

    Attributes:
        image, text: ``full``; ``frozen``: nothing, the projection included; ``last_n``: the last blocks and what
            follows them; ``lora``: adapters in the blocks, and the projection; ``projection_only``.
        image_last_n, text_last_n: blocks that train, with mode ``last_n``.
        image_thaw_samples, text_thaw_samples: until so many pairs were seen only the tower's projection trains.
        logit_scale: whether it trains.
        lora_rank, lora_alpha, lora_dropout: of the adapters; ``alpha / rank`` is the factor of what they add. Dropout
            acts before those of linear layers and convolutions, not in ``nn.MultiheadAttention``.
        image_lora_targets, text_lora_targets: modules by the ends of their names, such as ``[attn, c_fc]``; by default
            attention, linear layers and 1x1 convolutions in the blocks.

    Raises:
        UserError: an unknown mode, a number out of range, an option without its mode, towers that are both frozen.
    """

    image: Mode = "full"
    text: Mode = "full"
    image_last_n: int | None = None
    text_last_n: int | None = None
    image_thaw_samples: int = 0
    text_thaw_samples: int = 0
    logit_scale: bool = True
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    image_lora_targets: Sequence[str] | None = None
    text_lora_targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for tower in TOWERS:
            _check_mode(self, tower)
            _check_thaw(self, tower)
            _check_targets(self, tower)
        if self.image == self.text == "frozen":
            raise UserError(
                "tuning.image=frozen and tuning.text=frozen leave nothing to train; let one of them train, if only by "
                "projection_only"
            )
        if self.lora_rank < 1:
            raise UserError(f"tuning.lora_rank={self.lora_rank} must be at least 1; 4 to 32 is usual")
        if not self.lora_alpha > 0:
            raise UserError(f"tuning.lora_alpha={self.lora_alpha} must be greater than 0; one to two ranks is usual")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"tuning.lora_dropout={self.lora_dropout} must be at least 0 and below 1")

    def mode(self, tower: str) -> Mode:
        return getattr(self, tower)

    def last_n(self, tower: str) -> int | None:
        return getattr(self, f"{tower}_last_n")

    def thaw_samples(self, tower: str) -> int:
        return getattr(self, f"{tower}_thaw_samples")

    def lora_targets(self, tower: str) -> Sequence[str] | None:
        return getattr(self, f"{tower}_lora_targets")


def apply_tuning(model: ContrastiveModel, tuning: Tuning) -> None:
    """Freeze what shall not train, and add adapters where asked for. Once, before the optimiser is built.

    ``logit_bias`` is left as it is: the loss that adds it says so itself. What has no parameter that trains is in eval
    mode from then on, also after ``model.train()``. Adapters are drawn by torch's global generator, which the run
    seeds; their names depend on the architecture and the tuning alone.

    Raises:
        UserError: a tower without projection or without blocks where the mode needs them, more blocks asked for than
            there are, an unknown target (with what there is), nothing but ``logit_scale`` to train at the start.
    """
    if has_lora(model):
        raise UserError("the model has adapters already; merge them first (quiltnet.model.adapters.merge_lora)")
    for kind, tower in towers(model.clip).items():
        _check_tower(tower, kind, tuning)
    can_train = {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}
    for kind, tower in towers(model.clip).items():
        if tuning.mode(kind) == "lora":
            size = Lora(tuning.lora_rank, tuning.lora_alpha, tuning.lora_dropout)
            add_lora(tower, size, tuning.lora_targets(kind))
    trained = _trained(model, tuning) | {"logit_bias"}
    for name, parameter in model.clip.named_parameters():
        parameter.requires_grad_(name in trained and (name in can_train or is_adapter(name)))
    model.train(model.training)
    _check_start(model, tuning)


def waiting(model: ContrastiveModel, tuning: Tuning) -> dict[str, int]:
    """Names in ``model.clip`` of what trains from a count of pairs on only, and that count.

    Args:
        model: after ``apply_tuning``, before ``freeze_waiting``.
    """
    projections = model.projection_names(prefix="")
    trained = {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}
    return {
        name: tuning.thaw_samples(kind)
        for name, (kind, _, _) in parameter_layers(model.clip, prefix="").items()
        if kind and tuning.thaw_samples(kind) and name in trained - projections
    }


def freeze_waiting(model: ContrastiveModel, thaw_samples: Mapping[str, int], samples_seen: int) -> bool:
    """Freeze what has to wait at that time and thaw what had to; a function of the clock alone.

    Called before the model is placed, and by ``quiltnet.training.thawing.Thawing`` as the clock moves on.

    Args:
        thaw_samples: from ``waiting``.

    Returns:
        Whether that changed what trains.
    """
    changed = False
    for name, begin in thaw_samples.items():
        parameter = model.clip.get_parameter(name)
        changed |= parameter.requires_grad != (samples_seen >= begin)
        parameter.requires_grad_(samples_seen >= begin)
    if changed:
        model.train(model.training)
    return changed


def has_lora(model: ContrastiveModel) -> bool:
    return any(is_adapter(name) for name, _ in model.clip.named_parameters())


def merge_lora(model: ContrastiveModel) -> ContrastiveModel:
    """A copy of the model with its adapters added to its weights, under the names of a model without.

    All weights of a tower that had adapters can train again. A model without adapters is copied as it is.
    """
    model = deepcopy(model)
    for tower in towers(model.clip).values():
        merge_layers(tower)
    return model


def save_adapters(model: ContrastiveModel, folder: Path) -> None:
    """Write ``adapters.json`` into a model's folder, if the model has adapters: what ``read_adapters`` gives back."""
    layers = {kind: lora_layers(tower) for kind, tower in towers(model.clip).items()}
    layers = {kind: found for kind, found in layers.items() if found}
    if not layers:
        return
    size = lora_size(next(layer for found in layers.values() for layer in found.values()))
    options = {f"lora_{name}": value for name, value in size._asdict().items()}
    for kind, found in layers.items():
        options |= {kind: "lora", f"{kind}_lora_targets": list(found)}
    text = json.dumps(asdict(Tuning(**options)), indent=2)
    (folder / ADAPTERS_NAME).write_text(text + "\n", encoding="utf-8")


def read_adapters(folder: Path) -> Tuning | None:
    """The tuning that gives a model of that folder the adapters its weights are of; None where they have none.

    Raises:
        UserError: the file is not one of ours.
    """
    path = folder / ADAPTERS_NAME
    if not path.is_file():
        return None
    try:
        return Tuning(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not say what adapters the model has ({error}); take it from the run") from error


def _trained(model: ContrastiveModel, tuning: Tuning) -> set[str]:
    """Names in ``model.clip`` of what trains once adapters are in place."""
    projections = model.projection_names(prefix="")
    trained = {"logit_scale"} if tuning.logit_scale else set()
    for name, (kind, layer, head) in parameter_layers(model.clip, prefix="").items():
        mode = tuning.mode(kind) if kind else "frozen"
        if (
            mode == "full"
            or (mode in ("lora", "projection_only") and name in projections)
            or (mode == "lora" and is_adapter(name))
            or (mode == "last_n" and layer >= head - tuning.last_n(kind))
        ):
            trained.add(name)
    return trained


def _check_mode(tuning: Tuning, tower: str) -> None:
    mode, last_n = tuning.mode(tower), tuning.last_n(tower)
    if mode not in get_args(Mode):
        raise UserError(f"tuning.{tower}={mode!r}: choose {', '.join(get_args(Mode))}")
    if mode == "last_n" and (last_n is None or last_n < 1):
        raise UserError(f"tuning.{tower}=last_n needs to know how many blocks; say tuning.{tower}_last_n=2")
    if mode != "last_n" and last_n is not None:
        raise UserError(f"tuning.{tower}_last_n={last_n} is of mode last_n, and tuning.{tower}={mode}; use one of them")


def _check_thaw(tuning: Tuning, tower: str) -> None:
    mode, samples = tuning.mode(tower), tuning.thaw_samples(tower)
    if samples < 0:
        raise UserError(f"tuning.{tower}_thaw_samples={samples} must be at least 0, which is from the start")
    if samples and mode in ("frozen", "projection_only"):
        raise UserError(f"tuning.{tower}_thaw_samples={samples}, but tuning.{tower}={mode} never thaws; leave it out")


def _check_targets(tuning: Tuning, tower: str) -> None:
    mode, targets = tuning.mode(tower), tuning.lora_targets(tower)
    if targets is None:
        return
    if mode != "lora":
        raise UserError(f"tuning.{tower}_lora_targets is of mode lora, and tuning.{tower}={mode}; use one of them")
    if isinstance(targets, str) or not targets:
        raise UserError(f"tuning.{tower}_lora_targets={targets!r} must be a list of names, such as [attn, c_fc]")


def _check_tower(tower: nn.Module, kind: str, tuning: Tuning) -> None:
    mode, last_n = tuning.mode(kind), tuning.last_n(kind)
    if mode == "projection_only" and not projection_names(tower):
        raise UserError(
            f"tuning.{kind}=projection_only, but this {kind} tower has no projection into the joint space; give it one "
            "(timm_proj=linear, hf_proj_type=linear), or tune it otherwise"
        )
    if mode == "last_n":
        blocks = len(block_names(tower))
        if not blocks:
            raise UserError(f"tuning.{kind}=last_n, but blocks of this {kind} tower cannot be told apart; use another")
        if last_n > blocks:
            raise UserError(
                f"tuning.{kind}_last_n={last_n}, but the {kind} tower has {blocks} blocks; say at most that"
            )


def _check_start(model: ContrastiveModel, tuning: Tuning) -> None:
    later = waiting(model, tuning)
    places = parameter_layers(model.clip, prefix="")
    trained = {n for n, parameter in model.clip.named_parameters() if parameter.requires_grad and places[n][0]}
    if later and trained <= later.keys():
        raise UserError(
            "until image_thaw_samples or text_thaw_samples nothing of the towers would train, as they have no "
            "projections; let one of them train from the start"
        )
