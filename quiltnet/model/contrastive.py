"""The CLIP face that every model shows, whatever its towers: encode an image, encode a text, scale."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from quiltnet.model.backbone_features import backbone_features
from quiltnet.model.text_forward import encode_text, padding_is_idle
from quiltnet.model.tokenizer import BatchTokenizer, Tokenizer
from quiltnet.model.tower_blocks import parameter_layers, projection_names, tower_blocks, towers

BatchNormMode = Literal["frozen", "adapted", "train"]


@dataclass
class Description:
    """All that rebuilds an untrained model, in open_clip's terms; it travels with the weights.

    ``model_cfg`` (architecture, activation, context length) and ``preprocess_cfg`` (size, mean, std, interpolation,
    resize_mode) are the two halves of an ``open_clip_config.json``.
    """

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]


class PairFeatures(NamedTuple):
    """What a contrastive loss takes of a batch.

    Attributes:
        image_features, text_features: (B, D) float32, unit length.
        logit_scale: ().
        logit_bias: (), added to the logits by SigLIP's loss; None where the model has none.
        second_image_features: (B, D) of a second view of the images; None where there is one view.
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    second_image_features: Tensor | None = None


class ContrastiveModel(nn.Module):
    """An open_clip model with the facts it needs to be used rightly: image transform, tokeniser, normalisation.

    Features are normalised in float32 whatever the towers computed in: under bfloat16 autocast open_clip's own
    ``normalize=True`` returns vectors whose length errs by 0.0025.
    """

    def __init__(
        self,
        clip: nn.Module,
        description: Description,
        tokenize: Tokenizer,
        batchnorm: BatchNormMode = "frozen",
    ) -> None:
        super().__init__()
        self.clip = clip
        self.description = description
        self.tokenize = tokenize
        self.batchnorm = batchnorm
        preprocessing = PreprocessCfg(**description.preprocess_cfg)
        self.transform = image_transform_v2(preprocessing, is_train=False)
        # Not in the state dict: the description is their one home.
        self.register_buffer("_mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of the input in pixels, or (height, width)."""
        return self.description.preprocess_cfg["size"]

    @property
    def interpolation(self) -> str:
        return self.description.preprocess_cfg["interpolation"]

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    @property
    def logit_scale(self) -> Tensor:
        """``()``: the factor of the cosine similarities."""
        return self.clip.logit_scale.exp()

    @property
    def logit_bias(self) -> Tensor | None:
        """``()``: what SigLIP's loss adds to the logits; None where the model was built without."""
        return getattr(self.clip, "logit_bias", None)

    def forward(self, image: Tensor, text: Tensor, second_image: Tensor | None = None) -> PairFeatures:
        """image, second_image: ``(B, 3, H, W)``; text: ``(B, L)``. All in one call, as DDP wants it of a step."""
        second = self.encode_image(second_image) if second_image is not None else None
        return PairFeatures(self.encode_image(image), self.encode_text(text), self.logit_scale, self.logit_bias, second)

    def encode_image(self, image: Tensor, *, projected: bool = True) -> Tensor:
        """image: ``(B, 3, H, W)``, floats from ``transform`` or raw uint8, which is normalised here -> ``(B, D)``.

        Not ``projected``: ``(B, width)`` float32 as the image tower has them before its projection, of any length;
        UserError where no such features can be told apart.
        """
        if image.dtype == torch.uint8:
            # torchvision's ToTensor and Normalize, operation for operation, so that both roads give the same bits.
            # Not in the loader's channels_last, in which gradients of 1x1 convolutions do not lie as DDP's buckets do.
            image = image.to(torch.float32, memory_format=torch.contiguous_format)
            image = image.div(255).sub(self._mean).div(self._std)
        if not projected:
            return backbone_features(self.clip.visual, image).float()
        return F.normalize(self.clip.encode_image(image).float(), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """text: ``(B, L)`` int64 from ``tokenize``, or shorter from ``batch_tokenizer`` -> ``(B, D)``."""
        return F.normalize(encode_text(self.clip, text).float(), dim=-1)

    def weights_sha256(self) -> str:
        """Of names, shapes and float32 values of all weights; reads all of them, about a second a gigabyte."""
        digest = hashlib.sha256()
        for name, tensor in self.clip.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """All that features depend on but their input: weights by hash, architecture, preprocessing; JSON types."""
        description = {
            "weights_sha256": self.weights_sha256(),
            "model_cfg": self.description.model_cfg,
            "preprocess_cfg": self.description.preprocess_cfg,
        }
        return json.loads(json.dumps(description))  # tuples become lists, as they are after any file

    def batch_tokenizer(self) -> BatchTokenizer:
        """What training reads captions with: padding left out where this text tower gives the same features so."""
        return BatchTokenizer(self.tokenize, trim=padding_is_idle(self.clip, self.tokenize.pad_id))

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """At most 100: Radford et al. 2021 (sec. 2.5) found the bound necessary against instability.

        Called after the optimiser's step, not in forward, where a clamp would zero the gradient at the bound.
        """
        self.clip.logit_scale.clamp_(min=0, max=math.log(100))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay beside vectors and scalars: those the towers name, and positions."""
        trunk = getattr(self.clip.visual, "trunk", None)
        asked = {f"clip.{name}" for name in self.clip.no_weight_decay()}
        if hasattr(trunk, "no_weight_decay"):
            asked |= {f"clip.visual.trunk.{name}" for name in trunk.no_weight_decay()}
        positions = {n for n, _ in self.named_parameters() if n.endswith(("position_embeddings.weight", "pos_embed"))}
        return asked | positions

    def tower_blocks(self) -> dict[str, list[nn.Module]]:
        """The repeated blocks of the ``image`` and the ``text`` tower, in order of depth."""
        return tower_blocks(self.clip)

    def parameter_layers(self) -> dict[str, tuple[str, int, int]]:
        """Parameter name -> (tower, layer, layers): 0 for what embeds, ``layers`` for what projects."""
        return parameter_layers(self.clip)

    def projection_names(self, prefix: str = "clip.") -> set[str]:
        """Names of the parameters that take features of either tower into the joint space."""
        prefixes = {"image": f"{prefix}visual.", "text": f"{prefix}text." if hasattr(self.clip, "text") else prefix}
        found = towers(self.clip).items()
        return {prefixes[kind] + name for kind, tower in found for name in projection_names(tower)}

    def train(self, mode: bool = True) -> ContrastiveModel:
        """Training mode, except for what is frozen, and for BatchNorm unless ``batchnorm="train"``.

        What has parameters of which none trains stays in eval mode: its features are the same each time, without
        dropout or stochastic depth. BatchNorm keeps its pretrained statistics: those of a batch differ from rank to
        rank and from batch to batch, so with them W ranks no longer equal one. ``batchnorm="adapted"`` keeps those
        that the run measured before its first step.
        """
        super().train(mode)
        for module in _frozen_modules(self.clip):
            module.eval()
        if self.batchnorm != "train":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have parameters of which none trains, and what stands among nothing but such."""
    parameters = list(module.parameters())
    if not parameters:
        return
    if not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    children = list(module.children())
    if any(parameter.requires_grad for child in children for parameter in child.parameters()):
        for child in children:
            yield from _frozen_modules(child)
    else:  # a projection that is a parameter of the tower itself: patch dropout among the children is the trunk's
        yield from children
