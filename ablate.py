"""The paper's tables in miniature: each cell is a model, trained in the built-in world, judged on
held-out scenes with clean texts.

    python ablate.py table1                 neither / filter / captioner / both
    python ablate.py table2                 nucleus sampling against beam search
    python ablate.py table3                 what encoder and decoder share
    python ablate.py table4                 captioner and filter in one model, or two
    python ablate.py table12                longer on the noisy texts
    python ablate.py table13                go on with the old model, or start a new one
    python ablate.py losses                 each part of the objective switched off
    python ablate.py all --seeds 3 --jobs 2

The world's web set is noisy and its human set small and clean, as for `python capfilt.py`. Every
model and every set is made once, kept under --out in a folder named by all that it is made of, and
used again by every table that needs it; an interrupted training goes on where it stopped. A table
is written to --results as json and markdown: mean and spread over seeds, the paper's numbers
beside them, whether the paper's order came out, and a paired test.

To add an experiment, add one entry to EXPERIMENTS.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import train
from capfilt import CapFiltConfig, bootstrap, open_captioner, open_filter
from data.files import read_json, whole_file, write_json
from data.sources import PairIndex, with_shares
from reports.tables import cell_table, set_lines, verdict_table, verdicts
from tools.judge import MEASURES, judge_in_world
from training import devices
from training.program import exit_status
from training.settings import add_flags, at_least, given_for, training_flags
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


@functools.cache
def digest_of_code() -> str:
    """Of the code that a result may depend on, without comments.

    An edited loss gives another result: its cells are trained again.
    """
    root, content = Path(__file__).parent, hashlib.sha256()
    files = [root / f"{name}.py" for name in ("attention", "vit", "med", "losses", "decoding",
                                              "blip", "config", "train", "capfilt")]
    for room in ("data", "tasks", "training", "world", "objectives", "blip2"):
        files += sorted((root / room).glob("*.py"))
    for path in files:
        content.update(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return content.hexdigest()


class ExperimentCache:
    """One seed's sets and models, each made when it is first asked for.

    Each lies in a folder that is named by what it is made of, code included; two processes that
    want the same one wait for each other.
    """

    def __init__(self, regime: Regime, seed: int, device: str = "cpu"):
        self.regime, self.seed, self.device = regime, seed, torch.device(device)
        self.shared = {"seed": seed, "device": device}

    def make(self, kind: str, ingredients: list, make: Callable[[Path], str]) -> str:
        """make(folder) -> the path of what it made there; called only if that is not finished."""
        made_of = repr([self.seed, ingredients, digest_of_code()])
        name = hashlib.sha256(made_of.encode()).hexdigest()[:10]
        folder = Path(self.regime.out) / f"{kind}-{self.seed}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                write_json(folder / "made_of.json", ingredients)
                path = make(folder)
                with whole_file(folder / "done") as file:
                    file.write(path)
        return (folder / "done").read_text()

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

    def finetune(self, task: str, **given) -> str:
        """The model of the raw texts finetuned on the human ones -> its checkpoint.

        task: caption, retrieval, or pretrain for all three objectives.
        """
        return self.train("finetune", self.regime.finetune | {
            "task": task, "init": self.pretrain(self.raw()),
            "data": str(self.data() / "human.json")} | given)

    def bootstrap(self, captioner: str, filter: str, **decoding) -> Path:
        """Folder of a bootstrapped set."""
        config = CapFiltConfig()
        def make(folder: Path) -> str:
            web, human = (PairIndex.open(path, self.data(), folder / "index")
                          for path in self.raw())
            report = bootstrap(web, human, [open_captioner(captioner, decoding, self.device)],
                               [open_filter(filter, {}, self.device)], config, folder, self.seed)
            truth = truth_of_set(folder, self.regime.world.web(self.seed))
            report.pop("examples")
            write_json(folder / "report.json", report | truth)
            return str(folder)
        return Path(self.make("set", [captioner, filter, repr(config), decoding], make))

    def capfilt(self, **decoding) -> Path:
        """The bootstrapped set of a captioner and a filter that were finetuned separately."""
        return self.bootstrap(self.finetune("caption"), self.finetune("retrieval"), **decoding)

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
        """`python train.py` with more settings, on the world's clean texts -> its checkpoint."""
        return self.train("clean", self.regime.losses | given)


# ---- the tables ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Experiment:
    """A table: its cells, the paper's numbers and the order that the paper found."""

    title: str
    cells: dict[str, Callable[[ExperimentCache], str]]  # name -> how its model is made
    # cell -> COCO text-to-image R@1, image-to-text R@1 (finetuned), COCO CIDEr
    paper: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    claims: tuple[tuple[str, str], ...] = ()  # (better, worse)
    judged: tuple[str, ...] = tuple(MEASURES)  # the measures for which the paper has this order
    # cell -> its bootstrapped set, of which the rates are shown
    sets: dict[str, Callable[[ExperimentCache], Path]] = field(default_factory=dict)

    def measures(self) -> dict[str, str]:
        """What the claims are judged by: name -> in words."""
        return {name: MEASURES[name] for name in self.judged}


NEITHER, BOTH = (60.7, 78.4, 127.8), (63.1, 80.6, 129.7)


def both(cache: ExperimentCache, times: int = 1, **decoding) -> str:
    """CapFilt as the paper has it: a new model on human, kept web and kept synthetic texts."""
    return cache.pretrain(cache.texts(cache.capfilt(**decoding), "kept", "kept"), times)


def shared_set(cache: ExperimentCache) -> Path:
    """Bootstrapped by one model that was finetuned on all objectives and does both jobs."""
    one = cache.finetune("pretrain", lm_only_steps=0, lr=5e-4)
    return cache.bootstrap(one, one)


def sharing(share: str) -> Callable[[ExperimentCache], str]:
    """The cell of a row of Table 3."""
    return lambda cache: cache.pretrain(cache.raw(), share=share)


def without(**given) -> Callable[[ExperimentCache], str]:
    """The cell of `losses` with these settings."""
    return lambda cache: cache.clean(**given)


PARTS = {"ITC": dict(itc_weight=0.0), "ITM": dict(itm_weight=0.0), "LM": dict(lm_weight=0.0),
         "momentum distillation": dict(alpha=0.0), "queue": dict(queue_size=0),
         "hard negatives": dict(hard_negatives=False)}

EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: captioner and filter",
        {"neither": lambda cache: cache.pretrain(cache.raw()),
         "filter": lambda cache: cache.pretrain(cache.texts(cache.capfilt(), "kept", "none")),
         "captioner": lambda cache: cache.pretrain(cache.texts(cache.capfilt(), "all", "all")),
         "both": both},
        {"neither": NEITHER, "filter": (61.5, 79.1, 128.2), "captioner": (62.0, 79.7, 128.9),
         "both": BOTH},
        (("filter", "neither"), ("captioner", "neither"), ("captioner", "filter"),
         ("both", "filter"), ("both", "captioner")),
        {"both": ExperimentCache.capfilt}),
    "table2": Experiment(
        "Table 2: how the synthetic texts are generated",
        {"none": lambda cache: cache.pretrain(cache.raw()),
         "beam": lambda cache: both(cache, method="beam"), "nucleus": both},
        {"none": NEITHER, "beam": (61.9, 79.6, 128.9), "nucleus": BOTH},
        (("beam", "none"), ("nucleus", "beam")),
        {"beam": lambda cache: cache.capfilt(method="beam"), "nucleus": ExperimentCache.capfilt}),
    "table3": Experiment(
        "Table 3: what text encoder and decoder share (on the raw texts)",
        {"all": sharing("all"), "all but CA": sharing("all_but_ca"),
         "all but SA": sharing("all_but_sa"), "none": sharing("none")},
        {"all": (59.5, 77.3, 125.9), "all but CA": (59.9, 77.5, 126.1), "all but SA": NEITHER,
         "none": (60.5, 78.3, 127.4)},
        (("all but SA", "all"), ("all but SA", "all but CA"), ("all but SA", "none"))),
    "table4": Experiment(
        "Table 4: captioner and filter in one model, or in two",
        {"one model": lambda cache: cache.pretrain(cache.texts(shared_set(cache), "kept", "kept")),
         "two models": both},
        {"one model": (62.2, 79.8, 129.0), "two models": BOTH},
        (("two models", "one model"),),
        {"one model": shared_set, "two models": ExperimentCache.capfilt}),
    "table12": Experiment(
        "Table 12: longer on the noisy texts",
        {"raw": lambda cache: cache.pretrain(cache.raw()),
         "raw, twice the steps": lambda cache: cache.pretrain(cache.raw(), times=2),
         "CapFilt": both,
         "CapFilt, twice the steps": lambda cache: both(cache, times=2)},  # not in the paper
        {"raw": NEITHER, "raw, twice the steps": (60.5, 78.3, 127.7), "CapFilt": BOTH},
        (("CapFilt", "raw"), ("CapFilt", "raw, twice the steps"),
         ("CapFilt, twice the steps", "raw, twice the steps"))),
    "table13": Experiment(
        "Table 13: go on with the old model, or start a new one",
        {"continue": lambda cache: cache.pretrain(cache.texts(cache.capfilt(), "kept", "kept"),
                                                  init=cache.pretrain(cache.raw())),
         "new model": both},
        {"continue": (63.0, 80.6, 129.9), "new model": BOTH},
        # In the paper TR@1 is equal, and CIDEr in the other order.
        (("new model", "continue"),), judged=("t2i_r1", "t2i_r1_rerank")),
    "losses": Experiment(
        "Each part of the objective switched off (on clean texts; not in the paper)",
        {"all": without(), **{f"without {name}": without(**given)
                              for name, given in PARTS.items()}},
        claims=tuple(("all", f"without {name}") for name in PARTS)),
}


# ---- running cells -------------------------------------------------------------------------------

def run_cell(regime: Regime, name: str, cell: str, seed: int, device: str,
             threads: int) -> dict:
    """One cell with one seed -> its numbers. What its trainings print goes to a file."""
    torch.set_num_threads(threads)
    cache = ExperimentCache(regime, seed, device)
    log = Path(regime.out) / f"{name}-{cell}-{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        experiment = EXPERIMENTS[name]
        checkpoint = experiment.cells[cell](cache)
        world_numbers = Path(checkpoint).with_name("world.json")
        if not world_numbers.exists():
            write_json(world_numbers, judge_in_world(checkpoint, cache.device,
                                                     regime.world.held_out))
        judged = read_json(world_numbers)
        numbers = {measure: judged[measure] for measure in MEASURES}
        numbers["minutes"] = read_json(Path(checkpoint).with_name("metrics.json"))["train_minutes"]
        if cell in experiment.sets:
            report = read_json(experiment.sets[cell](cache) / "report.json")
            numbers["set"] = {k: v for k, v in report.items() if k != "image_root"}
    return numbers


def end_with(parent: int) -> None:
    """Called in a new worker: it ends when its parent has been killed.

    Else it would go on alone with what nobody waits for.
    """
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def run_all(regime: Regime, names: list[str], seeds: list[int], device: str,
            jobs: int) -> Iterator[tuple[str, dict[str, list[dict]]]]:
    """Yield (experiment, {cell: [numbers of each seed]}) as each is complete.

    Cells that share their first stages follow one another, seeds side by side.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        running = {name: {cell: [pool.submit(run_cell, regime, name, cell, seed, device, threads)
                                 for seed in seeds] for cell in EXPERIMENTS[name].cells}
                   for name in names}
        total = sum(len(EXPERIMENTS[name].cells) for name in names) * len(seeds)
        try:
            with tqdm(total=total, desc="cells", unit="cell") as bar:
                for name, cells in running.items():
                    numbers = {}
                    for cell, futures in cells.items():
                        numbers[cell] = []
                        for future in futures:
                            numbers[cell].append(future.result())
                            bar.update()
                    yield name, numbers
        except BaseException:  # an interrupt too: what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- what came out -------------------------------------------------------------------------------

def markdown(experiment: Experiment, cells: dict[str, list[dict]], command: str,
             regime: Regime, seeds: list[int]) -> str:
    """A table with mean and standard deviation over seeds, and the verdicts."""
    order = "the paper's order" if experiment.paper else "expected order"
    lines = [f"# {experiment.title}", "", f"`{command}`", "",
             f"In the built-in world, {len(seeds)} seed{'s' * (len(seeds) > 1)} "
             f"({', '.join(map(str, seeds))}): mean ± standard deviation, percent, on "
             f"{regime.world.held_out} held-out scenes with clean texts, straight after "
             f"pretraining. {machine()}.", "", *cell_table(cells, MEASURES, experiment.paper)]
    for cell in experiment.sets:
        lines += set_lines(cell, cells[cell])
    lines += ["", *verdict_table(experiment.claims, experiment.measures(), cells, order), "",
              "Is the first better than the second? The difference of the means in points. yes, "
              "no: paired t-test over seeds, two-sided, p below 0.05, not corrected for the number "
              "of tests. tie: p is 0.05 or more; in brackets the smallest difference that this "
              "test could have detected. a look: one seed, no verdict.", ""]
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    name = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


# ---- command line --------------------------------------------------------------------------------

def command_line() -> argparse.ArgumentParser:
    """The experiments and the flags of the regime."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiments", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="EXPERIMENT",
                   help=f"{', '.join(EXPERIMENTS)} or all")
    p.add_argument("--seeds", type=at_least(1), default=3, help="how many (default 3)")
    p.add_argument("--jobs", type=at_least(1), default=1,
                   help="cells at a time (default 1); on a CPU one for each core is fastest")
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: cuda if there is one, "
                   "else cpu)")
    p.add_argument("--out", default="runs/ablate", help="default runs/ablate")
    p.add_argument("--results", default="results", help="folder for the tables (default results)")
    p.add_argument("--pairs", type=at_least(1), default=WORLD_PAIRS,
                   help=f"pairs that every pretraining sees (default {WORLD_PAIRS})")
    for flag, recipe, about in (("--pretrain", WORLD_PRETRAIN, "every pretraining"),
                                ("--finetune", WORLD_FINETUNE, "every finetuning"),
                                ("--losses", WORLD_RECIPE, "the experiment `losses`")):
        p.add_argument(flag, default=recipe, type=training_flags, metavar="FLAGS",
                       help=f"of train.py for {about} (default {recipe})")
    add_flags(p.add_argument_group("the built-in world"), WorldSets, {})
    return p


def run(o: argparse.Namespace, command: str) -> None:
    """Make the tables that the command line asks for."""
    regime = Regime(str(Path(o.out).resolve()), WorldSets(**given_for(WorldSets, vars(o))), o.pairs,
                    o.pretrain, o.finetune, o.losses)
    names = list(EXPERIMENTS) if "all" in o.experiments else o.experiments
    if o.device:
        devices.start(o.device)  # says what is wrong before anything is trained
    seeds, device = list(range(o.seeds)), o.device or (
        "cuda" if torch.cuda.is_available() else "cpu")
    for name, cells in run_all(regime, names, seeds, device, o.jobs):
        text = markdown(EXPERIMENTS[name], cells, command, regime, seeds)
        Path(o.results).mkdir(parents=True, exist_ok=True)
        with whole_file(Path(o.results) / f"{name}.md") as file:
            file.write(text)
        write_json(Path(o.results) / f"{name}.json", {
            "command": command, "machine": machine(), "seeds": seeds, "cells": cells,
            "verdicts": verdicts(EXPERIMENTS[name].claims, EXPERIMENTS[name].measures(), cells)})
        print(f"{text}\nwrote {o.results}/{name}.md, {name}.json", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "ablate.py", *arguments])
    return exit_status(lambda: run(command_line().parse_args(arguments), command),
                       "interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
