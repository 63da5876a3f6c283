"""Which tokens of a text its similarity to an image comes from."""

from __future__ import annotations

from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from quiltnet.model.attention_relevance import RecordAttention, token_relevance
from quiltnet.model.image_relevance import captured
from quiltnet.model.text_forward import encode_text


class TextTrace:
    """One text through a model's text tower, with what its relevance is computed from.

    Attributes:
        features: (1, D), not normalised.
        points: tensors of the graph at which gradients are wanted.
    """

    def __init__(self, clip: nn.Module, text: Tensor) -> None:
        tower = getattr(clip, "text", clip)
        self._length = text.shape[1]
        with captured(_embedding(tower)) as embeddings, captured(tower.transformer) as last:
            with RecordAttention() as attention:
                self.features = encode_text(clip, text)
        self._embeddings, self._last, self._weights = embeddings[0], last[-1], attention.weights
        self.points = [self._embeddings, self._last, *self._weights]

    def relevance(self, gradients: list[Tensor]) -> Tensor:
        """``(L,)`` by the gradients at ``points``.

        By attention and its gradient (``token_relevance``), never negative. Where attention is not to be had, gradient
        times input embedding, which is negative for tokens that speak against the image.
        """
        embedding_gradient, last_gradient, *attention_gradients = gradients
        row = token_relevance(self._weights, attention_gradients, self._last, last_gradient)
        if row is None or len(row) < self._length:
            return (self._embeddings[0].float() * embedding_gradient[0].float()).sum(dim=-1)
        return row[: self._length]  # CoCa's towers have a token of their own behind the text


def _embedding(tower: nn.Module) -> nn.Module:
    if isinstance(tower, HFTextEncoder):
        return tower.transformer.get_input_embeddings()
    return tower.token_embedding
