"""What can be asked of a scene (VQA) and stated about two (NLVR2).

    ask(scene, rng)              -> Question: text, ten people's answers, kind
    draw_statement, draw_pair    a statement, and pairs of scenes of which it is true or false
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from world.scenes import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    choose_other,
    random_scene,
    split_of,
)

KINDS = ("colour", "shape", "size", "count", "background", "yes/no", "where")
NUMBERS = ("none", "one", "two", "three", "four")
PEOPLE = 10  # answer each question, as in VQA


@dataclass(frozen=True)
class Question:
    """A question about a scene: people's answers, its kind, the thing that it is about.

    thing is None where it is about no single one.
    """

    text: str
    answers: tuple[str, ...]
    kind: str
    thing: Thing | None = None


# ---- questions about one image -------------------------------------------------------------------

def holds(thing: Thing, facts: dict[str, str]) -> bool:
    """Whether the thing has all these attributes."""
    return facts.items() <= thing.facts().items()


def describe_thing(facts: dict[str, str], rng: random.Random) -> str:
    """{"colour": "red", "shape": "circle"} -> "red disc"; without a shape "red thing".

    A place comes behind.
    """
    words = [rng.choice(SIZES[facts["size"]]) if "size" in facts else "", facts.get("colour", ""),
             rng.choice(SHAPES[facts["shape"]]) if "shape" in facts else "thing"]
    if "row" in facts:
        words += ["at the", rng.choice(ROWS[facts["row"]]), rng.choice(COLUMNS[facts["column"]])]
    return " ".join(filter(None, words))


def with_article(noun: str) -> str:
    """"red disc" -> "a red disc", "orange disc" -> "an orange disc"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def name_thing(scene: Scene, thing: Thing, without: tuple[str, ...],
               rng: random.Random) -> str | None:
    """Words for this thing and no other of the scene; None if there are none.

    The attributes `without` are not used: they are what is asked for.
    """
    facts = thing.facts()
    ways = [("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("row", "column")]
    ways = [way for way in ways if not set(way) & set(without)]
    rng.shuffle(ways)
    for way in ways:
        named = {attribute: facts[attribute] for attribute in way}
        if sum(holds(other, named) for other in scene.things) == 1:
            return describe_thing(named, rng)
    return None


def ask(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """A question about the scene, of a given kind (of KINDS) or a random one.

    PEOPLE answer it. Who answers uses synonyms as they come ("top left", "upper left").
    """
    while True:
        chosen = kind or rng.choice(KINDS)
        thing = rng.choice(scene.things)
        asked_for = ("row", "column") if chosen == "where" else (chosen,)
        name = name_thing(scene, thing, asked_for, rng)
        if chosen == "count":
            return ask_count(scene, thing, rng)
        if chosen == "background":
            text = rng.choice(("what colour is the background?", "what is the background colour?"))
            return Question(text, people_say([scene.background], rng), chosen)
        if chosen == "yes/no":
            return ask_yes_no(scene, thing, rng)
        if name is not None:
            return ask_attribute(thing, name, chosen, rng)
        kind = None  # the things differ in nothing but what is asked for: ask something else


def people_say(synonyms: list[str], rng: random.Random) -> tuple[str, ...]:
    """What each of PEOPLE answers."""
    return tuple(rng.choice(synonyms) for _ in range(PEOPLE))


def ask_attribute(thing: Thing, name: str, kind: str, rng: random.Random) -> Question:
    """Colour, shape, size or place of one thing, which is called `name`."""
    if kind == "where":
        row, column = thing.place.split()
        places = [f"{r} {c}" for r in ROWS[row] for c in COLUMNS[column]]
        return Question(f"where is the {name}?", people_say(places, rng), kind, thing)
    forms = {"colour": ("what colour is the {}?",), "size": ("how large is the {}?",),
             "shape": ("what is the {}?", "what shape is the {}?")}[kind]
    if kind == "colour":
        synonyms = [thing.colour]
    else:
        synonyms = {"shape": SHAPES, "size": SIZES}[kind][getattr(thing, kind)]
    return Question(rng.choice(forms).format(name), people_say(synonyms, rng), kind, thing)


def ask_count(scene: Scene, thing: Thing, rng: random.Random) -> Question:
    """How many things there are, or how many of a colour or size."""
    counted = rng.choice(({}, {"colour": thing.colour}, {"size": rng.choice(list(SIZES))}))
    what = describe_thing(counted, rng) if counted else "thing"
    number = sum(holds(other, counted) for other in scene.things)
    return Question(f"how many {what}s are there?", people_say([NUMBERS[number]], rng), "count")


def ask_yes_no(scene: Scene, thing: Thing, rng: random.Random) -> Question:
    """Whether there is such a thing: about half of the answers are yes, a no is a near miss."""
    facts = thing.facts()
    attributes = rng.choice((("colour", "shape"), ("size", "shape"), ("colour", "row", "column")))
    stated = {attribute: facts[attribute] for attribute in attributes}
    if rng.random() < 0.5:
        changed = rng.choice([name for name in stated if name not in ("row", "column")])
        values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[changed]
        stated[changed] = choose_other(values, [stated[changed]], rng)
    fitting = [other for other in scene.things if holds(other, stated)]
    return Question(f"is there {with_article(describe_thing(stated, rng))}?",
                    ("yes" if fitting else "no",) * PEOPLE, "yes/no",
                    fitting[0] if len(fitting) == 1 else None)


# ---- statements about two images -----------------------------------------------------------------

def draw_statement(rng: random.Random) -> tuple[str, Callable[[Scene, Scene], bool]]:
    """A statement about a left and a right image, and the test whether two scenes fit it."""
    shape, colour = rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
    ground, number = rng.choice(list(BACKGROUNDS)), rng.choice((2, 3, 4))
    noun, coloured = with_article(rng.choice(SHAPES[shape])), with_article(f"{colour} thing")
    def has(scene, **facts):
        return any(holds(thing, facts) for thing in scene.things)
    return rng.choice((
        (f"the left image shows {noun}", lambda a, b: has(a, shape=shape)),
        (f"the right image shows {noun}", lambda a, b: has(b, shape=shape)),
        (f"the left image shows {coloured}", lambda a, b: has(a, colour=colour)),
        (f"the right image shows {coloured}", lambda a, b: has(b, colour=colour)),
        (f"both images show {noun}", lambda a, b: has(a, shape=shape) and has(b, shape=shape)),
        (f"both images show {coloured}",
         lambda a, b: has(a, colour=colour) and has(b, colour=colour)),
        (f"only one of the images has a {ground} background",
         lambda a, b: (a.background == ground) != (b.background == ground)),
        (f"there is {coloured} in one of the images",
         lambda a, b: has(a, colour=colour) or has(b, colour=colour)),
        ("the images have the same background", lambda a, b: a.background == b.background),
        ("the left image shows more things than the right one",
         lambda a, b: len(a.things) > len(b.things)),
        (f"there are {NUMBERS[number]} things in all",
         lambda a, b: len(a.things) + len(b.things) == number)))


def draw_pair(is_true: Callable[[Scene, Scene], bool], label: bool, split: str,
              rng: random.Random) -> tuple[Scene, Scene]:
    """Two scenes of a split of which the statement is true, or false (`label`).

    Near misses are common: half of the time the right image has the background of the left one, or
    the looks of one of its things.
    """
    while True:
        left, right = random_scene(rng, split), random_scene(rng, split)
        near_miss = rng.choices(("background", "looks", ""), (0.25, 0.25, 0.5))[0]
        if near_miss == "background":
            right = replace(right, background=left.background)
        elif near_miss == "looks":
            first, *rest = right.things
            looks = rng.choice(left.things)
            right = replace(right, things=(replace(looks, place=first.place), *rest))
        if is_true(left, right) == label and split_of(right) == split:
            return left, right
