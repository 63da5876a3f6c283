from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from quiltnet.data.captions import CaptionChoice
from quiltnet.data.sentences import SentenceLimit
from quiltnet.errors import UserError

CAPTIONS = ["one", "two words", "three", "too many"]
RECORD = {
    "captions": CAPTIONS,
    "metadata": {"roi_text": ["gland", "", None, "duct"], "magnification": 2.0, "subset": "atlas", "noisy_text": None},
    "caption_metadata": {"corrected_text": ["first corrected", None, "", "  "], "med_umls_ids": [[], [], [], []]},
    "alt_text": "from another tool",
}


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.default_rng(list(seed))


def shares(policy, draws: int = 3000, captions=CAPTIONS, record=RECORD) -> dict[str, float]:
    choose = CaptionChoice(policy)
    counts = Counter(choose(captions, record, rng_of(1, n)) for n in range(draws))
    return {text: times / draws for text, times in counts.items()}


@pytest.mark.parametrize(
    ("policy", "text"),
    [("first", "one"), ("joined", "one two words three too many"), ("longest", "two words")],
)
def test_policies_that_draw_nothing(policy, text):
    rng = rng_of(0)
    state = rng.bit_generator.state
    assert CaptionChoice(policy)(CAPTIONS, RECORD, rng) == text
    assert rng.bit_generator.state == state


def test_random_is_even_and_repeatable():
    assert shares("random") == shares("random") == pytest.approx(dict.fromkeys(CAPTIONS, 0.25), abs=0.03)


def test_weights_are_shares_of_what_is_there():
    """Only the first caption has a corrected text; a list of phrases is drawn from evenly, without its blanks."""
    drawn = shares({"weighted": {"caption": 0.5, "roi_text": 0.25, "corrected_text": 0.25}})
    a_third = 1 / 3  # weights 0.5 and 0.25 where there is no corrected text
    assert drawn == pytest.approx(
        {
            "one": 0.25 * 0.5,
            "first corrected": 0.25 * 0.25,
            "gland": (0.25 * 0.25 + 0.75 * a_third) / 2,
            "duct": (0.25 * 0.25 + 0.75 * a_third) / 2,
            **dict.fromkeys(CAPTIONS[1:], 0.25 * 2 * a_third),
        },
        abs=0.02,
    )


def test_weights_need_not_sum_to_one():
    assert shares({"weighted": {"caption": 7, "roi_text": 3}}) == shares(
        {"weighted": {"caption": 0.7, "roi_text": 0.3}}
    )


@pytest.mark.parametrize("field", ["absent", "noisy_text", "magnification", "med_umls_ids", "metadata", "captions_"])
def test_fields_without_text_fall_through_to_the_caption(field):
    assert set(shares({"weighted": {field: 1}}, draws=100)) == set(CAPTIONS)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"metadata": "not a table", "caption_metadata": None},
        {"caption_metadata": {"corrected_text": "a text, not one a caption"}},
        {"caption_metadata": {"corrected_text": []}},
        {"corrected_text": {"a": "mapping"}},
    ],
)
def test_records_of_any_shape(record):
    chosen = CaptionChoice({"weighted": {"corrected_text": 1}})(["only"], record, rng_of(0))
    assert chosen == "only"


def test_fields_of_other_tools_lie_at_the_top():
    assert shares({"weighted": {"alt_text": 1}}, draws=20) == {"from another tool": 1.0}


def test_a_field_belongs_to_its_caption():
    record = {"caption_metadata": {"corrected_text": ["of a", "of b"], "number": ["a", "b"]}}
    policy = CaptionChoice({"weighted": {"corrected_text": 1, "number": 1}})
    assert {policy(["a", "b"], record, rng_of(n)) for n in range(60)} == {"of a", "of b", "a", "b"}
    pairs = {(CaptionChoice("random")(["a", "b"], record, rng_of(n)), policy(["a", "b"], record, rng_of(n))[-1])
             for n in range(60)}  # fmt: skip
    assert pairs == {("a", "a"), ("b", "b")}  # the same draw of a caption


def test_a_choice_travels_to_workers():
    choice = CaptionChoice({"weighted": {"roi_text": 1}}, sentences=SentenceLimit(len, 3))
    again = pickle.loads(pickle.dumps(choice))
    assert [again(CAPTIONS, RECORD, rng_of(n)) for n in range(9)] == [
        choice(CAPTIONS, RECORD, rng_of(n)) for n in range(9)
    ]


@pytest.mark.parametrize(
    "policy",
    [
        "shortest",
        "weighted",
        {"caption": 1},
        {"weighted": {}},
        {"weighted": "caption"},
        {"weighted": {"a": 1}, "b": 2},
        None,
    ],
)
def test_unknown_policies(policy):
    with pytest.raises(UserError, match=r"is not known; use one of random, first, longest, joined or \{weighted"):
        CaptionChoice(policy)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "0.5", None, True])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(UserError, match=r"the weight of 'roi_text' is .*positive numbers: leave the field out"):
        CaptionChoice({"weighted": {"caption": 1, "roi_text": weight}})


def test_a_sample_without_record():
    assert CaptionChoice()(CAPTIONS, {}, rng_of(0)) == CaptionChoice("random")(CAPTIONS, {}, rng_of(0))


# Sentences. Words stand for tokens here.

SENTENCES = [
    "A gland.",
    "Two more words here!",
    "Is it H. pylori?",
    "(Yes.)",
    "The last sentence is by far the longest one.",
]
TEXT = " ".join(SENTENCES)


def count_words(text: str) -> int:
    return len(text.split())


def test_a_text_that_fits_is_left_alone():
    rng = rng_of(0)
    state = rng.bit_generator.state
    assert SentenceLimit(count_words, count_words(TEXT))(TEXT, rng) == TEXT
    assert rng.bit_generator.state == state


def test_runs_of_whole_sentences_from_every_start():
    limit = SentenceLimit(count_words, 9)
    drawn = Counter(limit(TEXT, rng_of(n)) for n in range(1000))
    runs = [
        "A gland. Two more words here!",
        "Two more words here! Is it H. pylori? (Yes.)",
        "Is it H. pylori? (Yes.)",
        "(Yes.)",
    ]
    assert set(drawn) == {*runs, SENTENCES[-1]}
    assert min(drawn.values()) > 150  # starts are even: late text is seen as often as early text


def test_a_sentence_that_is_too_long_is_left_to_the_tokeniser():
    assert {SentenceLimit(count_words, 3)(TEXT, rng_of(n)) for n in range(50)} == {
        "A gland.", "Two more words here!", "Is it H. pylori?", "(Yes.)", SENTENCES[-1]
    }  # fmt: skip
    assert SentenceLimit(count_words, 3)("no full stop anywhere in it", rng_of(0)) == "no full stop anywhere in it"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is so.\n\nNext line.", 2),
        ("By J. Smith et al. in the 1.5 mm margin, e.g. here.", 1),
        ("S. aureus is seen.", 1),
        ('He said "stop." Then he went.', 2),
        ("腺癌です。間質も見えます。 ", 2),
        ("Étage un. Été deux.", 2),
    ],
)
def test_where_sentences_end(text, sentences):
    nothing_fits = SentenceLimit(lambda part: 2, 1)
    drawn = {nothing_fits(text, rng_of(n)) for n in range(99)}
    assert len(drawn) == sentences
    assert all(part.strip() and part in text for part in drawn)


def test_short_plain_texts_are_not_counted():
    def never(text: str) -> int:
        raise AssertionError(text)

    assert SentenceLimit(never, 77)("Fat. Gland.", rng_of(0)) == "Fat. Gland."
    for text in ("x" * 74, "&nGt;", "क़"):  # no room for added tokens; longer once cleaned
        with pytest.raises(AssertionError):
            SentenceLimit(never, 77)(text, rng_of(0))


def test_the_choice_is_cut_to_sentences():
    choice = CaptionChoice("joined", sentences=SentenceLimit(count_words, 4))
    assert {choice(SENTENCES[:2], {}, rng_of(n)) for n in range(20)} == set(SENTENCES[:2])


def test_a_very_long_text_costs_few_counts():
    counted = []
    limit = SentenceLimit(lambda text: counted.append(len(text)) or count_words(text), 60)
    text = "Some words of a sentence. " * 4000
    assert count_words(limit(text, rng_of(0))) == 60
    assert len(counted) <= 14
    assert sum(counted) < 1.1 * len(text)
