"""The papers' tables in miniature: each cell is a model, trained in the picture world, judged on
held-out scenes with clean texts.

    python ablate.py table1                 neither / filter / captioner / both
    python ablate.py table2                 nucleus sampling against beam search
    python ablate.py table3                 what encoder and decoder share
    python ablate.py table4                 captioner and filter in one model, or two
    python ablate.py table12                longer on the noisy texts
    python ablate.py table13                go on with the old model, or start a new one
    python ablate.py losses                 each part of the objective set aside; on clean texts
    python ablate.py losses-noisy           the same on noisy texts
    python ablate.py distillation           CapFilt against momentum distillation
    python ablate.py noise                  CapFilt as the web gets noisier
    python ablate.py web                    CapFilt on larger web sets
    python ablate.py models                 larger captioner and filter, larger model
    python ablate.py recipes                CLIP's, SigLIP's, ALBEF's and SimVLM's losses
    python ablate.py recipes-vqa            questions, finetuned from each of these models
    python ablate.py rounds                 CapFilt again, with the model that it gave
    python ablate.py captions               several synthetic captions an image
    python ablate.py ensembles              two captioners, two filters
    python ablate.py losses --cells "all" "without ITM"
    python ablate.py blip2-figure5          BLIP-2: stage 2 with and without stage 1
    python ablate.py blip2-figure5-t5       the same for an encoder-decoder
    python ablate.py blip2-table6           stage 1 with and without ITG
    python ablate.py blip2-sizes            smaller language model, smaller image encoder
    python ablate.py blip2-queries          8, 16 or 32 queries
    python ablate.py blip2-share            a Q-Former of 1, 2 or 3 layers
    python ablate.py blip2-blip             BLIP against BLIP-2
    python ablate.py all --seeds 3 --jobs 2

The world's web set is noisy and its human set small and clean, as for `python capfilt.py`. Every
model and every set is made once, kept under --out in a folder named by all that it is made of, and
used again by every table that needs it; an interrupted training goes on where it stopped. A table
is written to --results as json and markdown: mean and spread over seeds, the paper's numbers
beside them, whether the paper's order came out, and a paired test.

The experiments are in tools/: experiments.py has the tables of the paper, experiments_claims.py
what it claims without a table and what it leaves to future work, experiments_blip2.py the second
paper.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import train
from capfilt import CapFiltConfig, bootstrap, open_captioner
from data.files import InputError, make_folder, read_json, whole_file, write_json
from data.sources import PairIndex, with_shares
from reports.tables import (
    cell_table,
    parameter_table,
    set_table,
    set_verdict_table,
    verdict_table,
    verdicts,
)
from tasks.registry import TASKS
from tools.experiments import BLIP_EXPERIMENTS, Experiment
from tools.experiments_blip2 import BLIP2_EXPERIMENTS
from tools.experiments_claims import CLAIM_EXPERIMENTS
from tools.filter_quality import open_filter
from tools.judge import judge_in_world, trained_share
from tools.workers import end_with, unless_stopped
from training import devices
from training.checkpoints import open_model
from training.code import digest_of_code
from training.program import exit_status
from training.settings import (
    FileFlag,
    add_flags,
    at_least,
    given_for,
    training_flags,
    unread_settings,
)
from world.web import (
    WORLD_FINETUNE,
    WORLD_PAIRS,
    WORLD_PRETRAIN,
    WORLD_RECIPE,
    WorldSets,
    truth_of_set,
)

try:
    import fcntl
except ImportError:  # Windows: there, one job at a time
    fcntl = None


@dataclass(frozen=True)
class Regime:
    """What all cells have in common."""

    out: str
    world: WorldSets
    pairs: int  # pairs that every pretraining sees
    pretrain: dict  # settings of every pretraining
    finetune: dict  # settings of every finetuning
    losses: dict  # settings of the experiment `losses`, which runs on clean texts


def of_other_code(a: dict, b: dict) -> bool:
    """Whether two folders are made of the same by other code. (Their names hold it as well.)"""
    first, second = (re.sub(r"-[0-9a-f]{10}\b", "", json.dumps(made_of["of"]))
                     for made_of in (a, b))
    return first == second and a["code"] != b["code"]


class ExperimentCache:
    """One seed's sets and models, each made when it is first asked for.

    Each lies in a folder that is named by what it is made of, code included; two processes that
    want the same one wait for each other.
    """

    def __init__(self, regime: Regime, seed: int, device: str = "cpu"):
        self.regime, self.seed, self.device = regime, seed, torch.device(device)
        self.shared = {"seed": seed, "device": device}
        self.made_again: list[str] = []  # what was there, but of other code

    def make(self, kind: str, ingredients: list, make: Callable[[Path], str]) -> str:
        """make(folder) -> the path of what it made there; called only if that is not finished."""
        made_of = {"of": ingredients, "code": digest_of_code()}
        name = hashlib.sha256(repr([self.seed, *made_of.values()]).encode()).hexdigest()[:10]
        folder = Path(self.regime.out) / f"{kind}-{self.seed}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                for earlier in sorted(folder.parent.glob(f"{kind}-{self.seed}-*/recipe.json")):
                    if earlier.parent != folder and of_other_code(read_json(earlier), made_of):
                        self.made_again.append(f"{folder.name} is made anew: "
                                               f"{earlier.parent.name} is of other code")
                        break
                write_json(folder / "recipe.json", made_of)
                path = make(folder)
                with whole_file(folder / "done") as file:
                    file.write(path)
        return (folder / "done").read_text(encoding="utf-8")

    def with_world(self, **web) -> "ExperimentCache":
        """The same in a world with other web texts; web: fields of WorldSets."""
        regime = replace(self.regime, world=replace(self.regime.world, **web))
        return self.beside(ExperimentCache(regime, self.seed, str(self.device)))

    def with_seed(self, seed: int) -> "ExperimentCache":
        """What all seeds of a table have in common is made with one of them."""
        return self.beside(ExperimentCache(self.regime, seed, str(self.device)))

    def beside(self, other: "ExperimentCache") -> "ExperimentCache":
        """The other one, which adds what is made again to the same list."""
        other.made_again = self.made_again
        return other

    def train(self, kind: str, given: dict, *more) -> str:
        """A model trained with these settings -> its checkpoint. `more` it is made of as well."""
        given = self.shared | given
        return self.make(kind, [given, *more],
                         lambda folder: train.train_into(folder / "run", given))

    def data(self) -> Path:
        """Folder with web.json, human.json, vocab.txt."""
        world = self.regime.world
        def save(folder: Path) -> str:
            world.save(folder, self.seed)
            return str(folder)
        return Path(self.make("data", [repr(world)], save))

    def pretrain(self, sources: list[str], times: int = 1, **given) -> str:
        """A model pretrained on json lists, `times` as long as the others -> its checkpoint.

        Images are relative to the data's folder.
        """
        data, pairs = self.data(), self.regime.pairs * times
        mixture = with_shares(sources, str(data), Path(self.regime.out) / "index", pairs)
        return self.train("pretrain", self.regime.pretrain | {
            "data": mixture, "image_root": str(data), "vocab": str(data / "vocab.txt")} | given)

    def raw(self) -> list[str]:
        """The web texts as they are, and the human ones."""
        return [str(self.data() / "web.json"), str(self.data() / "human.json")]

    def finetune(self, task: str, init: str = "", **given) -> str:
        """A model (the one of the raw texts) finetuned on the human ones -> its checkpoint.

        task: caption, retrieval, or pretrain for all three objectives.
        """
        return self.train("finetune", self.regime.finetune | {
            "task": task, "init": init or self.pretrain(self.raw()),
            "data": str(self.data() / "human.json")} | given)

    def bootstrap(self, captioners: list[str], filters: list[str], settings: dict | None = None,
                  **decoding) -> Path:
        """Folder of a bootstrapped set; settings: of CapFiltConfig."""
        config = CapFiltConfig(**settings or {})
        def make(folder: Path) -> str:
            web, human = (PairIndex.open(path, self.data(), folder / "index")
                          for path in self.raw())
            report = bootstrap(
                web, human, [open_captioner(path, decoding, self.device) for path in captioners],
                [open_filter(path, self.device) for path in filters], config, folder, self.seed)
            truth = truth_of_set(folder, self.regime.world.web(self.seed))
            report.pop("examples")
            write_json(folder / "report.json", report | truth)
            return str(folder)
        return Path(self.make("set", [captioners, filters, repr(config), decoding], make))

    def capfilt(self, settings: dict | None = None, init: str = "", **decoding) -> Path:
        """The bootstrapped set of a captioner and a filter that were finetuned separately.

        Both start from `init` (the model of the raw texts).
        """
        return self.bootstrap([self.finetune("caption", init)], [self.finetune("retrieval", init)],
                              settings, **decoding)

    def texts(self, folder: Path, web: str, synthetic: str) -> list[str]:
        """The human texts, and those of a bootstrapped set -> a json list.

        web, synthetic: "none", the "kept" or "all" texts of that source.
        """
        def make(place: Path) -> str:
            kept = read_json(folder / "bootstrapped.json")
            choice = {"none": [], "kept": kept, "all": kept + read_json(folder / "rejected.json")}
            records = [record for record in kept if record["source"] == "human"]
            for source, which in (("web", web), ("synthetic", synthetic)):
                records += [record for record in choice[which] if record["source"] == source]
            write_json(place / "texts.json", records, indent=None)
            return str(place / "texts.json")
        return [self.make("texts", [str(folder), web, synthetic], make)]

    def clean(self, **given) -> str:
        """`python train.py` with more settings, on the world's clean texts -> its checkpoint.

        Of --losses, which is for all cells of a table, it takes what its task reads.
        """
        unread = unread_settings(TASKS[given.get("task", "pretrain")])
        shared = {name: value for name, value in self.regime.losses.items() if name not in unread}
        size = {"eval_size": self.regime.world.held_out}
        return self.train("clean", shared | size | given)


EXPERIMENTS = BLIP_EXPERIMENTS | CLAIM_EXPERIMENTS | BLIP2_EXPERIMENTS


def set_numbers(folder: Path) -> dict:
    """A bootstrapped set's report, and of each source the shares of rejected, distinct texts."""
    numbers = read_json(folder / "report.json")
    numbers.pop("image_root")
    records = [record for name in ("bootstrapped", "rejected")
               for record in read_json(folder / f"{name}.json")]
    for source in ("web", "synthetic"):
        texts = [record["caption"] for record in records if record["source"] == source]
        numbers[f"{source}_reject_rate"] = 1 - numbers[f"{source}_kept_rate"]
        numbers[f"{source}_distinct"] = len(set(texts)) / max(len(texts), 1)
    return numbers


# ---- running cells -------------------------------------------------------------------------------

def run_cell(regime: Regime, name: str, cell: str, seed: int, device: str,
             threads: int) -> tuple[dict, list[str]]:
    """One cell with one seed -> its numbers, and what was made again because the code changed.

    What its trainings print goes to a file.
    """
    torch.set_num_threads(threads)
    cache = ExperimentCache(regime, seed, device)
    log = Path(regime.out) / f"{name}-{cell}-{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        experiment = EXPERIMENTS[name]
        checkpoint = experiment.cells[cell](cache)
        judged = evaluated = read_json(Path(checkpoint).with_name("metrics.json"))
        if not experiment.evaluated:
            world_numbers = Path(checkpoint).with_name("world.json")
            if not world_numbers.exists():
                write_json(world_numbers, judge_in_world(checkpoint, cache.device,
                                                         regime.world.held_out))
            judged = read_json(world_numbers)
        numbers = {measure: judged[measure] for measure in experiment.measures if measure in judged}
        numbers["minutes"] = evaluated["train_minutes"]
        if "trained_share" in experiment.measures:
            numbers["trained_share"] = trained_share(checkpoint)
        if experiment.paper_parameters:  # without the twins
            model = open_model(checkpoint, device=cache.device).model
            numbers["parameters"] = sum(p.numel() for p in model.parameters())
        if cell in experiment.sets:
            numbers["set"] = set_numbers(experiment.sets[cell](cache))
    return numbers, cache.made_again


def run_all(regime: Regime, experiments: dict[str, Experiment], seeds: list[int], device: str,
            jobs: int) -> Iterator[tuple[str, dict[str, list[dict]]]]:
    """Yield (experiment, {cell: [numbers of each seed]}) as each is complete.

    Cells that share their first stages follow one another, seeds side by side.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        running = {name: {cell: [pool.submit(unless_stopped, run_cell, regime, name, cell, seed,
                                             device, threads)
                                 for seed in seeds] for cell in experiment.cells}
                   for name, experiment in experiments.items()}
        total = sum(len(cells) for cells in running.values()) * len(seeds)
        try:
            with tqdm(total=total, desc="cells", unit="cell") as bar:
                for name, cells in running.items():
                    numbers = {}
                    for cell, futures in cells.items():
                        numbers[cell] = []
                        for future in futures:
                            of_seed, made_again = future.result()
                            numbers[cell].append(of_seed)
                            for line in made_again:
                                bar.write(line)
                            bar.update()
                    yield name, numbers
        except BaseException:  # an interrupt too: what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- what came out -------------------------------------------------------------------------------

def markdown(experiment: Experiment, cells: dict[str, list[dict]], command: str,
             regime: Regime, seeds: list[int], device: str = "cpu") -> str:
    """A table with mean and standard deviation over seeds, and the verdicts."""
    order = "the paper's order" if experiment.paper else "expected order"
    lines = [f"# {experiment.title}", "", f"`{command}`", "",
             f"In the picture world, {len(seeds)} seed{'s' * (len(seeds) > 1)} "
             f"({', '.join(map(str, seeds))}): mean ± standard deviation, percent, on "
             f"{regime.world.held_out} held-out scenes with clean texts, straight after "
             f"{'' if experiment.evaluated else 'pre'}training. {devices.machine(device)}.", "",
             *cell_table(cells, experiment.measures, experiment.paper)]
    if experiment.paper_parameters:
        lines += ["", *parameter_table(cells, experiment.paper_parameters)]
    if experiment.sets:
        with_set = {cell: cells[cell] for cell in experiment.sets}
        lines += ["", *set_table(with_set, experiment.paper_rejected),
                  *set_verdict_table(experiment.claims, with_set)]
    lines += ["", *verdict_table(experiment.claims, experiment.judged_by(), cells, order), "",
              "Is the first better than the second? The difference of the means in points. yes, "
              "no: paired t-test over seeds, two-sided, p below 0.05, not corrected for the number "
              "of tests. tie: p is 0.05 or more; in brackets the smallest difference that this "
              "test could have detected. a look: fewer than five seeds, so no verdict; "
              "in brackets p where it is below 0.05, else the smallest difference.", ""]
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------

def command_line() -> argparse.ArgumentParser:
    """The experiments and the flags of the regime."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiments", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="EXPERIMENT",
                   help=f"{', '.join(EXPERIMENTS)} or all")
    p.add_argument("--seeds", type=at_least(1), default=3, help="how many (default 3); a verdict "
                   "needs five")
    p.add_argument("--cells", nargs="+", default=[], metavar="CELL",
                   help="only these cells of a table, each in quotes (default: all)")
    p.add_argument("--jobs", type=at_least(1), default=1,
                   help="cells at a time (default 1); on a CPU one for each core is fastest")
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: cuda if there is one, "
                   "else cpu)")
    p.add_argument("--out", default="runs/ablate", action=FileFlag, help="default runs/ablate")
    p.add_argument("--results", default="results", action=FileFlag,
                   help="folder for the tables (default results)")
    p.add_argument("--pairs", type=at_least(1), default=WORLD_PAIRS,
                   help=f"pairs that every pretraining sees (default {WORLD_PAIRS})")
    for flag, recipe, about in (("--pretrain", WORLD_PRETRAIN, "every pretraining"),
                                ("--finetune", WORLD_FINETUNE, "every finetuning"),
                                ("--losses", WORLD_RECIPE, "the experiment `losses` and BLIP-2's")):
        p.add_argument(flag, default={}, type=training_flags, metavar="FLAGS",
                       help=f"of train.py for {about}, beside {recipe}")
    add_flags(p.add_argument_group("the picture world"), WorldSets, {})
    return p


def run(o: argparse.Namespace, command: str) -> None:
    """Make the tables that the command line asks for."""
    regime = Regime(str(Path(o.out).resolve()), WorldSets(**given_for(WorldSets, vars(o))), o.pairs,
                    WORLD_PRETRAIN | o.pretrain, WORLD_FINETUNE | o.finetune,
                    WORLD_RECIPE | o.losses)
    make_folder(o.out)
    make_folder(o.results, "--results")
    if fcntl is None and o.jobs > 1:
        raise InputError("--jobs: on Windows nothing keeps two cells from training the same "
                         "model; leave it out")
    names = list(EXPERIMENTS) if "all" in o.experiments else o.experiments
    experiments = {name: EXPERIMENTS[name].only(o.cells) for name in names}
    if o.device:
        devices.start(o.device)  # says what is wrong before anything is trained
    seeds, device = list(range(o.seeds)), o.device or (
        "cuda" if torch.cuda.is_available() else "cpu")
    for name, cells in run_all(regime, experiments, seeds, device, o.jobs):
        experiment = experiments[name]
        text = markdown(experiment, cells, command, regime, seeds, device)
        # The whole table is not written over, nor one of other cells or of more seeds.
        file_name = "-".join([name, *(re.sub(r"\W+", "_", cell) for cell in o.cells)])[:120]
        before = Path(o.results) / f"{file_name}.json"
        if before.exists() and len(read_json(before).get("seeds", [])) > o.seeds:
            file_name += f"-seeds_{o.seeds}"
        with whole_file(Path(o.results) / f"{file_name}.md") as file:
            file.write(text)
        write_json(Path(o.results) / f"{file_name}.json", {
            "command": command, "machine": devices.machine(device), "seeds": seeds, "cells": cells,
            "verdicts": verdicts(experiment.claims, experiment.judged_by(), cells)})
        print(f"{text}\nwrote {o.results}/{file_name}.md, {file_name}.json", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "ablate.py", *arguments])
    return exit_status(lambda: run(command_line().parse_args(arguments), command),
                       "interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
