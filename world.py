"""The built-in picture world: a scene graph that renders to an image, speaks captions, and judges
any caption.

    scene = random_scene(rng)     one or two coloured shapes in the four quarters of a pastel
                                  background
    render(scene, 64, rng)        (3, 64, 64) uint8
    describe(scene, rng)          "at the top left a small red circle and at the ... on a pink
                                  background"
    swap(scene, "colour", rng)    the same scene with exactly one attribute changed
    is_true(text, scene)          does every fact that the text states hold?
    web_text(scene, 0.5, rng)     what the web would write: another image's text, a wrong word, junk

It exists so that training can be watched and judged without downloading anything: every claim of a
generated caption can be checked, which no photograph allows. Colours of objects are dark, those of
backgrounds pale, and no two attributes share a word. Every caption that the world speaks states all
facts of its scene, so vagueness earns nothing.
Scenes are split by a hash of what they show: no scene of "val" or "held-out" is ever trained on,
whatever the seed.
"""

import json
import random
import zlib
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

COLOURS = {"red": (214, 24, 32), "orange": (245, 130, 0), "brown": (120, 68, 24),
           "green": (24, 135, 44), "teal": (0, 150, 160), "blue": (28, 52, 214),
           "purple": (140, 24, 170), "black": (16, 16, 16)}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (196, 196, 196), "pink": (255, 196, 206),
               "cream": (255, 240, 170), "mint": (178, 238, 196), "lavender": (206, 194, 250)}
# The first word names the thing; all of them are used in captions, each about equally often.
SHAPES = {"circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",),
          "cross": ("cross", "plus"), "ring": ("ring", "hoop"), "star": ("star",),
          "heart": ("heart",), "diamond": ("diamond", "rhombus")}
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
ROWS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
COLUMNS = {"left": ("left",), "right": ("right",)}
PLACES = [f"{row} {column}" for row in ROWS for column in COLUMNS]
SPLITS = ("train", "val", "held-out")
ATTRIBUTES = ("background", "colour", "shape", "size", "place")
FILLERS = set("a an the at in on of and with background backdrop".split())
PIXELS = {"small": 18, "large": 28}  # of 64: a quarter is 32 wide, so a large one nearly fills it
JITTER = 2  # of 64: how far an object may stand from the middle of its quarter
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


@dataclass(frozen=True, order=True)
class Thing:
    """One object: where it stands ("top left"), and its looks."""

    place: str
    colour: str
    shape: str
    size: str

    def facts(self) -> dict[str, str]:
        """Attribute -> value, the place as row and column."""
        row, column = self.place.split()
        return {"colour": self.colour, "shape": self.shape, "size": self.size, "row": row,
                "column": column}


@dataclass(frozen=True)
class Scene:
    """A background and one or two things in different quarters, in reading order."""

    background: str
    things: tuple[Thing, ...]


def random_scene(rng: random.Random, split: str | None = None) -> Scene:
    """A random scene, of one of SPLITS if asked for; 55 % have two things."""
    while True:
        places = rng.sample(PLACES, 2 if rng.random() < 0.55 else 1)
        things = [Thing(place, rng.choice(list(COLOURS)), rng.choice(list(SHAPES)),
                        rng.choice(list(SIZES))) for place in places]
        scene = Scene(rng.choice(list(BACKGROUNDS)), tuple(sorted(things)))
        if split in (None, split_of(scene)):
            return scene


def number_of(scene: Scene) -> int:
    """A hash of what the scene shows: images of one scene have the same number."""
    return zlib.crc32(repr(scene).encode())


def split_of(scene: Scene) -> str:
    """One scene in five is held out for the final judgement, one in 25 is there to choose a
    checkpoint by."""
    number = number_of(scene)
    return "held-out" if number % 5 == 0 else "val" if number % 25 == 1 else "train"


# ---- pictures ------------------------------------------------------------------------------------

@cache
def stencil(shape: str, size: int) -> np.ndarray:
    """(size, size) float in [0, 1]: how much of each pixel the shape covers (drawn 8 times
    larger, then shrunk)."""
    big = Image.new("L", (size * 8, size * 8))
    draw, s = ImageDraw.Draw(big), size * 8 - 1
    def polygon(points):
        draw.polygon([(x * s, y * s) for x, y in points], fill=255)
    if shape == "circle":
        draw.ellipse((0, 0, s, s), fill=255)
    elif shape == "square":
        draw.rectangle((0.06 * s, 0.06 * s, 0.94 * s, 0.94 * s), fill=255)
    elif shape == "triangle":
        polygon([(0.5, 0), (1, 0.95), (0, 0.95)])
    elif shape == "cross":
        draw.rectangle((0.34 * s, 0, 0.66 * s, s), fill=255)
        draw.rectangle((0, 0.34 * s, s, 0.66 * s), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, s, s), fill=255)
        draw.ellipse((0.27 * s, 0.27 * s, 0.73 * s, 0.73 * s), fill=0)
    elif shape == "star":
        angles = [(k * np.pi / 5 - np.pi / 2, 0.53 if k % 2 == 0 else 0.21) for k in range(10)]
        polygon([(0.5 + r * np.cos(t), 0.52 + r * np.sin(t)) for t, r in angles])
    elif shape == "heart":
        draw.ellipse((0, 0.04 * s, 0.54 * s, 0.58 * s), fill=255)
        draw.ellipse((0.46 * s, 0.04 * s, s, 0.58 * s), fill=255)
        polygon([(0.04, 0.42), (0.96, 0.42), (0.5, 0.98)])
    elif shape == "diamond":
        polygon([(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)])
    return np.asarray(big.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def render(scene: Scene, image_size: int = 64, rng: random.Random | None = None) -> np.ndarray:
    """-> (3, image_size, image_size) uint8. `rng` moves things and shifts colours a little; None
    draws them exactly."""
    def shade(colour):  # (3, 1, 1)
        return np.array([[[c + (rng.uniform(-8, 8) if rng else 0)]] for c in colour])
    unit, ground = image_size / 64, shade(BACKGROUNDS[scene.background])
    image = np.empty((3, image_size, image_size), np.uint8)
    image[:] = ground.round().clip(0, 255)
    for thing in scene.things:
        row, column = thing.place.split()
        cover = stencil(thing.shape, round(PIXELS[thing.size] * unit))
        corner = []
        for second_half in (row == "bottom", column == "right"):
            jitter = rng.uniform(-JITTER, JITTER) if rng else 0
            start = round((16 + 32 * second_half + jitter) * unit - len(cover) / 2)
            corner.append(min(max(start, 0), image_size - len(cover)))
        y, x = corner
        blend = ground + cover * (shade(COLOURS[thing.colour]) - ground)
        image[:, y:y + len(cover), x:x + len(cover)] = blend.round().clip(0, 255)
    return image


# ---- words ---------------------------------------------------------------------------------------

def describe(scene: Scene, rng: random.Random) -> str:
    """A caption that states every fact of the scene, in one of several manners of speaking
    with synonyms.

    The same number of random draws is made for every scene with as many things, so that from the
    same generator state a scene and its `swap` are described in the same words but for the
    swapped one.
    """
    def say(words):
        return words[int(rng.random() * len(words))]
    place = say(("at the {} {} ", "{} {} a ", "{} {} "))
    spoken = []
    for thing in scene.things:
        row, column = thing.place.split()
        spoken.append(place.format(say(ROWS[row]), say(COLUMNS[column]))
                      + f"{say(SIZES[thing.size])} {thing.colour} {say(SHAPES[thing.shape])}")
    things = " and ".join(spoken)
    manner = say(("{things} on a {ground} background", "on {ground} {things}",
                  "a {ground} backdrop with {things}", "{things} on {ground}"))
    return manner.format(things=things, ground=scene.background)


def swap(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """The scene with exactly one attribute (of ATTRIBUTES) of it or of one of its things changed.

    A thing moves only to a free quarter, so a description of the result is always false of
    the original.
    """
    def other(values, *taken):
        return rng.choice([value for value in values if value not in taken])
    if attribute == "background":
        return replace(scene, background=other(BACKGROUNDS, scene.background))
    index = rng.randrange(len(scene.things))
    thing, taken = scene.things[index], [t.place for t in scene.things]
    value = {"colour": lambda: other(COLOURS, thing.colour),
             "shape": lambda: other(SHAPES, thing.shape), "size": lambda: other(SIZES, thing.size),
             "place": lambda: other(PLACES, *taken)}[attribute]()
    # Not sorted again: the swapped thing is spoken of in its old turn.
    things = (scene.things[:index] + (replace(thing, **{attribute: value}),)
              + scene.things[index + 1:])
    return replace(scene, things=things)


def read(text: str) -> tuple[list[str], list[dict[str, str]]] | None:
    """text -> the backgrounds and things that it states, or None where it is no sentence
    of this world.

    Size, colour, row and column belong to the shape that follows. A word from outside the world, a
    property without a shape, or one stated twice of the same thing makes a text unreadable.
    """
    backgrounds, things, pending = [], [], {}
    for word in text.lower().replace(".", " ").replace(",", " ").split():
        attribute, value = WORDS.get(word, (None, None))
        if attribute == "background":
            backgrounds.append(value)
        elif attribute in pending or (attribute is None and word not in FILLERS):
            return None
        elif attribute == "shape":
            things.append({**pending, "shape": value})
            pending = {}
        elif attribute:
            pending[attribute] = value
    return None if pending else (backgrounds, things)


def is_true(text: str, scene: Scene) -> bool:
    """Whether every fact that the text states holds in the scene. A text that states nothing,
    or that cannot be read, is not true. Each thing that is mentioned must be another thing of
    the scene."""
    stated = read(text)
    if stated is None or not any(stated):
        return False
    backgrounds, things = stated
    if any(name != scene.background for name in backgrounds):
        return False
    return any(all(fact in thing.facts().items() for said, thing in zip(things, chosen)
                   for fact in said.items()) for chosen in permutations(scene.things, len(things)))


def is_complete(text: str, scene: Scene) -> bool:
    """Whether the text mentions the background and every attribute of as many things as there are
    (true or not)."""
    stated = read(text)
    return bool(stated) and bool(stated[0]) and len(stated[1]) == len(scene.things) and all(
        len(said) == len(scene.things[0].facts()) for said in stated[1])


def web_text(scene: Scene, noise: float, rng: random.Random) -> tuple[str, str]:
    """-> (text, kind). With probability `noise` the text is bad: kind "other" (another image's
    text, 40 %), "wrong" (one attribute wrong, 30 %) or "junk" (alt text that says nothing, 30 %);
    else kind "true"."""
    if rng.random() >= noise:
        return describe(scene, rng), "true"
    kind = rng.choices(("other", "wrong", "junk"), (0.4, 0.3, 0.3))[0]
    if kind == "junk":
        return rng.choice(JUNK), kind
    if kind == "wrong":
        return describe(swap(scene, rng.choice(ATTRIBUTES), rng), rng), kind
    text = describe(random_scene(rng), rng)
    return (text, "true") if is_true(text, scene) else (text, kind)


# ---- a data set ----------------------------------------------------------------------------------

class World(Dataset):
    """`size` image-text pairs of one split, a function of (seed, split, index) alone; the caption
    of a train scene is worded anew every epoch. No augmentation: a crop or flip would make "a small
    circle at the left" false.

    Items are those of `data.PairDataset`: image (3, S, S) uint8, text, texts, image_id (equal for
    images of one scene). The scenes of "val" and "held-out" are all different.
    """

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0,
                 noise: float = 0.0):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        self.split, self.size, self.image_size, self.seed, self.noise = (
            split, size, image_size, seed, noise)
        self.epoch, self.scenes = 0, None
        if split != "train":
            rng, scenes = random.Random(f"scenes {seed}"), {}
            while len(scenes) < size:
                scenes[random_scene(rng, split)] = None
            self.scenes = list(scenes)

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def rng(self, index: int, purpose: str) -> random.Random:
        """A generator of its own for each (seed, split, index, purpose)."""
        return random.Random(f"{purpose} {self.seed} {self.split} {index}")

    def scene(self, index: int) -> Scene:
        """What item `index` shows."""
        return (self.scenes[index] if self.scenes
                else random_scene(self.rng(index, "scene"), self.split))

    def text(self, index: int, scene: Scene | None = None) -> str:
        """What is written under item `index` in this epoch; `scene` spares drawing it again."""
        rng = self.rng(index, f"text {self.epoch}")
        return web_text(scene or self.scene(index), self.noise, rng)[0]

    def references(self, index: int, count: int = 5) -> list[str]:
        """Item `index` as `count` people would describe it, whatever the noise."""
        scene = self.scene(index)
        return [describe(scene, self.rng(index, f"reference {k}")) for k in range(count)]

    def __getitem__(self, index: int) -> dict:
        scene = self.scene(index)
        image = render(scene, self.image_size, self.rng(index, "image"))
        text = self.text(index, scene)
        return {"image": torch.from_numpy(image), "text": text, "texts": (text,),
                "image_id": number_of(scene), "index": index}

    def save(self, folder: Path, name: str) -> Path:
        """Write the items as a user would bring them, name/INDEX.png and name.json, a list of
        {image, caption} -> the path of the list."""
        (folder / name).mkdir(parents=True, exist_ok=True)
        records = []
        for index, item in enumerate(map(self.__getitem__, range(len(self)))):
            records.append({"image": f"{name}/{index:06d}.png", "caption": item["text"]})
            picture = Image.fromarray(item["image"].permute(1, 2, 0).numpy())
            picture.save(folder / records[-1]["image"])
        path = folder / f"{name}.json"
        path.write_text(json.dumps(records, indent=0) + "\n")
        return path


def all_captions(count: int = 2000) -> list[str]:
    """Captions enough to train a tokenizer on: they contain every word of the world, junk
    included."""
    rng = random.Random("words")
    return [describe(random_scene(rng), rng) for _ in range(count)] + list(JUNK)
