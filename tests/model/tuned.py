"""Models of every kind of tower, and steps that a tuning of them is judged by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.training.engine import TrainState, start_training, train_step
from quiltnet.training.losses import InfoNCE
from quiltnet.training.optim import build_optimizer
from quiltnet.training.placement import Placement
from quiltnet.training.precision import build_accelerator
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, bert_folder

KINDS = ("native", "timm vit and bert", "timm cnn")


def model_of(kind: str, folder: Path, **image_options: object) -> ContrastiveModel:
    """Native ViT and text, two blocks each; or timm's ViT beside BERT; or timm's EfficientNet beside native text."""
    text = {**TINY_TEXT, "layers": 2}
    image = {**TINY_IMAGE, "layers": 2}
    if kind == "timm vit and bert":
        image = {**TINY_VIT, "timm_proj": "linear"}
        text = {"hf_model_name": str(bert_folder(folder)), "hf_pooler_type": "cls_pooler", "context_length": 12}
    if kind == "timm cnn":
        image = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    torch.manual_seed(0)
    return build_model(image={**image, **image_options}, text=text, embed_dim=16)


def pairs_for(model: ContrastiveModel, size: int = 4, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    side = model.image_size if isinstance(model.image_size, int) else model.image_size[0]
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(image=image, text=torch.randint(1, 9, (size, 12), generator=generator), second_image=None)


def contrast(features: object, batch: object) -> dict[str, Tensor]:
    return {"loss": InfoNCE()(*features[:3])}


def start(
    model: ContrastiveModel, placement: Placement | None = None, lr: float = 1e-2, **options: float
) -> TrainState:
    return start_training(
        model.train(),
        build_optimizer(model, lr=lr, **options),
        lambda seen, step: 1.0,
        global_batch_size=4,
        accelerator=build_accelerator("fp32", cpu=True),
        placement=placement,
    )


def take_steps(model: ContrastiveModel, steps: int, **options: int) -> None:
    state = start(model)
    for step in range(steps):
        train_step(state, pairs_for(model, seed=step), contrast, **options)


def gradients(model: ContrastiveModel) -> dict[str, Tensor]:
    """Of one batch, in the model's present mode."""
    batch = pairs_for(model)
    contrast(model(batch.image, batch.text), batch)["loss"].backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
