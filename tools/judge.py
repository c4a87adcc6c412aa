"""What the picture world says of models and of bootstrapped sets."""

from pathlib import Path

import torch
from torch import nn

from data.files import write_json
from tasks.registry import TASKS
from tasks.task import EvalSettings, Source
from training import distributed
from training.checkpoints import open_model
from training.distributed import print0
from training.precision import evaluation_precision

MEASURES = {"t2i_r1": "text-to-image R@1, ITC", "i2t_r1": "image-to-text R@1, ITC",
            "t2i_r1_rerank": "text-to-image R@1, re-ranked",
            "i2t_r1_rerank": "image-to-text R@1, re-ranked",
            "itm_swap": "ITM prefers the true text", "caption_true": "captions wholly true"}


def judge_in_world(checkpoint: str, device: torch.device, size: int) -> dict[str, float]:
    """A pretrained model on held-out scenes with clean texts -> MEASURES and more.

    All ranks call it.
    """
    trained = open_model(checkpoint, device=device)
    task = TASKS["pretrain"]
    held_out = task.open_data(Source("", "", "held-out", size, trained.image_size))
    with evaluation_precision(trained.settings["precision"], device):
        return task.evaluate(trained, held_out, EvalSettings()).numbers


def trained_share(checkpoint: str) -> float:
    """The share of a model's parameters that its training changes: the others are frozen."""
    model = open_model(checkpoint, kinds=(nn.Module,)).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / sum(p.numel() for p in model.parameters())


def compare_in_world(checkpoints: dict[str, str], device: torch.device, size: int,
                     out: Path) -> None:
    """The MEASURES of several models (name -> checkpoint) side by side, and comparison.json."""
    numbers = {name: judge_in_world(path, device, size) for name, path in checkpoints.items()}
    if distributed.rank() == 0:
        write_json(out / "comparison.json", numbers)
    print0(f"{'%':30}" + "".join(f"{name:>14}" for name in numbers))
    for measure, about in MEASURES.items():
        print0(f"{about:30}" + "".join(f"{100 * of_model[measure]:14.1f}"
                                       for of_model in numbers.values()))


def print_truth(shares: dict[str, float]) -> None:
    """What world.web.truth_of_set found."""
    for source in ("web", "synthetic"):
        before, after, recall = (100 * shares[f"{source}_{name}"]
                                 for name in ("true", "kept_true", "true_kept"))
        print0(f"{source + ' texts':16}{before:6.1f} % true before, {after:.1f} % of the kept; "
               f"{recall:.1f} % of the true ones were kept")


def print_report(report: dict, folder: Path) -> None:
    """How many texts of a bootstrapped set were kept, and where it lies."""
    for source in ("web", "synthetic"):
        kept, dropped = report[f"{source}_kept"], report[f"{source}_rejected"]
        print0(f"{source + ' texts':16}{kept:9} of {kept + dropped} kept "
               f"({100 * report[f'{source}_kept_rate']:.1f} %)")
    left_out = "".join(f", {count} x {reason}"
                       for reason, count in (report["left_out"] | report["broken"]).items())
    print0(f"{'human pairs':16}{report['human']:9}\n{'images':16}{report['images']:9}{left_out}\n"
           f"wrote {folder}/bootstrapped.json, rejected.json, report.json, sheet.png")
