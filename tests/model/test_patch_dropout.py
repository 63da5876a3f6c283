"""Patch dropout of open_clip's and timm's towers: put in, changed, taken out, refused where there are no patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.patch_dropout import patch_dropout_of, set_patch_dropout
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT

EVA = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "avg", "image_size": 224}  # rotary positions
# Image tower, patches, tokens that stay, where its blocks are.
TOWERS = {
    "open_clip": ({**TINY_IMAGE, "image_size": 64}, 16, 1, "visual.transformer.resblocks.0"),
    "timm": (TINY_VIT, 100, 1, "visual.trunk.blocks.0"),
    "eva": (EVA, 256, 1, "visual.trunk.blocks.0"),
}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
EFFICIENTNET = {"timm_model_name": "test_efficientnet", "timm_pool": "avg"}


@pytest.fixture(scope="module", params=sorted(TOWERS))
def tower(request):
    torch.manual_seed(0)
    image, patches, kept, block = TOWERS[request.param]
    model = build_model(image=image, text=TINY_TEXT, embed_dim=16)
    return model, patches, kept, model.clip.get_submodule(block)


def _tokens(model: nn.Module, block: nn.Module) -> tuple[int, Tensor]:
    """How many tokens the first block sees, and the features."""
    seen = []
    with block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])):
        image = torch.linspace(-1, 1, 3 * model.image_size**2).view(1, 3, model.image_size, -1)
        features = model.encode_image(image.expand(3, -1, -1, -1)).detach()
    return seen[0], features


def test_half_of_the_patches_are_left_out_in_training_alone(tower):
    model, patches, kept, block = tower
    keys, parameters = list(model.state_dict()), sum(1 for _ in model.parameters())
    _, whole = _tokens(model.eval(), block)
    assert patch_dropout_of(model.clip) == 0
    for share in (0.5, 0.75, 0.0, 0.5, 0.0):
        set_patch_dropout(model.clip, share)
        assert patch_dropout_of(model.clip) == share
        assert list(model.state_dict()) == keys and sum(1 for _ in model.parameters()) == parameters
        count, features = _tokens(model.train(), block)
        assert count == patches * (1 - share) + kept
        different = (features[0] - features[1]).abs().max() > 1e-4  # the three images are the same
        assert different == (share > 0)
        count, features = _tokens(model.eval(), block)
        assert count == patches + kept
        torch.testing.assert_close(features, whole, rtol=0, atol=0)


def test_a_tower_in_evaluation_stays_so(tower):
    model, patches, kept, block = tower
    set_patch_dropout(model.eval().clip, 0.5)
    assert _tokens(model, block)[0] == patches + kept
    set_patch_dropout(model.clip, 0.0)


def test_a_share_that_the_configuration_asked_for_is_seen_and_may_be_changed():
    model = build_model(image={**TINY_IMAGE, "patch_dropout": 0.5}, text=TINY_TEXT, embed_dim=16)
    assert patch_dropout_of(model.clip) == 0.5
    set_patch_dropout(model.clip, 0.0)
    assert patch_dropout_of(model.clip) == 0
    assert _tokens(model.train(), model.clip.visual.transformer.resblocks[0])[0] == 5


@pytest.mark.parametrize("image", [RESNET, EFFICIENTNET], ids=["ModifiedResNet", "EfficientNet"])
def test_towers_without_patches_are_refused(image, request):
    clip = build_model(image=image, text=TINY_TEXT, embed_dim=16).clip
    set_patch_dropout(clip, 0.0)
    assert patch_dropout_of(clip) == 0
    with pytest.raises(UserError, match=rf"patch_dropout=0.5 needs a vision transformer.*{request.node.callspec.id}"):
        set_patch_dropout(clip, 0.5)


@pytest.mark.parametrize("share", [-0.1, 1, 50, float("nan")])
def test_shares_outside_0_to_1_are_refused(share):
    with pytest.raises(UserError, match=r"at least 0 and less than 1"):
        set_patch_dropout(nn.Module(), share)
