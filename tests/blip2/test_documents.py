"""The documents of a language model: dialogs about a scene, and what of them gives a loss."""

import random

import pytest

from blip2.language import LanguageConfig
from blip2.task_language import collate, encode_dialogs
from blip2.texts import NO_LOSS, WordPieces
from config import TrainConfig
from data.text import Tokenizer
from world.datasets import Questions, all_texts
from world.dialogs import FOLLOW_UPS, ask_next
from world.documents import DIALOGS, ROUNDS, Documents, list_facts
from world.questions import KINDS, ask
from world.scenes import Scene, Thing, random_scene


@pytest.fixture(scope="module")
def tokenizer():
    """The vocabulary of the world."""
    return Tokenizer.train(all_texts(), 4000)


def test_answers_end_and_questions_give_no_loss(tokenizer):
    pieces = WordPieces(tokenizer.vocab)
    batch = encode_dialogs(pieces, [
        (("what colour is the star?", "red"), ("where is it?", "top left")),
        (("how many things are there?", "two"),)])
    first = "[CLS] question : what colour is the star ? answer : red question : where is it ? " \
            "answer : top left [SEP]".split()
    second = "[CLS] question : how many things are there ? answer : two [SEP]".split()
    words = [[tokenizer.vocab[i] for i in row] for row in batch["ids"].tolist()]
    assert words == [first, second + ["[PAD]"] * (len(first) - len(second))]
    assert batch["mask"].sum(1).tolist() == [len(first), len(second)]
    wanted = [[tokenizer.vocab[i] if i != NO_LOSS else "" for i in row]
              for row in batch["targets"].tolist()]
    assert wanted[0] == [""] * 11 + ["red", "[SEP]"] + [""] * 7 + ["top", "left", "[SEP]"]
    assert wanted[1] == [""] * (len(second) - 2) + ["two", "[SEP]"] + [""] * (
        len(first) - len(second))


def test_an_encoder_decoder_reads_the_rounds_before(tokenizer):
    documents = Documents("train", 40)
    index = next(i for i in range(40) if documents.example(i).caption)
    document = documents.example(index)
    encode = collate(tokenizer, TrainConfig(max_tokens=40),
                     LanguageConfig(kind="encoder-decoder"))
    pieces = WordPieces(tokenizer.vocab)
    answers = [answer for _, answer in document.dialogs[0]]
    for share, numbers in ((0.2, (0, 2)), (0.7, (1, 3))):  # half of the questions at a time
        batch = encode([documents[index] | {"share": share}])
        read = [pieces.decode(row) for row in batch["ids"].tolist()]
        written = [pieces.decode([i for i in row if i >= 0]) for row in batch["targets"].tolist()]
        assert len(read) == DIALOGS * ROUNDS / 2 + 1  # and the caption in other words
        assert written[:2] == [answers[number] for number in numbers]
        assert [text.count("question :") for text in read[:2]] == [n + 1 for n in numbers]
    assert f"answer : {answers[2]} question :" in read[1].replace(" short", "")


def test_a_second_question_goes_on_about_the_thing_of_the_first():
    """Half of the time; "it" has its attributes, and is not asked for the same twice."""
    followed = about_things = 0
    for number in range(400):
        rng = random.Random(number)
        scene = random_scene(rng)
        first = ask(scene, rng)
        second = ask_next(scene, rng, first)
        if second.text in FOLLOW_UPS.values():
            followed += 1
            assert second.thing == first.thing and second.kind != first.kind
            if second.kind == "colour":
                assert second.answers == (first.thing.colour,)
        about_things += first.thing is not None
        assert ask_next(scene, rng).text not in FOLLOW_UPS.values()  # nothing stands before
    assert 0.4 < followed / about_things < 0.6


def test_documents_repeat_and_hold_dialogs_of_the_kinds_that_are_hard():
    documents = Documents("train", 200)
    texts = [documents.example(i) for i in range(200)]
    documents.set_epoch(3)
    assert [documents.example(i) for i in range(200)] == texts
    assert all(len(text.dialogs) == DIALOGS and {len(d) for d in text.dialogs} == {ROUNDS}
               for text in texts)
    first = [dialog[0] for text in texts for dialog in text.dialogs]
    yes_no = sum(answer in ("yes", "no") for _, answer in first) / len(first)
    background = sum("background" in question for question, _ in first) / len(first)
    assert yes_no > 2 / 10 and background < 1 / len(KINDS)
    followed = sum(dialog[1][0] in FOLLOW_UPS.values() for text in texts for dialog in text.dialogs)
    assert 0.2 < followed / len(first) < 0.5


def test_the_dialog_before_a_question_is_about_the_same_scene():
    questions = Questions("held-out", 50, 64)
    before = [questions.dialog_before(i) for i in range(50)]
    assert before == [questions.dialog_before(i) for i in range(50)]
    counted = 0
    for i, dialog in enumerate(before):
        assert len(dialog) == 3
        asked = questions.example(i)
        assert asked.question not in [text for text, _ in dialog]
        if asked.kind == "background":  # its answer would stand there
            assert not any("background" in text for text, _ in dialog)
        for text, answer in dialog:
            if text == "how many things are there?":
                counted += 1
                assert answer == ("none", "one", "two")[len(questions.world.scene(i).things)]
    assert counted


def test_a_list_states_every_fact_in_any_order():
    scene = Scene("mint", (Thing("top left", "red", "star", "small"),
                           Thing("bottom right", "blue", "ring", "large")))
    lists = {list_facts(scene, random.Random(number)) for number in range(300)}
    assert len(lists) > 250
    for text in lists:
        words = text.replace(",", "").split()
        assert {"mint", "background", "red", "star", "blue", "left", "right"} <= set(words)
        for synonyms in (("small", "little"), ("ring", "hoop"), ("large", "big"),
                         ("top", "upper"), ("bottom", "lower")):
            assert sum(words.count(word) for word in synonyms) == 1
        red, blue = words.index("red"), words.index("blue")
        assert abs(red - words.index("left")) < 5 and abs(blue - words.index("right")) < 5
    assert {text.split()[0] == "mint" for text in lists} == {True, False}
    documents = Documents("train", 400)
    begin = [documents.example(i).caption for i in range(400)]
    listed = sum(" a " not in f" {text}" for text in begin if text) / len(begin)
    assert 0.4 < listed < 0.6
    assert 0 < sum(not text for text in begin) < 30
