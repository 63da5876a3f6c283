"""Captions to token ids: open_clip's BPE or any Hugging Face tokeniser, behind one call that needs no network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy

from quiltnet.errors import UserError
from quiltnet.model.fast_bpe import FastBPE
from quiltnet.model.text_cleaning import Cleaning
from quiltnet.model.tokenizer_config import check_tokenizer_config

# Loader workers are forked after the first use; the library would warn and switch its threads off anyway.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# How vocabularies mark where words begin, go on or end.
_MARKS = re.compile("^(##|▁|Ġ)|</w>$")


class Tokenizer:
    """``captions`` (N strings) -> ``(N, context_length)`` int64, truncated and padded as the text tower was trained.

    Attributes:
        pad_id: what texts are filled up with; None where padding does not stand at the end, or is not known.
    """

    def __init__(self, tokenize: Any, context_length: int) -> None:
        self.context_length = context_length
        self._tokenize = tokenize
        self._read = _reader(tokenize)
        self.pad_id: int | None = self._read.pad_id

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return self._read(list(captions), self.context_length)[0]

    def measure(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids: ``(N, context_length)`` int64; length: ``(N,)`` int64, tokens of each whole text, start and end too."""
        return self._read(list(captions), self.context_length)

    def count_tokens(self, caption: str) -> int:
        """Of the whole text, start and end too: more than ``context_length`` where the call cuts it."""
        return int(self.measure([caption])[1])

    def pieces(self, caption: str) -> list[str | None]:
        """Of each place of the row, the piece of the caption it stands for; None for what the tokeniser adds.

        Pieces are as they stand in the caption, cleaned as the tokeniser cleans it and without the marks that
        vocabularies have ("##s", "s</w>"): ``cilia`` may give ``cil`` and ``ia``.
        """
        found = self._read.pieces(caption, self.context_length)
        return found + [None] * (self.context_length - len(found))

    @property
    def open_clip_tokenizer(self) -> Any:
        """The one of open_clip that this stands before, whose ids it gives."""
        return self._tokenize

    @property
    def vocab_size(self) -> int:
        """Number of ids it can produce; a text tower with fewer embedding rows cannot read them."""
        inner = getattr(self._tokenize, "tokenizer", self._tokenize)
        return len(inner) if hasattr(inner, "__len__") else inner.vocab_size

    def save(self, folder: Path) -> None:
        """Write what ``open_clip.get_tokenizer("local-dir:…")`` reads. open_clip's own BPE needs no file."""
        if isinstance(self._tokenize, open_clip.tokenizer.HFTokenizer):
            self._tokenize.save_pretrained(folder)


@dataclass(frozen=True)
class BatchTokenizer:
    """B captions -> text ``(B, L')`` int64 and truncated ``(B,)`` bool: texts that were cut to ``context_length``.

    L' is the longest text's length rounded up to one of ``lengths``, at most five, so that ``torch.compile`` meets few
    shapes. Ids are those of ``tokenize``; only padding is left out.

    Attributes:
        tokenize: gives the ids.
        trim: whether padding may be left out, which the text tower decides; else L' is always ``context_length``.
    """

    tokenize: Tokenizer
    trim: bool

    @property
    def lengths(self) -> list[int]:
        """Every L' there is, ascending; the last is ``context_length``. 16, 32, 48, 64, 77 and 64, 128, 192, 256."""
        context_length = self.tokenize.context_length
        step = 16 * -(-context_length // 80)
        return [*range(step, context_length, step), context_length] if self.trim else [context_length]

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        text, length = self.tokenize.measure(captions)
        longest = min(int(length.max()), self.tokenize.context_length)
        shape = next(bucket for bucket in self.lengths if bucket >= longest)
        return text[:, :shape].contiguous(), length > self.tokenize.context_length


def bpe_tokenizer(context_length: int, **options: Any) -> Tokenizer:
    """CLIP's byte-pair encoding; its vocabulary is in open_clip's wheel."""
    return Tokenizer(open_clip.SimpleTokenizer(context_length=context_length, **options), context_length)


def hugging_face_tokenizer(name_or_folder: str, context_length: int, **options: Any) -> Tokenizer:
    """The tokeniser of a Hugging Face model: a hub name, or a folder with its vocabulary.

    Raises:
        UserError: it is one that is not in transformers, but is code in its repository; or names files elsewhere.
    """
    check_tokenizer_config(name_or_folder)
    options["trust_remote_code"] = False
    try:
        return Tokenizer(open_clip.tokenizer.HFTokenizer(name_or_folder, context_length, **options), context_length)
    except ValueError as error:
        raise refused_code(error, name_or_folder) from error


def refused_code(error: ValueError, name: str) -> Exception:
    """The message where transformers would have to run code of a repository; any other error as it is."""
    if "trust_remote_code" not in str(error):
        return error
    return UserError(f"{name} is code of its repository, which is never run here; take one that transformers has")


def built_in_tokenizer(architecture: str, context_length: int) -> Tokenizer:
    """The tokeniser that open_clip registers for one of its architectures."""
    return Tokenizer(open_clip.get_tokenizer(architecture, context_length=context_length), context_length)


def _reader(tokenize: Any) -> FastBPE | _HuggingFace | _AsIs:
    if type(tokenize) is open_clip.SimpleTokenizer:
        return FastBPE(tokenize)
    if type(tokenize) is open_clip.tokenizer.HFTokenizer and not tokenize.tokenizer_mode:
        inner = tokenize.tokenizer
        if inner.is_fast and inner.padding_side == "right" and inner.pad_token_id is not None:
            return _HuggingFace(tokenize)
    return _AsIs(tokenize)


class _HuggingFace:
    """The ids of open_clip's ``HFTokenizer``, padded here: the library makes five lists of 256 for each short text."""

    def __init__(self, reference: open_clip.tokenizer.HFTokenizer) -> None:
        self._reference = reference
        self._clean = Cleaning(reference.clean_fn)
        self.pad_id: int = reference.tokenizer.pad_token_id

    def __call__(self, texts: list[str], context_length: int) -> tuple[Tensor, Tensor]:
        inner = self._reference.tokenizer
        inner.set_truncation_and_padding(
            PaddingStrategy.DO_NOT_PAD,
            TruncationStrategy.LONGEST_FIRST,
            max_length=context_length,
            stride=0,
            pad_to_multiple_of=None,
            padding_side=None,
        )
        encodings = inner.backend_tokenizer.encode_batch_fast([self._clean(text) for text in texts])
        text = np.full((len(texts), context_length), self.pad_id, np.int64)
        for row, encoding in zip(text, encodings, strict=True):
            row[: len(encoding)] = encoding.ids
        if self._reference.strip_sep_token:
            text[text == inner.sep_token_id] = 0
        added = inner.num_special_tokens_to_add()
        length = [len(kept) + sum(len(rest) - added for rest in kept.overflowing) for kept in encodings]
        return torch.from_numpy(text), torch.tensor(length, dtype=torch.int64)

    def pieces(self, caption: str, context_length: int) -> list[str | None]:
        """As ``Tokenizer.pieces``, without padding."""
        self([caption], context_length)  # sets the library's truncation
        caption = self._clean(caption)
        encoding = self._reference.tokenizer.backend_tokenizer.encode(caption)
        # Whole characters, of which a piece of bytes may be a part; a word that is not known keeps its letters.
        return [
            None if is_added else caption[start:end].strip()
            for (start, end), is_added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        ]


class _AsIs:
    """Any other tokeniser, by its own call. A text is taken as too long if one more place has one more token."""

    pad_id = None

    def __init__(self, tokenize: Any) -> None:
        self._tokenize = tokenize

    def __call__(self, texts: list[str], context_length: int) -> tuple[Tensor, Tensor]:
        """As ``Tokenizer.measure``; the length of a text that is too long is given as ``context_length + 1``."""
        padding = getattr(getattr(self._tokenize, "tokenizer", None), "pad_token_id", None) or 0
        text = self._tokenize(texts, context_length=context_length)
        used = (text != padding).sum(-1)
        with_one_more = (self._tokenize(texts, context_length=context_length + 1) != padding).sum(-1)
        return text, torch.where(with_one_more > used, context_length + 1, used)

    def pieces(self, caption: str, context_length: int) -> list[str | None]:
        """As ``Tokenizer.pieces``, by what the tokeniser itself calls its tokens."""
        inner = self._tokenize.tokenizer
        added = set(inner.all_special_ids) - {inner.unk_token_id}
        ids = self._tokenize([caption], context_length=context_length)[0].tolist()
        names = inner.convert_ids_to_tokens(ids)
        return [None if i in added else _MARKS.sub("", name) for i, name in zip(ids, names, strict=True)]
