"""Examples of each task, torch data sets of them, batches.

An example is what there is before its pictures are read. Each has `images`, the files that belong
to it, `image`, their name in messages, and `texts`, everything that is said in it.
"""

import hashlib
import multiprocessing
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.files import InputError
from data.images import load_image, load_whole, open_member
from data.text import Tokenizer, clean_caption


def name_hash(name: str | int) -> int:
    """A 63-bit number that stands for a name, the same in every run."""
    content = str(name).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def check_inside(where: str, name: str, root: str) -> None:
    """Raises InputError where the name of a picture leads out of the image root."""
    if not os.path.normpath(os.path.join(root, name)).startswith(os.path.join(root, "")):
        raise InputError(f"{where}: image {name[:200]!r} lies outside the image root {root}; "
                         "correct the path or give another --image-root")


@dataclass(frozen=True)
class Pair:
    """An image or a clip and its captions as they were written."""

    image: str
    captions: tuple[str, ...]
    image_id: int  # equal for the rows of one image
    name: str | int = ""  # the file's own id of the image, or its path: for result files
    domain: str = ""  # NoCaps: in-domain, near-domain or out-domain
    root: str = ""  # the folder that its file lies in; "": the data set's

    @property
    def images(self) -> tuple[str, ...]:
        """Its file."""
        return (self.image,)

    @property
    def texts(self) -> tuple[str, ...]:
        """Its captions."""
        return self.captions


@dataclass(frozen=True)
class VQAExample:
    """A question about an image or a clip; its people's answers, none in a test set."""

    image: str
    question: str
    question_id: int | str
    answers: tuple[str, ...] = ()
    weight: float = 1.0  # of all answers together
    kind: str = ""  # VQAv2's answer type: yes/no, number, other

    @property
    def images(self) -> tuple[str, ...]:
        """Its file."""
        return (self.image,)

    @property
    def texts(self) -> tuple[str, ...]:
        """The question and its answers."""
        return (self.question, *self.answers)


@dataclass(frozen=True)
class NLVR2Example:
    """A sentence, the two images that it is about, and whether it is true."""

    images: tuple[str, str]
    sentence: str
    label: bool
    identifier: str  # split-set-pair-sentence, as NLVR2 has it; pairs share a sentence

    @property
    def image(self) -> str:
        """Both names."""
        return " and ".join(self.images)

    @property
    def texts(self) -> tuple[str, ...]:
        """The sentence."""
        return (self.sentence,)


Dialog = Sequence[tuple[str, str]]  # questions and answers that stand before a question


@dataclass(frozen=True)
class DialogRound:
    """A question, its answer, and the candidates of which number `target` is that answer."""

    question: str
    answer: str
    candidates: tuple[str, ...]
    target: int


@dataclass(frozen=True)
class DialogExample:
    """A captioned image and the rounds of a dialog about it."""

    image: str
    caption: str
    rounds: tuple[DialogRound, ...]
    dialog_id: int | str  # the image's id
    relevance: tuple[int, tuple[float, ...]] | None = None  # a round, and of its candidates

    @property
    def images(self) -> tuple[str, ...]:
        """Its file."""
        return (self.image,)

    @property
    def texts(self) -> tuple[str, ...]:
        """The caption, questions and answers."""
        spoken = [text for turn in self.rounds for text in (turn.question, turn.answer)]
        return (self.caption, *spoken)


# ---- data sets -----------------------------------------------------------------------------------

SIDES = re.compile(r"\b(left|right)\b", re.I)


class ImageDataset(Dataset):
    """Examples with their pictures: items {image, example, index, seed, broken}.

    image (3, S, S) uint8; example: one of the above; seed: a text that seeds the item's random
    choices, equal for equal (seed, epoch, index); broken: names of the pictures that could not be
    read.

    Training: augmented anew in each epoch (`augment`); an image that cannot be read is replaced by
    the next of 99 that can (`replace_broken`), so that batches keep their size. Evaluation: an
    unreadable image has `image` None.
    """

    def __init__(self, examples: Sequence, image_root: str | Path, image_size: int,
                 augment: bool = False, crop: tuple[float, float] = (0.2, 1.0),
                 flip: str = "safe", seed: int = 0, replace_broken: bool = False,
                 rand_augment: bool = True):
        """crop: smallest and largest share of the area; flip, rand_augment: as in TrainConfig."""
        self.examples, self.root, self.image_size = examples, Path(image_root), image_size
        self.augment, self.crop, self.flip = augment, crop, flip
        self.rand_augment = rand_augment
        self.seed, self.epoch, self.replace_broken = seed, 0, replace_broken

    def __len__(self) -> int:
        return len(self.examples)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)

    def example(self, index: int):
        """The example without its pictures."""
        return self.examples[index]

    def subsets(self) -> dict[str, list[int]]:
        """NoCaps' domains: name -> indices."""
        domains: dict[str, list[int]] = {}
        for index, example in enumerate(self.examples):
            if getattr(example, "domain", ""):
                domains.setdefault(example.domain, []).append(index)
        return domains

    def __getitem__(self, index: int) -> dict:
        broken, image, seed = [], None, f"{self.seed} {self.epoch} {index}"
        for i in range(index, index + (100 if self.replace_broken else 1)):
            example = self.examples[i % len(self)]
            try:
                image = self.load(example, random.Random(seed) if self.augment else None)
                break
            except OSError as error:
                broken.append(f"{example.image} ({error})")
        return {"image": image, "example": example, "index": index, "seed": seed, "broken": broken}

    def show(self, index: int, side: int) -> Tensor | list[Tensor]:
        """An item's picture or pictures in their own proportions, for a sheet.

        Each (3, H, W) uint8, the longer side `side`. Raises OSError.
        """
        example = self.example(index)
        root = getattr(example, "root", "") or self.root
        pictures = [load_whole(open_member(root, name), side) for name in example.images]
        return pictures[0] if len(pictures) == 1 else pictures

    def load(self, example, rng: random.Random | None) -> Tensor:
        """-> (3, S, S) uint8, or (n, 3, S, S) of an example with n pictures. Raises OSError."""
        says_side = any(SIDES.search(text) for text in example.texts)
        flip = self.flip == "always" or (self.flip == "safe" and not says_side)
        root = getattr(example, "root", "") or self.root
        pictures = [load_image(open_member(root, name), self.image_size, rng, self.crop, flip,
                               self.rand_augment) for name in example.images]
        return pictures[0] if len(pictures) == 1 else torch.stack(pictures)


def worker_options(dataset: Dataset, workers: int) -> dict:
    """The part of a DataLoader's arguments that says how many processes load pictures.

    The picture world needs none. Workers are forked, also where Python would start them anew: a
    Collate holds functions, which cannot be sent. Where nothing can be forked (Windows), or not
    safely (macOS), there are none.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    if workers == 0 or not isinstance(dataset, ImageDataset) or not can_fork:
        return {"num_workers": 0}
    return {"num_workers": workers, "multiprocessing_context": "fork"}


def some_examples(dataset: Dataset, most: int) -> Iterator:
    """At most about `most` of a data set's examples, evenly spread, without their pictures.

    Of a mixture all rows count, also those that later epochs read.
    """
    count, read = len(dataset), dataset.example
    if hasattr(getattr(dataset, "examples", None), "whole"):
        rows = dataset.examples.whole()
        count, read = len(rows), rows.__getitem__
    for index in range(0, count, max(1, count // most)):
        yield read(index)


def some_pictures(dataset: Dataset) -> list[Path]:
    """Where the files of about a hundred examples lie; [] for the world, which has none."""
    if not isinstance(dataset, ImageDataset):
        return []
    return [Path(getattr(example, "root", "") or dataset.root) / name
            for example in some_examples(dataset, 100) for name in example.images
            if "\0" not in name]  # such a name is no file's


class Collate:
    """Items -> a batch {image, examples, index, broken, and what `encode` makes}.

    image (B, ..., 3, S, S) uint8. Items whose image is None are left out; if none is left, `image`
    is None. encode(items) -> the tensors of the texts.
    """

    def __init__(self, encode: Callable[[list[dict]], dict[str, Tensor]]):
        self.encode = encode

    def __call__(self, items: list[dict]) -> dict:
        broken = [name for item in items for name in item["broken"]]
        items = [item for item in items if item["image"] is not None]
        batch = {"image": None, "examples": [item["example"] for item in items],
                 "index": [item["index"] for item in items], "broken": broken}
        if items:
            batch["image"] = torch.stack([item["image"] for item in items])
            batch |= self.encode(items)
        return batch


def caption_collate(tokenizer: Tokenizer, max_words: int, max_tokens: int, prompt: str = "",
                    image_ids: bool = False) -> Collate:
    """Batches of Pairs: ids and mask (B, L) of each pair's first caption.

    A caption is cut to max_words, then to max_tokens. `prompt` stands before each caption.
    image_ids: also image_ids (B,), equal where two pairs share an image.
    """
    def encode(items):
        texts = []
        for item in items:
            captions = item["example"].captions  # none in a test set
            caption = clean_caption(captions[0], max_words) if captions else ""
            texts.append(f"{prompt} {caption}")
        ids, mask = tokenizer.encode(texts, max_tokens)
        tensors = {"ids": ids, "mask": mask}
        if image_ids:
            tensors["image_ids"] = torch.tensor([item["example"].image_id for item in items])
        return tensors
    return Collate(encode)
