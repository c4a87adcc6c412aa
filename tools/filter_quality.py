"""How good CapFilt's filter is, by human pairs, of which the truth is known.

The filter judges each picture with its own text and with another picture's. A good one accepts the
first and not the second, at whatever threshold.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import prepare_images
from data.pairs import merge_captions
from data.shards import Shard
from data.sources import PairIndex
from data.text import clean_caption
from tasks.registry import TASKS
from tasks.task import TrainedModel
from training import distributed
from training.checkpoints import open_model
from training.distributed import print0

PAIRS = 300  # that are judged
USELESS = 0.75  # AUC below which the filter is said to tell too little

Score = Callable[[TrainedModel, Tensor, list[list[str]]], list[list[float]]]  # capfilt.itm_scores


def open_filter(path: str, device: torch.device, vocab: str = "") -> TrainedModel:
    """A checkpoint of `train.py retrieval`. Raises InputError."""
    return open_model(path, TASKS["retrieval"].needs, vocab, device)


def report_filters(filters: list[TrainedModel], human: PairIndex | None, score: Score,
                   threshold: float) -> list[dict]:
    """Judge each filter, print what it is worth -> filter_quality of each. All ranks call it.

    [] where there are no human pairs or no filters.
    """
    def judge() -> list[dict]:
        qualities = []
        for number, filter in enumerate(filters):
            own, others = scores_of_pairs(filter, human, score)
            if len(own):
                qualities.append(filter_quality(own, others, threshold))
                name = f"filter {number + 1}" if len(filters) > 1 else "filter"
                print_quality(qualities[-1], threshold, name)
            else:
                print0("WARNING of the human pairs none can be read, or all texts are equal: the "
                       "filter was not judged; is --image-root right?")
        return qualities
    return distributed.from_rank_0(judge) if human is not None and filters else []


@torch.no_grad()
def scores_of_pairs(filter: TrainedModel, human: PairIndex,
                    score: Score) -> tuple[np.ndarray, np.ndarray]:
    """ITM's probability of PAIRS human pairs, and of each picture with another one's text.

    Two arrays (n,). Pictures that cannot be read, and pairs for which no other text is found, are
    left out.
    """
    rng = random.Random("filter quality")
    rows = sorted(rng.sample(range(len(human)), min(PAIRS, len(human))))
    pairs = merge_captions([human[row] for row in rows])
    texts = [clean_caption(pair.captions[0]) for pair in pairs]
    other_of = {}  # image -> another picture's text
    for pair, text in zip(pairs, texts):
        different = [other for other in texts if other != text]
        if different:
            other_of[pair.image] = rng.choice(different)
    pairs = [pair for pair in pairs if pair.image in other_of]
    own, others = [], []
    with distributed.progress(about="filter, on human pairs", total=len(pairs)) as bar:
        shard = Shard(Path(), pairs, human.root, 0, bar)
        for batch, images, _ in shard.batches({filter.image_size}, 32, 0):
            choices = [[pair.captions[0], other_of[pair.image]] for pair in batch]
            images = prepare_images(images[filter.image_size], filter.device)
            for of_own, of_other in score(filter, images, choices):
                own.append(of_own)
                others.append(of_other)
    return np.array(own), np.array(others)


def filter_quality(own: np.ndarray, others: np.ndarray, threshold: float) -> dict:
    """Shares that are accepted, AUC, the best threshold.

    own, others (n,): ITM's probabilities of true pairs and of false ones. auc: how often a true
    pair scores higher than a false one (ties count half); chance 0.5. best_threshold: where the
    share of true pairs that are accepted exceeds that of false ones most.
    """
    higher = own[:, None] > others[None, :]
    equal = own[:, None] == others[None, :]
    candidates = np.unique(np.concatenate([own, others]))
    gains = [(own >= value).mean() - (others >= value).mean() for value in candidates]
    best = float(candidates[int(np.argmax(gains))])
    def accepted(value: float) -> dict[str, float]:
        return {"true": float((own >= value).mean()), "false": float((others >= value).mean())}
    return {"pairs": len(own), "auc": float((higher + 0.5 * equal).mean()),
            "accepted": accepted(threshold), "best_threshold": best,
            "accepted_at_best": accepted(best)}


def print_quality(quality: dict, threshold: float, name: str) -> None:
    """In words, with a warning where the filter tells too little."""
    def share(accepted: dict) -> str:
        return f"{100 * accepted['true']:.0f} % and {100 * accepted['false']:.0f} %"
    print0(f"{name}: of {quality['pairs']} human pairs, and of the same pictures with other texts, "
           f"it accepts {share(quality['accepted'])} at threshold {threshold:g} (AUC "
           f"{quality['auc']:.2f}; 0.5 is chance; for pictures that it was not trained on expect "
           "less)")
    at_best = quality["accepted_at_best"]
    gain = sum(sign * (at_best[kind] - quality["accepted"][kind])
               for kind, sign in (("true", 1), ("false", -1)))
    if quality["auc"] < USELESS:
        print0(f"WARNING {name} can hardly tell a true text from a false one: what it keeps is "
               "little better than what it drops. Finetune it longer or on more human pairs")
    elif gain > 0.05:
        best = math.floor(1e4 * quality["best_threshold"]) / 1e4  # up, and it would accept less
        print0(f"{name}: --threshold {best:g} would accept {share(at_best)}")
