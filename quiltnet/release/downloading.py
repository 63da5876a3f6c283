"""A repository of the hub becomes a local folder: of its files only those that a model is read from."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from quiltnet.model.folder import CONFIG_NAME
from quiltnet.model.timm_folder import FOLDER_NAME as TIMM_FOLDER
from quiltnet.model.weights import hub_access

# By name, not by ending: a repository may hold anything beside, and code is never fetched.
_DESCRIPTION = (
    CONFIG_NAME, f"{TIMM_FOLDER}/config.json", "config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "model.safetensors.index.json", "pytorch_model.bin.index.json"
)  # fmt: skip
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
# As the first QuiltNets were published; they are opened as tensors and nothing else.
_OPEN_CLIP_PICKLES = ("open_clip_pytorch_model.bin",)
_TRANSFORMERS_PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")


def download(repository: str) -> Path:
    """Fetch ``org/name`` or ``org/name@revision`` into the hub's cache; the weights of one layout, open_clip's first.

    Pickles come only where there are no safetensors.

    Raises:
        UserError: the hub cannot be reached, or has no such repository.
    """
    name, _, revision = repository.partition("@")
    with hub_access(f"the model {repository}", "give a local folder in the layout of open_clip or transformers"):
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_DESCRIPTION))
        is_open_clip = (folder / CONFIG_NAME).is_file()
        of_open_clip = [_OPEN_CLIP_WEIGHTS, _OPEN_CLIP_PICKLES] if is_open_clip else []
        for patterns in (*of_open_clip, _TRANSFORMERS_WEIGHTS, _TRANSFORMERS_PICKLES):
            snapshot_download(name, revision=folder.name, allow_patterns=patterns)  # named by its commit
            if any(path for pattern in patterns for path in folder.glob(pattern)):
                break
    return folder
