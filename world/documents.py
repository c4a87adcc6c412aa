"""Documents: texts alone, without pictures, that a language model of the world is trained on.

A document is a caption or a list of facts, and what can be said after it: the same scene in other
words, and dialogs: questions with their answers.
"""

import random
from dataclasses import dataclass

from torch.utils.data import Dataset

from data.datasets import Dialog
from world.dialogs import answer_about, ask_next
from world.language import describe
from world.questions import KINDS
from world.scenes import SPLITS, Scene, random_scene

DIALOGS, ROUNDS = 2, 4  # in a document, in a dialog
# How often each of KINDS is asked: what is easy to learn less often.
KIND_WEIGHTS = {"background": 0.3, "yes/no": 2.0, "where": 1.5}  # others: 1
WITHOUT_CAPTION = 0.03  # share of documents that are dialogs alone
LISTS = 0.5  # share of the others that begin with a list of facts


@dataclass(frozen=True)
class Document:
    """A caption or a list ("" in some), the same scene in other words, dialogs about it."""

    caption: str
    other_words: str
    dialogs: tuple[Dialog, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is said in it."""
        said = [text for dialog in self.dialogs for asked in dialog for text in asked]
        return (self.caption, self.other_words, *said)


class Documents(Dataset):
    """`size` documents of one split: items {example, index, broken}.

    A function of (seed, split, index) and not of the epoch: the same few thousand documents, read
    again and again, teach a small model to look things up in a caption, where ever new ones of the
    same number do not (results/blip2_tried.md).
    """

    def __init__(self, split: str, size: int, seed: int = 0):
        """Raises ValueError for an unknown split."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        self.split, self.size, self.seed, self.epoch = split, size, seed, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch: the documents stay, texts are split elsewhere."""
        self.epoch = epoch

    def scene(self, index: int) -> Scene:
        """What document `index` is about. Most scenes have two things: these are harder."""
        rng = random.Random(f"document {self.seed} {self.split} {index}")
        scene = random_scene(rng, self.split)
        if len(scene.things) == 1 and rng.random() < 0.5:
            scene = random_scene(rng, self.split)
        return scene

    def example(self, index: int) -> Document:
        """Document `index`."""
        scene = self.scene(index)
        rng = random.Random(f"words {self.seed} {self.split} {index}")
        caption = ""
        if rng.random() >= WITHOUT_CAPTION:
            caption = (list_facts if rng.random() < LISTS else describe)(scene, rng)
        other_words = describe(scene, rng)
        dialogs = tuple(converse_freely(scene, rng) for _ in range(DIALOGS))
        return Document(caption, other_words, dialogs)

    def __getitem__(self, index: int) -> dict:
        share = random.Random(f"share {self.epoch} {index}").random()  # where a text is split
        return {"example": self.example(index), "index": index, "share": share, "broken": []}


def list_facts(scene: Scene, rng: random.Random) -> str:
    """All facts of a scene in any order: "white background, top left red large star".

    A reader of captions and lists cannot rely on where a word stands. That helps it to read soft
    tokens, which are no captions (results/blip2_tried.md).
    """
    things = []
    for thing in rng.sample(scene.things, len(scene.things)):
        facts = [answer_about(thing, kind, rng) for kind in ("size", "colour", "shape", "where")]
        rng.shuffle(facts)
        things.append(" ".join(facts))
    background = f"{scene.background} background"
    said = rng.choice(([background, *things], [*things, background]))
    return rng.choice((", ", " and ", " with ")).join(said)


def converse_freely(scene: Scene, rng: random.Random) -> Dialog:
    """ROUNDS of a dialog."""
    weights = [KIND_WEIGHTS.get(kind, 1.0) for kind in KINDS]
    dialog, asked = [], None
    for _ in range(ROUNDS):
        asked = ask_next(scene, rng, asked, weights)
        dialog.append((asked.text, asked.answers[0]))
    return tuple(dialog)
