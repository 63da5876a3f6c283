"""Small random towers, and a Hugging Face text tower's folder made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel

TINY_IMAGE = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
TINY_TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
TINY_VIT = {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}


def tiny_model(**options: Any) -> ContrastiveModel:
    torch.manual_seed(0)
    return build_model(image=TINY_IMAGE, text=TINY_TEXT, embed_dim=16, **options)


def bert_folder(parent: Path) -> Path:
    """A BERT of one layer with 64 positions, saved as transformers saves it."""
    folder = parent / "bert"
    if not folder.exists():
        folder.mkdir()
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fatty", "tissue", "gland", "##s", "a", "of"]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
