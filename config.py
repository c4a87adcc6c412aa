"""The recipe: every setting of a run, tasks and presets, the schedules, and the command line made
from them.

Every field of BLIPConfig and TrainConfig is a flag of train.py; the comment behind a field is its
help text. Settings are the field's default, then the task's (TASKS), then the preset's (PRESETS),
then what the command line gives.
"""

import argparse
import inspect
import math
import re
import textwrap
from dataclasses import dataclass, fields

from blip import OBJECTIVES, SIZES, BLIPConfig


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. The defaults are the paper's for pretraining ViT-B (BLIP sec. 4.1)."""

    task: str = "pretrain"  # what is trained (of TASKS): the first word of the command
    init: str = ""  # checkpoint whose model and tokenizer a finetuning starts from
    init_vit: str = ""  # DeiT or timm ViT weights that pretraining starts from (paper: ImageNet)
    init_text: str = ""  # BERT weights that pretraining starts from; needs --vocab
    preset: str = "tiny"  # tiny, base or large: sizes and recipe
    data: str = ""  # json files, tar shards; "a.json,web/*.tar:0.2": a fifth of web an epoch
    val: str = ""  # json of held-out pairs; a Karpathy file given as --data holds its own
    val_split: str = "val"  # which split of a Karpathy file is held out: val or test
    image_root: str = ""  # folder that image paths start from; none: the folder of each source
    vocab: str = ""  # BERT's vocab.txt; none: train a WordPiece vocabulary, or take --init's
    vocab_pieces: int = 30524  # at most so many pieces when the vocabulary is trained
    out: str = "runs/pretrain"  # folder of the run
    seed: int = 0  # of weights, data order, augmentation and dropout
    epochs: int = 20  # passes over the data
    batch_size: int = 2880  # pairs a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches that a process adds up in a step: less memory
    lr: float = 3e-4  # peak learning rate
    min_lr: float = 1e-6  # where the decay ends
    schedule: str = "step"  # step: x lr_decay an epoch; cosine; epoch_cosine: constant in an epoch
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
    all_negatives: bool = False  # ITM's negatives from all processes in finetuning (paper: COCO)
    prompt: str = ""  # words before each caption, which give no loss
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
    compile: bool = False  # torch.compile the ViT: minutes at the start, then faster steps
    log_every: int = 20  # steps
    save_every: int = 500  # steps between checkpoints
    save_minutes: float = 10.0  # a checkpoint at least so often, at a logged step
    keep: int = 1  # the newest checkpoints that are kept
    eval_size: int = 1000  # held-out items
    eval_top_k: int = 16  # candidates that ITM re-ranks; 0 does not re-rank
    min_length: int = 5  # tokens of a caption that evaluation generates, [DEC] and prompt included
    max_length: int = 20  # tokens of a caption that evaluation generates, [DEC] and prompt included

    def __post_init__(self):
        for name, allowed in (("task", tuple(TASKS)), ("preset", tuple(SIZES)),
                              ("schedule", ("step", "cosine", "epoch_cosine")),
                              ("precision", ("auto", "bf16", "fp32")),
                              ("val_split", ("val", "test"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of "
                                 f"{', '.join(allowed)}")
        if (min(self.batch_size, self.epochs, self.accumulate) < 1
                or not any(self.weights().values())):
            raise ValueError("batch_size, epochs and accumulate must be at least 1, and one of "
                             "the loss weights above 0")

    def weights(self) -> dict[str, float]:
        """Objective -> weight of its loss; the paper's are 1."""
        return {name: getattr(self, f"{name}_weight") for name in OBJECTIVES}


# BLIP sec. 5 and the released configurations: no warm-up, cosine to 0 per epoch, milder crops.
FINETUNE = dict(schedule="epoch_cosine", warmup_steps=0, min_lr=0.0, crop_min=0.5, batch_size=256)
TASKS = {
    "pretrain": {},
    "retrieval": dict(FINETUNE, out="runs/retrieval", lr=1e-5, epochs=6, max_tokens=35,
                      alpha_epochs=1.0, lm_weight=0.0, eval_top_k=128),  # k: Flickr; COCO 256
    "caption": dict(FINETUNE, out="runs/caption", lr=1e-5, epochs=5, max_tokens=40,
                    itc_weight=0.0, itm_weight=0.0, prompt="a picture of"),
    "vqa": dict(FINETUNE, out="runs/vqa", lr=2e-5, epochs=10, max_tokens=35),
    "nlvr2": dict(FINETUNE, out="runs/nlvr2", lr=3e-5, epochs=15, max_tokens=40),
    "visdial": dict(FINETUNE, out="runs/visdial", lr=2e-5, epochs=20, max_tokens=160,
                    batch_size=120),  # two rounds of each dialog: 240, as in the paper
}
# The tiny ones are measured, not the paper's: see "The tiny preset" in the README.
TINY = dict(batch_size=32, schedule="cosine", warmup_steps=100, beta2=0.98, grad_clip=1.0,
            workers=1, eval_top_k=16, min_length=5, max_length=30)
PRESETS = {
    ("pretrain", "large"): dict(lr=2e-4, batch_size=2400),  # BLIP sec. 4.1
    ("pretrain", "tiny"): dict(TINY, epochs=1, world_size=38400, lr=1.2e-3, alpha_epochs=0.085,
                               lm_only_steps=200, vocab_pieces=4000),
    ("retrieval", "large"): dict(lr=5e-6),
    ("retrieval", "tiny"): dict(TINY, epochs=2, world_size=6400, lr=5e-4),
    ("caption", "large"): dict(lr=2e-6),
    ("caption", "tiny"): dict(TINY, epochs=2, world_size=12800, lr=5e-4, prompt=""),
    ("vqa", "tiny"): dict(TINY, epochs=1, world_size=128000, lr=3e-4),
    ("nlvr2", "tiny"): dict(TINY, epochs=1, world_size=64000, lr=3e-4),
    ("visdial", "tiny"): dict(TINY, epochs=1, batch_size=16, world_size=40000, lr=5e-4,
                              max_tokens=60, eval_size=200),
}
# Finetuning takes the model from the checkpoint and changes only this much of it on its own; the
# rest of what may be changed is not visible in the weights.
FINETUNE_MODEL = {  # presets base and large (BLIP, appendix A; released configurations)
    "retrieval": dict(image_size=384), "caption": dict(image_size=384),
    "vqa": dict(image_size=480, drop_path=0.1), "nlvr2": dict(image_size=384, drop_path=0.1),
    "visdial": dict(image_size=384)}
FREE_IN_FINETUNING = {"image_size", "drop_path", "grad_checkpoint", "dropout", "queue_size",
                      "momentum", "temp_min", "temp_max", "label_smoothing", "hard_negatives"}
# What may differ from the checkpoint when a run is resumed: nothing that the result depends on.
FREE_ON_RESUME = {"out", "device", "workers", "log_every", "save_every", "save_minutes", "keep",
                  "accumulate", "compile"}


# ---- command line --------------------------------------------------------------------------------

def field_help(config_class: type) -> dict[str, str]:
    """Field -> the comment behind it in the class's source, which so documents the flag as well."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))


def truth(text: str) -> bool:
    """A flag's value: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse(arguments: list[str], description: str) -> tuple[dict, bool]:
    """`description` heads the help -> what was given, by field name, and whether to resume."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     usage=f"%(prog)s [{' | '.join(TASKS)}] [flags]",
                                     epilog=recipes(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    task = {}
    if arguments and not arguments[0].startswith("-"):  # argparse takes a wrong flag's value for it
        task, arguments = {"task": arguments[0]}, arguments[1:]
        if task["task"] not in TASKS:
            parser.error(f"{task['task']!r} is no task; choose one of {', '.join(TASKS)}")
    parser.add_argument("--resume", action="store_true",
                        help="continue from checkpoint.pt in --out")
    for title, config_class in (("training", TrainConfig), ("model", BLIPConfig)):
        add_flags(parser.add_argument_group(title), config_class,
                  SIZES["tiny"] if config_class is BLIPConfig else PRESETS["pretrain", "tiny"])
    given = task | vars(parser.parse_args(arguments))
    return given, given.pop("resume")


def recipes() -> str:
    """What tasks and presets change, for the help."""
    lines = ["what tasks and presets set, unless a flag does:"]
    for name, changes in [*TASKS.items(), *((" ".join(k), v) for k, v in PRESETS.items())]:
        text = ", ".join(f"{field} {value!r}" for field, value in changes.items())
        if text:
            lines += textwrap.wrap(f"{name}: {text}", 96, initial_indent="  ",
                                   subsequent_indent="      ")
    return "\n".join(lines)


def add_flags(parser, config_class: type, tiny: dict) -> None:
    """A flag for each field, without a default, so that only what is given is there; `tiny` has the
    defaults that differ in that preset."""
    help_of = field_help(config_class)
    for f in fields(config_class):
        if f.name != "task" and "set from the tokenizer" not in help_of[f.name]:
            other = tiny.get(f.name, f.default)
            shown = f"default {f.default!r}" + (f", tiny {other!r}" if other != f.default else "")
            parser.add_argument("--" + f.name.replace("_", "-"),
                                type=truth if f.type is bool else f.type,
                                default=argparse.SUPPRESS,
                                help=f"{help_of[f.name]} ({shown})".replace("%", "%%"))


def resolve(given: dict, start: dict | None = None) -> tuple[BLIPConfig, TrainConfig]:
    """What was given, and the {model_config, train_config} of a checkpoint to start from -> model
    and training configuration. Raises ValueError."""
    task, start = given.get("task", TrainConfig.task), start or {}
    trained = start.get("train_config", {})
    preset = given.get("preset", trained.get("preset", "base" if start else TrainConfig.preset))
    def own(config_class):
        return {f.name: given[f.name] for f in fields(config_class) if f.name in given}
    recipe = TrainConfig(**{**TASKS[task], **PRESETS.get((task, preset), {}), "preset": preset,
                            **own(TrainConfig)})
    if not start:
        if task != "pretrain":
            raise ValueError(f"finetuning ({task}) starts from a pretrained model: give --init "
                             "CHECKPOINT (python train.py writes runs/pretrain/checkpoint.pt)")
        return BLIPConfig(**{**SIZES[preset], **own(BLIPConfig)}), recipe
    model = start["model_config"]
    fixed = [name for name, value in own(BLIPConfig).items()
             if name not in FREE_IN_FINETUNING and value != model[name]]
    if fixed:
        raise ValueError(f"--{fixed[0].replace('_', '-')} is {model[fixed[0]]} in the weights of "
                         f"--init and cannot be {given[fixed[0]]}; leave it out")
    if task != "pretrain" and preset != "tiny":
        model = {**model, **FINETUNE_MODEL[task]}
    return BLIPConfig(**{**model, **own(BLIPConfig)}), recipe


# ---- schedules -----------------------------------------------------------------------------------

def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    if config.schedule == "step":
        return max(config.min_lr, config.lr * config.lr_decay ** (step // steps_per_epoch))
    if config.schedule == "epoch_cosine":
        step = step // steps_per_epoch * steps_per_epoch
    progress = step / (config.epochs * steps_per_epoch)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def alpha_at(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Weight of the soft targets: 0 -> alpha over alpha_epochs, counted from the first step
    with ITC."""
    ramp = config.alpha_epochs * steps_per_epoch
    return config.alpha * min(1.0, max(0, step - config.lm_only_steps) / ramp if ramp else 1.0)


def objectives_of(task: str) -> tuple[str, ...]:
    """The losses that a task trains, and that a checkpoint must have been trained with to start it
    or to be judged by it."""
    return tuple(name for name in OBJECTIVES if TASKS[task].get(f"{name}_weight", 1.0))


def objectives_at(config: TrainConfig, step: int) -> tuple[str, ...]:
    """The losses that are on in a step."""
    on = tuple(name for name, weight in config.weights().items() if weight)
    return ("lm",) if step < config.lm_only_steps and "lm" in on else on
