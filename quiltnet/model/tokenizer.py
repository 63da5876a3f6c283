"""Captions to token ids: open_clip's BPE or any Hugging Face tokeniser, behind one call that needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

# Loader workers are forked after the first use; the library would warn and switch its threads off anyway.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """``captions`` (N strings) -> ``(N, context_length)`` int64, truncated and padded as the text tower was trained."""

    def __init__(self, tokenize: Any, context_length: int) -> None:
        self._tokenize = tokenize
        self.context_length = context_length

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return self._tokenize(list(captions), context_length=self.context_length)

    @property
    def vocab_size(self) -> int:
        """Number of ids it can produce; a text tower with fewer embedding rows cannot read them."""
        inner = getattr(self._tokenize, "tokenizer", self._tokenize)
        return len(inner) if hasattr(inner, "__len__") else inner.vocab_size

    def save(self, folder: Path) -> None:
        """Write what ``open_clip.get_tokenizer("local-dir:…")`` reads. open_clip's own BPE needs no file."""
        if isinstance(self._tokenize, open_clip.tokenizer.HFTokenizer):
            self._tokenize.save_pretrained(folder)


def bpe_tokenizer(context_length: int, **options: Any) -> Tokenizer:
    """CLIP's byte-pair encoding; its vocabulary is in open_clip's wheel."""
    return Tokenizer(open_clip.SimpleTokenizer(context_length=context_length, **options), context_length)


def hugging_face_tokenizer(name_or_folder: str, context_length: int, **options: Any) -> Tokenizer:
    """The tokeniser of a Hugging Face model: a hub name, or a folder with its vocabulary."""
    return Tokenizer(open_clip.tokenizer.HFTokenizer(name_or_folder, context_length, **options), context_length)


def built_in_tokenizer(architecture: str, context_length: int) -> Tokenizer:
    """The tokeniser that open_clip registers for one of its architectures."""
    return Tokenizer(open_clip.get_tokenizer(architecture, context_length=context_length), context_length)
