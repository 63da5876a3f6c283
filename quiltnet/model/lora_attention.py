"""LoRA in ``nn.MultiheadAttention``, leaving its own weights untouched to the last bit. Imports peft, which is slow."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn


class LoraAttention(MultiheadAttention):
    """peft's layer with another forward: adapters of ``in_proj`` and ``out_proj``, which this attention never calls.

    peft 0.21 adds the adapters to the weights before each call and subtracts them after it. What comes back has other
    last bits, in new ``nn.Parameter`` objects that neither optimiser, DDP nor FSDP knows. Here sums stand in the
    weights' place for the time of the call. ``lora_dropout`` has no effect: there is no input of the adapter alone.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        # In float32 also under autocast, as merging adds them.
        with torch.autocast(query.device.type, enabled=False):
            weights = self._adapted_weights()
        return torch.func.functional_call(self.get_base_layer(), weights, (query, *args), kwargs)

    @torch.no_grad()
    def unload_and_optionally_merge_module(self, merge: bool, *_: Any, **__: Any) -> nn.MultiheadAttention:
        """The attention as it was before, with the adapters added to its weights if ``merge``."""
        attention = self.get_base_layer()
        if merge:
            for name, weight in self._adapted_weights().items():
                attention.get_parameter(name).copy_(weight)
        attention.out_proj = attention.out_proj.get_base_layer()
        return attention

    def _adapted_weights(self) -> dict[str, Tensor]:
        attention = self.get_base_layer()
        layers = {"in_proj_weight": self, "out_proj.base_layer.weight": attention.out_proj}
        return {
            name: attention.get_parameter(name) + sum(map(layer.get_delta_weight, layer.active_adapters))
            for name, layer in layers.items()
        }

    def _restore_weights(self) -> None:
        """Nothing to be restored before ``state_dict`` and ``named_modules``: parameters stay where they are."""
