"""Cleaning and the WordPiece tokenizer."""

import random
import time

import pytest
from conftest import REFERENCE, reference

from data.files import InputError
from data.text import Tokenizer, clean_caption

CAPTIONS = ["a dog runs on the grass", "a man on a red surfboard", "two dogs play with a ball",
            "the man runs"] * 3


def test_captions_are_cleaned_as_in_the_released_code():
    assert clean_caption('A "Dog" (runs).. on #1: the; grass!~*') == "a dog runs on 1 the grass"
    assert clean_caption("word " * 40, 30).split() == ["word"] * 30
    assert clean_caption("it's a dog-house, ok?") == "it's a dog-house, ok?"


def test_tokenizer_round_trip_and_padding():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    ids, mask = tokenizer.encode(["a dog", "a man on a red surfboard"], 30)
    assert ids[0, 0] == tokenizer.cls and ids[0, mask[0].sum() - 1] == tokenizer.sep
    assert (ids[0, mask[0].sum():] == tokenizer.pad).all() and ids.shape[1] == mask[1].sum()
    assert tokenizer.decode(ids[1]) == "a man on a red surfboard"
    again = Tokenizer(tokenizer.state())
    assert again.encode(CAPTIONS, 30)[0].equal(tokenizer.encode(CAPTIONS, 30)[0])
    assert tokenizer.config()["vocab_size"] == len(tokenizer.vocab)
    assert tokenizer.vocab[-2:] == ["[DEC]", "[ENC]"]


def test_a_long_text_is_cut_and_keeps_sep():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    ids, mask = tokenizer.encode(["dog " * 50], 10)
    assert ids.shape == (1, 10) and ids[0, -1] == tokenizer.sep and mask.all()


def test_training_a_vocabulary_repeats():
    texts = [" ".join(random.Random(i).choices(
        "runs running runner jumps jumped dog dogs boat boats".split(), k=6)) for i in range(50)]
    assert len({tuple(Tokenizer.train(texts, size).vocab) for size in (60, 60, 60, 60)}) == 1


def test_chinese_signs_get_a_piece_each():
    """They stand alone, so a piece for the inside of a word would be wasted."""
    signs = [chr(0x4E00 + i) for i in range(300)]
    texts = ["".join(signs[i:i + 10]) for i in range(0, 300, 3)] + ["a dog and a boat"] * 5
    start = Tokenizer.train(["a dog and a boat"] * 5, 60)
    wider = start.with_pieces_of(texts, 300)
    assert all(wider.can_spell(sign) for sign in signs)
    assert not any(piece.startswith("##") and piece[2:] in signs for piece in wider.vocab)


def test_bert_vocabulary_gives_the_released_ids():
    ref = reference("b_pretrain_parts.pt")
    tokenizer = Tokenizer.from_file(REFERENCE / "vocab.txt")
    ids, mask = tokenizer.encode(ref["inputs"]["captions"], 30)
    length = ids.shape[1]
    assert (ids.equal(ref["inputs"]["input_ids"][:, :length])
            and mask.equal(ref["inputs"]["attention_mask"][:, :length]))
    assert (tokenizer.dec, tokenizer.enc) == (484, 485)


@pytest.mark.parametrize("content, message",
                         [("[PAD]\n[UNK]\ndog\n", r"lacks \[CLS\], \[SEP\]"),
                          ("[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog\ndog\n", "lists 'dog' twice")])
def test_a_vocabulary_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        Tokenizer.from_file(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "nothing.txt")


def test_a_vocabulary_from_an_editor_of_windows(tmp_path):
    """A mark at its start, other line ends and empty lines at its end are no tokens."""
    (tmp_path / "vocab.txt").write_bytes(
        "\ufeff[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\ndog\r\n\r\n\r\n".encode())
    assert Tokenizer.from_file(tmp_path / "vocab.txt").vocab[:5] == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog"]


def test_words_and_signs_without_pieces_are_found():
    tokenizer = Tokenizer.train(["a red dog"] * 3, 100)
    assert tokenizer.unknown("A ☃ dog [red] zoo?") == ["☃", "[", "]", "zoo", "?"]


def test_a_word_of_a_megabyte_does_not_stop_the_training_of_a_vocabulary():
    start = time.perf_counter()
    tokenizer = Tokenizer.train([*CAPTIONS, "dog" * 400_000, "dog" * 400_001], 300)
    assert time.perf_counter() - start < 10
    ids, _ = tokenizer.encode(["a dog " + "x" * 1_000_000], 30)
    assert tokenizer.decode(ids[0]).startswith("a dog")
