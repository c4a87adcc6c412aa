"""The first paper's tables as experiments for `ablate.py`: models, the paper's numbers and order.

A cell is a function of ablate.ExperimentCache (`cache`), and tells how its model is made. To add an
experiment, add one entry to BLIP_EXPERIMENTS.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from data.files import InputError
from tools.judge import MEASURES

Cell = Callable[[Any], str]  # an ExperimentCache -> the checkpoint of the cell's model


@dataclass(frozen=True)
class Experiment:
    """A table: its cells, the paper's numbers and the order that the paper found."""

    title: str
    # name -> how its model is made: by settings, or by a task of its own. (A cell that replaces a
    # function would get the model of another one, which has the same settings.)
    cells: dict[str, Cell]
    # cell -> COCO text-to-image R@1, image-to-text R@1 (finetuned), COCO CIDEr
    paper: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    claims: tuple[tuple[str, str], ...] = ()  # (better, worse)
    _: KW_ONLY
    judged: tuple[str, ...] = ()  # the measures for which the paper has this order; (): all
    # cell -> its bootstrapped set, of which the rates are shown
    sets: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    # cell -> percent of the synthetic texts that the paper's filter rejects
    paper_rejected: dict[str, float] = field(default_factory=dict)
    # cell -> millions of parameters in the paper; ours are shown beside them
    paper_parameters: dict[str, float] = field(default_factory=dict)
    measures: dict[str, str] = field(default_factory=lambda: dict(MEASURES))  # the columns
    evaluated: bool = False  # the trainings' own evaluation is used, else tools.judge's

    def __post_init__(self):
        for better, worse in self.claims:
            if not {better, worse} <= self.cells.keys():
                raise ValueError(f"{self.title}: the claim ({better!r}, {worse!r}) names a cell "
                                 f"that is none of {', '.join(map(repr, self.cells))}")

    def only(self, cells: list[str]) -> "Experiment":
        """The same with these cells alone; []: with all. Raises InputError for unknown ones.

        A claim stays where both of its cells do.
        """
        unknown = sorted(set(cells) - self.cells.keys())
        if unknown:
            raise InputError(f"--cells: {self.title} has no cell {unknown[0]!r}; it has "
                             f"{', '.join(map(repr, self.cells))} (each in quotes)")
        if not cells:
            return self
        def chosen(of_cells: dict) -> dict:
            return {cell: value for cell, value in of_cells.items() if cell in cells}
        claims = tuple(claim for claim in self.claims if {*claim} <= {*cells})
        return replace(self, cells=chosen(self.cells), paper=chosen(self.paper),
                       sets=chosen(self.sets), claims=claims)

    def judged_by(self) -> dict[str, str]:
        """What the claims are judged by: name -> in words."""
        return {name: self.measures[name] for name in self.judged or self.measures}


NEITHER, BOTH = (60.7, 78.4, 127.8), (63.1, 80.6, 129.7)


def on_set(cache, folder: Path, times: int = 1, **given) -> str:
    """A model on a bootstrapped set: human, kept web and kept synthetic texts."""
    return cache.pretrain(cache.texts(folder, "kept", "kept"), times, **given)


def both(cache, times: int = 1, **decoding) -> str:
    """CapFilt as the paper has it: a new model on what captioner and filter made."""
    return on_set(cache, cache.capfilt(**decoding), times)


def capfilt_set(cache) -> Path:
    """Bootstrapped by a captioner and a filter that were finetuned separately."""
    return cache.capfilt()


def shared_set(cache) -> Path:
    """Bootstrapped by one model that was finetuned on all objectives and does both jobs."""
    one = cache.finetune("pretrain", lm_only_steps=0, lr=5e-4)
    return cache.bootstrap([one], [one])


def sharing(share: str) -> Cell:
    """The cell of a row of Table 3."""
    return lambda cache: cache.pretrain(cache.raw(), share=share)


BLIP_EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: captioner and filter",
        {"neither": lambda cache: cache.pretrain(cache.raw()),
         "filter": lambda cache: cache.pretrain(cache.texts(cache.capfilt(), "kept", "none")),
         "captioner": lambda cache: cache.pretrain(cache.texts(cache.capfilt(), "all", "all")),
         "both": both},
        {"neither": NEITHER, "filter": (61.5, 79.1, 128.2), "captioner": (62.0, 79.7, 128.9),
         "both": BOTH},
        (("filter", "neither"), ("captioner", "neither"), ("captioner", "filter"),
         ("both", "neither"), ("both", "filter"), ("both", "captioner")),
        sets={"both": capfilt_set}),
    "table2": Experiment(
        "Table 2: how the synthetic texts are generated",
        {"none": lambda cache: cache.pretrain(cache.raw()),
         "beam": lambda cache: both(cache, method="beam"), "nucleus": both},
        {"none": NEITHER, "beam": (61.9, 79.6, 128.9), "nucleus": BOTH},
        (("beam", "none"), ("nucleus", "beam")),
        sets={"beam": lambda cache: cache.capfilt(method="beam"), "nucleus": capfilt_set},
        paper_rejected={"beam": 19, "nucleus": 25}),
    "table3": Experiment(
        "Table 3: what text encoder and decoder share (on the raw texts)",
        {"all": sharing("all"), "all but CA": sharing("all_but_ca"),
         "all but SA": sharing("all_but_sa"), "none": sharing("none")},
        {"all": (59.5, 77.3, 125.9), "all but CA": (59.9, 77.5, 126.1), "all but SA": NEITHER,
         "none": (60.5, 78.3, 127.4)},
        (("all but SA", "all"), ("all but SA", "all but CA"), ("all but SA", "none")),
        paper_parameters={"all": 224, "all but CA": 252, "all but SA": 252, "none": 361}),
    "table4": Experiment(
        "Table 4: captioner and filter in one model, or in two",
        {"one model": lambda cache: on_set(cache, shared_set(cache)),
         "two models": both},
        {"one model": (62.2, 79.8, 129.0), "two models": BOTH},
        (("two models", "one model"),),
        sets={"one model": shared_set, "two models": capfilt_set},
        paper_rejected={"one model": 8, "two models": 25}),
    "table12": Experiment(
        "Table 12: longer on the noisy texts",
        {"raw": lambda cache: cache.pretrain(cache.raw()),
         "raw, twice the steps": lambda cache: cache.pretrain(cache.raw(), times=2),
         "CapFilt": both,
         "CapFilt, twice the steps": lambda cache: both(cache, times=2)},  # not in the paper
        # In the paper the raw texts are repeated until they are 1.6 times as many.
        {"raw": NEITHER, "raw, twice the steps": (60.5, 78.3, 127.7), "CapFilt": BOTH},
        (("CapFilt", "raw"), ("raw", "raw, twice the steps"), ("CapFilt", "raw, twice the steps"),
         ("CapFilt, twice the steps", "raw, twice the steps"))),
    "table13": Experiment(
        "Table 13: go on with the old model, or start a new one",
        {"continue": lambda cache: on_set(cache, cache.capfilt(),
                                          init=cache.pretrain(cache.raw())),
         "new model": both},
        {"continue": (63.0, 80.6, 129.9), "new model": BOTH},
        # In the paper TR@1 is equal, and CIDEr in the other order.
        (("new model", "continue"),), judged=("t2i_r1", "t2i_r1_rerank")),
}
