"""Load a model from wherever it lies; export it in open_clip's layout, proven by loading it back."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import open_clip
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import save_file

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model, load_folder
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.embedder import Embedder
from quiltnet.model.folder import CONFIG_NAME, WEIGHTS_NAME, write_description
from quiltnet.model.transformers_clip import is_transformers_clip, load_transformers_clip
from quiltnet.model.weights import hub_access
from quiltnet.training.checkpoint import WEIGHTS_NAME as CHECKPOINT_WEIGHTS_NAME
from quiltnet.training.checkpoint import latest_checkpoint

HUB_PREFIX = "hub:"
DESCRIPTION_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
EXPORT_TOLERANCE = 1e-5


def load(source: str | Path) -> Embedder:
    """A model ready to encode: ``encode_images(list of PIL)``, ``encode_text(list of str)``.

    Args:
        source: a run directory, one of its checkpoints, a folder in the layout of open_clip (an export) or of
            transformers' ``CLIPModel``, ``hub:org/name`` of either layout, or ``architecture:pretrained`` by
            open_clip's names.
    """
    return Embedder(load_model(source))


def load_model(source: str | Path) -> ContrastiveModel:
    """As ``load``, the model itself."""
    name = str(source)
    path = Path(name)
    if name.startswith(HUB_PREFIX):
        repository = name.removeprefix(HUB_PREFIX)
        with hub_access(f"the model {repository}", "give a local folder in the layout of open_clip or transformers"):
            path = Path(snapshot_download(repository))
    if (path / CONFIG_NAME).is_file():
        return load_folder(path)
    if is_transformers_clip(path):
        return load_transformers_clip(path)
    if (path / CHECKPOINT_WEIGHTS_NAME).is_file():
        return _load_checkpoint(path)
    if (path / DESCRIPTION_FOLDER / CONFIG_NAME).is_file():
        checkpoint = latest_checkpoint(path / CHECKPOINTS_FOLDER)
        if checkpoint is None:
            raise UserError(f"{path} has no finished checkpoint yet")
        return _load_checkpoint(checkpoint)
    architecture, colon, pretrained = name.partition(":")
    if colon and not path.exists():
        return build_model(architecture, pretrained=pretrained)
    raise UserError(
        f"{name} is no model: give a run directory (outputs/…), an exported folder with {CONFIG_NAME}, a folder of "
        "transformers whose config.json names CLIPModel, hub:org/name, or an open_clip name:tag such as ViT-B-32:openai"
    )


def export_open_clip(model: ContrastiveModel, out: Path) -> float:
    """Write a folder that ``open_clip`` loads by ``local-dir:``, and compare embeddings before saying so.

    The folder appears under its name only when the comparison has passed.

    Returns:
        The largest difference between embeddings of our model and of open_clip's reload.

    Raises:
        UserError: ``out`` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already; give another --out, or remove it")
    unfinished = out.parent / f".{out.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model = deepcopy(model).eval().cpu()  # the caller may go on training with it
    try:
        write_description(model, unfinished)
        weights = {name: tensor.contiguous() for name, tensor in model.clip.state_dict().items()}
        save_file(weights, unfinished / WEIGHTS_NAME)
        difference = compare_with_open_clip(model, unfinished)
        if not difference <= EXPORT_TOLERANCE:
            raise RuntimeError(
                f"open_clip reloads the export with embeddings that differ by {difference:.1e} "
                f"(limit {EXPORT_TOLERANCE:.0e}); nothing was written to {out}"
            )
        # A Hugging Face tower is found by absolute path, which the move changes.
        write_description(model, unfinished, final=out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


@torch.no_grad()
def compare_with_open_clip(model: ContrastiveModel, folder: Path) -> float:
    """Largest absolute difference of unit embeddings, ours against open_clip's reload of ``folder``."""
    try:
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    except RuntimeError as error:
        raise UserError(
            f"open_clip cannot load this model back ({error}); it builds a timm vision transformer at its own image "
            "size only, so such a tower must be trained at that size to be exported"
        ) from error
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    noise = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    captions = ["A histopathology slide showing glands.", "smooth muscle, H&E"]
    theirs.eval()
    pairs = [
        (
            model.encode_image(model.transform(image)[None]),
            theirs.encode_image(transform(image)[None], normalize=True),
        ),
        (model.encode_text(model.tokenize(captions)), theirs.encode_text(tokenize(captions), normalize=True)),
    ]
    return max((ours - other).abs().max().item() for ours, other in pairs)


def _load_checkpoint(checkpoint: Path) -> ContrastiveModel:
    description = checkpoint.resolve().parent.parent / DESCRIPTION_FOLDER
    if not (description / CONFIG_NAME).is_file():
        raise UserError(f"{checkpoint} stands outside a run directory; its model is described in {description}")
    return load_folder(description, weights=checkpoint / CHECKPOINT_WEIGHTS_NAME)
