"""Features of a frozen teacher, kept beside each sample: computed once, learned from in every epoch.

The idea is MobileCLIP's reinforced data set (Vasu et al. 2024, arXiv 2311.17049), which keeps features of many
augmented views of an image; here it is one, of the image as it is stored.

A member ``{key}.teacher.safetensors`` holds ``image`` (D',) and ``text`` (captions, D'), float16, unit length but for
their rounding, in the order of the sample's captions.
"""

from __future__ import annotations

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from quiltnet.data.decoding import BrokenSample

TEACHER_EXTENSION = "teacher.safetensors"


def pack_features(image: np.ndarray, texts: np.ndarray) -> bytes:
    """image: (D',); texts: (captions, D')."""
    return save({"image": image.astype(np.float16), "text": texts.astype(np.float16)})


def parse_features(data: bytes, captions: int) -> tuple[np.ndarray, np.ndarray]:
    """``(D',)`` and ``(captions, D')`` float32.

    Raises:
        BrokenSample: no_teacher_features, where ``data`` is empty; broken_teacher_features.
    """
    if not data:
        raise BrokenSample("no_teacher_features")
    try:
        stored = load(data)
        image, texts = stored["image"].astype(np.float32), stored["text"].astype(np.float32)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BrokenSample("broken_teacher_features") from error
    are_whole = image.ndim == 1 and texts.shape == (captions, len(image)) and np.isfinite(image).all()
    if not are_whole or not np.isfinite(texts).all():
        raise BrokenSample("broken_teacher_features")
    return image, texts
