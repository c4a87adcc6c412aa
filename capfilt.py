"""CapFilt (BLIP sec. 3.3, Fig. 3): a captioner writes, a filter judges, a new model learns.

    python capfilt.py       the whole loop in the picture world: pretrain on noisy texts, finetune
                            captioner and filter, bootstrap, pretrain anew, compare
    python capfilt.py --web WEB --human HUMAN --captioner C.pt --filter F.pt --out DIR
                            your own web pairs, with models that you have finetuned
    python capfilt.py --web WEB --human HUMAN --init M.pt --finetune --out DIR
                            the same, and finetune captioner and filter on HUMAN first

For each web image the captioner writes a synthetic text by nucleus sampling; the filter's ITM head
judges the web text and the synthetic one; what it calls unmatched is dropped. The bootstrapped set
is the human pairs + the web texts that were kept + the synthetic texts that were kept.

Into --out: bootstrapped.json (for `train.py --data`), rejected.json, report.json (counts, rates),
filter.json (does it know true pairs?), sheet.png (Fig. 4), shards/ (the same command goes on).
"""

import argparse
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import train
from config import CapFiltConfig
from data.files import InputError, lock_folder, write_json
from data.images import prepare_images
from data.shards import Shard, merge, pending, write
from data.sources import PairIndex, open_index, with_shares
from data.text import clean_caption
from reports.sheets import draw_judged_texts
from tasks.captioning import Decoding, write_captions
from tasks.registry import TASKS
from tasks.task import TrainedModel
from tools.filter_quality import open_filter, report_filters
from tools.judge import compare_in_world, print_report, print_truth
from training import devices, distributed
from training.checkpoints import open_model
from training.code import digest_of_code
from training.distributed import print0
from training.precision import autocast, choose_precision
from training.program import exit_status
from training.settings import FileFlag, add_flags, at_least, given_for, training_flags
from world.web import WORLD_PAIRS, WorldSets, stand_in, truth_of_set


@dataclass
class Captioner:
    """A finetuned model that writes, and how. (A filter is a plain TrainedModel.)"""

    trained: TrainedModel
    decoding: Decoding


# ---- Figure 3 ------------------------------------------------------------------------------------

def bootstrap(web: PairIndex, human: PairIndex | None, captioners: list[Captioner],
              filters: list[TrainedModel], config: CapFiltConfig, out: Path, seed: int = 0,
              workers: int = 0) -> dict:
    """The bootstrapped set of web texts and human pairs, into `out` -> its report.

    seed: of the sampling. Every process calls it. Shards that are there are not made again. Raises
    InputError.
    """
    made_of = asdict(config) | {
        "code": digest_of_code(), "web set": web.digest(), "filters": [f.digest() for f in filters],
        "captioners": [[c.trained.digest(), asdict(c.decoding)] for c in captioners]}
    for shard in pending(web, out, made_of, config.shard_size, seed):
        write(shard, caption_and_filter(shard, captioners, filters, config, workers))
    return distributed.from_rank_0(lambda: merge(web, human, out, config.shard_size))


@torch.no_grad()
def caption_and_filter(shard: Shard, captioners: list[Captioner], filters: list[TrainedModel],
                       config: CapFiltConfig, workers: int = 0) -> list[dict]:
    """The images of a shard with their texts: {image, texts: [{caption, source, itm, kept}]}."""
    models = [captioner.trained for captioner in captioners] + filters
    sizes, device = {model.image_size for model in models}, models[0].device
    records = []
    for pairs, images, seed in shard.batches(sizes, config.batch_size, workers):
        images = {size: prepare_images(image, device) for size, image in images.items()}
        with autocast(device, config.precision):
            texts = [[{"caption": text, "source": "web"} for text in pair.captions]
                     for pair in pairs]
            for number, captioner in enumerate(captioners):
                add_synthetic_texts(texts, captioner, images, number, seed, config.captions)
            for filter in filters:
                add_itm_scores(texts, filter, images)
        for number, image_texts in enumerate(texts):
            decide(image_texts, config, random.Random(f"{seed} {number}"))
        records += [{"image": pair.image, "texts": image_texts}
                    for pair, image_texts in zip(pairs, texts)]
    return records


def add_synthetic_texts(texts: list[list[dict]], captioner: Captioner, images: dict[int, Tensor],
                        number: int, seed: int, count: int) -> None:
    """The captioner writes `count` captions for each image (Cap).

    NOTE: one that is empty or equals a text that the image has already is dropped; the paper does
    not say.
    """
    trained, decoding = captioner.trained, replace(captioner.decoding, seed=seed + number)
    written = write_captions(trained.model, trained.tokenizer, images[trained.image_size],
                             decoding, count)
    for image_texts, captions in zip(texts, written):
        for caption, score in captions:
            others = {clean_caption(text["caption"]) for text in image_texts} | {""}
            if clean_caption(caption) not in others:
                image_texts.append({"caption": caption, "source": "synthetic",
                                    "captioner": number, "log_probability": round(score, 3)})


def add_itm_scores(texts: list[list[dict]], filter: TrainedModel,
                   images: dict[int, Tensor]) -> None:
    """The filter's ITM probability that a text matches its image, for each text (Filt)."""
    captions = [[text["caption"] for text in image_texts] for image_texts in texts]
    scores = itm_scores(filter, images[filter.image_size], captions)
    for image_texts, of_captions in zip(texts, scores):
        for text, score in zip(image_texts, of_captions):
            text.setdefault("itm", []).append(round(score, 4))


def itm_scores(trained: TrainedModel, images: Tensor, texts: list[list[str]]) -> list[list[float]]:
    """ITM's probability that an image and a text match.

    images (B, 3, S, S), normalised, and texts of each. An image is projected once for all texts.
    """
    most = max(len(row) for row in texts)
    # As many texts for each image: a shorter row repeats its last one.
    padded = [row + row[-1:] * (most - len(row)) for row in texts]
    flat = [clean_caption(text, trained.max_words) for row in padded for text in row]
    ids, mask = trained.tokenizer.encode(flat, trained.max_tokens)
    kv = trained.model.project(trained.model.vit(images))
    logits = trained.model.match(kv, ids.to(trained.device), mask.to(trained.device)).float()
    scores = logits.softmax(-1)[:, 1].view(-1, most).tolist()
    return [of_row[:len(row)] for of_row, row in zip(scores, texts)]


def decide(texts: list[dict], config: CapFiltConfig, rng: random.Random) -> None:
    """Set "kept" of one image's texts: whether the score reaches the threshold.

    Of the synthetic texts that do, only those that `config.keep` chooses stay.
    """
    def value(text: dict) -> float:
        itm = text.get("itm", [1.0])
        return sum(itm) / len(itm) if config.agree == "mean" else min(itm)
    for text in texts:
        text["kept"] = value(text) >= config.threshold
    accepted = [text for text in texts if text["kept"] and text["source"] == "synthetic"]
    if config.keep != "all" and len(accepted) > 1:
        chosen = max(accepted, key=value) if config.keep == "best" else rng.choice(accepted)
        for text in accepted:
            text["kept"] = text is chosen


# ---- around it: pretrain, finetune two, bootstrap, pretrain anew ---------------------------------

def run(o: argparse.Namespace) -> None:
    """Do what the command line asks."""
    out, device = Path(o.out), devices.start(o.device)
    distributed.from_rank_0(lambda: lock_folder(out))
    world = stand_in(o, WorldSets(**given_for(WorldSets, vars(o))), out)
    check(o)
    shared = {"seed": o.seed, "device": o.device, "precision": o.precision, "vocab": o.vocab}

    def pretrain(folder: Path, sources: list[str], root: str) -> str:
        data = with_shares(sources, root, out / "index", o.pairs)
        return train.train_into(folder, shared | o.pretrain | {"data": data, "image_root": root})

    def finetune(task: str, folder: Path, start: str) -> str:
        return train.train_into(folder, shared | o.finetune | {
            "task": task, "init": start, "data": o.human, "image_root": o.image_root})

    model, models = o.init, {}
    if o.finetune is not None and not model:
        print0("== pretrain on the web texts and the human ones")
        models["raw"] = model = pretrain(out / "base", [o.web, o.human], o.image_root)
    for number in range(1, o.rounds + 1):
        folder = out if o.rounds == 1 else out / f"round{number}"
        if o.finetune is not None:
            print0("== finetune captioner and filter on the human pairs")
            o.captioner = [finetune("caption", folder / "captioner", model)]
            o.filter = [finetune("retrieval", folder / "filter", model)]
        report = bootstrap_from(o, folder, device)
        if world and distributed.rank() == 0:
            print_truth(truth_of_set(folder, world.web(o.seed)))
        bootstrapped, root = str(folder / "bootstrapped.json"), report["image_root"]
        if o.pretrain is None:
            print0(f'next: python train.py --data "{bootstrapped}" --image-root "{root}"')
        else:
            print0("== pretrain a new model on the bootstrapped set")
            model = pretrain(folder / "model", [bootstrapped], root)
            models["bootstrapped" if o.rounds == 1 else f"round {number}"] = model
    if world:
        print0("== compare, on held-out scenes with clean texts")
        compare_in_world(models, device, world.held_out, out)


def check(o: argparse.Namespace) -> None:
    """InputError or SettingError for what cannot be, or cannot go together."""
    for kind in (CapFiltConfig, Decoding):
        kind(**given_for(kind, vars(o)))
    if o.finetune is not None and not o.human:
        raise InputError("--finetune needs --human: pairs of good quality, as COCO's")
    if (o.finetune is None) != bool(o.captioner + o.filter):
        raise InputError("give --captioner and --filter (checkpoints of `train.py caption` and "
                         "`train.py retrieval`), or else --init and --finetune to make them")
    if o.rounds > 1 and None in (o.finetune, o.pretrain):
        raise InputError("--rounds needs --finetune and --pretrain: each starts from the last")
    if o.finetune is not None and not o.init and o.pretrain is None:
        raise InputError("--finetune needs a pretrained model: give --init, or --pretrain for one")


def bootstrap_from(o: argparse.Namespace, folder: Path, device: torch.device) -> dict:
    """One CapFilt with the command line's captioners and filters -> the report, printed too."""
    index = Path(o.out) / "index"
    web = open_index(o.web, o.image_root, index)
    human = open_index(o.human, o.image_root, index) if o.human else None
    print0(f"== caption and filter {len(web)} web texts, writing to {folder}")
    captioners = [open_captioner(path, vars(o), device) for path in o.captioner]
    filters = [open_filter(path, device, o.vocab) for path in o.filter]
    precision = {"precision": choose_precision(o.precision, device)}
    config = CapFiltConfig(**given_for(CapFiltConfig, vars(o) | precision))
    qualities = report_filters(filters, human, itm_scores, config.threshold)
    report = bootstrap(web, human, captioners, filters, config, folder, o.seed, o.workers)
    if distributed.rank() == 0:
        write_json(folder / "filter.json", qualities)
        draw_judged_texts(folder / "sheet.png", report["examples"], Path(web.root))
    print_report(report, folder)
    return report


def open_captioner(path: str, given: dict, device: torch.device) -> Captioner:
    """A checkpoint of `train.py caption`. Raises InputError where a setting does not fit it."""
    trained = open_model(path, TASKS["caption"].needs, given.get("vocab", ""), device)
    # Nucleus sampling makes better synthetic texts than beam search (Table 2).
    decoding = Decoding.choose({"method": "nucleus"} | given, trained.settings)
    decoding.prompt_ids(trained.model, trained.tokenizer)
    captions = given.get("captions", 1)
    if decoding.method == "beam" and decoding.beams < captions:
        raise InputError(f"--captions {captions} by beam search need --beams {captions} or more")
    return Captioner(trained, decoding)


# ---- command line --------------------------------------------------------------------------------

def command_line() -> argparse.ArgumentParser:
    """The flags of the module docstring."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--web", default="", action=FileFlag, help="json or tar shards; none: the world")
    p.add_argument("--human", default="", action=FileFlag, help="json of pairs of good quality")
    p.add_argument("--image-root", default="", action=FileFlag, help="default: the source's folder")
    p.add_argument("--captioner", nargs="+", default=[], help="train.py caption (none: web texts)")
    p.add_argument("--filter", nargs="+", default=[], help="train.py retrieval (none: keep all)")
    p.add_argument("--out", default="runs/capfilt", action=FileFlag, help="default runs/capfilt")
    p.add_argument("--init", default="", action=FileFlag, help="model that --finetune starts from")
    p.add_argument("--finetune", nargs="?", const={}, type=training_flags, metavar="FLAGS",
                   help="make captioner and filter from --init and --human first; FLAGS of "
                   "train.py for both, given as --finetune=\"--epochs 5\"")
    p.add_argument("--pretrain", nargs="?", const={}, type=training_flags, metavar="FLAGS",
                   help="pretrain a new model on the bootstrapped set; FLAGS of train.py likewise")
    p.add_argument("--rounds", type=at_least(1), default=1, help="repeat this often: "
                   "finetune, bootstrap, pretrain (default 1, as in the paper)")
    p.add_argument("--pairs", type=at_least(0), default=0, help="pairs that --pretrain sees in an "
                   f"epoch, whatever the set's size (default 0: the set; world {WORLD_PAIRS})")
    p.add_argument("--vocab", default="", help="vocab.txt, for released weights")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    p.add_argument("--workers", type=at_least(0), default=0, help="loading processes (default 0)")
    add_flags(p.add_argument_group("what is kept"), CapFiltConfig, {})
    add_flags(p.add_argument_group("how the captioner writes"), Decoding, {"method": "nucleus"})
    add_flags(p.add_argument_group("the picture world"), WorldSets, {})
    p.set_defaults(seed=0)
    return p


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    return exit_status(lambda: run(command_line().parse_args(arguments)),
                       "interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
