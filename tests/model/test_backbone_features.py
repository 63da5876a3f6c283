"""Features before the projection: projected, they are the model's own."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from quiltnet.cli.teach import describe_teacher
from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, tiny_model

CNN = {"timm_model_name": "resnet10t", "image_size": 48}
TINY_RESNET = {"image_size": 64, "width": 8, "layers": [1, 1, 1, 1], "head_width": 8}


def model_with(image, **options) -> ContrastiveModel:
    torch.manual_seed(0)
    return build_model(image=image, text=TINY_TEXT, embed_dim=16, **options).eval()


def features(model: ContrastiveModel, **options) -> torch.Tensor:
    torch.manual_seed(1)
    side = model.image_size
    with torch.no_grad():
        return model.encode_image(torch.randn(2, 3, side, side), **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True, "pool_type": "avg"}, {"attentional_pool": True}],
    ids=str,
)
def test_of_open_clips_vision_transformers(options):
    """But for attentional pooling, which works in the joint width already, they are as wide as the tower."""
    model = model_with({**TINY_IMAGE, **options})
    backbone = features(model, projected=False)
    assert backbone.shape == (2, 16 if "attentional_pool" in options else 32) and backbone.dtype == torch.float32
    torch.testing.assert_close(F.normalize(backbone @ model.clip.visual.proj, dim=-1), features(model))


@pytest.mark.parametrize(
    ("image", "width"),
    [
        ({**TINY_VIT}, 64),
        ({**TINY_VIT, "timm_proj": "mlp"}, 64),
        ({**CNN, "timm_pool": "avg"}, 512),
    ],
    ids=["vit", "mlp", "cnn"],
)
def test_of_timm_towers_with_a_head(image, width):
    model = model_with(image)
    backbone = features(model, projected=False)
    assert backbone.shape == (2, width)
    torch.testing.assert_close(F.normalize(model.clip.visual.head(backbone), dim=-1), features(model))


def test_of_a_timm_tower_whose_own_classifier_projects():
    model = model_with({**TINY_VIT, "timm_pool": "token", "timm_proj": ""})
    backbone = features(model, projected=False)
    assert backbone.shape == (2, 64)
    torch.testing.assert_close(F.normalize(model.clip.visual.trunk.head(backbone), dim=-1), features(model))


def test_raw_pixels_are_normalised_first():
    model = tiny_model().eval()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    prepared = torch.stack([model.transform(picture) for picture in pictures])
    raw, floats = (model.encode_image(image, projected=False) for image in (pixels, prepared))
    torch.testing.assert_close(raw, floats)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (TINY_RESNET, "attention pooling of CLIP's ResNets holds their projection; take its projected features"),
        ({**CNN, "timm_pool": "rot_attn", "timm_proj": ""}, "RotAttentionPool2d of this timm tower"),
    ],
    ids=["resnet", "attention"],
)
def test_a_tower_whose_pooling_projects_is_refused(image, message):
    model = model_with(image)
    assert features(model).shape == (2, 16)
    with pytest.raises(UserError, match=message):
        features(model, projected=False)


def test_a_description_is_of_everything_that_moves_features():
    model = tiny_model()
    described = model.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == tiny_model().describe()
    with torch.no_grad():
        model.clip.visual.proj[0, 0] += 1e-3
    assert model.describe()["weights_sha256"] != described["weights_sha256"]
    other_mean = tiny_model(mean=[0.1, 0.2, 0.3]).describe()
    assert other_mean["weights_sha256"] == described["weights_sha256"] and other_mean != described


def test_the_hash_of_weights_is_of_names_shapes_and_float32_values():
    model = tiny_model()
    expected = hashlib.sha256()
    for name, tensor in model.clip.state_dict().items():
        expected.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.numpy().astype("float32").tobytes())
    assert model.weights_sha256() == expected.hexdigest()
    assert describe_teacher("a teacher", model)["sha256"] == expected.hexdigest()
