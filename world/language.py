"""What is said of a scene, and the checker that compares any sentence with it.

    describe(scene, rng)          a caption that states every fact
    is_true(text, scene)          does every fact that the text states hold?
    web_text(scene, 0.5, rng)     what the web would write: another image's text, a wrong word, junk

No two attributes share a word. Every caption that the world speaks states all facts of its scene,
so that a vague caption is never better.
"""

import random
import re
from itertools import permutations

from world.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    random_scene,
    swap,
)

FILLERS = set("a an the at in on of and with all background backdrop".split())
# How a caption is worded: {after} are things with their places behind them ("a small red circle at
# the top left"), {before} with their places in front ("at the top left, a small red circle").
CAPTIONS = ("{after} on a {ground} background", "{after}, on {ground}", "on {ground}: {after}",
            "a {ground} backdrop with {after}", "on a {ground} background, {before}")
PREPOSITIONS = ("at the", "in the")
JUNK = ("stunning view july 2009", "img 0042 final copy", "free shipping on all orders",
        "click to enlarge", "my favourite one so far", "stock photo royalty free",
        "happy birthday grandma", "untitled design 3")

# word -> (attribute, value): the dictionary that is_true reads with.
WORDS = {word: (attribute, value)
         for attribute, words in (("shape", SHAPES), ("size", SIZES), ("row", ROWS),
                                  ("column", COLUMNS))
         for value, synonyms in words.items() for word in synonyms}
WORDS |= ({colour: ("colour", colour) for colour in COLOURS}
          | {name: ("background", name) for name in BACKGROUNDS})


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption that states every fact of the scene, in one of several ways, with synonyms.

    "a small blue star at the lower right, on lavender". The same number of random draws is made for
    every scene with as many things, so that from the same generator state a scene and its `swap`
    are described in the same words but for the swapped one.
    """
    def choose(words):
        return words[int(rng.random() * len(words))]
    caption, preposition = choose(CAPTIONS), choose(PREPOSITIONS)
    after, before = [], []
    for thing in scene.things:
        row, column = thing.place.split()
        place = f"{preposition} {choose(ROWS[row])} {choose(COLUMNS[column])}"
        noun = f"a {choose(SIZES[thing.size])} {thing.colour} {choose(SHAPES[thing.shape])}"
        after.append(f"{noun} {place}")
        before.append(f"{place}, {noun}")
    return caption.format(after=" and ".join(after), before=" and ".join(before),
                          ground=scene.background)


def read_facts(text: str) -> tuple[list[str], list[dict[str, str]]] | None:
    """The backgrounds and things that a text states; None for no sentence of the world.

    "and" parts the things: between two of them one shape is named, and its size, colour, row and
    column stand before it or behind. A word from outside the world, a property without a shape, or
    one that is stated twice of the same thing makes a text unreadable.
    """
    backgrounds, things = [], []
    for clause in re.split(r"\band\b", text.lower()):
        thing = {}
        for word in re.findall(r"[^\s.,:]+", clause):
            attribute, value = WORDS.get(word, (None, None))
            if attribute == "background":
                backgrounds.append(value)
            elif attribute in thing or (attribute is None and word not in FILLERS):
                return None
            elif attribute:
                thing[attribute] = value
        if thing and "shape" not in thing:
            return None
        if thing:
            things.append(thing)
    return backgrounds, things


def is_true(text: str, scene: Scene) -> bool:
    """Whether every fact that the text states holds in the scene.

    A text that states nothing, or that cannot be read, is not true. Each thing that is mentioned
    must be another thing of the scene.
    """
    stated = read_facts(text)
    if stated is None or not any(stated):
        return False
    backgrounds, things = stated
    if any(name != scene.background for name in backgrounds):
        return False
    return any(all(fact in thing.facts().items() for said, thing in zip(things, chosen)
                   for fact in said.items()) for chosen in permutations(scene.things, len(things)))


def wrong_facts(text: str, scene: Scene) -> list[str]:
    """What is wrong with a text, in words: "shape: square, is: triangle", "size: not said".

    Each thing that is mentioned is compared with the thing of the scene that it fits best. Empty
    for a text that is true and complete.
    """
    stated = read_facts(text)
    if stated is None:
        return ["no sentence of this world"]
    backgrounds, things = stated
    wrong = [f"background: {name}, is: {scene.background}" for name in backgrounds
             if name != scene.background]
    wrong += [] if backgrounds else ["background: not said"]
    together = min(len(things), len(scene.things))
    candidates = [[difference for thing, actual in zip(things, chosen)
                   for difference in differences(thing, actual.facts())]
                  for chosen in permutations(scene.things, together)]
    wrong += min(candidates, key=len)
    if len(things) != len(scene.things):
        wrong.append(f"things: {len(things)}, are: {len(scene.things)}")
    return wrong


def differences(stated: dict[str, str], facts: dict[str, str]) -> list[str]:
    """Where what is stated of a thing differs from its facts, in words."""
    wrong = []
    for attribute, value in facts.items():
        if attribute not in stated:
            wrong.append(f"{attribute}: not said")
        elif stated[attribute] != value:
            wrong.append(f"{attribute}: {stated[attribute]}, is: {value}")
    return wrong


def is_complete(text: str, scene: Scene) -> bool:
    """Whether the text mentions the background and every attribute of all things, true or not."""
    stated = read_facts(text)
    return bool(stated) and bool(stated[0]) and len(stated[1]) == len(scene.things) and all(
        len(said) == len(scene.things[0].facts()) for said in stated[1])


def web_text(scene: Scene, noise: float, rng: random.Random) -> tuple[str, str]:
    """What the web writes under a picture, and its kind: (text, kind).

    With probability `noise` the text is bad: kind "other" (another image's text, 40 %), "wrong"
    (one attribute wrong, 30 %) or "junk" (alt text that says nothing, 30 %); else kind "true".
    """
    if rng.random() >= noise:
        return describe(scene, rng), "true"
    kind = rng.choices(("other", "wrong", "junk"), (0.4, 0.3, 0.3))[0]
    if kind == "junk":
        return rng.choice(JUNK), kind
    if kind == "wrong":
        return describe(swap(scene, rng.choice(ATTRIBUTES), rng), rng), kind
    text = describe(random_scene(rng), rng)
    return (text, "true") if is_true(text, scene) else (text, kind)


def all_captions(count: int = 2000) -> list[str]:
    """Captions that contain every word of the world's captions, junk included.

    (The words of questions, statements and dialogs: world.datasets.all_texts.)
    """
    rng = random.Random("words")
    return [describe(random_scene(rng), rng) for _ in range(count)] + list(JUNK)
