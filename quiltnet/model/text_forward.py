"""Features of texts without their padding, where they are the same as with it."""

from __future__ import annotations

from open_clip import CLIP
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.transformer import TextTransformer, Transformer, text_global_pool
from torch import Tensor, nn

# Encoders whose attention leaves masked tokens out and whose positions do not depend on the number of tokens behind.
_MASKED_ENCODERS = {"bert", "roberta", "xlm-roberta"}
_MASKED_POOLERS = {MeanPooler, ClsPooler, ClsLastHiddenStatePooler}


def padding_is_idle(clip: nn.Module, pad_id: int | None) -> bool:
    """Whether features of a text are the same without the padding behind it; False wherever that is not certain.

    Under a causal mask no place sees what stands behind it, and a text is pooled at its end token (``last`` pooling
    takes the last place, padding or not); or the tower masks padding itself.

    Args:
        pad_id: what the tokeniser fills up with at the end; None where it does something else.
    """
    if pad_id is None:
        return False
    tower = getattr(clip, "text", clip)
    if type(tower) is HFTextEncoder:
        config = tower.config
        masks = config.model_type in _MASKED_ENCODERS and type(tower.pooler) in _MASKED_POOLERS
        return masks and config.pad_token_id == pad_id and not tower.output_tokens
    if not is_causal(tower):
        return False
    pool_type, end_id = _pooling(tower)
    # argmax finds the end token by the highest id, or its first of several; 0 is never above another.
    return (pool_type == "argmax" and pad_id == 0) or (pool_type == "eos" and pad_id != end_id)


def encode_text(clip: nn.Module, text: Tensor) -> Tensor:
    """``clip.encode_text``, which in open_clip 3.3 fails in causal towers where L is below ``context_length``.

    Args:
        text: ``(B, L)`` int64.

    Returns:
        ``(B, D)``, not normalised.
    """
    tower = getattr(clip, "text", clip)
    if not is_causal(tower) or text.shape[1] == tower.context_length:
        return clip.encode_text(text)
    return encode_causal_text(tower, text)


def encode_causal_text(tower: nn.Module, text: Tensor) -> Tensor:
    """Operation for operation what open_clip does with a text of full length, for any length up to that.

    Args:
        tower: one of which ``is_causal``.
        text: ``(B, L)`` int64.
    """
    length = text.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(text).to(dtype)
    x = x + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length].contiguous())
    x = tower.ln_final(x)
    pool_type, end_id = _pooling(tower)
    pooled = text_global_pool(x, text, pool_type, eos_token_id=end_id)
    if tower.text_projection is None:
        return pooled
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(pooled)
    return pooled @ tower.text_projection


def is_causal(tower: nn.Module) -> bool:
    """One of open_clip's own text towers with its causal mask, and nothing but the text in its sequence."""
    return (
        type(tower) in (CLIP, TextTransformer)
        and type(tower.transformer) is Transformer
        and tower.attn_mask is not None
        and len(tower.positional_embedding) == tower.context_length
        and not getattr(tower, "output_tokens", False)
    )


def _pooling(tower: nn.Module) -> tuple[str, int]:
    """How a native tower makes one vector of a text, and the end token it may look for."""
    if type(tower) is CLIP:
        return tower.text_pool_type, tower.text_eos_id
    return tower.pool_type, tower.eos_id
