from __future__ import annotations

import pytest
import torch

from quiltnet.training.flops import flops_by_length, flops_per_pair, peak_flops, peak_memory_gib
from tests.model.towers import tiny_model

PAIRS, WIDTH, MLP, LAYERS, EMBED = 2, 32, 128, 1, 16
PATCHES, TOKENS = 4, 12


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros((PAIRS, 3, 32, 32), dtype=torch.uint8), torch.ones((PAIRS, TOKENS), dtype=torch.int64)


def forward_of_block(tokens: int) -> int:
    """Query, key, value and output; both halves of the MLP; scores and weighted sum."""
    return 2 * tokens * WIDTH * (4 * WIDTH + 2 * MLP) + 2 * 2 * tokens * tokens * WIDTH


def forward_of_image() -> int:
    embedding = 2 * PATCHES * 3 * 16 * 16 * WIDTH
    return embedding + LAYERS * forward_of_block(PATCHES + 1) + 2 * WIDTH * EMBED


def forward_of_text(tokens: int = TOKENS) -> int:
    return LAYERS * forward_of_block(tokens) + 2 * WIDTH * EMBED


def test_forward_and_backward_by_hand():
    """Backward is twice the forward, but nobody asks for the gradient of the pixels."""
    model = tiny_model()
    embedding = 2 * PATCHES * 3 * 16 * 16 * WIDTH
    expected = 3 * (forward_of_image() + forward_of_text()) - embedding
    assert flops_per_pair(model, *tensors()) == expected


def test_a_frozen_tower_costs_its_forward_alone():
    model = tiny_model()
    model.clip.visual.requires_grad_(False)
    assert flops_per_pair(model, *tensors()) == forward_of_image() + 3 * forward_of_text()
    model.requires_grad_(False)
    assert flops_per_pair(model, *tensors()) == forward_of_image() + forward_of_text()


def test_lengths_and_views():
    model = tiny_model()
    image, text = tensors()
    by_length = flops_by_length(model, image, text, [5, TOKENS], views=2)
    of_image = 3 * forward_of_image() - 2 * PATCHES * 3 * 16 * 16 * WIDTH
    assert by_length == {n: 2 * of_image + 3 * forward_of_text(n) for n in (5, TOKENS)}


def test_dropped_patches_are_not_counted():
    model = tiny_model()
    whole = flops_per_pair(model, *tensors())
    model.clip.visual.patch_dropout = torch.nn.Module()
    model.clip.visual.patch_dropout.forward = lambda x: x[:, :3]
    assert flops_per_pair(model, *tensors()) < whole


def test_the_run_does_not_notice():
    model = tiny_model(batchnorm="train")
    model.clip.visual.register_module("norm", torch.nn.BatchNorm2d(3))
    model.clip.visual.register_forward_pre_hook(lambda visual, inputs: (visual.norm(inputs[0]),))
    model.clip.logit_scale.grad = torch.ones(())
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    flops_per_pair(model, *tensors())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random) and not model.training
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["clip.logit_scale"]


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L4", "fp16", 121),
        ("NVIDIA L40S", "bf16", 362.05),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("NVIDIA GeForce RTX 5090", "bf16", 209.5),
        ("AMD Instinct MI250X/MI250", "bf16", 191.5),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("cpu", "fp32", None),
    ],
)
def test_peaks(name, precision, tera):
    expected = None if tera is None else pytest.approx(tera * 1e12)
    assert peak_flops(name, precision) == expected


def test_peak_memory_is_that_of_this_process():
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(2**25)  # 128 MiB
    assert 0.05 < before <= peak_memory_gib(torch.device("cpu")) < 100 and len(held)
