"""Documents: texts alone, without pictures, that a language model of the world is trained on.

A document is a caption, and what can be said after it: the same scene in other words, and questions
with their answers.
"""

import random
from dataclasses import dataclass

from torch.utils.data import Dataset

from world.language import describe
from world.questions import KINDS, ask
from world.scenes import SPLITS, Scene, random_scene

QUESTIONS = 8  # in a document
# How often each of KINDS is asked: what is easy to learn less often.
KIND_WEIGHTS = {"background": 0.3, "yes/no": 2.0, "where": 1.5}
WITHOUT_CAPTION = 0.03  # share of documents that are questions alone


@dataclass(frozen=True)
class Document:
    """A caption ("" in some), the same scene in other words, pairs (question, answer)."""

    caption: str
    other_words: str
    questions: tuple[tuple[str, str], ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is said in it."""
        asked = [text for pair in self.questions for text in pair]
        return (self.caption, self.other_words, *asked)


class Documents(Dataset):
    """`size` documents of one split: items {example, index, broken}.

    A function of (seed, split, index) and not of the epoch: the same few thousand documents, read
    again and again, teach a small model to look things up in a caption, where ever new ones of the
    same number do not (results/blip2_world.md).
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
        caption = "" if rng.random() < WITHOUT_CAPTION else describe(scene, rng)
        other_words = describe(scene, rng)
        weights = [KIND_WEIGHTS.get(kind, 1.0) for kind in KINDS]
        asked = [ask(scene, rng, kind) for kind in rng.choices(KINDS, weights, k=QUESTIONS)]
        questions = tuple((question.text, question.answers[0]) for question in asked)
        return Document(caption, other_words, questions)

    def __getitem__(self, index: int) -> dict:
        share = random.Random(f"share {self.epoch} {index}").random()  # where a text is split
        return {"example": self.example(index), "index": index, "share": share, "broken": []}
