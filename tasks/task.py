"""What a task is: one record, which train.py and eval.py read.

A new task is one file beside this one, with a `TASK` or `BENCHMARKS`, and its name in registry.py.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from blip import make_vit
from config import SIZES, BLIPConfig, TrainConfig
from data.datasets import (
    Collate,
    ImageDataset,
    caption_collate,
    check_inside,
    name_hash,
    worker_options,
)
from data.files import InputError, named_files
from data.images import batch_to
from data.pairs import merge_captions, read_pairs
from data.sources import open_mixture
from data.text import Tokenizer, clean_caption
from reports.sheets import Sections
from training import distributed
from training.trainable import Trainable
from world.datasets import World

BATCH = 64  # images that an evaluation encodes at a time
GREY_LEVEL = 128  # of the images that a blind model sees


class TaskModel(Trainable):
    """A model of one of the paper's tasks: a ViT and what reads its tokens."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        self.config = config
        self.vit = make_vit(config)


@dataclass
class TrainedModel:
    """A model with what is needed to use it."""

    model: nn.Module
    tokenizer: Tokenizer
    settings: dict  # of its training: TrainConfig's fields
    answers: list[str] = field(default_factory=list)  # that a VQA model ranks
    released: bool = False  # by the paper's authors, or in their form

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def image_size(self) -> int:
        """In pixels."""
        return self.model.config.image_size

    @property
    def max_words(self) -> int:
        """The number of words at which texts are cut."""
        return self.settings["max_words"]

    @property
    def max_tokens(self) -> int:
        """The number of tokens at which texts are cut, [CLS] and [SEP] included."""
        return self.settings["max_tokens"]

    @property
    def workers(self) -> int:
        """Processes that load photographs: as many as in training, if there are as many cores."""
        return min(self.settings.get("workers", 0), os.cpu_count() or 1)

    def digest(self) -> str:
        """Of the weights: under the same file name there may be others tomorrow."""
        content = hashlib.sha256()
        for value in self.model.state_dict().values():
            content.update(value.cpu().numpy().tobytes())
        return content.hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Where examples come from: files, or without them the picture world."""

    data: str  # files with commas between them
    image_root: str  # "": the folder of the first file
    split: str  # train, val or held-out of the world; of a Karpathy file
    size: int  # the first examples, this many; 0: all
    image_size: int  # pixels
    seed: int = 0
    each_caption: bool = False  # an item for each caption, for training; else for each image
    augment: bool = False  # random crops, flips and RandAugment, for training
    rand_augment: bool = True  # false: crops and flips alone
    replace_broken: bool = False  # an image that cannot be read by another one, for training
    crop_min: float = 1.0  # smallest share of the area in a random crop
    flip: str = "safe"  # TrainConfig.flip
    noise: float = 0.0  # share of bad texts in the world
    frames: int = 0  # of a clip
    need_labels: bool = True  # an example without its captions or answers is an error
    index: Path = Path("runs/index")  # where the index of large sources is kept

    def folder(self) -> str | Path:
        """That the images are relative to."""
        return self.image_root or Path(named_files(self.data)[0]).parent

    def first(self, examples: list) -> list:
        """The first `size` examples; InputError where a picture's name leads out of folder()."""
        root = os.path.abspath(self.folder())
        if 0 < self.size < len(examples):
            distributed.print0(f"of {len(examples)} examples of {self.data} the first {self.size} "
                               "are judged")
        for number, example in enumerate(examples):
            for name in example.images:
                check_inside(f"{self.data}, example {number}", name, root)
        return examples[:self.size or None]

    def images(self, examples: list, kind: type[ImageDataset] = ImageDataset) -> ImageDataset:
        """Examples from files as a data set."""
        return kind(self.first(examples), self.folder(), self.image_size,
                    self.augment, (self.crop_min, 1.0), self.flip, self.seed,
                    self.replace_broken, self.rand_augment)


@dataclass
class Datasets:
    """What a run trains on and is judged by."""

    train: Dataset
    val: Dataset | None  # what the best epoch is chosen by; None: the last step is kept
    final: Dataset | None  # what is judged at the end; None: nothing is
    answers: list[str] = field(default_factory=list)  # that a VQA model ranks


@dataclass(frozen=True)
class EvalSettings:
    """How an evaluation is done. None: as the checkpoint was trained."""

    top_k: int | None = None  # candidates: of ITM, or answers whose likelihood is computed
    rerank_score: str = ""  # TrainConfig.rerank_score; "": as the checkpoint was trained
    decoding: dict = field(default_factory=dict)  # what was asked of captioning.Decoding
    generate: bool = False  # VQA: answer freely instead of ranking
    answers: tuple[str, ...] = ()  # VQA: those that are ranked
    training: Dataset | None = None  # its commonest caption or answer is what a blind model says
    baselines: bool = True  # also what a model that sees nothing scores


@dataclass
class Evaluation:
    """What an evaluation finds."""

    numbers: dict  # "chance" and "constant" hold trivial levels, NAME_by values for each kind
    sections: Sections  # of the sheet
    files: dict[str, list | dict] = field(default_factory=dict)  # json files for servers and tools


@dataclass(frozen=True)
class Benchmark:
    """A command of eval.py."""

    name: str
    about: str
    model: type  # that it judges
    evaluate: Callable[[TrainedModel, Dataset, EvalSettings], Evaluation]
    open_data: Callable[[Source], Dataset]
    needs: tuple[str, ...] = ()  # objectives that the checkpoint must have been trained with
    flags: tuple[str, ...] = ()  # of eval.FLAGS, beside those that all commands have
    defaults: dict = field(default_factory=dict)  # of these flags
    size: int = 1000  # items of the world
    settings: dict = field(default_factory=dict)  # instead of the checkpoint's
    needs_data: bool = False  # the world has none of it
    need_labels: bool = True  # an example without its captions or answers is an error


# Settings that only some tasks read. Where one would do nothing it is refused, and not in --help.
LOSSES = ("itc_weight", "itm_weight", "lm_weight", "lm_only_steps", "itm_from")
CONTRAST = ("temp_min", "temp_max", "hard_negatives", "negative_floor", "mask_positives")
TWINS = ("alpha", "alpha_epochs", "momentum", "queue_size")
OF_BLIP = (*LOSSES, *CONTRAST, *TWINS, "label_smoothing")
SOME_READ = (*OF_BLIP, "equal_texts", "all_negatives", "merge_from", "answers", "prompt",
             "itg_smoothing", "new_layers", "text_from")


@dataclass(frozen=True)
class Task:
    """What train.py has to know of a task."""

    name: str  # the first word of the command
    about: str
    model: type[nn.Module]  # made from its configuration
    open_data: Callable[[Source], Dataset]
    collate: Callable[[Tokenizer, TrainConfig, object], Collate]  # object: a `config`
    evaluate: Callable[[TrainedModel, Dataset, EvalSettings], Evaluation]
    score: Callable[[dict], float] | None = None  # numbers -> what selects the best epoch
    # (config, tokenizer, alpha) -> arguments of the model's forward, without the batch's tensors
    inputs: Callable[[TrainConfig, Tokenizer, float], dict] = lambda config, tokenizer, alpha: {}
    config: type = BLIPConfig  # of the model
    sizes: dict[str, dict] = field(default_factory=lambda: SIZES)  # preset -> fields of `config`
    # the tasks whose model it may start from with --init, beside its own; () none
    starts_from: tuple[str, ...] = ("pretrain",)
    start_is_needed: bool = True  # without --init there is nothing to train
    # the start's model and training configuration -> fields of `config`
    from_start: Callable[[dict, dict], dict] = lambda model_config, recipe: model_config
    # of a new run: the model's configuration with what the tokenizer (and other files) decide
    complete: Callable[[object, Tokenizer], object] = (
        lambda config, tokenizer: replace(config, **tokenizer.config()))
    # how a text that it learns to write is cut into pieces (by another model's tokenizer, perhaps)
    pieces: Callable[[object, Tokenizer], Callable[[str], list[int]]] = (
        lambda config, tokenizer: tokenizer.piece_ids)
    needs: tuple[str, ...] = ()  # objectives that its start must have been trained with
    reads: tuple[str, ...] = SOME_READ  # which of these it reads
    holds_splits: bool = False  # a file may hold training and validation (Karpathy's)
    lengths_count_prompt: bool = True  # --min-length and --max-length: of prompt and caption
    reranks: bool = False  # it is judged by re-ranking --eval-top-k candidates
    # before training: what the data sets must still be told, or be rid of
    prepare: Callable[[Datasets, Tokenizer, TrainConfig], Datasets] = (
        lambda datasets, tokenizer, config: datasets)
    # fields of TrainConfig that differ from its defaults: with every preset; with --preset large;
    # with --preset tiny; with --preset tiny on own data
    settings: dict = field(default_factory=dict)
    large: dict = field(default_factory=dict)
    tiny: dict = field(default_factory=dict)
    tiny_own: dict = field(default_factory=dict)
    model_settings: dict = field(default_factory=dict)  # fields of `config`, with base and large
    # Losses of BLIP that it does not train -> those in their place, which have their weights.
    replaces: dict[str, str] = field(default_factory=dict)
    # What its losses are for a model that knows nothing, where that is not BLIP's; None: unknown.
    chance: dict[str, float | None] = field(default_factory=dict)
    # what the end of a run shows: reports.numbers.print_highlights
    highlights: tuple[tuple[tuple[str, str, str], ...], ...] = ()
    # (model, its configuration, the model of --init or None) of a new run: what else its weights
    # start from
    initialise: Callable[[nn.Module, object, nn.Module | None], None] = (
        lambda model, config, source: None)

    def benchmark(self, name: str, about: str, **changes) -> Benchmark:
        """A command of eval.py that evaluates as this task does."""
        return Benchmark(name, about, self.model, self.evaluate, self.open_data, **changes)


# ---- settings that several tasks have ------------------------------------------------------------

# BLIP sec. 5 and the released configurations: no warm-up, cosine to 0 per epoch, milder crops.
FINETUNE = dict(schedule="epoch_cosine", warmup_steps=0, min_lr=0.0, crop_min=0.5, batch_size=256)
# Measured, not the paper's: see "The tiny preset" in docs/training.md.
TINY = dict(batch_size=32, schedule="cosine", warmup_steps=100, beta2=0.98, grad_clip=1.0,
            workers=1, eval_top_k=16, rerank_score="posterior", min_length=5, max_length=30)
OWN_WORDS = 4000  # pieces that own texts may add to a start's vocabulary, with --preset tiny


# ---- image-text pairs: what pretraining, retrieval and captioning read --------------------------

def open_pairs(source: Source) -> Dataset:
    """Image-text pairs: one caption each in training, else one item for each image."""
    if not source.data:
        return World(source.split, source.size, source.image_size, source.seed, source.noise)
    if not source.each_caption:
        if len(named_files(source.data)) > 1:
            raise InputError(f"{source.data} names several files, and what judges is one file; put "
                             "all its pairs into one")
        pairs = read_pairs(source.data, source.image_root or None, source.split,
                           source.need_labels)
        return source.images(merge_captions(pairs))
    pairs = open_mixture(source.data, source.image_root, source.index)
    return ImageDataset(pairs, "", source.image_size, source.augment, (source.crop_min, 1.0),
                        source.flip, source.seed, source.replace_broken,
                        source.rand_augment)


def collate_pairs(tokenizer: Tokenizer, config: TrainConfig, model_config) -> Collate:
    """Batches of pairs, each caption behind the prompt.

    With `equal_texts` also image_ids (B,), equal where captions are: no negatives of one another.
    """
    def encode(items):
        tensors = of_captions.encode(items)
        if config.equal_texts:
            captions = [clean_caption(item["example"].captions[0]) for item in items]
            tensors["image_ids"] = torch.tensor([name_hash(caption) for caption in captions])
        return tensors
    of_captions = caption_collate(tokenizer, config.max_words, config.max_tokens, config.prompt)
    return Collate(encode)


# ---- evaluation, shared out over processes -------------------------------------------------------

def shared_batches(count: int, batch_size: int = BATCH) -> list[list[int]]:
    """This rank's share of the batches of 0 ... count - 1.

    The batches are the same whatever the number of ranks, and so are the numbers.
    """
    return distributed.own_part([rows.tolist() for rows in torch.arange(count).split(batch_size)])


def evaluation_batches(dataset: Dataset, collate: Collate, trained: TrainedModel, about: str,
                       broken: list[str] | None = None, grey: bool = False) -> Iterator[dict]:
    """This rank's batches on the model's device, images normalised (data.images.batch_to).

    A batch has BATCH images: fewer clips, whose frames all count. Images that cannot be read are
    left out; their names go into `broken`. grey: a model that sees nothing, every image is grey.
    """
    batch_size = max(1, BATCH // getattr(dataset, "frames", 1))
    loader = DataLoader(dataset, collate_fn=collate,
                        batch_sampler=shared_batches(len(dataset), batch_size),
                        pin_memory=trained.device.type == "cuda",
                        generator=torch.Generator(),  # else it would move a training's
                        **worker_options(dataset, trained.workers))
    for batch in distributed.progress(loader, about, unit="batch"):
        if broken is not None:
            broken += batch["broken"]
        if batch["image"] is None:
            continue
        if grey:
            batch["image"] = torch.full_like(batch["image"], GREY_LEVEL)
        yield batch_to(batch, trained.device)


def require_readable(records: list, dataset: Dataset, broken: list[str] | None = None) -> None:
    """InputError where no picture of a data set could be read. broken: their names, if known."""
    if not records:
        hint = f"the first: {broken[0]}" if broken else "is --image-root right?"
        raise InputError(f"none of the {len(dataset)} images could be read; {hint}")


def broken_images(dataset: Dataset, records: list[dict]) -> int:
    """How many images of a data set could not be read: those of the items without a record.

    An image is counted once, however many items are about it.
    """
    answered = {record["index"] for record in records}
    return len({dataset.example(index).image for index in range(len(dataset))
                if index not in answered})


def subsets_of(dataset: Dataset) -> dict[str, list[int]]:
    """Parts of a data set that are also reported by themselves: name -> indices."""
    return dataset.subsets() if hasattr(dataset, "subsets") else {}

