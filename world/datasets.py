"""The world as data sets: items as those of data.datasets.ImageDataset, from scenes of one split.

    World           captioned pictures
    Questions       VQA                    Clips           captioned clips
    Statements      NLVR2                  ClipQuestions   questions about clips
    Dialogs         visual dialog          all_texts       what a vocabulary is trained on
"""

import json
import random
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from config import SettingError
from data.clips import frame_numbers
from data.datasets import Dialog, DialogExample, NLVR2Example, Pair, VQAExample
from data.text import clean_caption
from world.dialogs import FOLLOW_UPS, HEDGES, converse
from world.language import all_captions, describe, web_text
from world.questions import KINDS, ask, draw_pair, draw_statement
from world.scenes import SPLITS, Scene, random_scene, render, scene_hash

FRAMES = 8  # of a clip
MOST_SCENES = 50_000  # different ones that are drawn of a held-out split
# What a language model is prompted with (BLIP-2), often enough to be words of the vocabulary.
PROMPTS = ("a photo of", "question: short answer:") * 2


class World(Dataset):
    """`size` image-text pairs of one split.

    The picture is a function of (seed, split, index), the caption also of the epoch: it is worded
    anew every epoch. The scenes of "val" and of "held-out" differ from each other. No augmentation:
    a crop or flip would make "a small circle at the left" false. image_id is equal for images of
    one scene.
    """

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0,
                 noise: float = 0.0):
        """noise: share of bad texts. Raises ValueError for an unknown split."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed
        self.noise, self.epoch, self.scenes = noise, 0, None
        if split != "train":
            if size > MOST_SCENES:
                raise SettingError(f"the world has about {MOST_SCENES} {split} scenes, fewer than "
                                   f"the {size} that were asked for; give a smaller number")
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
        if self.scenes:
            return self.scenes[index]
        return random_scene(self.rng(index, "scene"), self.split)

    def picture(self, index: int) -> torch.Tensor:
        """-> (3, S, S) uint8."""
        image = render(self.scene(index), self.image_size, self.rng(index, "image"))
        return torch.from_numpy(image)

    def example(self, index: int) -> Pair:
        """What is written under item `index` in this epoch."""
        scene = self.scene(index)
        text, _ = web_text(scene, self.noise, self.rng(index, f"text {self.epoch}"))
        return Pair("", (text,), scene_hash(scene))

    def references(self, index: int, count: int = 5) -> list[str]:
        """Item `index` as `count` people would describe it, whatever the noise."""
        scene = self.scene(index)
        return [describe(scene, self.rng(index, f"reference {k}")) for k in range(count)]

    def __getitem__(self, index: int) -> dict:
        return make_item(self, index, self.picture(index), self.example(index))

    def save(self, folder: Path, name: str) -> Path:
        """Write the items as a user would bring them -> the path of the list.

        name/INDEX.png, and name.json, a list of {image, caption}.
        """
        (folder / name).mkdir(parents=True, exist_ok=True)
        records = []
        for index in range(len(self)):
            path = f"{name}/{index:06d}.png"
            picture = Image.fromarray(self.picture(index).permute(1, 2, 0).numpy())
            picture.save(folder / path)
            records.append({"image": path, "caption": self.example(index).captions[0]})
        path = folder / f"{name}.json"
        path.write_text(json.dumps(records, indent=0) + "\n")
        return path


def make_item(dataset, index: int, image: torch.Tensor, example) -> dict:
    """An item of data.datasets.ImageDataset; dataset has split, seed and epoch."""
    return {"image": image, "example": example, "index": index, "broken": [],
            "seed": f"{dataset.seed} {dataset.split} {dataset.epoch} {index}"}


class SceneDataset(Dataset):
    """Something that is said about each of `size` scenes of one split.

    A function of (seed, split, index), and in training of the epoch.
    """

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0):
        self.world = World(split, size, image_size, seed)

    def __len__(self) -> int:
        return len(self.world)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch: something new is said about the same training scenes."""
        self.world.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict:
        return make_item(self.world, index, self.picture(index), self.example(index))

    def picture(self, index: int) -> torch.Tensor:
        """-> (3, S, S) uint8."""
        return self.world.picture(index)


class Questions(SceneDataset):
    """Questions about scenes; the kinds take turns."""

    def example(self, index: int) -> VQAExample:
        """What is asked about item `index` in this epoch."""
        rng = self.world.rng(index, f"question {self.world.epoch}")
        asked = ask(self.world.scene(index), rng, KINDS[index % len(KINDS)])
        return VQAExample("", asked.text, index, asked.answers, kind=asked.kind)

    def dialog_before(self, index: int) -> Dialog:
        """Three questions of other kinds about the same scene, with their answers."""
        scene, rng = self.world.scene(index), self.world.rng(index, "dialog before")
        kind, dialog = self.example(index).kind, []
        while len(dialog) < 3:
            asked = ask(scene, rng)
            if asked.kind != kind:  # else the answer may stand there
                dialog.append((asked.text, asked.answers[0]))
        return dialog


class Statements(Dataset):
    """`size` statements of one split, each with two images (2, 3, S, S).

    Four items in a row have one statement with different images, two of them true, for consistency.
    """

    GROUP = 4

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0):
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def statement(self, index: int) -> tuple[str, bool, tuple[Scene, Scene]]:
        """The sentence of item `index`, its label, its two scenes."""
        group = f"statement {self.seed} {self.split} {self.epoch} {index // self.GROUP}"
        sentence, is_true = draw_statement(random.Random(group))
        label = index % self.GROUP < self.GROUP // 2
        scenes = draw_pair(is_true, label, self.split, random.Random(f"{group} {index}"))
        return sentence, label, scenes

    def example(self, index: int) -> NLVR2Example:
        """What is stated in item `index` in this epoch."""
        sentence, label, _ = self.statement(index)
        identifier = f"world-{index // self.GROUP}-{index % self.GROUP}-0"
        return NLVR2Example(("left", "right"), sentence, label, identifier)

    def __getitem__(self, index: int) -> dict:
        rng = random.Random(f"image {self.seed} {self.split} {index}")
        images = [torch.from_numpy(render(scene, self.image_size, rng))
                  for scene in self.statement(index)[2]]
        return make_item(self, index, torch.stack(images), self.example(index))


class Dialogs(SceneDataset):
    """Dialogs about scenes."""

    def example(self, index: int) -> DialogExample:
        """The dialog about item `index` in this epoch."""
        rng = self.world.rng(index, f"dialog {self.world.epoch}")
        caption, rounds = converse(self.world.scene(index), rng)
        return DialogExample("", caption, tuple(rounds), index)


def film(scene: Scene) -> list[Scene]:
    """What each of FRAMES frames shows.

    With two things, the first half shows one and the second half the other: no frame alone tells
    all of it.
    """
    if len(scene.things) == 1:
        return [scene] * FRAMES
    first, second = (Scene(scene.background, (thing,)) for thing in scene.things)
    return [first] * (FRAMES // 2) + [second] * (FRAMES - FRAMES // 2)


class Clips(SceneDataset):
    """Captioned clips (F, 3, S, S): `frames` of them, uniformly drawn (1: the first one)."""

    def __init__(self, split: str, size: int, image_size: int = 64, seed: int = 0,
                 frames: int = FRAMES):
        super().__init__(split, size, image_size, seed)
        self.frames = frames

    def picture(self, index: int) -> torch.Tensor:
        """-> (frames, 3, S, S) uint8."""
        shown, rng = film(self.world.scene(index)), self.world.rng(index, "clip")
        images = [render(shown[number], self.world.image_size, rng)
                  for number in frame_numbers(FRAMES, self.frames)]
        return torch.stack([torch.from_numpy(image) for image in images])

    def example(self, index: int) -> Pair:
        """The caption of clip `index`."""
        return Pair("", self.world.example(index).captions, index)

    def subsets(self) -> dict[str, list[int]]:
        """"several": the clips of which no one frame shows all."""
        return {"several": [i for i in range(len(self)) if len(self.world.scene(i).things) > 1]}


class ClipQuestions(Clips):
    """Questions about clips, which one frame may not answer."""

    def example(self, index: int) -> VQAExample:
        """What is asked about clip `index`."""
        rng = self.world.rng(index, "clip question")
        asked = ask(self.world.scene(index), rng, KINDS[index % len(KINDS)])
        return VQAExample("", asked.text, index, asked.answers, kind=asked.kind)


def all_texts(count: int = 2000) -> list[str]:
    """What the world's vocabulary is trained on: all kinds of things that are said in it."""
    rng = random.Random("words of the tasks")
    asked = [ask(random_scene(rng), rng) for _ in range(count)]
    questions = [question.text for question in asked]
    answers = [f"{rng.choice(('', *HEDGES))} {question.answers[0]}" for question in asked]
    statements = [draw_statement(rng)[0] for _ in range(count)]
    texts = [*all_captions(count), *questions, *FOLLOW_UPS.values(), *answers, *statements]
    return [clean_caption(text) for text in texts] + list(PROMPTS)
