"""A model's tokeniser in the files that transformers, tokenizers and the hub read, made without a network."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import open_clip
from open_clip.tokenizer import get_clean_fn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from quiltnet.model.tokenizer import Tokenizer

# open_clip's names of the two tokens around a text, and those of OpenAI's files.
_MARKS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def transformers_tokenizer(tokenize: Tokenizer) -> PreTrainedTokenizerBase | None:
    """The tokeniser with the same ids, cut at the model's context length; None where transformers has no equal.

    CLIP's vocabulary and merges are those in open_clip's wheel. open_clip repairs a text first (``ftfy``, HTML
    entities), which no file can say: of such texts the ids differ.
    """
    reference = tokenize.open_clip_tokenizer
    if type(reference) is open_clip.tokenizer.HFTokenizer:
        inner = deepcopy(reference.tokenizer)
        inner.model_max_length = tokenize.context_length
        return inner
    if not _is_clips(reference):
        return None
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
    vocabulary = {_MARKS.get(piece, piece): number for piece, number in reference.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokenize.context_length)


def write_tokenizer(tokenize: Tokenizer, folder: Path) -> None:
    """Nothing where transformers has no equal."""
    tokenizer = transformers_tokenizer(tokenize)
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, CLIPTokenizer):  # vocab.json and merges.txt, which transformers read before 5
        tokenizer.backend_tokenizer.model.save(str(folder))


def _is_clips(reference: object) -> bool:
    """open_clip's own byte-pair encoding, without added tokens or another cleaning or cutting."""
    return (
        type(reference) is open_clip.SimpleTokenizer
        and len(reference.all_special_ids) == len(_MARKS)
        and reference.clean_fn is get_clean_fn("lower")
        and reference.reduction_fn is None
    )
