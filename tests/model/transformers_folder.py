"""A small random CLIP model in a folder, as transformers saves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = "<|startoftext|>", "<|endoftext|>"


def small_tokenizer() -> CLIPTokenizer:
    """A letter a token, and two merges; the end token has the highest id, as CLIP's has."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "gl", "gla", START, END]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("g", "l"), ("gl", "a")])


def small_clip(hidden_act: str = "gelu", eos_token_id: int | None = None, **vision: Any) -> CLIPModel:
    """Every parameter random, norms and biases too.

    Args:
        eos_token_id: of the configuration; the tokeniser's own where not given.
    """
    tokenizer = small_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 76,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "hidden_act": hidden_act,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id if eos_token_id is None else eos_token_id,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": hidden_act,
        **vision,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def save_clip(model: CLIPModel, folder: Path) -> Path:
    """Model, tokeniser and image processor, each in files of its own."""
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    small_image_processor().save_pretrained(folder)
    return folder


def small_image_processor() -> CLIPImageProcessor:
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return CLIPImageProcessor(**sides, image_mean=[0.7, 0.5, 0.6], image_std=[0.2, 0.3, 0.2])


def small_processor() -> CLIPProcessor:
    return CLIPProcessor(small_image_processor(), small_tokenizer())
