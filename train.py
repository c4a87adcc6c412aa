"""Train BLIP: one loop.

    python train.py                     the tiny model on the built-in world, 5 minutes on a laptop
    python train.py --data train.json --val val.json --image-root DIR --preset base    real pairs
    python train.py --resume            continue the run in --out
    python train.py --itc-weight 0      an ablation: switch a loss off
Every field of BLIPConfig and TrainConfig is a flag; `--help` lists them. In the run's folder:
log.jsonl (one line per logged step), checkpoint.pt (everything), metrics.json and samples.png (at
the end).
"""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import checkpoints
import distributed
from blip import BLIP, BLIPConfig
from config import FREE_ON_RESUME, TrainConfig, alpha_at, learning_rate, objectives_at, parse
from data import Collate, InputError, PairDataset, Tokenizer, normalise, read_pairs
from distributed import print0
from eval import evaluate_pairs, evaluate_world
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

def load_data(config: TrainConfig, image_size: int) -> tuple[Dataset, Dataset | None, list[str]]:
    """-> training set, held-out set if there is one, and the texts that a vocabulary can be
    trained on."""
    if not config.data:
        train = World("train", config.world_size, image_size, config.seed, config.noise)
        return train, World("held-out", config.eval_size, image_size), all_captions()
    root = config.image_root or None
    pairs = read_pairs(config.data, root)
    train = PairDataset(pairs, root or Path(config.data).parent, image_size, config.augment,
                        (config.crop_min, 1.0), config.seed)
    held_out = None
    if config.val:
        held_out = PairDataset(read_pairs(config.val, root, config.val_split)[:config.eval_size],
                               root or Path(config.val).parent, image_size)
    return train, held_out, [caption for pair in pairs for caption in pair.captions]


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
                 state: dict | None):
        """`state` is a checkpoint to continue, or None."""
        self.config, self.device, self.out = config, device, Path(config.out)
        self.train_set, self.held_out, texts = load_data(config, model_config.image_size)
        if len(self.train_set) < config.batch_size:
            raise InputError(f"there are {len(self.train_set)} training pairs, fewer than "
                             f"--batch-size {config.batch_size}; give a smaller one")
        if state:
            self.tokenizer = Tokenizer(state["tokenizer"])
        elif config.vocab:
            self.tokenizer = Tokenizer.from_file(config.vocab)
        else:
            self.tokenizer = Tokenizer.train(texts, config.vocab_pieces)
        torch.manual_seed(config.seed)  # the same on all ranks: weights and queues start equal
        self.model = BLIP(replace(model_config, **self.tokenizer.config())).to(device)
        self.optimizer = make_optimizer(self.model, config)
        self.step, self.seconds, self.seen, self.broken = 0, 0.0, 0, 0
        # dropout and mining differ from rank to rank
        torch.manual_seed(config.seed + distributed.rank())
        self.steps_per_epoch = len(self.train_set) // config.batch_size
        self.steps = self.steps_per_epoch * config.epochs
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.seen, self.broken = state["seen"], state["broken"]
            torch.set_rng_state(state["rng"])
            if device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"])

    def save(self) -> None:
        """Write checkpoint.pt, on rank 0. The schedules are functions of `step`: nothing else is
        needed to go on."""
        if distributed.rank() == 0:
            cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
            checkpoints.save(self.out / "checkpoint.pt", {
                "model": self.model.state_dict(), "model_config": asdict(self.model.config),
                "tokenizer": self.tokenizer.state(), "optimizer": self.optimizer.state_dict(),
                "train_config": asdict(self.config), "step": self.step, "seconds": self.seconds,
                "seen": self.seen, "broken": self.broken, "rng": torch.get_rng_state(),
                "rng_cuda": cuda})

    def batches(self) -> Iterator[dict]:
        """Batches from the current step to the end of the last epoch."""
        pictures = isinstance(self.train_set, PairDataset)
        while self.step < self.steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            self.train_set.set_epoch(epoch)
            yield from DataLoader(
                self.train_set, collate_fn=Collate(self.tokenizer, self.config.max_tokens),
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
    log, stop = Log(run), []
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
        image, ids, mask = (batch[k].to(device, non_blocking=True)
                            for k in ("image", "ids", "mask"))

        with torch.autocast(device.type, torch.bfloat16,
                            enabled=use_bf16(config.precision, device)):
            losses, keys = net(normalise(image), ids, mask, alpha)
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
        log.add(losses, bar, lr=lr, alpha=alpha)
        if run.step % config.save_every == 0 or stop or run.step == run.steps:
            run.save()
        if stop:
            break
    bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    return not stop


class Log:
    """log.jsonl, the progress bar's losses, and TensorBoard where it is installed. Rank
    0 writes."""

    def __init__(self, run: Run):
        self.run, self.sums, self.count, self.since = run, {}, 0, time.perf_counter()
        self.file = self.board = None
        if distributed.rank():
            return
        path, kept = run.out / "log.jsonl", []
        # resumed: what was logged after the checkpoint happens again
        if run.step and path.exists():
            kept = [line for line in path.read_text().splitlines()
                    if json.loads(line)["step"] <= run.step]
        self.file = open(path, "w", buffering=1)
        self.file.writelines(line + "\n" for line in kept)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(run.out / "tensorboard")
        except ImportError:
            pass

    def add(self, losses: dict[str, Tensor], bar: tqdm, **values: float) -> None:
        """Called after every step; the losses stay on the device until a line is due."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()
        self.count += 1
        run, every = self.run, self.run.config.log_every
        if run.step % every and run.step != run.steps:
            return
        means = {name: round(total.item() / self.count, 4) for name, total in self.sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise InputError(f"the loss is no longer finite at step {run.step} ({means}); try a "
                             "smaller --lr or --grad-clip 1, or --precision fp32")
        rate = self.count * run.config.batch_size / (time.perf_counter() - self.since)
        self.sums, self.count, self.since = {}, 0, time.perf_counter()
        bar.set_postfix(means | {"pairs/s": round(rate)})
        if self.file:
            line = {"step": run.step, **means, **values, "temp": run.model.temp.item(),
                    "pairs_per_s": round(rate, 1), "minutes": round(run.seconds / 60, 3)}
            self.file.write(json.dumps(line) + "\n")
            for name, value in line.items() if self.board else ():
                self.board.add_scalar(name, value, run.step)


def evaluate(run: Run) -> dict:
    """Held-out evaluation on rank 0 -> the numbers, written to metrics.json beside samples.png
    and printed."""
    broken = {"train_broken": run.broken, "train_seen": run.seen}
    numbers = ({"train_minutes": round(run.seconds / 60, 2), "steps": run.step}
               | (broken if run.broken else {}))
    if run.held_out is not None:
        judge = evaluate_world if isinstance(run.held_out, World) else evaluate_pairs
        numbers |= judge(run.model, run.tokenizer, run.held_out, run.device, run.config.eval_top_k,
                         run.out / "samples.png", run.config.max_tokens)
    (run.out / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")
    chance = numbers.get("chance", {})
    for name, value in numbers.items():
        if isinstance(value, float) and name != "train_minutes":
            level = chance.get(name.removesuffix("_rerank"))
            print(f"{name:22} {value:6.1%}"
                  + (f"   (chance {level:.1%})" if level is not None else ""))
        elif name == "itm_swap_by":
            print(f"{name:22} " + ", ".join(f"{k} {v:.1%}" for k, v in value.items()))
    return numbers


def start(arguments: list[str]) -> Run:
    """Parse, set up the run's folder, build or resume the run."""
    model_config, config, resume, given = parse(arguments, __doc__)
    device = distributed.init(config.device)
    path, state = Path(config.out) / "checkpoint.pt", None
    if config.batch_size % distributed.world_size():
        raise InputError(f"--batch-size {config.batch_size} is not a multiple of "
                         f"{distributed.world_size()} processes")
    if resume:
        state = checkpoints.load(path)
        if "optimizer" not in state:
            raise InputError(f"{path} holds a model but no run to continue")
        asked = asdict(config) | asdict(model_config)
        saved = state["train_config"] | state["model_config"]
        changed = [f"--{name.replace('_', '-')}" for name in given - FREE_ON_RESUME
                   if asked[name] != saved[name]]
        if changed:
            raise InputError(f"{', '.join(changed)} cannot change when a run is resumed; leave it "
                             "out, or start a new run")
        kept = ({name: getattr(config, name) for name in given & FREE_ON_RESUME}
                | {"out": config.out})
        config = TrainConfig(**{**state["train_config"], **kept})
        model_config = BLIPConfig(**state["model_config"])
    run = Run(model_config, config, device, state)
    if distributed.rank() == 0:
        prepare_folder(run.out, resume)
    online = sum(p.numel() for p in {id(p): p for g in run.optimizer.param_groups
                                     for p in g["params"]}.values())
    print0(f"model    {asdict(run.model.config)}\ntraining {asdict(config)}")
    print0(f"{online / 1e6:.2f}M parameters without twins, {len(run.train_set)} pairs, {run.steps} "
           f"steps, on {device} ({'bf16' if use_bf16(config.precision, device) else 'fp32'}), "
           f"writing to {config.out}")
    if run.held_out is None:
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
