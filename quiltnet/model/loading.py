"""Models of earlier runs and of others, as they lie on a disk: open_clip's layout and OpenAI's own file."""

from __future__ import annotations

from pathlib import Path

from quiltnet.errors import UserError
from quiltnet.model.adapters import apply_tuning, merge_lora, read_adapters
from quiltnet.model.assembly import assemble, build_tokenizer, load_model_weights
from quiltnet.model.changes import Changes
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.folder import find_weights, read_description
from quiltnet.model.published_layouts import is_openai, known_bert, openai_description
from quiltnet.model.weights import described_by, read_weights, resolve_path

AS_IT_IS = Changes()


def load_folder(
    folder: str | Path, *, weights: str | Path | None = None, changes: Changes = AS_IT_IS
) -> ContrastiveModel:
    """The model of a folder in open_clip's layout, with the folder's weights or those of another file.

    Adapters (LoRA) of a run's folder are added to the weights they belong to: the model is one without.
    """
    folder = resolve_path(str(folder))
    with described_by(folder):
        description = read_description(folder)
        file = Path(weights) if weights else find_weights(folder)
        tensors = read_weights(file)
        changes.apply(description)
        model = assemble(
            description,
            build_tokenizer(description),
            batchnorm=changes.batchnorm,
            text_config=known_bert(description.model_cfg["text_cfg"].get("hf_model_name"), tensors),
        )
        tuning = read_adapters(folder)
        if tuning is not None:
            apply_tuning(model, tuning)
    load_model_weights(model, tensors, str(file), resize=changes.resize)
    return model if tuning is None else _without_adapters(model)


def load_openai(file: Path, *, changes: Changes = AS_IT_IS) -> ContrastiveModel:
    """The model of a file that OpenAI published, such as ``ViT-B-32.pt``: QuickGELU, the architecture by its tensors.

    Raises:
        UserError: a file of other tensors, which say neither their architecture nor their activation.
    """
    tensors = read_weights(file, torchscript=True)
    if not is_openai(tensors):
        raise UserError(
            f"{file} holds tensors that do not say which model they are of; say it yourself: model=ViT-B-32 "
            f"model.pretrained={file} model.quick_gelu=false, or give the folder that the file lies in"
        )
    with described_by(file):
        description = openai_description(tensors)
        changes.apply(description)
        model = assemble(description, build_tokenizer(description), batchnorm=changes.batchnorm)
    load_model_weights(model, tensors, str(file), resize=changes.resize)
    return model


def _without_adapters(model: ContrastiveModel) -> ContrastiveModel:
    """Adapters merged, and all trains again, as in a model that was never tuned."""
    model = merge_lora(model)
    for name, parameter in model.clip.named_parameters():
        parameter.requires_grad_(name != "logit_bias")
    return model
