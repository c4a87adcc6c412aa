"""Dialogs about a scene: questions that build on one another, answers to choose from."""

import random

from data.datasets import DialogRound
from world.questions import KINDS, NUMBERS, Question, ask, describe_thing, with_article
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

    A question may ask about "it", so that the history is needed (ask_next).
    """
    mentioned = rng.choice(scene.things)
    noun = with_article(describe_thing({"colour": mentioned.colour}, rng))
    caption = f"{noun} on a {scene.background} background"
    rounds, asked = [], None
    for _ in range(ROUNDS):
        asked = ask_next(scene, rng, asked)
        candidates = draw_candidates(asked.answers[0], asked.kind, rng)
        rounds.append(DialogRound(asked.text, *candidates))
    return caption, rounds


def ask_next(scene: Scene, rng: random.Random, before: Question | None = None,
             weights: list[float] | None = None) -> Question:
    """A question in a dialog: half of the time it goes on about the thing of the one before.

    before: the question before, None at the start. weights: how often each of KINDS is asked.
    """
    if before is not None and before.thing is not None and rng.random() < 0.5:
        kind = rng.choice([name for name in FOLLOW_UPS if name != before.kind])
        answer = answer_about(before.thing, kind, rng)
        return Question(FOLLOW_UPS[kind], (answer,), kind, before.thing)
    kind = rng.choices(KINDS, weights)[0] if weights else rng.choice(KINDS)
    return ask(scene, rng, kind)


def answer_about(thing: Thing, kind: str, rng: random.Random) -> str:
    """What the answer to a question of this kind about a thing is."""
    if kind == "where":
        row, column = thing.place.split()
        return f"{rng.choice(ROWS[row])} {rng.choice(COLUMNS[column])}"
    if kind == "colour":
        return thing.colour
    return rng.choice({"shape": SHAPES, "size": SIZES}[kind][getattr(thing, kind)])
