"""Attention weights of a forward pass, whatever computes them, and what they say of the tokens' relevance.

The rule is that of Chefer, Gur and Wolf 2021 (arXiv 2103.15679; github.com/hila-chefer/Transformer-MM-Explainability):
gradient times attention, its positive part, averaged over heads and passed down through the layers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
_NOT_COMPUTED_HERE = ("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "static_k", "static_v")


class RecordAttention(TorchFunctionMode):
    """Keeps the weights of every attention that is computed inside, each (B, heads, queries, keys), in order.

    Fused attention never has its weights in memory, so it is computed step by step here, with the same result but for
    rounding: ``nn.MultiheadAttention`` (with LoRA too), ``scaled_dot_product_attention`` of timm, open_clip and
    transformers. What is computed step by step anyway is found by its softmax. The mode is torch's own and of this
    thread alone; no module is changed.

    Attributes:
        weights: parts of the graph, so that gradients can be taken at them, also where no parameter trains.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            given = _MULTI_HEAD.bind(*args, **kwargs)
            given.apply_defaults()
            if not any(given.arguments[name] for name in _NOT_COMPUTED_HERE if given.arguments[name] is not None):
                return self._attend_with_heads(given.arguments), None
        result = func(*args, **kwargs)
        if func in _SOFTMAXES and result.ndim == 4:
            self._keep(result)
        return result

    def _keep(self, weights: Tensor) -> None:
        if not weights.requires_grad:  # nothing before it trains: the graph begins here
            weights.requires_grad_()
        self.weights.append(weights)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # towers are in eval mode here
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` as its documentation writes it down, softmax in float32 or better."""
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
        self._keep(weights)
        return weights.to(value.dtype) @ value

    def _attend_with_heads(self, given: dict[str, Any]) -> Tensor:
        """The output (L, B, D) of ``F.multi_head_attention_forward``, whose arguments these are."""
        if given["use_separate_proj_weight"]:
            projections = [given[f"{name}_proj_weight"] for name in "qkv"]
        else:
            projections = given["in_proj_weight"].chunk(3)
        biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
        inputs = (given["query"], given["key"], given["value"])
        heads = given["num_heads"]
        query, key, value = (
            F.linear(tokens, weight, bias).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # (B, heads, L, D / heads)
            for tokens, weight, bias in zip(inputs, projections, biases, strict=True)
        )
        mask = given["attn_mask"]
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, heads))
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # True leaves out in this function, and lets in where it goes
        attended = self._attend(query, key, value, mask)
        return F.linear(attended.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])


def token_relevance(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], tokens: Tensor, token_gradient: Tensor
) -> Tensor | None:
    """How much each token that goes into a transformer counts for the score that the gradients are of.

    Chefer et al. start with the identity, go up by ``R += (gradient * attention).clamp(min=0).mean(heads) @ R`` and
    look at the row of the token that is pooled. Only such a row is wanted, so it is taken downwards, which is the same
    product. Pooling by attention is one more layer, without the identity (their rule for cross-attention). An average
    over tokens is an attention with equal weights, whose gradient times weight is each token times its gradient.

    Args:
        weights, gradients: of each layer in order, (1, heads, queries, keys).
        tokens, token_gradient: (1, N, D), what the tower pools.

    Returns:
        (N',) for the N' tokens at the bottom, never negative; None where these attentions are not one chain over one
        set of tokens (windows, attention over channels).
    """
    layers = [
        (gradient.float() * weight.float()).clamp(min=0).mean(dim=1)
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    if not layers or any(len(layer) != 1 for layer in layers):
        return None
    row = _pooled(tokens, token_gradient)
    if layers[-1].shape[1] != len(row):  # pooled by an attention of its own behind these tokens
        row = row.new_ones(layers[-1].shape[1])
    for layer in reversed(layers):
        queries, keys = layer.shape[1:]
        if queries != len(row):
            return None
        passed = row @ layer[0]
        row = row + passed if queries == keys else passed
    return row


def _pooled(tokens: Tensor, gradient: Tensor) -> Tensor:
    """(N,): how much each token is pooled. Of one alone it does not matter how much."""
    places = (gradient[0] != 0).any(dim=-1)
    if places.sum() == 1:
        return places.float()
    return (tokens[0].float() * gradient[0].float()).sum(dim=-1).clamp(min=0)
