"""Small random models in the layouts that OpenAI and the QuiltNets were published in."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path

import open_clip
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.model.towers import TINY_VIT

PUBMEDBERT = "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}


def openai_clip(quick_gelu: bool = True) -> nn.Module:
    """Of OpenAI's form at a small size; no two parameters alike, values as float16 has them."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(16, deepcopy(VISION), deepcopy(TEXT), quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn(parameter.shape)).half())
    return clip


class _OpenAIForm(nn.Module):
    """The names of OpenAI's state dict: the text tower unwrapped, three numbers beside the weights."""

    def __init__(self, clip: nn.Module, marked: bool = True) -> None:
        super().__init__()
        for name in ("visual", "transformer", "token_embedding", "ln_final"):
            setattr(self, name, getattr(clip, name))
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(clip, name))
        if marked:
            for name, number in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 49408)):
                self.register_buffer(name, torch.tensor(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * x


def save_openai(clip: nn.Module, file: Path, *, marked: bool = True) -> Path:
    """A TorchScript archive of float16 weights."""
    module = _OpenAIForm(deepcopy(clip), marked).half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, torch.ones(1)).save(str(file))
    return file


def save_pmb(folder: Path, vocabulary: Path | None = None) -> Path:
    """QuiltNet-B-16-PMB as it lies on the hub, with smaller towers: no configuration of BERT, old keys, a pickle."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fatty", "tissue", "gland", "##s", "a", "of"]
    text = vocabulary.read_text() if vocabulary else "\n".join(words) + "\n"
    (folder / "vocab.txt").write_text(text)
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    (folder / "vocab.txt").write_text(text)
    bert = BertConfig(
        vocab_size=len(text.splitlines()), hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=96
    )  # fmt: skip
    scratch = folder / "scratch"
    BertModel(bert).save_pretrained(scratch)
    vision_cfg = {**TINY_VIT, "timm_model_pretrained": False, "timm_proj": "linear"}
    new = {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 256}
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(
        32, deepcopy(vision_cfg), {"hf_model_name": str(scratch), "hf_model_pretrained": False, **new}
    )
    weights = clip.state_dict()
    weights["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]  # as transformers kept it then
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    old = {"proj": "mlp", "pooler_type": "cls_last_hidden_state_pooler", "context_length": 256}
    config = {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": vision_cfg,
            "text_cfg": {"hf_model_name": PUBMEDBERT, "hf_tokenizer_name": PUBMEDBERT, **old},
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
