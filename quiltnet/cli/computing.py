"""What a step of a run computes, and what its device could at most: for the log."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from quiltnet.cli.train_data import views
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.training.flops import flops_by_length, peak_flops


def computing(cfg: DictConfig, model: ContrastiveModel, device: torch.device) -> dict[str, object]:
    """``flops`` and ``peak`` of ``LogMetrics``; nothing on a CPU, where counting takes seconds and no peak is known.

    Before the model is placed: compiled code is not seen, and what checkpointing computes again is of no use.
    """
    if device.type != "cuda":
        return {}
    model.to(device)
    size = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
    image = torch.zeros((2, 3, *size), dtype=torch.uint8, device=device)
    text = model.tokenize(["tissue"] * 2).to(device)
    flops = flops_by_length(model, image, text, model.batch_tokenizer().lengths, views=views(cfg))
    return {"flops": flops, "peak": peak_flops(torch.cuda.get_device_name(device), cfg.precision)}
