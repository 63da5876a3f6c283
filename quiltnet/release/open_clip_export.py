"""An export in open_clip's layout, and what open_clip makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.folder import CONFIG_NAME, WEIGHTS_NAME, write_description
from quiltnet.model.timm_folder import FOLDER_NAME as TIMM_FOLDER
from quiltnet.model.timm_folder import LOCAL_PREFIX
from quiltnet.release.comparison import LIMIT, Comparison, Reference
from quiltnet.release.tokenizer_files import write_tokenizer
from quiltnet.whole_files import as_any_file, write_whole

LIBRARY = "open_clip"


def write_open_clip(model: ContrastiveModel, folder: Path, *, half: bool = False) -> None:
    """Configuration with activation and preprocessing, weights, and tokeniser files.

    open_clip needs no file for CLIP's own tokeniser; those are for everybody else.
    """
    write_description(model, folder)
    write_tokenizer(model.tokenize, folder)
    weights = {name: tensor.contiguous() for name, tensor in model.clip.state_dict().items()}
    if half:
        weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    as_any_file(folder / WEIGHTS_NAME)


def name_repository(folder: Path, repository: str) -> None:
    """Make the export one for the hub, in place: open_clip finds a Hugging Face text tower in ``repository``.

    Before, it found it by a path of this machine, which nobody else has. ``quiltnet.load`` looks into the folder
    either way. Nothing happens where there is nothing to change.
    """
    config = folder / CONFIG_NAME
    if not config.is_file():
        return
    content = json.loads(config.read_text(encoding="utf-8"))
    vision_cfg, text_cfg = content["model_cfg"]["vision_cfg"], content["model_cfg"]["text_cfg"]
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text_cfg.get(key):
            text_cfg[key] = repository
    if str(vision_cfg.get("timm_model_name")).startswith(LOCAL_PREFIX):
        vision_cfg["timm_model_name"] = f"{LOCAL_PREFIX}{TIMM_FOLDER}"
    write_whole(config, json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def compare_with_open_clip(reference: Reference, folder: Path) -> list[Comparison]:
    """Embeddings of open_clip's reload of ``folder``, by its own transform and tokeniser.

    Raises:
        UserError: open_clip cannot build the model again.
        NotEqual: other tokens, or another ``logit_scale``.
    """
    source = f"local-dir:{folder}"
    try:
        theirs, _, transform = open_clip.create_model_and_transforms(source)
    except RuntimeError as error:
        raise UserError(
            f"open_clip cannot load this model back ({error}); a timm tower whose windows follow the image size must "
            "be trained at its own image size to be exported"
        ) from error
    theirs.eval()
    text = open_clip.get_tokenizer(source)(list(reference.captions))
    reference.check_ids(LIBRARY, [row[:length] for row, length in zip(text.tolist(), reference.lengths, strict=True)])
    reference.check_scale(LIBRARY, theirs.logit_scale.item())
    pixels = torch.stack([transform(image) for image in reference.images])
    difference = reference.features_difference(theirs.encode_image(pixels), theirs.encode_text(text))
    return [Comparison(LIBRARY, difference, LIMIT, "embeddings")]
