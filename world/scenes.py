"""A scene: one or two coloured shapes in the four quarters of a pastel background.

    scene = random_scene(rng)        a scene graph
    render(scene, 64, rng)           (3, 64, 64) uint8
    swap(scene, "colour", rng)       the same scene with exactly one attribute changed

The world exists so that training can be watched and judged without downloading anything: every
claim of a generated caption can be checked, which no photograph allows. Colours of objects are
dark, those of backgrounds pale. Scenes are split by a hash of what they show: no scene of "val" or
"held-out" is ever trained on, whatever the seed.
"""

import random
import zlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

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
PIXELS = {"small": 18, "large": 28}  # of 64: a quarter is 32 wide, so a large one nearly fills it
JITTER = 2  # of 64: how far an object may stand from the middle of its quarter


@dataclass(frozen=True)
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
        things.sort(key=lambda thing: PLACES.index(thing.place))  # reading order
        scene = Scene(rng.choice(list(BACKGROUNDS)), tuple(things))
        if split in (None, split_of(scene)):
            return scene


def scene_hash(scene: Scene) -> int:
    """A hash of what the scene shows: images of one scene have the same number.

    It decides the splits: a renamed class or field would make other splits of the same scenes.
    """
    return zlib.crc32(repr(scene).encode())


def split_of(scene: Scene) -> str:
    """held-out: one scene in five, for the final judgement; val: one in 25; else train."""
    number = scene_hash(scene)
    return "held-out" if number % 5 == 0 else "val" if number % 25 == 1 else "train"


def swap(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """The scene with one attribute (of ATTRIBUTES) of it or of one of its things changed.

    A thing moves only to a free quarter, so a description of the result is always false of the
    original. The things keep their order in the caption.
    """
    if attribute == "background":
        return replace(scene, background=choose_other(BACKGROUNDS, [scene.background], rng))
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    if attribute == "place":
        place = choose_other(PLACES, [other.place for other in scene.things], rng)
        swapped = replace(thing, place=place)
    else:
        values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[attribute]
        value = choose_other(values, [getattr(thing, attribute)], rng)
        swapped = replace(thing, **{attribute: value})
    return replace(scene, things=(*scene.things[:index], swapped, *scene.things[index + 1:]))


def choose_other(values, excluded: list[str], rng: random.Random) -> str:
    """One of the values that is not excluded."""
    return rng.choice([value for value in values if value not in excluded])


# ---- pictures ------------------------------------------------------------------------------------

@cache
def stencil(shape: str, size: int) -> np.ndarray:
    """How much of each pixel the shape covers, (size, size) float in [0, 1].

    Drawn 8 times larger, then shrunk.
    """
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
    """The scene as a picture, (3, image_size, image_size) uint8.

    `rng` moves things and shifts colours a little; None draws them exactly.
    """
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
