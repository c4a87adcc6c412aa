"""Evaluation: what a model can do, with the level of chance or a trivial answer beside each number.

    python eval.py retrieval --checkpoint C              recall by ITC and after ITM's re-ranking
    python eval.py caption --checkpoint C                BLEU, ROUGE-L, CIDEr
    python eval.py nocaps --checkpoint C --data N.json   the same in, near and out of domain
    python eval.py vqa --checkpoint C                    VQA accuracy, by kind of question
    python eval.py nlvr2 --checkpoint C                  accuracy and consistency
    python eval.py visdial --checkpoint C                MRR, recall and mean rank of answers
    python eval.py video-retrieval --checkpoint C        clips found by text
    python eval.py video-qa --checkpoint C               questions about clips
    python eval.py score --predictions P --references R  BLEU, ROUGE-L, CIDEr of any captions
    python eval.py describe PICTURE... --checkpoint C    captions, and samples with likelihoods
    python eval.py ask PICTURE QUESTION --checkpoint C   an answer
    python eval.py search TEXT --images DIR ...          a sheet of the best matches in a folder
    python eval.py match PICTURE TEXT ...                ITC similarity and ITM probability
    python eval.py attend PICTURE TEXT ...               where cross-attention looks, word by word
    python eval.py blip2-caption|blip2-vqa|blip2-retrieval --checkpoint C    the same of BLIP-2
    python eval.py chat PICTURE QUESTION... ...          questions, one after the other (BLIP-2)
    python eval.py queries PICTURE ...                   where each query looks (BLIP-2)

Without --data a benchmark runs on held-out scenes of the picture world, where every statement can
be checked. With it: a BLIP, Karpathy or COCO json; for vqa BLIP's lists, or VQAv2's
"questions.json,annotations.json"; for nlvr2 BLIP's list or the official jsonl; for visdial VisDial
1.0's file. Each writes its numbers beside all settings (metrics.json), a sheet of examples
(sheet.png) and, where there is one, the file that the evaluation server reads into --out.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from blip import BLIP
from blip2 import demo as blip2_demo
from blip2.stage1 import FrozenVision
from blip2.stage2 import Stage2
from blip2.texts import WordPieces, open_tokenizer
from data.datasets import ImageDataset
from data.files import InputError, make_folder, named_files, refuse_own_files, write_json
from data.pairs import read_pairs
from data.text import clean_question
from reports.metrics import caption_scores
from reports.numbers import print_numbers, write_numbers
from reports.sheets import draw_sheet
from tasks import vqa
from tasks.captioning import Decoding, read_scored
from tasks.registry import BENCHMARKS, TASKS
from tasks.task import Benchmark, EvalSettings, Source, TrainedModel
from tools import demo
from training import devices, distributed
from training.checkpoints import open_model
from training.folders import refuse_a_run
from training.precision import evaluation_precision
from training.program import exit_status
from training.settings import FileFlag, add_flags, at_least, given_for


def open_checkpoint(o: argparse.Namespace, needs: tuple[str, ...], kind: type = BLIP,
                    ) -> TrainedModel:
    """The command line's model, which must be of a kind and trained with what it `needs`."""
    heads = {name: getattr(o, name) for name in ("vit_heads", "text_heads") if getattr(o, name)}
    trained = open_model(o.checkpoint, needs, o.vocab, devices.start(o.device), (kind,), heads)
    if not trained.released and (o.vocab or heads):
        raise InputError(f"--vocab, --vit-heads and --text-heads are for released weights; "
                         f"{o.checkpoint} holds its own: leave them out")
    return trained


# ---- benchmarks ----------------------------------------------------------------------------------

FLAGS = {  # of benchmarks, beside those that all have
    "top_k": dict(type=at_least(0), help="candidates that ITM re-ranks (0: none; the paper: COCO "
                  "256, Flickr 128), or answers whose likelihood is computed (128); default: "
                  "the checkpoint's"),
    "rerank_score": dict(default="", choices=["released", "posterior"], help="released: ITC "
                         "cosine + ITM's matched logit; posterior: ITC cosine / temperature + "
                         "ITM's log-odds (default: the checkpoint's)"),
    "generate": dict(action="store_true", help="answer freely; default: rank the answers of the "
                     "checkpoint, or of --answers"),
    "answers": dict(default="", action=FileFlag, help="json list of the answers that are ranked"),
    "frames": dict(type=at_least(1), help="drawn uniformly from a clip (1: the first one)"),
    "constant_from": dict(default="", action=FileFlag, help="json of training captions: the "
                          "commonest is the constant answer to compare with (default: the "
                          "references' own)"),
}


def run_benchmark(o: argparse.Namespace, benchmark: Benchmark) -> None:
    """Measure; write the numbers, the sheet and the results into --out; print the numbers."""
    if benchmark.needs_data and not o.data:
        raise InputError(f"{benchmark.name} needs --data: its annotations")
    refuse_a_run(o.out)
    refuse_own_files([*named_files(o.data), *named_files(getattr(o, "constant_from", ""))], o.out)
    needs = benchmark.needs
    if getattr(o, "top_k", None) == 0:  # ITM is not asked
        needs = tuple(name for name in needs if name != "itm")
    trained = open_checkpoint(o, needs, benchmark.model)
    trained.settings = trained.settings | benchmark.settings
    size = o.size or (0 if o.data else benchmark.size)
    split = o.split if o.data else "held-out"
    source = Source(o.data, o.image_root, split, size, trained.image_size,
                    frames=getattr(o, "frames", 0), need_labels=benchmark.need_labels)
    dataset = benchmark.open_data(source)
    settings = eval_settings(o, benchmark, trained)
    out = make_folder(o.out)  # one that cannot be made is told before the work, not after it
    with evaluation_precision(trained.settings["precision"], trained.device):
        evaluation = benchmark.evaluate(trained, dataset, settings)
    if distributed.rank() == 0:
        write_numbers(out / "metrics.json", evaluation.numbers, all_settings(o, benchmark, trained))
        written = ["metrics.json", *evaluation.files]
        if evaluation.sections:
            draw_sheet(out / "sheet.png", evaluation.sections)
            written.append("sheet.png")
        for name, content in evaluation.files.items():
            write_json(out / name, content, indent=None)
        print_numbers(evaluation.numbers)
        print(f"wrote {out}/{', '.join(sorted(written))}")


def all_settings(o: argparse.Namespace, benchmark: Benchmark, trained: TrainedModel) -> dict:
    """Everything that the numbers depend on."""
    settings = {name: value for name, value in vars(o).items() if name != "run"}
    if "decoding" in benchmark.flags:
        settings |= asdict(Decoding.choose(benchmark.defaults | vars(o), trained.settings))
    return settings | {"model": asdict(trained.model.config), "trained": trained.settings,
                       "torch": torch.__version__}


def eval_settings(o: argparse.Namespace, benchmark: Benchmark,
                  trained: TrainedModel) -> EvalSettings:
    """What the flags say. Raises InputError."""
    training, answers = None, ()
    if getattr(o, "constant_from", ""):
        training = ImageDataset(read_pairs(o.constant_from, "/"), "", 0)
    elif benchmark.model is vqa.VQA and not o.data:  # a question-only baseline
        training = TASKS["vqa"].open_data(Source("", "", "train", 5000, trained.image_size))
    if getattr(o, "answers", ""):
        answers = vqa.read_answers(o.answers)
    # No baseline on grey images for files: it doubles the time.
    return EvalSettings(top_k=getattr(o, "top_k", None),
                        rerank_score=getattr(o, "rerank_score", ""),
                        decoding=benchmark.defaults | given_for(Decoding, vars(o)),
                        generate=getattr(o, "generate", False), answers=tuple(answers),
                        training=training, baselines=not o.data)


# ---- other commands ------------------------------------------------------------------------------

def score(o: argparse.Namespace) -> None:
    """Print one json object: the measures of captions from anywhere."""
    predictions, references = read_scored(o.predictions, o.references, o.subset)
    numbers, _ = caption_scores(predictions, references)
    rounded = {name: round(value, 6) for name, value in numbers.items()}
    print(json.dumps(rounded | {"images": len(predictions)}))


def describe(o: argparse.Namespace) -> None:
    """Captions of pictures, and samples."""
    trained = open_checkpoint(o, TASKS["caption"].needs)
    decoding = Decoding.choose(vars(o), trained.settings)
    pictures, records = demo.find_pictures(o.picture), []
    out, name = make_folder(o.out), "captions-interrupted.json"
    try:
        for record in demo.describe(trained, pictures, decoding, o.captions, o.samples):
            records.append(record)
        name = "captions.json"
    finally:
        if records:
            write_json(out / name, records)
            print(f"wrote {out}/{name} ({len(records)} pictures; beam: mean log-probability of a "
                  "token; sample: log-likelihood)")


def ask(o: argparse.Namespace) -> None:
    """An answer to a question about a picture."""
    trained = open_checkpoint(o, (), vqa.VQA)
    print(demo.ask(trained, o.picture, o.question, o.generate))


def search(o: argparse.Namespace) -> None:
    """The pictures of a folder that fit a text best."""
    trained, out = open_checkpoint(o, TASKS["retrieval"].needs), Path(o.out)
    pictures = [path for path in demo.find_pictures(o.images)
                if path.resolve() != (out / "search.png").resolve()]  # of a search before
    for record in demo.search(trained, o.text, pictures, Path(o.checkpoint), out, o.top_k):
        print(f"{record['score']:7.2f}   ITC {record['itc']:6.3f}  ITM {record['itm']:5.3f}  "
              f"{record['image']}")
    print(f"wrote {o.out}/search.png")


def match(o: argparse.Namespace) -> None:
    """ITC similarity and ITM probability of a picture and a text."""
    trained = open_checkpoint(o, TASKS["retrieval"].needs)
    itc, itm = demo.match(trained, demo.open_picture(o.picture, trained.image_size), o.text)
    print(f"ITC similarity {itc:.4f} (-1 to 1), ITM probability {itm:.4f}")


def attend(o: argparse.Namespace) -> None:
    """Where cross-attention looks, word by word."""
    trained = open_checkpoint(o, ("itm",))
    image = demo.open_picture(o.picture, trained.image_size)
    words, heat, itm = demo.attention(trained, image, o.text, o.layer)
    path = make_folder(o.out) / "attention.png"
    demo.draw_attention(path, image, words, heat, f"{o.text} (ITM probability {itm:.3f})")
    print(f"ITM probability {itm:.4f}; wrote {path}")


def chat(o: argparse.Namespace) -> None:
    """Several questions about a picture, each in the light of those before (BLIP-2)."""
    trained = open_checkpoint(o, (), Stage2)
    reader = open_tokenizer(trained.model.config.language)
    for question in o.question:
        demo.check_words(clean_question(question),
                         reader.tokenizer if isinstance(reader, WordPieces) else None)
    image = demo.open_picture(o.picture, trained.image_size)
    for question, answer in blip2_demo.chat(trained, image, o.question):
        print(f"question: {question}\nanswer:   {answer}")


def queries(o: argparse.Namespace) -> None:
    """Where each of BLIP-2's queries looks, and how much they differ."""
    trained = open_checkpoint(o, (), FrozenVision)
    image = demo.open_picture(o.picture, trained.image_size)
    names, heat, rank = blip2_demo.query_attention(trained, image)
    path = make_folder(o.out) / "queries.png"
    demo.draw_attention(path, image, names, heat, "where each query looks")
    print(f"the {len(names)} queries differ in about {rank:.1f} directions (effective rank of "
          f"their last states)\nwrote {path}")


# ---- command line --------------------------------------------------------------------------------

PRINTED = ("score", "ask", "match", "chat")  # what they find is printed, and no file is written


def command_line() -> argparse.ArgumentParser:
    """The commands of the module docstring and their flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, about: str, run, model: bool = True) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        p.set_defaults(run=run)
        if name not in PRINTED:
            p.add_argument("--out", default=f"runs/eval/{name}", action=FileFlag,
                           help=f"folder for what it writes (default runs/eval/{name})")
        if model:
            p.add_argument("--checkpoint", required=True, help="of train.py, or released weights")
            p.add_argument("--vocab", default="", help="vocab.txt, for released weights")
            for part, about in (("vit", "image encoder"), ("text", "text transformer")):
                p.add_argument(f"--{part}-heads", type=at_least(0), default=0,
                               help=f"attention heads of the {about}, for released weights of an "
                               "unusual width")
            p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        return p

    for benchmark in BENCHMARKS.values():
        p = add(benchmark.name, benchmark.about,
                lambda o: run_benchmark(o, BENCHMARKS[o.command]))
        add_benchmark_flags(p, benchmark)
    p = add("score", "score captions from anywhere; prints one json object", score, model=False)
    p.add_argument("--predictions", required=True, help="list of {image or image_id, caption}")
    p.add_argument("--references", required=True, help="list of {image or image_id, caption: []}")
    p.add_argument("--subset", action="store_true",
                   help="allow references without a prediction: leave them out")
    p = add("describe", "captions, and samples with their log-likelihoods", describe)
    p.add_argument("picture", nargs="+", help="picture or folder")
    p.add_argument("--captions", type=at_least(1, 100), default=1,
                   help="by beam search (default 1)")
    p.add_argument("--samples", type=at_least(0), default=3, help="by nucleus sampling (default 3)")
    add_flags(p, Decoding, {}, skip=("method",))
    p = add("ask", "an answer to a question about a picture", ask)
    p.add_argument("picture")
    p.add_argument("question")
    p.add_argument("--generate", action="store_true", help="answer freely, rank nothing")
    p = add("search", "the pictures of a folder that fit a text best", search)
    p.add_argument("text")
    p.add_argument("--images", nargs="+", required=True, help="folder or pictures")
    p.add_argument("--top-k", type=at_least(1), default=10, help="how many (default 10)")
    p = add("match", "ITC similarity and ITM probability of a picture and a text", match)
    p.add_argument("picture")
    p.add_argument("text")
    p = add("attend", "where cross-attention looks, word by word", attend)
    p.add_argument("picture")
    p.add_argument("text")
    p.add_argument("--layer", type=at_least(0), default=0,
                   help="cross-attention layer, 1 is the first (default: two thirds of the depth)")
    p = add("chat", "BLIP-2: questions about a picture, one after the other", chat)
    p.add_argument("picture")
    p.add_argument("question", nargs="+", help="in quotes, one or several")
    p = add("queries", "BLIP-2: where each query looks", queries)
    p.add_argument("picture")
    return parser


def add_benchmark_flags(p: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    """The flags that all benchmarks have, and the benchmark's own."""
    world = ("required: the world has none of it" if benchmark.needs_data
             else f"default: {benchmark.size} held-out items of the picture world")
    p.add_argument("--data", default="", action=FileFlag, help=f"json files ({world})")
    p.add_argument("--image-root", default="", action=FileFlag,
                   help="default: the folder of the json")
    p.add_argument("--split", default="test", help="of a Karpathy file (default test)")
    p.add_argument("--size", type=at_least(0), default=0,
                   help="only the first items, this many (default all)")
    for name in benchmark.flags:
        if name == "decoding":
            add_flags(p, Decoding, benchmark.defaults)
        else:
            options = dict(FLAGS[name])
            if name in benchmark.defaults:
                options["default"] = benchmark.defaults[name]
                options["help"] += f" (default {benchmark.defaults[name]})"
            p.add_argument("--" + name.replace("_", "-"), **options)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    o = command_line().parse_args(arguments)
    return exit_status(lambda: o.run(o))


if __name__ == "__main__":
    sys.exit(main())
