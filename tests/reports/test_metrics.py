"""BLEU, ROUGE-L and CIDEr-D against values worked out by hand, and on Flickr8k against the
established implementation."""

import json
import math
from pathlib import Path

import pytest

from data.text import Tokenizer
from reports.metrics import (
    bleu,
    caption_scores,
    cider,
    longest_common_subsequence,
    rouge_l,
    tokenise,
)

FLICKR = Path(__file__).parents[3] / "shared" / "data" / "flickr8k" / "test.json"


def words(*texts):
    return [text.split() for text in texts]


@pytest.mark.parametrize("text, tokens", [
    ("A dog's T-shirt, no. 7!", ["a", "dog's", "t-shirt", "no", "7"]),
    ("- it 's 'quoted' -- (so)_there", ["it", "s", "quoted", "so", "there"]),
    ("Déjà vu", ["deja", "vu"]), (" . ", [])])
def test_tokens(text, tokens):
    assert tokenise(text) == tokens


def test_bleu_by_hand():
    # "the the the ..." (Papineni et al. 2002): two of seven are allowed.
    assert bleu(words("the the the the the the the"),
                [words("the cat is on the mat", "there is a cat on the mat")])[0] == (
                    pytest.approx(2 / 7))
    # 3 of 4 words, 1 of 3 pairs, and the reference is longer by one: exp(1 - 5/4).
    scores = bleu(words("a cat sat here"), [words("a cat was sat down")])
    assert scores[0] == pytest.approx(3 / 4 * math.exp(-1 / 4))
    assert scores[1] == pytest.approx(math.sqrt(3 / 4 * 1 / 3) * math.exp(-1 / 4))
    assert scores[2:] == [0, 0]
    # Counts are added over the set before they are divided; of two equally close lengths the
    # shorter one counts.
    scores = bleu(words("a b", "c d e f"), [words("a b"), words("c x x", "c x x x x")])
    assert scores[0] == pytest.approx(3 / 6)
    assert bleu(words("a b c d"), [words("a b", "a b c d e")])[0] == pytest.approx(math.exp(-1 / 4))
    assert bleu([[]], [words("a b")]) == [0, 0, 0, 0]


def test_words_of_other_languages():
    """As an uncased WordPiece writes them: without accents, Chinese characters apart."""
    assert tokenise("Un café, près de là") == ["un", "cafe", "pres", "de", "la"]
    assert tokenise("一只狗 in 2") == ["一", "只", "狗", "in", "2"]
    for text in ("一只狗在草地上跑", "犬が草の上を走る", "ein Mädchen läuft über die Straße",
                 "собака бежит", "कुत्ता दौड़ता है"):
        tokenizer = Tokenizer.train([text] * 3)
        written = tokenizer.decode(tokenizer.piece_ids(text))
        assert tokenise(written) == tokenise(text)


def test_rouge_by_hand():
    assert longest_common_subsequence("a b c d e".split(), "x a c y e".split()) == 3
    # Best precision and best recall may come from different references.
    p, r, b = 2 / 3, 2 / 2, 1.44
    assert rouge_l(words("a b c"), [words("a b", "x y z a")]) == pytest.approx(
        [(1 + b) * p * r / (r + b * p)])
    assert rouge_l(words("a"), [words("b")]) == [0.0]


def test_cider_by_hand():
    # Two images. "a" occurs in both: weight 0. A caption equal to its reference scores 10 for each
    # n that has an informative n-gram: here n = 1, 2 and 3 of 4.
    references = [words("a dog runs"), words("a cat sleeps")]
    assert cider(words("a dog runs", "a"), references) == pytest.approx([10 * 3 / 4, 0])
    # "dog": one of two equally weighted words, so the cosine is 1/sqrt(2); two words fewer.
    assert cider(words("dog", "a"), references)[0] == pytest.approx(
        10 / 4 * math.exp(-4 / 72) / math.sqrt(2))
    # Repetition is clipped: "dog dog dog" is no better in the numerator and three times as long.
    assert cider(words("dog dog dog", "a"), references)[0] == pytest.approx(
        10 / 4 * (1 / 3) / math.sqrt(2))


def test_a_set_is_scored_as_a_whole():
    numbers, each = caption_scores(["A dog runs.", "cats"], [["a dog runs"], ["Cats!", "birds"]])
    assert numbers["bleu1"] == 1.0 and numbers["rouge_l"] == pytest.approx(1.0)
    assert numbers["cider"] == pytest.approx(sum(each) / 2) and len(each) == 2


def test_flickr8k_agrees_with_the_established_implementation():
    if not FLICKR.exists():
        pytest.skip("no Flickr8k")
    texts = [row["caption"] for row in json.loads(FLICKR.read_text())]
    numbers, _ = caption_scores([t[0] for t in texts], [t[1:] for t in texts])
    assert {name: round(numbers[name], 4) for name in ("bleu1", "bleu4", "rouge_l")} == {
        "bleu1": 0.6364, "bleu4": 0.2095, "rouge_l": 0.4876}
    assert numbers["cider"] == pytest.approx(0.7887, abs=5e-4)
