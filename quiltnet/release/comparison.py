"""Whether another library, given an export, sees and says the same as the model: on fixed images and captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel

LIMIT = 1e-4
# Where weights are rounded to float16 or a library computes in it, whose numbers have 11 bits.
HALF_LIMIT = 1e-2

# By transformers' default image processor, which resizes with torchvision: under 1 % of pixels are a level of 256 apart
# from Pillow's. Measured on ViT-B/32: 7e-5; small towers move further.
RESIZING_LIMIT = 1e-3

CAPTIONS = (
    "A histopathology slide showing glands.",
    "smooth muscle, H&E, x40",
    "Überwiegend β-catenin-positive Zellen, 5 µm, naïve Drüsen (組織)",
    "a gland of the colon beside fatty tissue, inflamed, " * 40,
)


@dataclass(frozen=True)
class Comparison:
    """The largest difference that was found, and the largest that is allowed.

    Attributes:
        library: that loaded the export.
        what: was compared.
    """

    library: str
    difference: float
    limit: float
    what: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit  # NaN does not pass


class NotEqual(RuntimeError):
    """An export that does not come back as the model it was made of."""


@dataclass(frozen=True)
class Reference:
    """What the model itself makes of the fixed images and captions.

    Attributes:
        images: N of them; ``pixels`` are ``(N, 3, H, W)`` as the model's transform has them.
        text: (N', L) int64; ``lengths`` without padding.
        image_features, text_features: (N, D), (N', D), unit length.
        log_logit_scale: as it lies in the weights.
    """

    images: Sequence[Image.Image]
    captions: Sequence[str]
    pixels: Tensor
    text: Tensor
    lengths: Sequence[int]
    image_features: Tensor
    text_features: Tensor
    log_logit_scale: float

    def features_difference(self, image_features: Tensor, text_features: Tensor) -> float:
        """The largest, of any place in any vector; theirs need not be of unit length."""
        pairs = ((self.image_features, image_features), (self.text_features, text_features))
        return largest_of([largest_difference(ours, F.normalize(theirs.float(), dim=-1)) for ours, theirs in pairs])

    def check_ids(self, library: str, ids: Sequence[Sequence[int]]) -> None:
        """Raises NotEqual where captions became other tokens; ``ids`` without padding."""
        for caption, ours, length, theirs in zip(self.captions, self.text.tolist(), self.lengths, ids, strict=True):
            if ours[:length] != list(theirs):
                raise NotEqual(f"{library} reads {caption[:60]!r} as the tokens {list(theirs)}, not {ours[:length]}")

    def check_scale(self, library: str, log_logit_scale: float) -> None:
        if log_logit_scale != self.log_logit_scale:
            raise NotEqual(f"{library} has the logit_scale {log_logit_scale}, the model {self.log_logit_scale}")


@torch.no_grad()
def take_reference(model: ContrastiveModel) -> Reference:
    """
    Raises:
        UserError: the model's features are NaN or infinite, which would equal nothing, and serve nobody.
    """
    images = sample_images(model.image_size)
    pixels = torch.stack([model.transform(image) for image in images])
    text, lengths = model.tokenize.measure(CAPTIONS)
    features = {"image": model.encode_image(pixels), "text": model.encode_text(text)}
    if broken := [tower for tower, rows in features.items() if not rows.isfinite().all()]:
        raise UserError(
            f"the {' and '.join(broken)} tower's features are not finite numbers, so its weights hold NaN or infinity, "
            "or overflow; export an earlier checkpoint"
        )
    return Reference(
        images,
        CAPTIONS,
        pixels,
        text,
        lengths.clamp(max=text.shape[1]).tolist(),
        features["image"],
        features["text"],
        model.clip.logit_scale.item(),
    )


def sample_images(image_size: int | tuple[int, int]) -> list[Image.Image]:
    """Noise in colour and grey, from smaller to twice larger than the model's images, upright, wide and square.

    None whose surplus in the crop is 3 pixels more than a multiple of 4: there open_clip's crop (torchvision's, which
    rounds a half to the even number) and that of transformers (which rounds it down) lie one pixel apart.
    """
    side = image_size if isinstance(image_size, int) else min(image_size)
    sizes = [(side, side), (2 * side + 20, 2 * side), (side, side + 34), (side // 2 + 1, side // 2 + 1)]
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    return [*images, images[1].convert("L")]


def largest_of(differences: Sequence[float]) -> float:
    """NaN where one is; ``max`` passes over it, as the first is not less than NaN."""
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours.float() - theirs.float()).abs().max().item()
