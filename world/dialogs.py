"""Dialogs about a scene: questions that build on one another, answers to choose from."""

import random

from data.datasets import DialogRound
from world.questions import KINDS, NUMBERS, ask, describe_thing, with_article
from world.scenes import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene, Thing

ROUNDS, CANDIDATES, PLAUSIBLE = 3, 100, 80
SAME = [set(words) for words in (*SHAPES.values(), *SIZES.values())] + [
    {f"{row} {column}" for row in rows for column in columns}
    for rows in ROWS.values() for columns in COLUMNS.values()]  # answers that mean the same
VALUES = {"colour": COLOURS, "background": BACKGROUNDS, "count": NUMBERS, "yes/no": ("yes", "no"),
          "shape": [word for words in SHAPES.values() for word in words],
          "size": [word for words in SIZES.values() for word in words],
          "where": [f"{row} {column}" for rows in ROWS.values() for row in rows
                    for columns in COLUMNS.values() for column in columns]}
# How an answer is said. Many ways, so that most of 100 candidates can answer the same question.
HEDGES = ("probably", "maybe", "surely", "clearly", "perhaps", "certainly", "definitely",
          "possibly", "obviously", "apparently", "i think", "i guess", "i believe", "i suppose",
          "i would say")
FORMS = ("{}", *(f"{hedge} {{}}" for hedge in HEDGES),
         *(f"{{}}, {hedge}" for hedge in HEDGES if hedge.startswith("i ")), "{}, probably",
         "{}, surely")
FOLLOW_UPS = {"colour": "what colour is it?", "size": "how large is it?", "shape": "what is it?",
              "where": "where is it?"}


def draw_candidates(answer: str, kind: str,
                    rng: random.Random) -> tuple[str, tuple[str, ...], int]:
    """The answer as somebody says it ("surely red"), CANDIDATES, and its number.

    The others are wrong: none means the same. Up to PLAUSIBLE of them answer the same kind of
    question.
    """
    same_meaning = {answer}
    for words in SAME:
        if answer in words:
            same_meaning = words
    plausible, other = [], []
    for name, values in VALUES.items():
        wrong = [value for value in values if value not in same_meaning]
        spoken = [form.format(value) for value in wrong for form in FORMS]
        if name == kind:
            plausible += spoken
        else:
            other += spoken
    plausible = rng.sample(plausible, min(PLAUSIBLE, len(plausible)))
    right = rng.choice(FORMS).format(answer)
    candidates = [right, *plausible, *rng.sample(other, CANDIDATES - 1 - len(plausible))]
    rng.shuffle(candidates)
    return right, tuple(candidates), candidates.index(right)


def converse(scene: Scene, rng: random.Random) -> tuple[str, list[DialogRound]]:
    """A caption that tells a part of the scene, and ROUNDS of a dialog.

    A question may ask about "it": the thing that the question before was about, so that the history
    is needed.
    """
    mentioned = rng.choice(scene.things)
    noun = with_article(describe_thing({"colour": mentioned.colour}, rng))
    caption = f"{noun} on a {scene.background} background"
    rounds, thing, kind = [], None, ""  # what the question before was about, and its kind
    for _ in range(ROUNDS):
        if thing is not None and rng.random() < 0.5:
            kind = rng.choice([name for name in FOLLOW_UPS if name != kind])
            question, answer = FOLLOW_UPS[kind], answer_about(thing, kind, rng)
        else:
            asked = ask(scene, rng, rng.choice(KINDS))
            question, answer = asked.text, asked.answers[0]
            thing, kind = asked.thing, asked.kind
        rounds.append(DialogRound(question, *draw_candidates(answer, kind, rng)))
    return caption, rounds


def answer_about(thing: Thing, kind: str, rng: random.Random) -> str:
    """What the answer to a question of this kind about a thing is."""
    if kind == "where":
        row, column = thing.place.split()
        return f"{rng.choice(ROWS[row])} {rng.choice(COLUMNS[column])}"
    if kind == "colour":
        return thing.colour
    return rng.choice({"shape": SHAPES, "size": SIZES}[kind][getattr(thing, kind)])
