"""CLIP's byte-pair encoding, several times faster than open_clip's, with the same ids for any text.

What is between two spaces is looked up whole: captions repeat their words. For a new one open_clip's own pattern finds
the words in it (no match of it holds white space, so it finds the same ones there as in the whole text), and the BPE of
Hugging Face's tokenizers, built from open_clip's vocabulary and merges, splits them. (Each piece of the vocabulary has
one merge, which comes after those of its parts; so the order in which equal pairs are merged cannot matter.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import torch
from tokenizers.models import BPE
from torch import Tensor

from quiltnet.model.text_cleaning import Cleaning

_REMEMBERED = 32_768  # about 5 MB
_LONGEST_REMEMBERED = 64  # characters


class FastBPE:
    """The ids of open_clip's ``SimpleTokenizer``, with its vocabulary, cleaning and special tokens.

    Pickled, it is the reference alone; what it remembers of words is bounded, and each process has its own.
    """

    def __init__(self, reference: open_clip.SimpleTokenizer) -> None:
        self.reference = reference
        self._clean = Cleaning(reference.clean_fn)
        self._chunks = _Chunks(reference)
        # A reduction_mask may take other words than it was given (nltk's), so its padding is not counted on.
        self.pad_id = 0 if reference.reduction_fn is None else None
        self._has_added_tokens = len(reference.all_special_ids) > 2

    def __reduce__(self) -> tuple[Any, ...]:
        return FastBPE, (self.reference,)

    def encode(self, text: str) -> np.ndarray:
        """``(n,)`` int32: all ids of the text, without start and end."""
        if self._has_added_tokens:
            return self._encode_slowly(text)
        chunks = self._clean(text).split(" ")
        return np.frombuffer(b"".join(map(self._chunks.__getitem__, chunks)), np.int32)

    def __call__(self, texts: list[str], context_length: int) -> tuple[Tensor, Tensor]:
        """ids: ``(N, context_length)`` int64, as open_clip's call gives them; length: ``(N,)`` int64, uncut."""
        encoded = [self.encode(text) for text in texts]
        length = torch.tensor([len(ids) + 2 for ids in encoded], dtype=torch.int64)
        if self.reference.reduction_fn is not None:
            return self._reduce(texts, context_length), length
        text = np.zeros((len(texts), context_length), np.int64)
        for row, ids in zip(text, encoded, strict=True):
            end = min(len(ids) + 1, context_length - 1)
            row[0] = self.reference.sot_token_id
            row[1:end] = ids[: max(end - 1, 0)]
            row[end] = self.reference.eot_token_id
        return torch.from_numpy(text), length

    def pieces(self, text: str, context_length: int) -> list[str | None]:
        """Of each place of the row, the text of its token; None for start and end. Without padding."""
        ids, length = self([text], context_length)
        end = min(int(length), context_length) - 1
        return [None, *(self.reference.decode([number]).strip() for number in ids[0, 1:end].tolist()), None]

    def _encode_slowly(self, text: str) -> np.ndarray:
        """Tokens that a user adds are patterns to open_clip, and may match white space too."""
        if len(self.reference.cache) > _REMEMBERED:  # open_clip's own has no bound
            special = [self.reference.decoder[number] for number in self.reference.all_special_ids]
            self.reference.cache = {token: token for token in special}
        return np.array(self.reference.encode(text), np.int32)

    def _reduce(self, texts: list[str], context_length: int) -> Tensor:
        """open_clip's ``reduction_mask`` options: which tokens of a long text are kept."""
        return self.reference.reduction_fn(
            texts,
            context_length=context_length,
            sot_token_id=self.reference.sot_token_id,
            eot_token_id=self.reference.eot_token_id,
            encode_fn=lambda text: self.encode(text).tolist(),
        )


class _Chunks(dict[str, bytes]):
    """What is between two spaces -> its ids, as the bytes of an int32 array; empties itself when it is full."""

    def __init__(self, reference: open_clip.SimpleTokenizer) -> None:
        super().__init__()
        self._reference = reference
        self._special = {reference.decoder[number]: [number] for number in reference.all_special_ids}
        merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
        self._bpe = BPE(vocab=reference.encoder, merges=merges, end_of_word_suffix="</w>", cache_capacity=0)

    def __missing__(self, chunk: str) -> bytes:
        ids = [number for word in self._reference.pat.findall(chunk) for number in self._ids(word)]
        as_bytes = np.array(ids, np.int32).tobytes()
        if len(chunk) <= _LONGEST_REMEMBERED:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[chunk] = as_bytes
        return as_bytes

    def _ids(self, word: str) -> list[int]:
        letters = self._reference.byte_encoder
        token = "".join([letters[byte] for byte in word.encode("utf-8")])
        return self._special.get(token) or [piece.id for piece in self._bpe.tokenize(token)]
