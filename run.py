"""What a training run consists of: data in its order, model, optimizer, counters; and how all of
that gets into a checkpoint and out of it.

What a run does depends on (seed, epoch, step), and not on the clock, the loader's workers or, but
for dropout and mining, the number of processes: each global batch is cut into world x accumulate
chunks, number micro * world + rank for each micro-batch of each rank.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

import checkpoints
import distributed
from blip import BLIPConfig
from config import TrainConfig
from data import Collate, InputError, PairDataset, Tokenizer
from pairs import is_list, merge_captions, open_mixture, read_pairs
from task_data import COLLATE, common_answers, open_task, spelt
from tasks import make_model
from weights import start_from
from world import World, all_captions
from world_tasks import all_texts


class EpochBatches(Sampler):
    """This rank's micro-batches of one epoch, `accumulate` for each step: a function of (seed,
    epoch, step) alone, so that a run can start anywhere and the samples of a global batch do not
    depend on the number of processes. The last, incomplete batch is left out."""

    def __init__(self, size: int, batch_size: int, seed: int, epoch: int, first_step: int,
                 accumulate: int = 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        self.order = torch.randperm(size, generator=generator)
        self.batch_size, self.first_step, self.steps = batch_size, first_step, size // batch_size
        self.accumulate = accumulate

    def __iter__(self) -> Iterator[list[int]]:
        world, rank = distributed.world_size(), distributed.rank()
        share = self.batch_size // (world * self.accumulate)
        for step in range(self.first_step, self.steps):
            for micro in range(self.accumulate):
                start = step * self.batch_size + (micro * world + rank) * share
                yield self.order[start:start + share].tolist()

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulate


@dataclass
class Sets:
    """Training set; what checkpoints are chosen by (None: the last one is kept); what is judged at
    the end (None: nothing is); the training texts, or for VQA the answers that are ranked."""

    train: Dataset
    val: Dataset | None
    final: Dataset | None
    texts: list[str]


def load_task_data(config: TrainConfig, image_size: int, tokenizer: Tokenizer) -> Sets:
    """The data sets of the tasks of tasks.py; of answers in files those that the tokenizer can
    spell."""
    c, val = config, None
    train = open_task(c.task, c.data, c.image_root, image_size, 0 if c.data else c.world_size,
                      "train", seed=c.seed, **({"augment": c.augment, "crop": (c.crop_min, 1.0)}
                                               if c.data else {}))
    def held_out(split, size):
        return open_task(c.task, c.val, c.image_root, image_size, size, split)
    if c.val or not c.data:
        val = held_out("val", c.eval_size if c.val else min(400, c.eval_size))
    final = val if c.data else held_out("held-out", c.eval_size)
    if c.task != "vqa":
        return Sets(train, val, final, [])
    if c.data:
        train.pairs, left_out = spelt(train.pairs, tokenizer)
        if left_out:
            distributed.print0(left_out)
    asked = train.pairs if c.data else map(train.question, range(min(5000, len(train))))
    return Sets(train, val, final, common_answers(one.answers for one in asked))


def load_data(config: TrainConfig, image_size: int, tokenizer: Tokenizer | None = None) -> Sets:
    """The data sets of a run: the world without --data. One --val serves both purposes.
    tokenizer: of the model that a finetuning starts from."""
    if config.task in COLLATE:
        return load_task_data(config, image_size, tokenizer)
    if not config.data:
        return Sets(World("train", config.world_size, image_size, config.seed, config.noise),
                    World("val", min(300, config.eval_size), image_size),
                    World("held-out", config.eval_size, image_size), all_captions())
    root, index = config.image_root or None, Path(config.out).parent / "index"
    if distributed.rank() == 0:
        open_mixture(config.data, root, index)  # builds what is not there yet, for all ranks
    distributed.barrier()
    pairs = open_mixture(config.data, root, index)
    train = PairDataset(pairs, "", image_size, config.augment, (config.crop_min, 1.0), config.seed)
    val, held_out = config.val, None
    alone = config.data.endswith(".json") and "," not in config.data
    if not val and alone and not is_list(config.data):
        val = config.data  # a Karpathy file holds all splits
    if val:
        known = merge_captions(read_pairs(val, root, config.val_split))[:config.eval_size]
        held_out = PairDataset(known, root or Path(val).parent, image_size)
        if config.eval_top_k > len(held_out):
            raise InputError(f"--eval-top-k {config.eval_top_k} is larger than the gallery of "
                             f"{len(held_out)} images in {val}; give a smaller one")
    some = range(0, len(pairs), max(1, len(pairs) // 200_000))  # enough for a vocabulary
    return Sets(train, held_out, held_out, [pairs[i].captions[0] for i in some])


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over everything but the twins. NOTE(differs from salesforce/BLIP): no weight decay on
    biases, LayerNorms and the temperature, which have nothing to gain from being small."""
    twins = {id(p) for _, twin in model.twins() for p in twin.parameters()}
    online = [p for p in model.parameters() if id(p) not in twins]
    groups = [{"params": [p for p in online if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in online if p.ndim <= 1], "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)


class Run:
    """What a run consists of, and how it gets into a checkpoint and out of it."""

    def __init__(self, model_config: BLIPConfig, config: TrainConfig, device: torch.device,
                 state: dict | None = None, source: tuple[nn.Module, Tokenizer] | None = None):
        """`state` is a checkpoint to continue; `source` a model to start from, and its
        tokenizer."""
        self.config, self.device, self.out = config, device, Path(config.out)
        known = Tokenizer(state["tokenizer"]) if state else source[1] if source else None
        self.sets = load_data(config, model_config.image_size, known)
        self.train_set = self.sets.train
        if len(self.train_set) < config.batch_size:
            raise InputError(f"there are {len(self.train_set)} training pairs, fewer than "
                             f"--batch-size {config.batch_size}; give a smaller one")
        if known:
            self.tokenizer = known
        elif config.vocab:
            self.tokenizer = Tokenizer.from_file(config.vocab)
        else:
            self.tokenizer = Tokenizer.train(self.sets.texts if config.data else all_texts(),
                                             config.vocab_pieces)
        torch.manual_seed(config.seed)  # the same on all ranks: weights and queues start equal
        model_config = replace(model_config, **self.tokenizer.config())
        try:
            self.model = make_model(config.task, model_config, state and state["model"]).to(device)
        except ValueError as error:  # sizes that do not fit the task
            raise InputError(str(error))
        self.optimizer = make_optimizer(self.model, config)
        if source:
            checkpoints.initialise(self.model, source[0])
        elif not state and (config.init_vit or config.init_text):
            if config.init_text and not config.vocab:
                raise InputError("--init-text needs --vocab with the vocab.txt of those weights")
            distributed.print0(start_from(self.model, config.init_vit, config.init_text))
        # What stands before each text: [DEC] and the prompt. It gives no loss.
        self.prompt_length = 1 + len(self.tokenizer.pieces_of(config.prompt))
        self.step, self.seconds, self.best = 0, 0.0, -math.inf
        self.seen, self.broken = 0, Counter()  # images, and why some of them could not be read
        self.steps_per_epoch = len(self.train_set) // config.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            if distributed.rank() == 0:  # of all ranks together
                self.seen, self.broken = state["seen"], Counter(state["broken"])
            self.best = state["best"]
        self.set_generators(state)

    def set_generators(self, state: dict | None) -> None:
        """Dropout and mining differ from rank to rank. They go on as they stood in the checkpoint;
        with another number of processes they start anew, as a function of seed, step and rank."""
        rank = distributed.rank()
        if state is None or len(state["rng"]) != distributed.world_size():
            torch.manual_seed(self.config.seed + rank + 1_000_003 * self.step)
            return
        torch.set_rng_state(state["rng"][rank])
        if self.device.type == "cuda" and state["rng_cuda"][rank] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"][rank])

    def save(self) -> None:
        """Write checkpoint.pt; all ranks call it, rank 0 writes. The schedules are functions of
        `step`: nothing else is needed to go on."""
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        states = distributed.gather([(torch.get_rng_state(), cuda, self.seen, self.broken)])
        if distributed.rank() == 0:
            checkpoints.save(self.out / "checkpoint.pt", self.weights() | {
                "optimizer": self.optimizer.state_dict(), "step": self.step,
                "seconds": self.seconds, "best": self.best, "rng": [s[0] for s in states],
                "rng_cuda": [s[1] for s in states], "seen": sum(s[2] for s in states),
                "broken": dict(sum((s[3] for s in states), Counter()))}, self.config.keep)

    def weights(self) -> dict:
        """What rebuilds the model and its tokenizer, and says how they were trained."""
        ours = {"model": self.model.state_dict(), "model_config": asdict(self.model.config),
                "tokenizer": self.tokenizer.state(), "train_config": asdict(self.config)}
        return ours | ({"answers": self.sets.texts} if self.config.task == "vqa" else {})

    def collate(self) -> Callable:
        """What makes a batch of the task's items."""
        c = self.config
        if c.task in COLLATE:
            return COLLATE[c.task](self.tokenizer, c.max_tokens)
        return Collate(self.tokenizer, c.max_tokens, c.prompt)

    def batches(self) -> Iterator[list[dict]]:
        """For each step from the current one to the end of the last epoch, its micro-batches."""
        c, pictures, collate = self.config, isinstance(self.train_set, PairDataset), self.collate()
        while self.step < self.steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            self.train_set.set_epoch(epoch)
            loader = iter(DataLoader(
                self.train_set, collate_fn=collate,
                batch_sampler=EpochBatches(len(self.train_set), c.batch_size, c.seed, epoch, first,
                                           c.accumulate),
                num_workers=c.workers if pictures else 0, pin_memory=self.device.type == "cuda",
                # its own: else each start of a loader would move the run's generator
                generator=torch.Generator()))
            for _ in range(first, self.steps_per_epoch):
                yield [next(loader) for _ in range(c.accumulate)]

    def count(self, batch: dict) -> None:
        """Keep count of unreadable images; InputError when they are too many."""
        self.seen += len(batch["broken"]) + (0 if batch["image"] is None else len(batch["image"]))
        # "name (reason)"
        self.broken.update(name.rpartition(" (")[2].rstrip(")") for name in batch["broken"])
        enough, broken = self.seen >= min(100, len(self.train_set)), self.broken.total()
        if batch["image"] is None or (enough and broken > self.config.max_broken * self.seen):
            raise InputError(f"{broken} of {self.seen} images could not be read, more than "
                             f"--max-broken {self.config.max_broken:g} allows; the last: "
                             f"{batch['broken'][-1:]}; is --image-root right?")
