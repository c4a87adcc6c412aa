"""Train BLIP: one loop for pretraining and every finetuning.

    python train.py                     the tiny model on the built-in world, 5 minutes on a laptop
    python train.py --data train.json --val val.json --image-root DIR --preset base    real pairs
    python train.py retrieval --init runs/pretrain/checkpoint.pt     finetune for retrieval
    python train.py caption --init runs/pretrain/checkpoint.pt       finetune for captions
    python train.py --resume            continue the run in --out
    python train.py --itc-weight 0      an ablation: switch a loss off
Every field of BLIPConfig and TrainConfig is a flag; `--help` lists them. In the run's folder:
log.jsonl (one line per logged step), checkpoint.pt (everything), best.pt (finetuning: the model
after the epoch that did best on the validation split), metrics.json and samples.png (at the end).
"""

import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import checkpoints
import distributed
from blip import BLIP, BLIPConfig
from captioning import Decoding
from config import (
    FREE_ON_RESUME,
    TASKS,
    TrainConfig,
    alpha_at,
    learning_rate,
    objectives_at,
    objectives_of,
    parse,
    resolve,
)
from data import (
    Collate,
    InputError,
    PairDataset,
    Tokenizer,
    merge_captions,
    normalise,
    read_json,
    read_pairs,
)
from distributed import print0
from eval import (
    evaluate_captions,
    evaluate_pretraining,
    evaluate_retrieval,
    mean,
    print_numbers,
    write_numbers,
)
from logbook import Log
from sheets import draw_sheet
from world import World, all_captions


class EpochBatches(Sampler):
    """This rank's share of each global batch of one epoch: a function of (seed, epoch, step) alone,
    so that a run can start anywhere and the samples of a global batch do not depend on the number
    of processes. The last, incomplete batch is left out."""

    def __init__(self, size: int, batch_size: int, seed: int, epoch: int, first_step: int):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        self.order = torch.randperm(size, generator=generator).tolist()
        self.batch_size, self.first_step, self.steps = batch_size, first_step, size // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // distributed.world_size()
        for step in range(self.first_step, self.steps):
            start = step * self.batch_size + distributed.rank() * share
            yield self.order[start:start + share]

    def __len__(self) -> int:
        return self.steps - self.first_step


# ---- the run -------------------------------------------------------------------------------------

@dataclass
class Sets:
    """Training set; what checkpoints are chosen by (None: the last one is kept); what is judged at
    the end (None: nothing is); the training texts."""

    train: Dataset
    val: Dataset | None
    final: Dataset | None
    texts: list[str]


def load_data(config: TrainConfig, image_size: int) -> Sets:
    """The data sets of a run: the world without --data. One --val serves both purposes."""
    if not config.data:
        return Sets(World("train", config.world_size, image_size, config.seed, config.noise),
                    World("val", min(300, config.eval_size), image_size),
                    World("held-out", config.eval_size, image_size), all_captions())
    root = config.image_root or None
    pairs = read_pairs(config.data, root)
    train = PairDataset(pairs, root or Path(config.data).parent, image_size, config.augment,
                        (config.crop_min, 1.0), config.seed)
    val, held_out = config.val, None
    if not val and isinstance(read_json(config.data), dict):  # a Karpathy file holds all splits
        val = config.data
    if val:
        known = merge_captions(read_pairs(val, root, config.val_split))[:config.eval_size]
        held_out = PairDataset(known, root or Path(val).parent, image_size)
        if config.eval_top_k > len(held_out):
            raise InputError(f"--eval-top-k {config.eval_top_k} is larger than the gallery of "
                             f"{len(held_out)} images in {val}; give a smaller one")
    return Sets(train, held_out, held_out, [text for pair in pairs for text in pair.captions])


def make_optimizer(model: BLIP, config: TrainConfig) -> torch.optim.AdamW:
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
                 state: dict | None = None, source: tuple[BLIP, Tokenizer] | None = None):
        """`state` is a checkpoint to continue; `source` a model to start from, and its
        tokenizer."""
        self.config, self.device, self.out = config, device, Path(config.out)
        self.sets = load_data(config, model_config.image_size)
        self.train_set = self.sets.train
        if len(self.train_set) < config.batch_size:
            raise InputError(f"there are {len(self.train_set)} training pairs, fewer than "
                             f"--batch-size {config.batch_size}; give a smaller one")
        if state:
            self.tokenizer = Tokenizer(state["tokenizer"])
        elif source:
            self.tokenizer = source[1]
        elif config.vocab:
            self.tokenizer = Tokenizer.from_file(config.vocab)
        else:
            self.tokenizer = Tokenizer.train(self.sets.texts, config.vocab_pieces)
        torch.manual_seed(config.seed)  # the same on all ranks: weights and queues start equal
        self.model = BLIP(replace(model_config, **self.tokenizer.config())).to(device)
        self.optimizer = make_optimizer(self.model, config)
        if source:
            checkpoints.initialise(self.model, source[0])
        # What stands before each text: [DEC] and the prompt. It gives no loss.
        self.prompt_length = 1 + len(self.tokenizer.pieces_of(config.prompt))
        self.step, self.seconds, self.seen, self.broken, self.best = 0, 0.0, 0, 0, -math.inf
        # dropout and mining differ from rank to rank
        torch.manual_seed(config.seed + distributed.rank())
        self.steps_per_epoch = len(self.train_set) // config.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.seen, self.broken = state["seen"], state["broken"]
            self.best = state.get("best", self.best)
            torch.set_rng_state(state["rng"])
            if device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"])

    def save(self) -> None:
        """Write checkpoint.pt, on rank 0. The schedules are functions of `step`: nothing else is
        needed to go on."""
        if distributed.rank() == 0:
            cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
            checkpoints.save(self.out / "checkpoint.pt", self.weights() | {
                "optimizer": self.optimizer.state_dict(), "step": self.step,
                "seconds": self.seconds, "seen": self.seen, "broken": self.broken,
                "best": self.best, "rng": torch.get_rng_state(), "rng_cuda": cuda})

    def weights(self) -> dict:
        """What rebuilds the model and its tokenizer, and says how they were trained."""
        return {"model": self.model.state_dict(), "model_config": asdict(self.model.config),
                "tokenizer": self.tokenizer.state(), "train_config": asdict(self.config)}

    def chooses(self) -> bool:
        """Whether the epoch that just ended is to be compared with the earlier ones."""
        return (self.config.task != "pretrain" and self.sets.val is not None
                and self.step % self.steps_per_epoch == 0)

    def choose(self) -> dict:
        """Judge the epoch on the validation split; keep its model in best.pt if it is the best so
        far -> what goes into the log."""
        numbers, _ = judge(self, self.sets.val)
        score = selection_score(self.config.task, numbers)
        if score > self.best:
            self.best = score
            checkpoints.save(self.out / "best.pt", self.weights() | {"step": self.step})
        self.model.train()
        return {"step": self.step, "val_score": round(score, 5), "best": round(self.best, 5)}

    def batches(self) -> Iterator[dict]:
        """Batches from the current step to the end of the last epoch."""
        pictures = isinstance(self.train_set, PairDataset)
        while self.step < self.steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            self.train_set.set_epoch(epoch)
            yield from DataLoader(
                self.train_set,
                collate_fn=Collate(self.tokenizer, self.config.max_tokens, self.config.prompt),
                batch_sampler=EpochBatches(len(self.train_set), self.config.batch_size,
                                           self.config.seed, epoch, first),
                num_workers=self.config.workers if pictures else 0,
                pin_memory=self.device.type == "cuda",
                # its own: else each start of a loader would move the run's generator
                generator=torch.Generator())

    def count(self, batch: dict) -> None:
        """Keep count of unreadable images; InputError when they are too many."""
        self.seen += len(batch["broken"]) + (0 if batch["image"] is None else len(batch["image"]))
        self.broken += len(batch["broken"])
        enough = self.seen >= min(100, len(self.train_set))
        if batch["image"] is None or (
                enough and self.broken > self.config.max_broken * self.seen):
            raise InputError(f"{self.broken} of {self.seen} images could not be read, more than "
                             f"--max-broken {self.config.max_broken:g} allows; the last: "
                             f"{batch['broken'][-1:]}; is --image-root right?")


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run under bfloat16 autocast: auto says yes where the hardware multiplies it fast,
    which among CPUs means AMX (without, it measured four times slower than float32)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


def train(run: Run) -> bool:
    """Train to the end -> True, or until a signal asks to stop -> False; either way the checkpoint
    is written."""
    config, model, device = run.config, run.model, run.device
    log, stop = Log(run.out, run.step, config.log_every), []
    before = {number: signal.signal(number, lambda *_: stop.append(True))
              for number in (signal.SIGINT, signal.SIGTERM)}
    net, objectives, weights = None, None, config.weights()
    model.train()
    bar = tqdm(run.batches(), "training", run.steps, initial=run.step,
               disable=distributed.rank() > 0, unit="step")
    start = time.perf_counter() - run.seconds
    for batch in bar:
        run.count(batch)
        if objectives != objectives_at(config, run.step):
            objectives = objectives_at(config, run.step)
            model.set_objectives(objectives)
            net = distributed.wrap(model)  # again, because other parameters are trained now
        lr = learning_rate(config, run.step, run.steps_per_epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        alpha = alpha_at(config, run.step, run.steps_per_epoch)
        image, ids, mask, image_ids = (batch[k].to(device, non_blocking=True)
                                       for k in ("image", "ids", "mask", "image_id"))
        if config.task != "retrieval":  # pretraining does not know which texts share an image
            image_ids = None

        with torch.autocast(device.type, torch.bfloat16,
                            enabled=use_bf16(config.precision, device)):
            losses, keys = net(normalise(image), ids, mask, alpha, image_ids, run.prompt_length,
                               config.all_negatives)
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        model.update_momentum()
        model.enqueue(keys)
        model.clamp_temperature()

        run.step += 1
        run.seconds = time.perf_counter() - start
        log.add(losses, bar, run.step, run.step == run.steps, config.batch_size, lr=lr, alpha=alpha,
                temp=model.temp.detach(), minutes=round(run.seconds / 60, 3))
        chooses = run.chooses()
        if chooses and distributed.rank() == 0:
            log.write(run.choose())
        if run.step % config.save_every == 0 or chooses or stop or run.step == run.steps:
            run.save()
        if stop:
            break
    bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    return not stop


def judge(run: Run, dataset: Dataset) -> tuple[dict, list]:
    """What the run's task is judged by -> the numbers, and the sections of a sheet."""
    c = run.config
    shared = (run.model, run.tokenizer, dataset, run.device)
    how = Decoding(prompt=c.prompt, min_length=c.min_length, max_length=c.max_length)
    if c.task == "retrieval":
        return evaluate_retrieval(*shared, c.eval_top_k, c.max_tokens)
    if c.task == "caption":
        return evaluate_captions(*shared, how, run.sets.texts)[:2]
    return evaluate_pretraining(*shared, c.eval_top_k, c.max_tokens, how, run.sets.texts)


def selection_score(task: str, numbers: dict) -> float:
    """By what the best epoch is chosen: CIDEr, or the mean of the six recalls that count."""
    if task == "caption":
        return numbers["cider"]
    suffix = "_rerank" if numbers["top_k"] else ""
    return mean(numbers[f"{way}_r{k}{suffix}"] for way in ("t2i", "i2t") for k in (1, 5, 10))


def evaluate(run: Run) -> dict:
    """The final judgement, on rank 0, of the best model -> the numbers, written to metrics.json
    beside samples.png and printed."""
    numbers = {"train_minutes": round(run.seconds / 60, 2), "steps": run.step}
    if run.broken:
        numbers |= {"train_broken": run.broken, "train_seen": run.seen}
    best = run.out / "best.pt"
    if best.exists():
        state = checkpoints.load(best)
        run.model.load_state_dict(state["model"])
        numbers["best_step"] = state["step"]
        print(f"the model that did best in validation is that of step {state['step']}")
    if run.sets.final is not None:
        found, sections = judge(run, run.sets.final)
        draw_sheet(run.out / "samples.png", sections)
        print_numbers(found)
        numbers |= found
    write_numbers(run.out / "metrics.json", numbers, run.weights()["train_config"])
    return numbers


def start(arguments: list[str]) -> Run:
    """Parse, set up the run's folder, build or resume the run."""
    given, resume = parse(arguments, __doc__)
    task_out = TASKS[given.get("task", TrainConfig.task)].get("out", TrainConfig.out)
    path = Path(given.get("out", task_out)) / "checkpoint.pt"
    state = source = init = None
    if resume:
        state = checkpoints.load(path)
        if "optimizer" not in state:
            raise InputError(f"{path} holds a model but no run to continue")
        saved = asdict(TrainConfig(**state["train_config"])) | state["model_config"]
        changed = [f"--{name.replace('_', '-')}" for name in given.keys() - FREE_ON_RESUME
                   if given[name] != saved[name]]
        if changed:
            raise InputError(f"{', '.join(changed)} cannot change when a run is resumed; leave it "
                             "out, or start a new run")
        kept = {name: given[name] for name in given.keys() & FREE_ON_RESUME}
        config = TrainConfig(**{**state["train_config"], **kept, "out": str(path.parent)})
        model_config = BLIPConfig(**state["model_config"])
    else:
        if given.get("init"):
            *source, settings = checkpoints.open_model(
                given["init"], objectives_of(given.get("task", TrainConfig.task)),
                given.get("vocab", ""))
            init = {"model_config": asdict(source[0].config), "train_config": settings}
        try:
            model_config, config = resolve(given, init)
        except ValueError as error:
            raise InputError(str(error))
    device = distributed.init(config.device)
    if config.batch_size % distributed.world_size():
        raise InputError(f"--batch-size {config.batch_size} is not a multiple of "
                         f"{distributed.world_size()} processes")
    run = Run(model_config, config, device, state, source)
    if distributed.rank() == 0:
        prepare_folder(run.out, resume)
    online = sum(p.numel() for p in {id(p): p for g in run.optimizer.param_groups
                                     for p in g["params"]}.values())
    print0(f"model    {asdict(run.model.config)}\ntraining {asdict(config)}")
    print0(f"{online / 1e6:.2f}M parameters without twins, {len(run.train_set)} pairs, {run.steps} "
           f"steps, on {device} ({'bf16' if use_bf16(config.precision, device) else 'fp32'}), "
           f"writing to {config.out}")
    if run.sets.final is None:
        print0("no --val given: there will be no evaluation")
    return run


def prepare_folder(out: Path, resume: bool) -> None:
    """Make the run's folder. An earlier run in it is moved aside, not overwritten."""
    try:
        if not resume and (out / "checkpoint.pt").exists():
            aside = next(p for n in range(1, 10000) if not (p := Path(f"{out}.old{n}")).exists())
            out.rename(aside)
            print(f"{out} holds an earlier run: moved to {aside} (--resume would have continued "
                  "it)")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the run's folder {out} cannot be made ({error}); give another --out")


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    try:
        run = start(sys.argv[1:] if arguments is None else arguments)
        finished = train(run)
        if not finished:
            print0(f"stopped at step {run.step} of {run.steps}; continue with: python train.py "
                   f"--resume --out {run.config.out}")
            return 130
        print0(f"trained for {run.seconds / 60:.1f} minutes; evaluating")
        if run.broken:
            print0(f"{run.broken} of {run.seen} images could not be read and were replaced by "
                   "others")
        if distributed.rank() == 0:
            evaluate(run)
            print(f"wrote {run.out}/metrics.json, samples.png, log.jsonl, checkpoint.pt")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
