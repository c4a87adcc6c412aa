"""What a training run consists of, and how all of it gets into a checkpoint and out of it.

Data in its order, model, optimizer, counters. What a run does depends on (seed, epoch, step), not
on the clock or the loader's workers. With 2 processes and 2 micro-batches a batch is cut into 4
parts; rank 0 takes parts 0 and 2, rank 1 takes parts 1 and 3. So, but for dropout and mining, it
depends on the number of parts, and not on how many processes they are for.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from blip import BLIP
from config import TrainConfig, check_lengths
from data.datasets import some_examples, worker_options
from data.files import InputError, named_files
from data.images import batch_to
from data.pairs import is_karpathy
from data.text import Tokenizer
from tasks.captioning import Decoding
from tasks.registry import TASKS, make_model
from tasks.task import Datasets, Source, Task, TrainedModel
from training import checkpoints, devices, distributed, plan
from training.code import digest_of_code
from training.precision import choose_precision
from training.program import leave_signals_to_the_run, signals_held_back
from training.settings import check_positions
from training.vocabulary import Pieces, caption_lengths, choose_tokenizer, warn_of_spelt_words
from weights.files import shorten
from weights.starting import start_from


class EpochBatches(Sampler):
    """This rank's micro-batches of one epoch, `accumulate` for each step.

    A function of (seed, epoch, step) alone, so that a run can start anywhere and the samples of a
    global batch do not depend on the number of processes. The last, incomplete batch is left out.
    """

    def __init__(self, size: int, batch_size: int, seed: int, epoch: int, first_step: int,
                 accumulate: int = 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        self.order = torch.randperm(size, generator=generator)
        self.batch_size, self.first_step, self.steps = batch_size, first_step, size // batch_size
        self.accumulate = accumulate

    def __iter__(self) -> Iterator[list[int]]:
        processes, rank = distributed.world_size(), distributed.rank()
        share = self.batch_size // (processes * self.accumulate)
        for step in range(self.first_step, self.steps):
            for micro in range(self.accumulate):
                start = step * self.batch_size + (micro * processes + rank) * share
                yield self.order[start:start + share].tolist()

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulate


# ---- data ----------------------------------------------------------------------------------------

def open_datasets(task: Task, config: TrainConfig, image_size: int) -> Datasets:
    """The data sets of a run: the world without --data.

    A file given with --val both chooses the best epoch and judges it. A Karpathy file has a split
    for each.
    """
    c = config
    base = Source(c.data, c.image_root, "train", 0, image_size, c.seed,
                  index=Path(c.out).parent / "index")
    train = task.open_data(replace(base, size=0 if c.data else c.scenes, noise=c.noise,
                                   augment=c.augment, rand_augment=c.rand_augment,
                                   crop_min=c.crop_min, flip=c.flip, each_caption=True,
                                   replace_broken=True))
    if not c.data:
        val = task.open_data(replace(base, split="val", size=min(300, c.eval_size), seed=0))
        return Datasets(train, val, task.open_data(
            replace(base, split="held-out", size=c.eval_size, seed=0)))
    files = c.val
    if not files and task.holds_splits and named_files(c.data) == [c.data] and is_karpathy(c.data):
        files = c.data
    if not files:
        return Datasets(train, None, None)
    held_out = task.open_data(replace(base, data=files, split=c.val_split, size=c.eval_size))
    require_a_picture(held_out, files)
    val = held_out
    may_choose = task.score and task.holds_splits and c.val_split == "test"
    # (Without --val it is --data, which was found to be one above.)
    if may_choose and (not c.val or all(is_karpathy(file) for file in named_files(files))):
        val = task.open_data(replace(base, data=files, split="val", size=c.eval_size))
    return Datasets(train, val, held_out)


def require_a_picture(dataset: Dataset, files: str) -> None:
    """InputError where no picture can be read: now, and not after the first epoch."""
    if all(dataset[i]["image"] is None for i in range(len(dataset))):
        raise InputError(f"none of the {len(dataset)} images of {files} can be read; is "
                         "--image-root right?")


def digest_of_data(config: TrainConfig, train: Dataset) -> str:
    """Of the number of own examples, their texts and pictures' names; "" of the world.

    Of more than 200,000 examples so many, evenly spread. A run that goes on with other examples
    would not be the run that began.
    """
    if not config.data:
        return ""
    digest = hashlib.sha256(str(len(train)).encode())
    for example in some_examples(train, 200_000):
        content = [example.texts, [Path(image).name for image in example.images]]
        digest.update(repr(content).encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


# ---- the run -------------------------------------------------------------------------------------

def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters.

    NOTE(differs from salesforce/BLIP): no weight decay on biases, LayerNorms and the temperature,
    which have nothing to gain from being small.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cuda", "mps", "cpu")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)


def trainable_names(model: nn.Module) -> set[str]:
    """Names of all trainable parameters: not of twins, not of what is frozen."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


class Run:
    """A training run: its data, model, optimizer and counters."""

    def __init__(self, model_config, config: TrainConfig, device: torch.device,
                 state: dict | None = None, source: TrainedModel | None = None,
                 given: dict | None = None, run_id: str = ""):
        """state: a checkpoint to continue; source: a model to start from. Raises InputError.

        given: what the user set: training/plan.py does not change it. run_id: of this run and no
        other; it stands in its checkpoints.
        """
        self.run_id, self.code = run_id, digest_of_code()[:8]  # before anybody edits it
        begun_by = (state or {}).get("code", self.code)
        self.edited = not begun_by.endswith(self.code)  # since the checkpoint
        if self.edited:
            self.code = f"{begun_by}, then {self.code}"
        self.device, self.out, self.task = device, Path(config.out), TASKS[config.task]
        image_size = getattr(model_config, "image_size", 0)  # 0: of a model of texts alone
        self.datasets = open_datasets(self.task, config, image_size)
        self.config, self.plan = config, []  # the plan: what was changed, in words
        self.data_digest = digest_of_data(self.config, self.datasets.train)
        self.require_same_data(state)
        self.require_a_batch()
        if not state:
            self.config, self.plan = plan.fit(config, given or {}, len(self.datasets.train))
        self.tokenizer = self.open_tokenizer(state, source)
        if config.data and not state:
            self.fit_lengths(self.task.pieces(model_config, self.tokenizer), given or {})
        if not state:
            check_lengths(self.config)
        self.datasets = self.task.prepare(self.datasets, self.tokenizer, self.config)
        self.require_a_batch()  # some may have been left out
        self.model = self.make_model(model_config, state, source)
        self.check_prompt()
        self.optimizer = make_optimizer(self.model, self.config)
        self.precision = choose_precision(config.precision, device)
        recomputed = getattr(self.model.config, "grad_checkpoint", False)
        if recomputed and device.type == "cpu" and self.precision == "bf16":
            raise InputError("--grad-checkpoint true needs --precision fp32 on a CPU; give it, or "
                             "leave --grad-checkpoint out")
        # float16 holds nothing below 6e-8: losses are scaled up so that gradients do not vanish.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.trainable = trainable_names(self.model)
        self.step, self.seconds, self.best = 0, 0.0, -math.inf
        self.seen, self.broken = 0, Counter()  # images, and why some of them could not be read
        self.steps_per_epoch = len(self.datasets.train) // config.batch_size
        self.steps = self.steps_per_epoch * self.config.epochs
        with checkpoints.understood(self.out / "checkpoint.pt"):
            if state:
                self.restore(state)
            self.set_generators(state)

    def require_a_batch(self) -> None:
        """InputError where there are fewer examples than a batch has: an epoch has no step."""
        count = len(self.datasets.train)
        if count < self.config.batch_size:
            raise InputError(f"there are {count} training examples, fewer than --batch-size "
                             f"{self.config.batch_size}; give a smaller one, or more data")

    def require_same_data(self, state: dict | None) -> None:
        """InputError where a run would go on with other data than it began with."""
        if state and state.get("digest_of_data", self.data_digest) != self.data_digest:
            raise InputError(f"{self.config.data} is not what it was when the run in {self.out} "
                             f"began (now it has {len(self.datasets.train)} examples); put the "
                             "old file back, or start a new run in another --out")

    def fit_lengths(self, pieces: Pieces, given: dict) -> None:
        """Lengths of captions that fit own ones; pieces: as the model that writes cuts a text."""
        train, c = self.datasets.train, self.config
        if pieces != self.tokenizer.piece_ids:  # another model writes
            warn_of_spelt_words(train, pieces, c)
        if "min_length" not in given:
            prompt = c.prompt if self.task.lengths_count_prompt else ""
            lengths = caption_lengths(train, pieces, prompt)
            self.config, sentences = plan.fit_captions(c, lengths)
            self.plan += sentences

    def open_tokenizer(self, state: dict | None, source: TrainedModel | None) -> Tokenizer:
        """The checkpoint's, the start's with words of own data, or a new one."""
        if state:
            with checkpoints.understood(self.out / "checkpoint.pt"):
                return Tokenizer(state["tokenizer"])
        return choose_tokenizer(self.config, self.datasets.train, source and source.tokenizer)

    def check_prompt(self) -> None:
        """InputError where the prompt of a model that writes captions leaves no room for them."""
        c = self.config
        if not isinstance(self.model, BLIP) or not c.lm_weight:
            return
        prompt = Decoding.choose({}, asdict(c)).prompt_ids(self.model, self.tokenizer)
        if len(prompt) + 2 >= c.max_tokens:  # [CLS] and [SEP]
            raise InputError(f"the prompt {c.prompt!r} has {len(prompt)} tokens, which leaves none "
                             f"for a caption of --max-tokens {c.max_tokens}; give a larger one, or "
                             "a shorter prompt")

    def make_model(self, model_config, state: dict | None,
                   source: TrainedModel | None) -> nn.Module:
        """The model with its starting weights, on the device. Raises InputError."""
        c = self.config
        torch.manual_seed(c.seed)  # the same on all ranks: weights and queues start equal
        if not state:
            model_config = self.task.complete(model_config, self.tokenizer)
            check_positions(model_config, c)  # once more: its language model is known now
        try:
            model = make_model(c.task, model_config).to(self.device)
        except ValueError as error:  # sizes that do not fit the task
            raise InputError(str(error))
        if source:
            # A new piece starts as the mean of the pieces that spelt it.
            spelt = [source.tokenizer.piece_ids(piece.removeprefix("##"))
                     for piece in self.tokenizer.vocab[len(source.tokenizer.vocab):]]
            fresh = checkpoints.initialise(model, source.model, spelt)
            if fresh:
                distributed.print0(f"not in --init, starts afresh: {shorten(fresh)}")
            # Once before the first step, as the released code does (BLIP.update_momentum).
            model.clamp_temperature()
            if any("_m." in name for name in fresh):  # the source has no twins: they are copies
                model.update_momentum(0.0)
            else:
                model.update_momentum()
        if not state:
            self.task.initialise(model, model.config, source and source.model)
        if not state and (c.init_vit or c.init_text):
            if not isinstance(model, BLIP):
                raise InputError(f"--init-vit and --init-text are for a BLIP; {c.task} starts from "
                                 "--init")
            if c.init_text and not c.vocab:
                raise InputError("--init-text needs --vocab with the vocab.txt of those weights")
            distributed.print0(start_from(model, c.init_vit, c.init_text))
        return model

    # ---- batches ----

    def batches(self) -> Iterator[list[dict]]:
        """For each step from the current one to the end of the last epoch, its micro-batches.

        InputError when too many images cannot be read.
        """
        c, train = self.config, self.datasets.train
        while self.step < self.steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            train.set_epoch(epoch)
            sampler = EpochBatches(len(train), c.batch_size, c.seed, epoch, first, c.accumulate)
            collate = self.task.collate(self.tokenizer, c, self.model.config)
            loader = DataLoader(
                train, collate_fn=collate, batch_sampler=sampler,
                worker_init_fn=leave_signals_to_the_run, pin_memory=self.device.type == "cuda",
                **worker_options(train, c.workers),
                # its own: otherwise each new loader would change the run's random state
                generator=torch.Generator())
            with signals_held_back():
                batches = iter(loader)
            for _ in range(first, self.steps_per_epoch):
                micro_batches = [next(batches) for _ in range(c.accumulate)]
                for batch in micro_batches:
                    self.count(batch)
                yield micro_batches

    def weight_of(self, loss: str) -> float:
        """A loss's weight in the sum: the setting LOSS_weight, where TrainConfig has one, else 1.

        A loss that stands in another one's place (ALBEF's mlm for lm) has that one's.
        """
        for old, new in self.task.replaces.items():
            if loss == new:
                loss = old
        return getattr(self.config, f"{loss}_weight", 1.0)

    def inputs(self, batch: dict, alpha: float) -> dict:
        """The arguments of the model's forward: the batch's tensors, and the task's."""
        tensors = {name: value for name, value in batch_to(batch, self.device).items()
                   if isinstance(value, torch.Tensor)}
        return tensors | self.task.inputs(self.config, self.tokenizer, alpha)

    def count(self, batch: dict) -> None:
        """Keep count of unreadable images; InputError when they are too many."""
        if "image" not in batch:
            return
        self.seen += len(batch["broken"]) + (0 if batch["image"] is None else len(batch["image"]))
        for name in batch["broken"]:  # "name (reason)"
            self.broken[name.rpartition(" (")[2].rstrip(")")] += 1
        if not batch["broken"]:
            return
        expected = self.config.max_broken * self.seen
        most = expected + 3 * math.sqrt(expected)  # by chance the first ones may be the broken ones
        broken, enough = self.broken.total(), self.seen >= min(100, len(self.datasets.train))
        if batch["image"] is None or (enough and broken > most):
            raise InputError(f"{broken} of {self.seen} images could not be read, more than "
                             f"--max-broken {self.config.max_broken:g} allows; the last: "
                             f"{batch['broken'][-1]}; is --image-root right?")

    # ---- into a checkpoint and out of it ----

    def trained_model(self) -> TrainedModel:
        """The model as it stands, for an evaluation."""
        return TrainedModel(self.model, self.tokenizer, asdict(self.config), self.datasets.answers)

    def weights(self) -> dict:
        """What rebuilds the model and its tokenizer, and says how they were trained."""
        state = {"model": self.model.state_dict(), "model_config": asdict(self.model.config),
                 "tokenizer": self.tokenizer.state(), "train_config": asdict(self.config),
                 "run_id": self.run_id, "code": self.code}
        return state | ({"answers": self.datasets.answers} if self.datasets.answers else {})

    def save(self) -> None:
        """Write checkpoint.pt; all ranks call it, rank 0 writes.

        The schedules are functions of `step`: nothing else is needed to go on. Raises InputError
        instead where a weight is no finite number.
        """
        self.require_finite()
        ranks = distributed.gather([{"rng": torch.get_rng_state(),
                                     "rng_device": devices.generator_state(self.device),
                                     "seen": self.seen, "broken": self.broken}])
        if distributed.rank() == 0:
            broken = sum((rank["broken"] for rank in ranks), Counter())
            checkpoints.save(self.out / "checkpoint.pt", self.weights() | {
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "step": self.step, "digest_of_data": self.data_digest,
                "seconds": self.seconds, "best": self.best, "broken": dict(broken),
                "seen": sum(rank["seen"] for rank in ranks),
                "rng": [rank["rng"] for rank in ranks],
                "rng_device": [rank["rng_device"] for rank in ranks]}, self.config.keep)

    def require_finite(self) -> None:
        """InputError where a weight is no finite number: such a model is neither judged nor kept.

        The loss of the step before may have been finite, its gradient not.
        """
        name = checkpoints.first_not_finite(self.model)
        if name:
            raise InputError(f"after step {self.step} {name} holds numbers that are not finite; "
                             "look for an operation whose gradient is not (sqrt at 0, log of 0), "
                             "or try a smaller --lr, --grad-clip 1 or --precision fp32. The "
                             "checkpoints in the run's folder are of before that")

    def restore(self, state: dict) -> None:
        """Model, optimizer and counters of a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):  # empty in other precisions than fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.best = float(state["best"])
        if distributed.rank() == 0:  # of all ranks together
            self.seen, self.broken = state["seen"], Counter(state["broken"])

    def set_generators(self, state: dict | None) -> None:
        """Dropout and mining differ from rank to rank, and go on as they stood in the checkpoint.

        With another number of processes they start anew, as a function of seed, step and rank.
        """
        rank = distributed.rank()
        # The device's too, for a checkpoint of another kind of device.
        torch.manual_seed(self.config.seed + rank + 1_000_003 * self.step)
        if state is None or len(state["rng"]) != distributed.world_size():
            return
        torch.set_rng_state(state["rng"][rank])
        if "rng_device" in state:
            devices.set_generator_state(self.device, state["rng_device"][rank])
