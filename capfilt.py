"""CapFilt: a captioner writes, a filter judges, a new model learns from what is kept (BLIP sec.
3.3).

    python capfilt.py       the whole loop in the built-in world: pretrain on noisy texts, finetune
                            captioner and filter, bootstrap, pretrain anew, compare
    python capfilt.py --web WEB --human HUMAN --captioner C.pt --filter F.pt --out DIR
                            your own web pairs, with models that you have finetuned
    python capfilt.py --web WEB --human HUMAN --init M.pt --finetune --out DIR
                            the same, and finetune captioner and filter on HUMAN first

For each web image the captioner writes a synthetic text by nucleus sampling; the filter's ITM head
judges the web text and the synthetic one; what it calls unmatched is dropped. The bootstrapped set
is the human pairs + the web texts that were kept + the synthetic texts that were kept.

Into --out: bootstrapped.json (a list for `train.py --data`: image, caption, source, ITM
probabilities) and rejected.json likewise, report.json (counts and rates), sheet.png (the paper's
Fig. 4), shards/ (one file for every so many images, whole or not there: the same command goes on
where it stopped; torchrun splits them over processes). Without --captioner web texts are only
filtered, without --filter nothing is dropped (Table 1).
"""

import argparse
import contextlib
import hashlib
import json
import random
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import distributed
import train
from blip import BLIP
from captioning import Decoding, captions_of
from config import add_flags, objectives_of
from data import InputError, Tokenizer, clean_caption, normalise
from distributed import print0
from pairs import Pair, Rows
from report import exit_status
from shards import judge_all, merge, write_whole
from webworld import MEASURES, WorldSets, judge_in_world, print_truth, truth


@dataclass(frozen=True)
class CapFiltConfig:
    """What the bootstrapped set depends on, beside the models and how they generate."""

    captions: int = 1  # synthetic captions that each captioner writes for an image (paper: 1)
    keep: str = "all"  # of an image's accepted synthetic captions: all, best (by ITM) or sample
    agree: str = "mean"  # of several filters, what must reach the threshold: their mean, or all
    threshold: float = 0.5  # ITM probability that makes a text a match (paper: the head's decision)
    shard_size: int = 1000  # web texts in a shard, which is what an interruption costs at most
    batch_size: int = 32  # images at a time

    def __post_init__(self):
        if self.keep not in ("all", "best", "sample") or self.agree not in ("mean", "all"):
            raise InputError("--keep is all, best or sample; --agree is mean or all")
        if min(self.captions, self.shard_size, self.batch_size) < 1 or not 0 <= self.threshold <= 1:
            raise InputError("--captions, --shard-size and --batch-size must be at least 1, and "
                             "--threshold between 0 and 1")


# ---- a batch of images: the paper's figure 3 -----------------------------------------------------

@dataclass
class Role:
    """A captioner or a filter: a model, how it generates, how many tokens it reads."""

    digest: str  # of the weights: under the same file name there may be others tomorrow
    model: BLIP
    tokenizer: Tokenizer
    how: Decoding
    max_tokens: int

    @classmethod
    def open(cls, path: str, task: str, given: dict, device: torch.device) -> "Role":
        """task: caption or retrieval, which the checkpoint must have been trained for."""
        model, tokenizer, trained = checkpoints.open_model(path, objectives_of(task),
                                                           given.get("vocab", ""), device)
        how = Decoding.of(given, trained, {"method": "nucleus"})  # BLIP Table 2: better than beam
        how.check(model, tokenizer)
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
        return cls(digest.hexdigest()[:16], model, tokenizer, how, trained.get("max_tokens", 35))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


@torch.no_grad()
def matched(filter: Role, images: Tensor, texts: list[list[str]]) -> list[list[float]]:
    """images (B, 3, S, S) uint8, texts of each -> ITM's probability that they match. Each image is
    encoded and projected once, however many texts look at it."""
    n = max(map(len, texts))
    kv = filter.model.med.project(filter.model.vit(normalise(images.to(filter.device))))
    # As many texts for each image: a shorter row repeats its last one.
    flat = [clean_caption(text) for row in texts for text in row + row[-1:] * (n - len(row))]
    ids, mask = filter.tokenizer.encode(flat, filter.max_tokens)
    logits = filter.model.match(kv, ids.to(filter.device), mask.to(filter.device)).float()
    rows = logits.softmax(-1)[:, 1].view(-1, n).tolist()
    return [row[:len(known)] for row, known in zip(rows, texts)]


def caption_and_filter(pairs: list[Pair], pictures: dict[int, Tensor], captioners: list[Role],
                       filters: list[Role], config: CapFiltConfig, seed: int) -> list[list[dict]]:
    """B web images with their texts; pictures: image size -> (B, 3, S, S) uint8 -> for each image
    its texts as {caption, source, itm, kept, ...}. `seed` decides what is sampled."""
    texts = [[{"caption": text, "source": "web"} for text in pair.captions] for pair in pairs]
    for number, captioner in enumerate(captioners):
        images = pictures[captioner.model.config.image_size]
        found = captions_of(captioner.model, captioner.tokenizer, images, captioner.device,
                            replace(captioner.how, seed=seed + number), config.captions)
        for row, captions in zip(texts, found):
            for caption, score in captions:
                known = {clean_caption(text["caption"]) for text in row} | {""}
                if clean_caption(caption) not in known:  # a repeated text would only weigh double
                    row.append({"caption": caption, "source": "synthetic", "captioner": number,
                                "log_probability": round(score, 3)})
    for filter in filters:
        images = pictures[filter.model.config.image_size]
        judged = matched(filter, images, [[text["caption"] for text in row] for row in texts])
        for row, values in zip(texts, judged):
            for text, value in zip(row, values):
                text.setdefault("itm", []).append(round(value, 4))
    for number, row in enumerate(texts):
        decide(row, config, random.Random(f"{seed} {number}"))
    return texts


def decide(texts: list[dict], config: CapFiltConfig, rng: random.Random) -> None:
    """Set "kept" of one image's texts: those that convince the filters, and of the synthetic ones
    among them those that `config.keep` asks for."""
    def value(text):
        itm = text.get("itm", [1.0])
        return sum(itm) / len(itm) if config.agree == "mean" else min(itm)
    for text in texts:
        text["kept"] = value(text) >= config.threshold
    accepted = [text for text in texts if text["kept"] and text["source"] == "synthetic"]
    if config.keep != "all" and len(accepted) > 1:
        chosen = max(accepted, key=value) if config.keep == "best" else rng.choice(accepted)
        for text in accepted:
            text["kept"] = text is chosen


def capfilt(web: Rows, human: Rows | None, captioners: list[Role], filters: list[Role],
            config: CapFiltConfig, out: Path, seed: int = 0, workers: int = 0,
            bf16: bool = False) -> dict:
    """CapFilt over a web set -> the report of shards.merge, which is written into `out` beside the
    bootstrapped set. All ranks call it."""
    roles = captioners + filters
    if any(r.how.method == "beam" and r.how.beams < config.captions for r in captioners):
        raise InputError(f"--captions {config.captions} by beam search need --beams "
                         f"{config.captions} or more")
    device = roles[0].device
    def judge(pairs, pictures, seed):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return caption_and_filter(pairs, pictures, captioners, filters, config, seed)
    settings = asdict(config) | {
        "seed": seed, "bf16": bf16, "web": web.folder.name,
        "captioners": [{"checkpoint": r.digest, **asdict(r.how)} for r in captioners],
        "filters": [r.digest for r in filters]}
    paths = judge_all(web, judge, {r.model.config.image_size for r in roles}, out, settings,
                      config.shard_size, config.batch_size, seed, workers)
    report = [merge(paths, web, human, out)] if distributed.rank() == 0 else []
    return distributed.gather(report)[0]


# ---- the loop around it: pretrain, finetune two, bootstrap, pretrain anew ------------------------

def trained(folder: Path, *flags: str) -> str:
    """Run train.py with these flags into `folder`, or go on where it stopped -> its best
    checkpoint. What train.py prints is in train.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
    with (open(folder / "train.txt", "a", encoding="utf-8") as file,
          contextlib.redirect_stdout(file)):
        run = train.start([*flags, "--out", str(folder), *resume])
        if not train.train(run):
            raise KeyboardInterrupt
        if not (folder / "metrics.json").exists():
            train.evaluate(run)
    distributed.barrier()
    return str(folder / ("best.pt" if (folder / "best.pt").exists() else "checkpoint.pt"))


@dataclass(frozen=True)
class Loop:
    """What the trainings of all rounds have in common."""

    human: str
    root: str  # of images; "": the folder of each source
    flags: list[str]  # of every training
    pairs: int = 0  # pairs that a pretraining sees in an epoch, whatever the set's size; 0: the set

    def pretrain(self, folder: Path, sources: list[str], root: str, *flags: str) -> str:
        """A new model on json lists or shards -> its checkpoint."""
        if self.pairs:
            size = sum(len(open_rows(source, root, folder.parent / "index")) for source in sources)
            sources = [f"{source}:{self.pairs / size:.6f}" for source in sources]
        return trained(folder, "pretrain", "--data", ",".join(sources), "--image-root", root,
                       *self.flags, *flags)

    def finetune(self, task: str, init: str, folder: Path, *flags: str) -> str:
        """A captioner (task caption) or a filter (retrieval), on the human pairs -> its
        checkpoint."""
        return trained(folder, task, "--init", init, "--data", self.human, "--image-root",
                       self.root, *self.flags, *flags)


def run(o: argparse.Namespace) -> None:
    """Do what the command line asks."""
    out, device, world = Path(o.out), distributed.init(o.device), None
    if not o.web:
        world = WorldSets(**own_fields(o, WorldSets))
        use_world(o, world, out / "data")
    check(o)
    flags = ["--seed", str(o.seed), "--device", o.device, "--precision", o.precision]
    loop = Loop(o.human, o.image_root, flags + ["--vocab", o.vocab] * bool(o.vocab), o.pairs)
    pretrain, finetune = shlex.split(o.pretrain or ""), shlex.split(o.finetune or "")
    model, models = o.init, {}
    if o.finetune is not None and not model:
        print0("== pretrain on the web texts and the human ones")
        models["raw"] = model = loop.pretrain(out / "base", [o.web, o.human], o.image_root,
                                              *pretrain)
    for number in range(1, o.rounds + 1):
        folder = out if o.rounds == 1 else out / f"round{number}"
        if o.finetune is not None:
            print0("== finetune captioner and filter on the human pairs")
            o.captioner = [loop.finetune("caption", model, folder / "captioner", *finetune)]
            o.filter = [loop.finetune("retrieval", model, folder / "filter", *finetune)]
        report = filter_web(o, folder, device)
        if world and distributed.rank() == 0:
            print_truth(truth(folder, world.web(o.seed)))
        bootstrapped, root = str(folder / "bootstrapped.json"), report["image_root"]
        if o.pretrain is not None:
            print0("== pretrain a new model on the bootstrapped set")
            model = loop.pretrain(folder / "model", [bootstrapped], root, *pretrain)
            models["bootstrapped" if o.rounds == 1 else f"round {number}"] = model
        else:
            print0(f"to pretrain on it: python train.py --data {bootstrapped} --image-root {root}")
    if world:
        print0("== compare, on held-out scenes with clean texts")
        compare(out, models, device, world.held_out)


def check(o: argparse.Namespace) -> None:
    """InputError for what cannot go together."""
    if o.finetune is not None and not o.human:
        raise InputError("--finetune needs --human: pairs of good quality, as COCO's")
    if o.finetune is None and not o.captioner + o.filter:
        raise InputError("give --captioner and --filter (checkpoints of `train.py caption` and "
                         "`train.py retrieval`), or --init and --finetune to make them")
    if o.rounds > 1 and None in (o.finetune, o.pretrain):
        raise InputError("--rounds needs --finetune and --pretrain: each round starts from the "
                         "model that was pretrained on the set of the one before")
    if o.finetune is not None and not o.init and o.pretrain is None:
        raise InputError("--finetune starts from a pretrained model: give --init, or --pretrain "
                         "to make it from --web and --human")


def filter_web(o: argparse.Namespace, folder: Path, device: torch.device) -> dict:
    """One CapFilt with the command line's captioners and filters -> the report."""
    web, human = (open_rows(path, o.image_root, Path(o.out) / "index") if path else None
                  for path in (o.web, o.human))
    print0(f"== caption and filter {len(web)} web texts, writing to {folder}")
    captioners, filters = ([Role.open(path, task, vars(o), device) for path in paths]
                           for task, paths in (("caption", o.captioner), ("retrieval", o.filter)))
    report = capfilt(web, human, captioners, filters, CapFiltConfig(**own_fields(o, CapFiltConfig)),
                     folder, o.seed, o.workers, train.use_bf16(o.precision, device))
    for source in ("web", "synthetic"):
        kept, dropped = report[f"{source}_kept"], report[f"{source}_rejected"]
        print0(f"{source + ' texts':16}{kept:9} of {kept + dropped} kept "
               f"({100 * report[f'{source}_kept_rate']:.1f} %)")
    left = {**report["broken"], **report["left_out"]}
    print0(f"{'human texts':16}{report['human']:9}\n{'images':16}{report['images']:9}"
           + "".join(f", {count} x {reason}" for reason, count in left.items()))
    print0(f"wrote {folder}/bootstrapped.json, rejected.json, report.json, sheet.png")
    return report


def open_rows(source: str, root: str, index: Path) -> Rows:
    """The rows of a source. All ranks call it: rank 0 builds the index if there is none yet."""
    if distributed.rank() == 0:
        Rows.of(source, root or None, index)
    distributed.barrier()
    return Rows.of(source, root or None, index)


def own_fields(o: argparse.Namespace, config_class: type) -> dict:
    """What the command line gives for a dataclass."""
    return {f.name: getattr(o, f.name) for f in fields(config_class) if hasattr(o, f.name)}


# ---- in the built-in world -----------------------------------------------------------------------

# Every set is seen for as many steps, and the recipe is that of `python train.py` with a longer
# start on LM alone, which noisy texts disturb less than they do ITC and ITM.
WORLD_FLAGS = "--augment false --workers 0"
WORLD_PRETRAIN, WORLD_PAIRS = f"{WORLD_FLAGS} --lm-only-steps 800", 44800
WORLD_FINETUNE = f"{WORLD_FLAGS} --epochs 16"


def use_world(o: argparse.Namespace, world: WorldSets, folder: Path) -> None:
    """Write the world's sets into `folder`, and fill in the command line with them and the
    recipe."""
    print0(f"== the world's web and human pairs, as files in {folder}")
    if distributed.rank() == 0:
        world.save(folder, o.seed)
    distributed.barrier()
    o.web, o.human, o.image_root = str(folder / "web.json"), str(folder / "human.json"), ""
    o.pairs = o.pairs or WORLD_PAIRS
    if o.pretrain is None:
        o.pretrain = WORLD_PRETRAIN
    o.pretrain += f" --vocab {shlex.quote(str(folder / 'vocab.txt'))}"
    if o.finetune is None and not o.captioner + o.filter:
        o.finetune = WORLD_FINETUNE


def compare(out: Path, models: dict[str, str], device: torch.device, size: int) -> None:
    """Print the models' MEASURES side by side, and write comparison.json."""
    found = {name: judge_in_world(path, device, size) for name, path in models.items()}
    print0(f"{'%':30}" + "".join(f"{name:>14}" for name in found))
    for measure, about in MEASURES.items():
        print0(f"{about:30}" + "".join(f"{100 * numbers[measure]:14.1f}"
                                       for numbers in found.values()))
    if distributed.rank() == 0:
        write_whole(out / "comparison.json", [json.dumps(found, indent=1) + "\n"])


# ---- command line --------------------------------------------------------------------------------

def command_line() -> argparse.ArgumentParser:
    """The flags of the module docstring."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--web", default="", help="json list of {image, caption}, or tar shards (a "
                   "file, a folder, a pattern); default: the world's")
    p.add_argument("--human", default="", help="json of pairs of good quality")
    p.add_argument("--image-root", default="", help="default: the folder of each source")
    p.add_argument("--captioner", nargs="+", default=[], help="checkpoints of train.py caption")
    p.add_argument("--filter", nargs="+", default=[], help="checkpoints of train.py retrieval")
    p.add_argument("--out", default="runs/capfilt", help="default runs/capfilt")
    p.add_argument("--init", default="", help="pretrained model that --finetune starts from")
    p.add_argument("--finetune", nargs="?", const="", metavar="FLAGS", help="make captioner and "
                   "filter from --init and --human first; FLAGS of train.py for both, given as "
                   "--finetune=\"--epochs 5\"")
    p.add_argument("--pretrain", nargs="?", const="", metavar="FLAGS", help="pretrain a new model "
                   "on the bootstrapped set; FLAGS of train.py likewise")
    p.add_argument("--rounds", type=int, default=1, help="so many times: finetune, bootstrap, "
                   "pretrain (default 1, as in the paper)")
    p.add_argument("--pairs", type=int, default=0, help="pairs that --pretrain sees in an epoch, "
                   "whatever the set's size (default 0: the set; world 44800)")
    p.add_argument("--vocab", default="", help="vocab.txt, for released weights")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    p.add_argument("--workers", type=int, default=0, help="processes that load images (default 0)")
    for title, config_class, other in (
            ("what is kept", CapFiltConfig, {}),
            ("how the captioner writes", Decoding, {"method": "nucleus"}),
            ("the built-in world", WorldSets, {})):
        add_flags(p.add_argument_group(title), config_class, other)
    p.set_defaults(seed=0)
    return p


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    return exit_status(lambda: run(command_line().parse_args(arguments)),
                       "interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
