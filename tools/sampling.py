"""How a captioner writes: how true, how varied, and what a filter makes of it (BLIP sec. 4.3).

    python -m tools.sampling --captioner runs/capfilt/captioner/checkpoint.pt \\
        --filter runs/capfilt/filter/checkpoint.pt --out runs/sampling

For beam search and for nucleus sampling with several p, k and temperatures, on held-out scenes of
the picture world: how many captions are wholly true, how varied the wording is (distinct-4 of Li
et al. 2016: of all sequences of 4 words the share that are different), how many captions the filter
rejects, and how many of the kept ones are true. Several captioners, each with its filter, are seeds
of one experiment: mean and spread. --name keeps several experiments side by side in one json.
Writes OUT.json, OUT.md and OUT.png.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from capfilt import itm_scores, open_captioner
from data.files import InputError, make_folder, read_json, whole_file, write_json
from data.images import prepare_images
from reports.metrics import mean, ngrams, tokenise
from reports.statistics import mean_and_spread
from reports.tables import markdown_row
from tasks.captioning import Decoding, write_captions
from tasks.task import TrainedModel
from tools.filter_quality import open_filter
from tools.plots import draw_sampling
from training import devices
from training.program import exit_status
from training.settings import at_least
from world.datasets import World
from world.language import is_true

NUCLEUS = {"method": "nucleus"}
WAYS = {"beam search": {"method": "beam"},
        **{f"p {p}": NUCLEUS | {"top_p": p} for p in (0.8, 0.85, 0.9, 0.95, 1.0)},
        "p 0.9, k 5": NUCLEUS | {"top_p": 0.9, "top_k": 5},
        "p 0.9, k 50": NUCLEUS | {"top_p": 0.9, "top_k": 50},
        "p 0.9, temperature 0.7": NUCLEUS | {"top_p": 0.9, "temperature": 0.7}}
MEASURES = {"true": "wholly true", "distinct": "distinct-4", "rejected": "rejected",
            "kept_true": "true among the kept"}
BATCH = 64


def judge_captions(captions: list[str], scores: list[float], world: World) -> dict[str, float]:
    """MEASURES of one caption for each scene; scores: the filter's probability of a match."""
    true = [is_true(caption, world.scene(i)) for i, caption in enumerate(captions)]
    kept = [score >= 0.5 for score in scores]
    sequences = [sequence for caption in captions for sequence in ngrams(tokenise(caption), 4)]
    kept_true = [t for t, k in zip(true, kept) if k]
    return {"true": mean(true), "distinct": len(set(sequences)) / max(len(sequences), 1),
            "rejected": 1 - mean(kept), "kept_true": mean(kept_true)}


@torch.no_grad()
def judge_captioner(checkpoint: str, filter: TrainedModel, size: int,
                    device: torch.device) -> dict[str, dict[str, float]]:
    """MEASURES of one captioner for each way to decode, on `size` held-out scenes."""
    trained = open_captioner(checkpoint, {}, device).trained
    world, numbers = World("held-out", size, trained.image_size), {}
    pictures = torch.stack([world.picture(i) for i in range(size)])
    for name, way in tqdm(WAYS.items(), desc="ways to decode"):
        decoding, captions, scores = Decoding.choose(way, trained.settings), [], []
        for batch in pictures.split(BATCH):
            images = prepare_images(batch, device)
            written = write_captions(trained.model, trained.tokenizer, images, decoding)
            texts = [[of_image[0][0]] for of_image in written]
            captions += [text for text, in texts]
            scores += [score for score, in itm_scores(filter, images, texts)]
        numbers[name] = judge_captions(captions, scores, world)
    return numbers


def table(experiments: dict[str, dict[str, list[dict]]], about: str) -> str:
    """Markdown of all experiments: mean and spread over seeds, percent."""
    lines = ["# How captions are sampled: truth and variety", "", about, ""]
    for name, ways in experiments.items():
        seeds = len(next(iter(ways.values())))
        lines += [f"## {name}", "", f"{seeds} seed{'s' * (seeds > 1)}, percent.", "",
                  markdown_row(["", *MEASURES.values()]), "|---" * (len(MEASURES) + 1) + "|"]
        lines += [markdown_row([way, *(mean_and_spread([row[measure] for row in rows])
                                       for measure in MEASURES)]) for way, rows in ways.items()]
        lines.append("")
    return "\n".join(lines)


def is_ours(experiments) -> bool:
    """Whether what a file holds is {experiment: {way to decode: its MEASURES, seed by seed}}."""
    try:
        return all(row.keys() >= MEASURES.keys() for ways in experiments.values()
                   for rows in ways.values() for row in rows)
    except (AttributeError, TypeError):
        return False


def run(o: argparse.Namespace) -> None:
    """Judge each way, and write it beside what is there."""
    if len(o.captioner) != len(o.filter):
        raise InputError(f"{len(o.captioner)} captioners and {len(o.filter)} filters; give each "
                         "captioner its filter, in the same order")
    device, path = devices.start(o.device), Path(f"{o.out}.json")
    make_folder(path.parent)
    experiments = read_json(path) if path.exists() else {}
    if not is_ours(experiments):
        raise InputError(f"{path} is not a file of this program; give another --out")
    seeds = [judge_captioner(captioner, open_filter(filter, device), o.size, device)
             for captioner, filter in zip(o.captioner, o.filter)]
    experiments[o.name] = {way: [of_seed[way] for of_seed in seeds] for way in WAYS}
    write_json(path, experiments)
    text = table(experiments, "`python -m tools.sampling --captioner C.pt --filter F.pt "
                              f"--size {o.size} --out {o.out}` for each experiment; one checkpoint "
                              "of each for every seed. Held-out scenes of the picture world, one "
                              "caption each. The filter rejects what it gives less than 0.5.")
    with whole_file(path.with_suffix(".md")) as file:
        file.write(text)
    draw_sampling(path.with_suffix(".png"), experiments)
    print(f"{text}\nwrote {o.out}.json, .md, .png")


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--captioner", nargs="+", required=True, metavar="C.pt", help="checkpoints")
    p.add_argument("--filter", nargs="+", required=True, metavar="F.pt", help="one for each")
    p.add_argument("--name", default="the captioner of capfilt.py", help="of this experiment")
    p.add_argument("--size", type=at_least(2), default=1000, help="held-out scenes, default 1000")
    p.add_argument("--device", default="auto", help="default auto")
    p.add_argument("--out", default="runs/sampling", help="default runs/sampling")
    return exit_status(lambda: run(p.parse_args(arguments)), "interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
