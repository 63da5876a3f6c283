"""Bytes that a training step keeps for the backward pass, a pair, and what follows for a card: measured, then derived.

.venv/bin/python benchmarks/activations.py [--architectures ViT-B-32 ViT-B-16 ViT-L-14] [--tokens 77]

Measured on the CPU, where attention saves what CUDA's flash attention saves: its inputs, its output and a row of
log-sum-exps, never the matrix. Two batch sizes give the bytes of a pair as a slope, each storage counted once and
parameters not at all. Derived: weights, gradients and AdamW's two moments in float32 are 16 bytes a parameter, the
copies of weights that autocast keeps 2 more; features and their gradients are 16 bytes times D a pair; with activation
checkpointing one block of the image tower is recomputed at a time.
"""

from __future__ import annotations

import argparse
import contextlib

import torch

from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel

GIB = 2**30
CARDS_GIB = (24, 40, 80)
USABLE = 0.9  # the rest: the CUDA context, workspaces, and what the allocator cannot join


def saved_bytes(model: ContrastiveModel, batch_size: int, tokens: int, autocast: bool) -> int:
    """Of all tensors that autograd holds at the end of the forward pass."""
    size = model.image_size
    image = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8)
    text = torch.ones(batch_size, tokens, dtype=torch.int64)
    text[:, -1] = 49407
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    precision = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        features = model(image, text)  # held until the storages are counted, so that no address is used twice
    del features
    return sum(held.values())


def report(architecture: str, tokens: int) -> None:
    model = build_model(architecture).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = len(model.tower_blocks()["image"])
    print(f"\n{architecture}: {parameters / 1e6:.1f} M parameters, texts of {tokens} tokens")
    for precision in ("fp32", "bf16"):
        whole = 0.0
        for checkpointed in (False, True):
            model.clip.set_grad_checkpointing(checkpointed)
            small, large = (saved_bytes(model, size, tokens, precision == "bf16") for size in (2, 6))
            pair = (large - small) / 4
            whole = whole or pair
            recomputed = (whole - pair) / blocks  # one block at a time is made again
            fixed = parameters * (16 if precision == "fp32" else 18)
            rest = recomputed + 16 * model.clip.text_projection.shape[1]
            fits = [int((card * GIB * USABLE - fixed) / (pair + rest)) for card in CARDS_GIB]
            cards = ", ".join(f"{max(n, 0):,} on {card} GiB" for n, card in zip(fits, CARDS_GIB, strict=True))
            print(
                f"  {precision}{' checkpointed' if checkpointed else '':13} {pair / 2**20:7.1f} MiB a pair (measured), "
                f"{fixed / GIB:.2f} GiB fixed (derived); pairs at once (derived): {cards}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["ViT-B-32", "ViT-B-16", "ViT-L-14"])
    parser.add_argument("--tokens", type=int, default=77)
    args = parser.parse_args()
    for architecture in args.architectures:
        report(architecture, args.tokens)


if __name__ == "__main__":
    main()
