"""What a run computes in, and what a device is refused."""

from __future__ import annotations

import logging

import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.training import precision
from quiltnet.training.precision import build_accelerator, check_precision


@pytest.mark.parametrize(("name", "mixed"), [("fp32", "no"), ("bf16", "bf16")])
def test_precision_of_the_towers(name, mixed):
    accelerator = build_accelerator(name, cpu=True)
    assert (accelerator.mixed_precision, accelerator.scaler, accelerator.device.type) == (mixed, None, "cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("name", "message"), [("fp16", "needs a GPU"), ("tf32", "needs an NVIDIA GPU of Ampere or later, this is a CPU")]
)
def test_a_cpu_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        build_accelerator(name, cpu=True)


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), ["tf32", "bf16"]), ((8, 0), []), ((9, 0), [])])
def test_a_gpu_before_ampere_is_refused(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for name in ("fp32", "tf32", "bf16", "fp16"):
        if name in refused:
            with pytest.raises(UserError, match="this is Tesla T4; use fp"):
                check_precision(name, "cuda")
        else:
            check_precision(name, "cuda")


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_on_a_cpu_without_it_is_said_to_be_slow(monkeypatch, caplog, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast}, raising=False)
    with caplog.at_level(logging.WARNING, logger=precision.__name__):
        check_precision("bf16", "cpu")
    assert ("slower than fp32" in caplog.text) is not fast


def test_deterministic_asks_ddp_to_keep_its_buckets():
    try:
        accelerator = build_accelerator(deterministic=True, cpu=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert accelerator.ddp_handler.find_unused_parameters
    finally:
        build_accelerator(cpu=True)
    assert not torch.are_deterministic_algorithms_enabled()
