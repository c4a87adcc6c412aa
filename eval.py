"""Evaluation: what a model can do, with the level of chance or a trivial answer beside each number.

    python eval.py retrieval --checkpoint C              recall by ITC and after ITM's re-ranking
    python eval.py caption --checkpoint C                BLEU, ROUGE-L, CIDEr
    python eval.py nocaps --checkpoint C --data N.json   the same in, near and out of domain
    python eval.py vqa --checkpoint C                    VQA accuracy, by kind of question
    python eval.py nlvr2 --checkpoint C                  accuracy and consistency
    python eval.py score --predictions P --references R  the same for captions from anywhere
    python eval.py describe PICTURE... --checkpoint C    captions, and samples with likelihoods
    python eval.py ask PICTURE QUESTION...               an answer
    python eval.py search TEXT --images DIR ...          a sheet of the best matches in a folder
    python eval.py match PICTURE TEXT ...                ITC similarity and ITM probability
    python eval.py attend PICTURE TEXT ...               where cross-attention looks, word by word

Without --data, retrieval, caption, vqa and nlvr2 run on held-out scenes of the built-in world,
where every statement can be checked. With it: a BLIP, Karpathy or COCO json; for vqa BLIP's lists,
or VQAv2's "questions.json,annotations.json"; for nlvr2 BLIP's list or the official jsonl. Each
writes its numbers beside all settings (metrics.json) and a sheet of examples (sheet.png) into
--out. SPICE and METEOR need Java and WordNet: `caption` writes captions.json and references.json
for their tools.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import checkpoints
import demo
import distributed
import task_eval
from blip import BLIP
from captioning import Decoding, caption_all, read_scored, write_results
from config import add_flags, objectives_of
from data import Collate, InputError, PairDataset, Tokenizer, normalise
from metrics import caption_scores
from pairs import Pair, merge_captions, read_pairs
from report import examples, exit_status, mean, print_numbers, write_numbers
from retrieval import Gallery, encode, retrieval, retrieval_chance, shared_batches
from sheets import BLACK, GREEN, GREY, RED, Cell, draw_sheet
from world import ATTRIBUTES, World, all_captions, describe, is_complete, is_true, swap

Sections = list[tuple[str, list[list[Cell]]]]  # what sheets.draw_sheet draws


# ---- retrieval -----------------------------------------------------------------------------------

def evaluate_retrieval(model: BLIP, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                       top_k: int = 16, max_tokens: int = 30) -> tuple[dict, Sections]:
    """-> numbers and a sheet's sections: t2i_r1 i2t_r1 ... as fractions, median and mean rank,
    each by ITC and with suffix _rerank; "chance" holds what a random order would give.

    In the world also t2i_true1 and i2t_true1: the item found first is true, whoever it was
    written for.
    """
    gallery = encode(model, tokenizer, dataset, device, max_tokens)
    numbers, scores = retrieval(model, gallery, top_k, device)
    chance = retrieval_chance(gallery)
    def holds(t: int, i: int) -> bool:
        return bool(gallery.image_of[t] == i)
    if isinstance(dataset, World):
        scenes = [dataset.scene(i) for i in range(len(dataset))]
        def holds(t: int, i: int) -> bool:
            return is_true(gallery.texts[t], scenes[i])
        for suffix, (t2i, i2t) in scores.items():
            numbers |= {f"t2i_true1{suffix}": mean(map(holds, range(len(t2i)), t2i.argmax(1))),
                        f"i2t_true1{suffix}": mean(map(holds, i2t.argmax(1), range(len(i2t))))}
        chance |= dict.fromkeys(("t2i_true1", "i2t_true1"), chance_of_truth(dataset))
    numbers |= {"chance": chance, "images": len(gallery.index), "texts": len(gallery.texts),
                "top_k": top_k, "broken": len(gallery.broken)}
    return numbers, retrieval_sections(gallery, *scores["_rerank" if top_k else ""], holds)


def chance_of_truth(world: World) -> float:
    """How often a text of the world holds of another scene than its own."""
    scenes = [world.scene(i) for i in range(len(world))]
    return mean(is_true(world.text(i), scenes[i - shift])
                for shift in range(1, min(20, len(scenes))) for i in range(shift, len(scenes)))


def retrieval_sections(gallery: Gallery, t2i: Tensor, i2t: Tensor,
                       holds: Callable[[int, int], bool]) -> Sections:
    """For the texts that are found best and worst, and for random ones, the five best images; for
    random images the three best texts. holds(text, image) tells what is right."""
    positives = gallery.positives()
    margin = (t2i.masked_fill(~positives, float("-inf")).amax(1)
              - t2i.masked_fill(positives, float("-inf")).amax(1))
    sections = []
    for title, chosen in examples(margin.tolist(), 4):
        rows = []
        for t in chosen:
            best = t2i[t].topk(min(5, t2i.shape[1]))
            rows.append([Cell(None, [(gallery.texts[t], BLACK)])] + [
                Cell(gallery.images([i])[0], [(f"{score:.2f}", GREY)],
                     GREEN if holds(t, i) else RED)
                for i, score in zip(best.indices.tolist(), best.values.tolist())])
        sections.append((f"images found for a text, {title} (score below; green: right)", rows))
    few = min(3, i2t.shape[1])
    cells = [Cell(gallery.images([i])[0], [(gallery.texts[t], GREEN if holds(t, i) else RED)
                                           for t in i2t[i].topk(few).indices.tolist()])
             for i in dict(examples([0.0] * len(i2t), 8))["random"]]
    return sections + [("texts found for an image, random", [cells])]


# ---- captions ------------------------------------------------------------------------------------

def evaluate_captions(model: BLIP, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                      how: Decoding, texts: list[str] | None = None
                      ) -> tuple[dict, Sections, list[dict]]:
    """-> numbers (bleu1-4, rouge_l, cider; in the world caption_true: every fact right, none left
    out), a sheet's sections, and the records {index, caption, references, cider}.

    "constant" holds what one and the same caption for every image would score: the one that is the
    most frequent in `texts` (those of a training set), or else in the references.
    """
    records, broken = caption_all(model, tokenizer, dataset, device, how)
    if not any(record["references"] for record in records):  # a test set: nothing to compare with
        shown = [records[i] for i in dict(examples([0.0] * len(records), 8))["random"]]
        return ({"images": len(records), "broken": len(broken)},
                [("captions, random", [caption_cells(dataset, shown)])], records)
    world = dataset if isinstance(dataset, World) else None
    for record in records if world else []:
        scene = world.scene(record["index"])
        record["references"] = world.references(record["index"])
        record["facts_hold"] = is_true(record["caption"], scene)
        record["true"] = record["facts_hold"] and is_complete(record["caption"], scene)
    references = [record["references"] for record in records]
    numbers, each = caption_scores([record["caption"] for record in records], references)
    for record, value in zip(records, each):
        record["cider"] = round(value, 4)
    texts = texts or (all_captions() if world else [t for known in references for t in known])
    constant = Counter(map(str.lower, texts)).most_common(1)[0][0]
    trivial = caption_scores([constant] * len(records), references)[0]
    if world:
        numbers |= {"caption_true": mean(record["true"] for record in records),
                    "caption_facts_hold": mean(record["facts_hold"] for record in records)}
        trivial |= {"caption_true": mean(is_true(constant, world.scene(record["index"]))
                                         for record in records)}
    numbers |= {"constant": trivial | {"caption": constant}, "images": len(records),
                "broken": len(broken)}
    return numbers, [(f"captions, {title} (by CIDEr; grey: a reference)",
                      [caption_cells(dataset, [records[i] for i in chosen])])
                     for title, chosen in examples(each, 8)], records


def caption_cells(dataset: Dataset, records: list[dict]) -> list[Cell]:
    """Images with their captions, in green or red where the world knows, over a reference."""
    cells = []
    for record in records:
        verdict, colour = {None: ("", BLACK), True: ("true: ", GREEN), False: ("FALSE: ", RED)}[
            record.get("true")]
        lines = [(verdict + record["caption"], colour)]
        if record["references"]:
            lines.append((f"CIDEr {record['cider']:.2f}: {record['references'][0]}", GREY))
        cells.append(Cell(dataset[record["index"]]["image"], lines))
    return cells


def by_domain(records: list[dict], pairs: list[Pair]) -> dict[str, float]:
    """NoCaps: CIDEr and the other measures of each domain by itself (its own images make the
    document frequencies)."""
    numbers = {}
    for domain in sorted({pairs[record["index"]].domain for record in records} - {""}):
        some = [record for record in records if pairs[record["index"]].domain == domain]
        found, _ = caption_scores([record["caption"] for record in some],
                                  [record["references"] for record in some])
        numbers |= {f"{domain}_{name}": value for name, value in found.items()}
    return numbers


# ---- all of it, after pretraining ----------------------------------------------------------------

@torch.no_grad()
def swap_preference(model: BLIP, tokenizer: Tokenizer, world: World,
                    device: torch.device) -> dict[str, float]:
    """For each attribute, how often ITM finds the true caption of a scene likelier than the same
    caption with that one attribute swapped. Chance is one half."""
    model.eval()
    wins = []
    loader = DataLoader(world, collate_fn=Collate(tokenizer),
                        batch_sampler=shared_batches(len(world)))
    for batch in distributed.progress(loader, "swaps"):
        kv = model.med.project(model.vit(normalise(batch["image"].to(device))))
        texts = []
        for i in batch["index"]:
            scene = world.scene(i)
            versions = [scene] + [swap(scene, attribute, world.rng(i, attribute))
                                  for attribute in ATTRIBUTES]
            texts += [describe(version, world.rng(i, "swap")) for version in versions]
        logits = model.match(kv, *(x.to(device) for x in tokenizer.encode(texts))).float().cpu()
        margin = (logits[:, 1] - logits[:, 0]).view(-1, len(ATTRIBUTES) + 1)
        wins += (margin[:, :1] > margin[:, 1:]).tolist()
    return {attribute: mean(row) for attribute, row in zip(ATTRIBUTES,
                                                           zip(*distributed.gather(wins)))}


def evaluate_pretraining(model: BLIP, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                         top_k: int, max_tokens: int, how: Decoding,
                         texts: list[str] | None = None) -> tuple[dict, Sections]:
    """Retrieval, captions and, in the world, swaps (itm_swap, itm_swap_by)."""
    numbers, sections = evaluate_retrieval(model, tokenizer, dataset, device, top_k, max_tokens)
    captions, more, _ = evaluate_captions(model, tokenizer, dataset, device, how, texts)
    numbers = captions | numbers
    if isinstance(dataset, World):
        swaps = swap_preference(model, tokenizer, dataset, device)
        numbers |= {"itm_swap_by": swaps, "itm_swap": mean(swaps.values())}
        numbers["chance"]["itm_swap"] = 0.5
    return numbers, more + sections


# ---- command line --------------------------------------------------------------------------------

def command_line() -> argparse.ArgumentParser:
    """The commands of the module docstring and their flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    def command(name, about, model=True, data=False):
        p = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        p.add_argument("--out", default=f"runs/eval/{name}",
                       help=f"folder for what it writes (default runs/eval/{name})")
        if model:
            p.add_argument("--checkpoint", required=True, help="of train.py, or released weights")
            p.add_argument("--vocab", default="", help="vocab.txt, for released weights")
            p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        if data:
            p.add_argument("--data", default="", help="json of images and captions (default: "
                                                      "held-out scenes of the built-in world)")
            p.add_argument("--image-root", default="", help="default: the folder of the json")
            p.add_argument("--split", default="test", help="of a Karpathy file (default test)")
            p.add_argument("--size", type=int, default=0,
                           help="only the first so many images (default all; world 1000)")
        return p
    p = command("retrieval", "recall by ITC and after ITM's re-ranking", data=True)
    p.add_argument("--top-k", type=int, default=None, help="candidates that ITM re-ranks; 0 does "
                   "not (default: the checkpoint's eval_top_k; the paper: COCO 256, Flickr 128)")
    p = command("caption", "BLEU, ROUGE-L and CIDEr of generated captions", data=True)
    p.add_argument("--constant-from", default="", help="json of training captions: the commonest "
                   "is the constant answer to compare with (default: the references' own)")
    add_flags(p, Decoding, {})
    p = command("nocaps", "the same in, near and out of domain; repetition penalty 1.1 unless "
                "given", data=True)
    add_flags(p, Decoding, {})
    task_eval.add_commands(command)
    p = command("score", "score captions from anywhere; prints one json object", model=False)
    p.add_argument("--predictions", required=True, help="list of {image or image_id, caption}")
    p.add_argument("--references", required=True, help="list of {image or image_id, caption: []}")
    p.add_argument("--subset", action="store_true",
                   help="allow references without a prediction: leave them out")
    p = command("describe", "captions, and samples with their log-likelihoods")
    p.add_argument("picture", nargs="+", help="picture or folder")
    p.add_argument("--captions", type=int, default=1, help="by beam search (default 1)")
    p.add_argument("--samples", type=int, default=3, help="by nucleus sampling (default 3)")
    add_flags(p, Decoding, {})
    p = command("search", "the pictures that fit a text best")
    p.add_argument("text")
    p.add_argument("--images", nargs="+", required=True, help="folders or pictures")
    p.add_argument("--top-k", type=int, default=10, help="how many are shown (default 10)")
    for name, about in (("match", "ITC similarity and ITM probability"),
                        ("attend", "where cross-attention looks, word by word")):
        p = command(name, about)
        p.add_argument("picture")
        p.add_argument("text")
    p.add_argument("--layer", type=int, default=0, help="from 1; the last one cannot be "
                   "shown (default: two thirds of the depth)")
    return parser


# What a checkpoint must have been trained with: the losses of the task that a command belongs to.
NEEDS = {**dict.fromkeys(("caption", "nocaps", "describe"), objectives_of("caption")),
         **dict.fromkeys(("retrieval", "search", "match"), objectives_of("retrieval")),
         "attend": ("itm",)}


def run_benchmark(o: argparse.Namespace, model: BLIP, tokenizer: Tokenizer, trained: dict,
                  device: torch.device) -> None:
    """retrieval, caption, nocaps: print, and write into --out."""
    dataset, pairs = open_data(o, model.config.image_size)
    out, settings = Path(o.out), vars(o) | {"model": asdict(model.config), "trained": trained,
                                            "torch": torch.__version__, "device": str(device)}
    if o.command == "retrieval":
        top_k = (min(trained.get("eval_top_k", 128), len(dataset)) if o.top_k is None
                 else o.top_k)
        if top_k > len(dataset):
            raise InputError(f"--top-k {top_k} is larger than the gallery of {len(dataset)} "
                             "images; give a smaller one (0 does not re-rank)")
        max_tokens = trained.get("max_tokens", 35)
        numbers, sections = evaluate_retrieval(model, tokenizer, dataset, device, top_k, max_tokens)
        settings |= {"top_k": top_k, "max_tokens": max_tokens}
    else:
        how = decoding(o, trained)
        settings |= asdict(how)
        texts = None
        if o.command == "caption" and o.constant_from:
            texts = [text for p in read_pairs(o.constant_from, "/") for text in p.captions]
        how.check(model, tokenizer)
        numbers, sections, records = evaluate_captions(model, tokenizer, dataset, device, how,
                                                       texts)
        if o.command == "nocaps":
            numbers |= by_domain(records, pairs)
    if distributed.rank():
        return
    out.mkdir(parents=True, exist_ok=True)
    print_numbers(numbers)
    write_numbers(out / "metrics.json", numbers, settings)
    draw_sheet(out / "sheet.png", sections)
    if o.command != "retrieval":
        write_results(out, records, pairs)
    print(f"wrote {out}/" + ", ".join(sorted(p.name for p in out.iterdir())))


def run(o: argparse.Namespace) -> None:
    """Do what the command line asks."""
    if o.command == "score":
        told, true = read_scored(o.predictions, o.references, o.subset)
        print(json.dumps({name: round(value, 6) for name, value
                          in caption_scores(told, true)[0].items()} | {"images": len(told)}))
        return
    device = distributed.init(o.device)
    if o.command in task_eval.TASK_OF:
        return task_eval.run(o, device)
    model, tokenizer, trained = checkpoints.open_model(o.checkpoint, NEEDS[o.command], o.vocab,
                                                       device)
    out, size = Path(o.out), model.config.image_size
    if o.command in ("retrieval", "caption", "nocaps"):
        run_benchmark(o, model, tokenizer, trained, device)
    elif o.command == "describe":
        records = demo.describe(model, tokenizer, demo.pictures_in(o.picture), device,
                                decoding(o, trained), o.captions, o.samples)
        out.mkdir(parents=True, exist_ok=True)
        (out / "captions.json").write_text(json.dumps(records, indent=1) + "\n")
        print(f"wrote {out}/captions.json (beam: mean log-probability of a token; sample: "
              "log-likelihood)")
    elif o.command == "search":
        for hit in demo.search(model, tokenizer, o.text, demo.pictures_in(o.images), device,
                               Path(o.checkpoint), out, o.top_k):
            print(f"ITC {hit['itc']:6.3f}  ITM {hit['itm']:5.3f}  {hit['image']}")
        print(f"wrote {out}/search.png")
    else:
        image = demo.open_picture(o.picture, size)
        if o.command == "match":
            itc, itm = demo.match(model, tokenizer, image, o.text, device)
            print(f"ITC similarity {itc:.4f} (-1 to 1), ITM probability {itm:.4f}")
            return
        words, heat, itm = demo.attention(model, tokenizer, image, o.text, device, o.layer)
        out.mkdir(parents=True, exist_ok=True)
        demo.draw_attention(out / "attention.png", image, words, heat,
                            f"{o.text} (ITM probability {itm:.3f})")
        print(f"ITM probability {itm:.4f}; wrote {out}/attention.png")


def open_data(o: argparse.Namespace, image_size: int) -> tuple[Dataset, list[Pair] | None]:
    """The data set that --data names, and its pairs; or the world, and None."""
    if not o.data:
        if o.command == "nocaps":
            raise InputError("nocaps needs --data: NoCaps' annotations, or a list of {image, "
                             "img_id}")
        return World("held-out", o.size or 1000, image_size), None
    pairs = read_pairs(o.data, o.image_root or None, o.split, need_captions=o.command != "nocaps")
    pairs = merge_captions(pairs)[:o.size or None]
    return PairDataset(pairs, o.image_root or Path(o.data).parent, image_size), pairs


def decoding(o: argparse.Namespace, trained: dict) -> Decoding:
    """How to generate; NoCaps has a setting of its own (BLIP sec. 5.2)."""
    paper = {"repetition_penalty": 1.1} if o.command == "nocaps" else {}
    return Decoding.of(vars(o), trained, paper)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    return exit_status(lambda: run(command_line().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
