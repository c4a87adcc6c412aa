"""Numbers that tell how a run is doing whatever its losses are, and what chance gives.

A loss cannot be compared with itself after one has changed it: the soft targets, the label
smoothing or a margin move its floor. These measures stay the same:

    itc_i2t_acc, itc_t2i_acc   share of pictures (texts) whose own text (picture) is the nearest of
                               this batch, by the online features; the queue plays no part
    itm_pos_acc, itm_neg_acc   share of own pairs (of hard negatives) that ITM judges rightly
    lm_nll                     nats a token that the next one costs, without label smoothing
    grad_norm                  of all gradients of a step together, before clipping

Diagnostics listens to the forward pass of the training itself (forward hooks), so that it draws no
random number and computes hardly anything. It knows BLIP and BLIP-2's first stage; other models
have grad_norm alone.
"""

import math
from collections import Counter, defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import BLIP, l2_normalize
from blip2.losses import query_similarity
from blip2.stage1 import Stage1
from config import TrainConfig
from losses import next_token_targets
from tasks.registry import TASKS
from training import distributed

ITM_CHANCE = 0.6365  # H(1/3): one own pair to two negatives, nothing but their number is known
NEAR_CHANCE = 0.97  # a loss above this part of its chance level has learnt next to nothing
ACCURACIES = {"itc": ("itc_i2t_acc", "itc_t2i_acc"), "itm": ("itm_pos_acc", "itm_neg_acc")}
SHOWN = 5  # the last lines of the log whose mean is printed at the end of a run
ABOUT = {"itc_i2t_acc": "ITC: pictures whose own text is the nearest in the batch",
         "itc_t2i_acc": "ITC: texts whose own picture is the nearest in the batch",
         "itm_pos_acc": "ITM: own pairs judged to match",
         "itm_neg_acc": "ITM: negatives judged not to match",
         "lm_nll": "LM: nats a token, without label smoothing",
         "grad_norm": "norm of the gradient, before clipping"}


def word_head(model: BLIP | Stage1) -> nn.Module:
    """The layer that gives the next word's logits."""
    return model.med.lm_head if isinstance(model, BLIP) else model.qformer.lm_head


class Diagnostics:
    """Listens to a model in training and adds its numbers up until they are taken.

    A model that is neither BLIP nor BLIP-2's first stage is left alone.
    """

    def __init__(self, model: nn.Module):
        self.listening, self.heard = False, defaultdict(list)
        self.sums, self.counts = {}, Counter()
        if not isinstance(model, (BLIP, Stage1)):
            return
        for part in (model.vision_proj, model.text_proj, model.itm_head, word_head(model)):
            part.register_forward_hook(self.hear)
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, with_kwargs=True)

    def begin(self, model: nn.Module, arguments: tuple, inputs: dict) -> None:
        """A forward pass of the training begins. An evaluation is not listened to."""
        self.listening = model.training
        self.heard.clear()  # of a pass that an error has ended

    def hear(self, part: nn.Module, arguments: tuple, output: Tensor) -> None:
        """Keep what a part of the model has computed."""
        if self.listening:
            self.heard[part].append(output.detach())

    def end(self, model: nn.Module, arguments: tuple, inputs: dict, output: tuple) -> None:
        """Measure the forward pass that is over."""
        if not self.listening:
            return
        self.listening = False
        with torch.autocast(inputs["ids"].device.type, enabled=False):  # bfloat16 would tie
            measures = measure(model, self.heard, inputs)
        self.heard.clear()
        for name, value in measures.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] += 1

    def take(self, grad_norm: Tensor) -> dict[str, Tensor]:
        """The means over the micro-batches since the last call, and the gradient's norm."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        return means | {"grad_norm": grad_norm}


@torch.no_grad()
def measure(model: BLIP | Stage1, heard: dict[nn.Module, list[Tensor]],
            inputs: dict) -> dict[str, Tensor]:
    """The measures of one forward pass, of the objectives that are on; scalars on the device.

    heard: what each call of vision_proj and text_proj (B, E), itm_head (own pairs' (B, 2) first,
    then 2B negatives) and lm_head (B, L - 1, V) gave; of BLIP-2's queries (B, Q, E) and (B, Q, 2).
    inputs: the forward's arguments. Where a forward that somebody has changed gives other shapes,
    that measure is left out; further calls are not looked at.
    """
    ids, mask = inputs["ids"], inputs["mask"]
    pairs, measures = len(ids), {}
    if model.text_proj in heard and model.vision_proj in heard:
        image_feat = l2_normalize(heard[model.vision_proj][0])
        text_feat = l2_normalize(heard[model.text_proj][0])
        image_feat = image_feat[:, None] if image_feat.ndim == 2 else image_feat  # (B, Q, E)
        width = image_feat.shape[-1]
        if len(image_feat) == pairs and text_feat.shape == (pairs, width):
            sim = query_similarity(image_feat, text_feat)
            pair = inputs.get("image_ids")  # pairs of one image may stand for one another
            pair = torch.arange(pairs, device=ids.device) if pair is None else pair
            measures["itc_i2t_acc"] = (pair[sim.argmax(1)] == pair).float().mean()
            measures["itc_t2i_acc"] = (pair[sim.argmax(0)] == pair).float().mean()
    if model.itm_head in heard:
        logits = torch.cat(heard[model.itm_head])[:3 * pairs]
        logits = logits.mean(1) if logits.ndim == 3 else logits  # over the queries
        if logits.shape == (3 * pairs, 2):
            says_match = (logits[:, 1] > logits[:, 0]).float()
            measures["itm_pos_acc"] = says_match[:pairs].mean()
            measures["itm_neg_acc"] = 1 - says_match[pairs:].mean()
    if word_head(model) in heard:
        logits = heard[word_head(model)][0].float()
        targets = next_token_targets(ids, mask, inputs.get("prompt_length", 0))
        if logits.shape[:2] == targets.shape:
            measures["lm_nll"] = F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                                 ignore_index=-100)
    return measures


# ---- what chance gives ---------------------------------------------------------------------------

def share_of_equal(texts: list[str]) -> float:
    """The probability that two of them are equal: as of labels, of which there are few."""
    pairs = len(texts) * (len(texts) - 1)
    return sum(count * (count - 1) for count in Counter(texts).values()) / max(1, pairs)


def chance_levels(model_config: object, config: TrainConfig,
                  equal: float = 0.0) -> dict[str, float]:
    """What a model that knows nothing has, for each loss and measure of the log.

    equal: the probability that two texts are equal and stand for one another (--equal-texts). Empty
    for other models than BLIP and BLIP-2's first stage. The ITC accuracies count the pairs of one
    process and micro-batch.
    """
    task = TASKS[config.task]
    if not isinstance(model_config, task.config) or not issubclass(task.model, (BLIP, Stage1)):
        return {}
    pairs = config.batch_size // (distributed.world_size() * config.accumulate)
    own = 1 / pairs + (1 - 1 / pairs) * equal  # one's own, and others that are equal to it
    words = math.log(model_config.vocab_size)
    columns = (pairs + model_config.queue_size if issubclass(task.model, BLIP)
               else pairs * distributed.world_size())  # what ITC compares a row with
    levels = {"itc": math.log(columns), "itm": ITM_CHANCE, "lm": words,
              "mlm": words, "itc_i2t_acc": own, "itc_t2i_acc": own, "itm_pos_acc": 0.5,
              "itm_neg_acc": 0.5, "lm_nll": words} | task.chance
    return {name: level for name, level in levels.items() if level is not None}


def last_means(log: list[dict]) -> dict[str, float]:
    """The mean of the last SHOWN lines of each number that the last line has."""
    return {name: sum(line.get(name, value) for line in log[-SHOWN:]) / len(log[-SHOWN:])
            for name, value in log[-1].items()}


def final_lines(log: list[dict], chance: dict[str, float]) -> list[str]:
    """The measures at the end of a run, with chance beside each, and hints where needed."""
    log = [line for line in log if "lr" in line]  # the others judge an epoch
    if not log:
        return []
    last, lines = last_means(log), []
    for name, about in ABOUT.items():
        if name in last and chance:
            factor, unit = (100, " %") if name.endswith("acc") else (1, "")
            level = f" (chance {factor * chance[name]:.2f})" if name in chance else ""
            lines.append(f"{factor * last[name]:7.2f}{unit}  {about}{level}")
    if lines:
        steps = log[-1]["step"] - (log[-SHOWN - 1]["step"] if len(log) > SHOWN else 0)
        lines.insert(0, f"in the training batches of the last {steps} steps:")
    return lines + [hint(name, last, chance) for name in ("itc", "itm", "lm", "mlm")
                    if name in last and name in chance and stands_at_chance(name, last, chance)]


def stands_at_chance(name: str, last: dict[str, float], chance: dict[str, float]) -> bool:
    """Whether an objective has learnt next to nothing, by its accuracies where it has some.

    The loss does not tell: ITC's falls below chance as soon as the queue's random vectors are told
    from texts, ITM's may stand above it for a model that is sure and wrong, and a loss that
    somebody has changed has another chance level.
    """
    accuracies = [accuracy for accuracy in ACCURACIES.get(name, ()) if accuracy in last]
    if not accuracies:
        return last[name] > NEAR_CHANCE * chance[name]
    level = sum(chance[accuracy] for accuracy in accuracies) / len(accuracies)
    reached = sum(last[accuracy] for accuracy in accuracies) / len(accuracies)
    return reached < level + 0.1 * (1 - level)


def hint(name: str, last: dict[str, float], chance: dict[str, float]) -> str:
    """What it means that an objective still stands at its chance level."""
    if last[name] < NEAR_CHANCE * chance[name]:  # by its accuracies: its loss may be another one
        return (f"{name} still stands at chance by its accuracies: it has learnt next to nothing "
                "yet; docs/healthy.md says what to look at")
    return (f"{name} still stands at chance (loss {last[name]:.3f}; of one that knows nothing: "
            f"{chance[name]:.3f}): it has learnt next to nothing yet; docs/healthy.md says what "
            "to look at")
