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
import contextlib
import hashlib
import json
import math
import os
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from capfilt import (
    WORLD_FINETUNE,
    WORLD_FLAGS,
    WORLD_PAIRS,
    WORLD_PRETRAIN,
    CapFiltConfig,
    Loop,
    Role,
    capfilt,
    own_fields,
    trained,
)
from config import add_flags
from pairs import Rows, read_json
from report import exit_status
from shards import write_whole
from webworld import MEASURES, WorldSets, judge_in_world, truth

try:
    import fcntl
except ImportError:  # Windows: there, one job at a time
    fcntl = None


@dataclass(frozen=True)
class Settings:
    """What all cells have in common: the regime."""

    out: str
    world: WorldSets
    pairs: int  # pairs that every pretraining sees
    pretrain: str  # flags of every pretraining
    finetune: str  # flags of every finetuning
    losses: str  # flags of the experiment `losses`, which runs on clean texts


class Lab:
    """One seed's sets and models. Each is made when it is first asked for, in a folder named by
    what it is made of; two processes that want the same one wait for each other."""

    def __init__(self, settings: Settings, seed: int, device: str = "cpu"):
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        self.flags = ["--seed", str(seed), "--device", device, *shlex.split(settings.pretrain)]

    def make(self, kind: str, ingredients: list, how: Callable[[Path], str]) -> str:
        """how(folder) -> the path of what it made there, done or gone on with."""
        name = hashlib.sha256(repr([self.seed, ingredients]).encode()).hexdigest()[:10]
        folder = Path(self.settings.out) / f"{kind}-{self.seed}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                write_whole(folder / "made_of.json", [json.dumps(ingredients, indent=1) + "\n"])
                path = how(folder)
                write_whole(folder / "done", [path])
        return (folder / "done").read_text()

    def data(self) -> Path:
        """Folder with web.json, human.json, vocab.txt."""
        world = self.settings.world
        def save(folder):
            world.save(folder, self.seed)
            return str(folder)
        return Path(self.make("data", [repr(world)], save))

    def pretrain(self, sources: list[str], *flags: str, times: int = 1) -> str:
        """A model pretrained on json lists whose images are relative to the data's folder, `times`
        as long as the others -> its checkpoint."""
        data = self.data()
        loop = Loop("", str(data), [*self.flags, "--vocab", str(data / "vocab.txt")],
                    self.settings.pairs * times)
        return self.make("pretrain", [sources, loop.flags, loop.pairs, flags],
                         lambda folder: loop.pretrain(folder / "run", sources, str(data), *flags))

    def raw(self) -> list[str]:
        """The web texts as they are, and the human ones."""
        return [str(self.data() / "web.json"), str(self.data() / "human.json")]

    def finetune(self, task: str, *flags: str) -> str:
        """The model of the raw texts finetuned on the human ones: task caption, retrieval, or
        pretrain for all three objectives -> its checkpoint."""
        data, base = self.data(), self.pretrain(self.raw())
        flags = [task, "--init", base, "--data", str(data / "human.json"), "--seed", str(self.seed),
                 "--device", str(self.device), *shlex.split(self.settings.finetune), *flags]
        return self.make("finetune", flags, lambda folder: trained(folder / "run", *flags))

    def bootstrap(self, captioner: str, filter: str, **decoding) -> Path:
        """Folder of a bootstrapped set."""
        data, config = self.data(), CapFiltConfig()
        def how(folder):
            web, human = (Rows.of(path, data, folder / "index") for path in self.raw())
            roles = [[Role.open(path, task, decoding, self.device)]
                     for task, path in (("caption", captioner), ("retrieval", filter))]
            capfilt(web, human, *roles, config, folder, self.seed)
            found = truth(folder, self.settings.world.web(self.seed))
            report = read_json(folder / "report.json") | found
            write_whole(folder / "report.json", [json.dumps(report, indent=1) + "\n"])
            return str(folder)
        return Path(self.make("set", [captioner, filter, repr(config), decoding], how))

    def capfilt(self, **decoding) -> Path:
        """The bootstrapped set of a captioner and a filter that were finetuned separately."""
        return self.bootstrap(self.finetune("caption"), self.finetune("retrieval"), **decoding)

    def texts(self, folder: Path, web: str, synthetic: str) -> list[str]:
        """The human texts and of a bootstrapped set's web and synthetic texts "none", the "kept" or
        "all" -> a json list."""
        def how(place):
            kept = read_json(folder / "bootstrapped.json")
            choice = {"none": [], "kept": kept, "all": kept + read_json(folder / "rejected.json")}
            records = [r for r in kept if r["source"] == "human"]
            for source, which in (("web", web), ("synthetic", synthetic)):
                records += [r for r in choice[which] if r["source"] == source]
            write_whole(place / "texts.json", [json.dumps(records)])
            return str(place / "texts.json")
        return [self.make("texts", [str(folder), web, synthetic], how)]

    def clean(self, *flags: str) -> str:
        """`python train.py` with more flags: the world's clean texts, worded anew -> its
        checkpoint."""
        flags = ["--seed", str(self.seed), "--device", str(self.device),
                 *shlex.split(self.settings.losses), *flags]
        return self.make("clean", flags, lambda folder: trained(folder / "run", *flags))


# ---- the tables ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Experiment:
    """A table: its cells, the paper's numbers and the order that the paper found."""

    title: str
    cells: dict[str, Callable[[Lab], str]]  # name -> how its model is made
    # cell -> COCO text-to-image R@1, image-to-text R@1 (finetuned), COCO CIDEr
    paper: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    claims: tuple[tuple[str, str], ...] = ()  # (better, worse)
    sets: dict[str, Callable[[Lab], Path]] = field(default_factory=dict)  # rates are shown of these


NEITHER, BOTH = (60.7, 78.4, 127.8), (63.1, 80.6, 129.7)


def both(lab: Lab, times: int = 1, **decoding) -> str:
    """CapFilt as the paper has it: a new model on human, kept web and kept synthetic texts."""
    return lab.pretrain(lab.texts(lab.capfilt(**decoding), "kept", "kept"), times=times)


def shared_set(lab: Lab) -> Path:
    """Bootstrapped by one model that was finetuned on all three objectives, and does both jobs."""
    one = lab.finetune("pretrain", "--lm-only-steps", "0", "--lr", "5e-4")
    return lab.bootstrap(one, one)


EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: captioner and filter",
        {"neither": lambda lab: lab.pretrain(lab.raw()),
         "filter": lambda lab: lab.pretrain(lab.texts(lab.capfilt(), "kept", "none")),
         "captioner": lambda lab: lab.pretrain(lab.texts(lab.capfilt(), "all", "all")),
         "both": both},
        {"neither": NEITHER, "filter": (61.5, 79.1, 128.2), "captioner": (62.0, 79.7, 128.9),
         "both": BOTH},
        (("filter", "neither"), ("captioner", "neither"), ("captioner", "filter"),
         ("both", "filter"), ("both", "captioner")),
        {"both": Lab.capfilt}),
    "table2": Experiment(
        "Table 2: how the synthetic texts are generated",
        {"none": lambda lab: lab.pretrain(lab.raw()), "beam": lambda lab: both(lab, method="beam"),
         "nucleus": both},
        {"none": NEITHER, "beam": (61.9, 79.6, 128.9), "nucleus": BOTH},
        (("beam", "none"), ("nucleus", "beam")),
        {"beam": lambda lab: lab.capfilt(method="beam"), "nucleus": Lab.capfilt}),
    "table3": Experiment(
        "Table 3: what text encoder and decoder share (on the raw texts)",
        {name: lambda lab, share=share: lab.pretrain(lab.raw(), *share) for name, share in (
            ("all", ("--share", "all")), ("all but CA", ("--share", "all_but_ca")),
            ("all but SA", ()), ("none", ("--share", "none")))},
        {"all": (59.5, 77.3, 125.9), "all but CA": (59.9, 77.5, 126.1), "all but SA": NEITHER,
         "none": (60.5, 78.3, 127.4)},
        (("all but SA", "all"), ("all but SA", "all but CA"), ("all but SA", "none"))),
    "table4": Experiment(
        "Table 4: captioner and filter in one model, or in two",
        {"one model": lambda lab: lab.pretrain(lab.texts(shared_set(lab), "kept", "kept")),
         "two models": both},
        {"one model": (62.2, 79.8, 129.0), "two models": BOTH},
        (("two models", "one model"),),
        {"one model": shared_set, "two models": Lab.capfilt}),
    "table12": Experiment(
        "Table 12: longer on the noisy texts",
        {"raw": lambda lab: lab.pretrain(lab.raw()),
         "raw, twice the steps": lambda lab: lab.pretrain(lab.raw(), times=2),
         "CapFilt": both,
         "CapFilt, twice the steps": lambda lab: both(lab, times=2)},  # not in the paper
        {"raw": NEITHER, "raw, twice the steps": (60.5, 78.3, 127.7), "CapFilt": BOTH},
        (("CapFilt", "raw"), ("CapFilt", "raw, twice the steps"),
         ("CapFilt, twice the steps", "raw, twice the steps"))),
    "table13": Experiment(
        "Table 13: go on with the old model, or start a new one",
        {"continue": lambda lab: lab.pretrain(lab.texts(lab.capfilt(), "kept", "kept"), "--init",
                                              lab.pretrain(lab.raw())),
         "new model": both},
        {"continue": (63.0, 80.6, 129.9), "new model": BOTH},
        (("new model", "continue"),)),
    "losses": Experiment(
        "Each part of the objective switched off (on clean texts; not in the paper)",
        {"all": lambda lab: lab.clean(),
         **{f"without {name}": lambda lab, flags=flags: lab.clean(*flags) for name, flags in (
             ("ITC", ("--itc-weight", "0")), ("ITM", ("--itm-weight", "0")),
             ("LM", ("--lm-weight", "0")), ("momentum distillation", ("--alpha", "0")),
             ("queue", ("--queue-size", "0")), ("hard negatives", ("--hard-negatives", "false")))}},
        claims=tuple(("all", f"without {name}") for name in (
            "ITC", "ITM", "LM", "momentum distillation", "queue", "hard negatives"))),
}


# ---- running cells -------------------------------------------------------------------------------

def run_cell(settings: Settings, name: str, cell: str, seed: int, device: str,
             threads: int) -> dict:
    """One cell with one seed -> its numbers. What its trainings print goes to a file."""
    torch.set_num_threads(threads)
    lab, log = Lab(settings, seed, device), Path(settings.out) / f"{name}-{cell}-{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        experiment = EXPERIMENTS[name]
        checkpoint = experiment.cells[cell](lab)
        numbers = judge_in_world(checkpoint, lab.device, settings.world.held_out)
        found = {measure: numbers[measure] for measure in MEASURES}
        found["minutes"] = read_json(Path(checkpoint).with_name("metrics.json"))["train_minutes"]
        if cell in experiment.sets:
            report = read_json(experiment.sets[cell](lab) / "report.json")
            found["set"] = {k: v for k, v in report.items() if k != "image_root"}
    return found


def end_with(parent: int) -> None:
    """Called in a new worker: it ends when its parent has been killed, instead of going on alone
    with what nobody waits for."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def run_all(settings: Settings, names: list[str], seeds: list[int], device: str,
            jobs: int) -> Iterator[tuple[str, dict[str, list[dict]]]]:
    """Yield (experiment, {cell: [numbers of each seed]}) as each is complete. Cells that share
    their first stages follow one another, seeds side by side."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        running = {name: {cell: [pool.submit(run_cell, settings, name, cell, seed, device, threads)
                                 for seed in seeds] for cell in EXPERIMENTS[name].cells}
                   for name in names}
        total = sum(len(EXPERIMENTS[name].cells) for name in names) * len(seeds)
        try:
            with tqdm(total=total, desc="cells", unit="cell") as bar:
                for name, cells in running.items():
                    found = {}
                    for cell, futures in cells.items():
                        found[cell] = []
                        for future in futures:
                            found[cell].append(future.result())
                            bar.update()
                    yield name, found
        except BaseException:  # an interrupt too: what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- what came out -------------------------------------------------------------------------------

def paired_test(differences: list[float]) -> float:
    """Paired t-test: the two-sided probability of so large a mean difference if there were none.
    1.0 for a single seed, which tells nothing."""
    n = len(differences)
    if n < 2:
        return 1.0
    spread = statistics.stdev(differences)
    if spread == 0:
        return 0.0 if differences[0] else 1.0
    t, df = abs(statistics.mean(differences)) / spread * math.sqrt(n), n - 1
    # Student's density, integrated over the angle: t = sqrt(df) tan(angle)
    angle = np.linspace(math.atan(t / math.sqrt(df)), math.pi / 2, 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    values = np.cos(angle) ** (df - 1)
    return float(2 * scale * ((values[1:] + values[:-1]) / 2 * np.diff(angle)).sum())


def verdicts(experiment: Experiment, cells: dict[str, list[dict]]) -> list[dict]:
    """For each claim and measure: the mean difference, the paired test, whether the order came
    out."""
    found = []
    for better, worse in experiment.claims:
        for measure in MEASURES:
            differences = [a[measure] - b[measure] for a, b in zip(cells[better], cells[worse])]
            difference = statistics.mean(differences)
            found.append({"better": better, "worse": worse, "measure": measure,
                          "difference": difference, "p": paired_test(differences),
                          "came_out": difference > 0})
    return found


def markdown(experiment: Experiment, cells: dict[str, list[dict]], command: str,
             settings: Settings, seeds: list[int]) -> str:
    """A table with mean and standard deviation over seeds, and the verdicts."""
    def cell_of(rows, measure):
        values = [100 * row[measure] for row in rows]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"
    columns = 3 * bool(experiment.paper)
    paper_head = " paper: COCO IR@1 | TR@1 | CIDEr |" if experiment.paper else ""
    lines = [f"# {experiment.title}", "", f"`{command}`", "",
             f"In the built-in world, {len(seeds)} seed{'s' * (len(seeds) > 1)} "
             f"({', '.join(map(str, seeds))}): mean ± standard deviation, percent, on "
             f"{settings.world.held_out} held-out scenes with clean texts, straight after "
             f"pretraining. {machine()}.", "",
             "| | " + " | ".join(MEASURES.values()) + " | minutes |" + paper_head,
             "|---" * (len(MEASURES) + 2 + columns) + "|"]
    for cell, rows in cells.items():
        minutes = statistics.mean(row["minutes"] for row in rows)
        lines.append(f"| {cell} | " + " | ".join(cell_of(rows, m) for m in MEASURES)
                     + f" | {minutes:.1f} |" + "".join(f" {value} |" for value in
                                                       experiment.paper.get(cell, [""] * columns)))
    for cell in experiment.sets:
        for source in ("web", "synthetic"):
            rates = [cell_of([row["set"] for row in cells[cell]], f"{source}_{name}") for name in
                     ("true", "kept_rate", "kept_true", "true_kept")]
            lines += ["", f"{cell}, {source} texts: {rates[0]} % true before filtering; {rates[1]} "
                      f"% kept, {rates[2]} % of these true; {rates[3]} % of the true ones kept."]
    order = "the paper's order" if experiment.paper else "expected order"
    lines += ["", f"| {order} | " + " | ".join(MEASURES.values()) + " |",
              "|---" * (len(MEASURES) + 1) + "|"]
    found = verdicts(experiment, cells)
    for better, worse in experiment.claims:
        row = [v for v in found if (v["better"], v["worse"]) == (better, worse)]
        lines.append(f"| {better} > {worse} | " + " | ".join(
            f"{'yes' if v['came_out'] else '**no**'}: {100 * v['difference']:+.1f} (p {v['p']:.2f})"
            for v in row) + " |")
    lines += ["", "(difference of the means in points; p: paired t-test over seeds, two-sided, not "
              "corrected for the number of tests)", ""]
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        f"{os.cpu_count()} CPU cores")
    return f"{name}, torch {torch.__version__}"


# ---- command line --------------------------------------------------------------------------------

def command_line() -> argparse.ArgumentParser:
    """The experiments and the flags of the regime."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiments", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="EXPERIMENT",
                   help=f"{', '.join(EXPERIMENTS)} or all")
    p.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    p.add_argument("--jobs", type=int, default=1, help="cells at a time (default 1); on a CPU one "
                   "for each core is fastest")
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    p.add_argument("--out", default="runs/ablate", help="default runs/ablate")
    p.add_argument("--results", default="results", help="folder for the tables (default results)")
    p.add_argument("--pairs", type=int, default=WORLD_PAIRS, help="pairs that every pretraining "
                   f"sees (default {WORLD_PAIRS})")
    p.add_argument("--pretrain", default=WORLD_PRETRAIN, metavar="FLAGS",
                   help=f"of train.py (default {WORLD_PRETRAIN!r})")
    p.add_argument("--finetune", default=WORLD_FINETUNE, metavar="FLAGS",
                   help=f"of train.py (default {WORLD_FINETUNE!r})")
    p.add_argument("--losses", default=WORLD_FLAGS, metavar="FLAGS",
                   help=f"of train.py for `losses` (default {WORLD_FLAGS!r})")
    add_flags(p.add_argument_group("the built-in world"), WorldSets, {})
    return p


def run(o: argparse.Namespace, command: str) -> None:
    """Make the tables that the command line asks for."""
    settings = Settings(str(Path(o.out).resolve()), WorldSets(**own_fields(o, WorldSets)), o.pairs,
                        o.pretrain, o.finetune, o.losses)
    names = list(EXPERIMENTS) if "all" in o.experiments else o.experiments
    seeds, device = list(range(o.seeds)), o.device or (
        "cuda" if torch.cuda.is_available() else "cpu")
    for name, cells in run_all(settings, names, seeds, device, o.jobs):
        text = markdown(EXPERIMENTS[name], cells, command, settings, seeds)
        Path(o.results).mkdir(parents=True, exist_ok=True)
        write_whole(Path(o.results) / f"{name}.md", [text])
        write_whole(Path(o.results) / f"{name}.json", [json.dumps(
            {"command": command, "machine": machine(), "seeds": seeds, "cells": cells,
             "verdicts": verdicts(EXPERIMENTS[name], cells)}, indent=1) + "\n"])
        print(f"{text}\nwrote {o.results}/{name}.md, {name}.json", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "ablate.py", *arguments])
    return exit_status(lambda: run(command_line().parse_args(arguments), command),
                       "interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
