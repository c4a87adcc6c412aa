"""The recipe: every setting of a run, the presets, the schedules, and the command line
made from them.

Every field of BLIPConfig and TrainConfig is a flag of train.py; the comment behind a field is
its help text.
"""

import argparse
import inspect
import math
import re
from dataclasses import dataclass, fields

from blip import OBJECTIVES, SIZES, BLIPConfig


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. The defaults are the paper's for ViT-B (BLIP sec. 4.1); PRESETS override
    what differs."""

    preset: str = "tiny"  # tiny, base or large: sizes and recipe
    data: str = ""  # json of training pairs, BLIP or Karpathy format; none: the built-in world
    val: str = ""  # json of held-out pairs; a Karpathy file given as --data holds its own
    val_split: str = "val"  # which split of a Karpathy file is held out: val or test
    image_root: str = ""  # folder that image paths start from; none: the folder of the json
    vocab: str = ""  # BERT's vocab.txt; none: train a WordPiece vocabulary on the captions
    vocab_pieces: int = 30524  # at most so many pieces when the vocabulary is trained
    out: str = "runs/pretrain"  # folder of the run
    seed: int = 0  # of weights, data order, augmentation and dropout
    epochs: int = 20  # passes over the data
    batch_size: int = 2880  # pairs a step, over all processes
    lr: float = 3e-4  # peak learning rate
    min_lr: float = 1e-6  # where the decay ends
    schedule: str = "step"  # step: x lr_decay each epoch (pretraining); cosine: to min_lr each step
    lr_decay: float = 0.85  # per epoch, for schedule step (paper; the released yaml has 0.9)
    warmup_steps: int = 3000  # linear warm-up
    warmup_lr: float = 1e-6  # where the warm-up starts
    weight_decay: float = 0.05  # AdamW; not on biases, LayerNorms, temperature
    beta2: float = 0.999  # AdamW
    grad_clip: float = 0.0  # largest gradient norm; 0 does not clip
    alpha: float = 0.4  # weight of the momentum twins' soft targets (ALBEF eq. 6)
    alpha_epochs: float = 2.0  # alpha ramps up linearly over so many epochs
    itc_weight: float = 1.0  # of the loss; 0 switches it off
    itm_weight: float = 1.0  # of the loss; 0 switches it off
    lm_weight: float = 1.0  # of the loss; 0 switches it off
    lm_only_steps: int = 0  # steps of LM alone first (warm start for tiny models; not in the paper)
    augment: bool = True  # random crop, flip, RandAugment on photographs; the world has none
    crop_min: float = 0.2  # smallest share of the area in a random crop
    max_tokens: int = 30  # a longer text is cut
    world_size: int = 60000  # train scenes in the built-in world
    noise: float = 0.0  # share of bad texts in the built-in world (web style)
    max_broken: float = 0.1  # stop when more than this share of images cannot be read
    workers: int = 4  # processes that load photographs
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # auto, bf16 or fp32; auto is bf16 on CUDA and on a CPU with AMX
    log_every: int = 20  # steps
    save_every: int = 500  # steps
    eval_size: int = 1000  # held-out items
    eval_top_k: int = 16  # candidates that ITM re-ranks; 0 does not re-rank

    def __post_init__(self):
        for name, allowed in (("preset", tuple(PRESETS)), ("schedule", ("step", "cosine")),
                              ("precision", ("auto", "bf16", "fp32")),
                              ("val_split", ("val", "test"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of "
                                 f"{', '.join(allowed)}")
        if self.batch_size < 1 or self.epochs < 1 or not any(self.weights().values()):
            raise ValueError("batch_size and epochs must be at least 1, and one of the loss "
                             "weights above 0")

    def weights(self) -> dict[str, float]:
        """Objective -> weight of its loss; the paper's are 1."""
        return {name: getattr(self, f"{name}_weight") for name in OBJECTIVES}


PRESETS = {
    "base": {},
    "large": dict(lr=2e-4, batch_size=2400),  # BLIP sec. 4.1
    # Measured, not the paper's: see "The tiny preset" in the README.
    "tiny": dict(epochs=1, world_size=38400, batch_size=32, lr=1.2e-3, schedule="cosine",
                 warmup_steps=100, beta2=0.98, grad_clip=1.0, alpha_epochs=0.085,
                 lm_only_steps=200, vocab_pieces=4000, workers=1),
}
# What may differ from the checkpoint when a run is resumed: nothing that the result depends on.
FREE_ON_RESUME = {"out", "device", "workers", "log_every", "save_every"}


# ---- command line --------------------------------------------------------------------------------

def field_help(config_class: type) -> dict[str, str]:
    """Field -> the comment behind it in the class's source, which so documents the flag as well."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))


def truth(text: str) -> bool:
    """A flag's value: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse(arguments: list[str], description: str) -> tuple[BLIPConfig, TrainConfig, bool, set[str]]:
    """`description` heads the help -> model and training configuration, whether to resume, and the
    names of the flags that were given."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true",
                        help="continue from checkpoint.pt in --out")
    for title, config_class in (("training", TrainConfig), ("model", BLIPConfig)):
        group, help_of = parser.add_argument_group(title), field_help(config_class)
        for f in fields(config_class):
            if not help_of[f.name].startswith("set from the tokenizer"):
                tiny = (PRESETS if config_class is TrainConfig
                        else SIZES)["tiny"].get(f.name, f.default)
                shown = f"default {f.default!r}" + (f", tiny {tiny!r}" if tiny != f.default else "")
                group.add_argument("--" + f.name.replace("_", "-"),
                                   type=truth if f.type is bool else f.type,
                                   default=argparse.SUPPRESS,
                                   help=f"{help_of[f.name]} ({shown})".replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    resume, preset = given.pop("resume"), given.get("preset", TrainConfig.preset)
    def build(config_class, presets):
        own = {k: v for k, v in given.items() if k in {f.name for f in fields(config_class)}}
        return config_class(**{**presets.get(preset, {}), **own})
    try:
        return build(BLIPConfig, SIZES), build(TrainConfig, PRESETS), resume, set(given)
    except ValueError as error:
        parser.error(str(error))


# ---- schedules -----------------------------------------------------------------------------------

def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    if config.schedule == "step":
        return max(config.min_lr, config.lr * config.lr_decay ** (step // steps_per_epoch))
    progress = step / (config.epochs * steps_per_epoch)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def alpha_at(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Weight of the soft targets: 0 -> alpha over alpha_epochs, counted from the first step
    with ITC."""
    ramp = config.alpha_epochs * steps_per_epoch
    return config.alpha * min(1.0, max(0, step - config.lm_only_steps) / ramp if ramp else 1.0)


def objectives_at(config: TrainConfig, step: int) -> tuple[str, ...]:
    """The losses that are on in a step."""
    on = tuple(name for name, weight in config.weights().items() if weight)
    return ("lm",) if step < config.lm_only_steps and "lm" in on else on
