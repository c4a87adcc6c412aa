"""From the command line to a configuration: defaults, the task's settings, the preset's, the flags.
"""

import argparse
import shlex
import textwrap
from dataclasses import MISSING, fields

from config import SIZES, BLIPConfig, SettingError, TrainConfig
from tasks.registry import TASKS, preset_settings

# Finetuning takes the model from the checkpoint and changes only this much of it; the rest would
# not fit its weights.
FREE_IN_FINETUNING = {"image_size", "drop_path", "grad_checkpoint", "dropout", "queue_size",
                      "momentum", "temp_min", "temp_max", "label_smoothing", "hard_negatives",
                      "negative_floor", "mask_positives", "merge_from"}
# What may differ from the checkpoint when a run is resumed: nothing that the result depends on.
FREE_ON_RESUME = {"out", "device", "workers", "log_every", "save_every", "save_minutes", "keep",
                  "accumulate", "compile"}


def boolean(text: str) -> bool:
    """A flag's value: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def flag_name(field_name: str) -> str:
    """batch_size -> --batch-size."""
    return "--" + field_name.replace("_", "-")


def add_flags(parser, config_class: type, other_defaults: dict,
              other_name: str = "default") -> None:
    """A flag for each field of a dataclass, without a default: only what is given is there.

    other_defaults: what a field is instead of its default, shown in the help under `other_name`.
    """
    for f in fields(config_class):
        if not f.metadata.get("flag", True) or f.default is MISSING:
            continue
        shown = f"default {f.default!r}"
        if other_defaults.get(f.name, f.default) != f.default:
            other = f"{other_name} {other_defaults[f.name]!r}"
            shown = other if other_name == "default" else f"{shown}, {other}"
        about = f"{f.metadata.get('about', '')} ({shown})".strip()
        parser.add_argument(flag_name(f.name), type=boolean if f.type is bool else f.type,
                            default=argparse.SUPPRESS, help=about.replace("%", "%%"))


def given_for(config_class: type, given: dict) -> dict:
    """The part of what was given that belongs to a dataclass."""
    return {f.name: given[f.name] for f in fields(config_class) if f.name in given}


def parse(arguments: list[str], description: str) -> tuple[dict, bool]:
    """What was given, by field name, and whether to resume. `description` heads the help."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     usage=f"%(prog)s [{' | '.join(TASKS)}] [flags]",
                                     epilog=recipes(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    given = {}
    if arguments and not arguments[0].startswith("-"):  # argparse takes a wrong flag's value for it
        given, arguments = {"task": arguments[0]}, arguments[1:]
        if given["task"] not in TASKS:
            parser.error(f"{given['task']!r} is no task; choose one of {', '.join(TASKS)}")
    parser.add_argument("--resume", action="store_true",
                        help="continue from checkpoint.pt in --out")
    add_flags(parser.add_argument_group("training"), TrainConfig, TASKS["pretrain"].tiny, "tiny")
    add_flags(parser.add_argument_group("model"), BLIPConfig, SIZES["tiny"], "tiny")
    given |= vars(parser.parse_args(arguments))
    return given, given.pop("resume")


def training_flags(text: str) -> dict:
    """FLAGS of train.py in one text -> settings by field name."""
    given, _ = parse(shlex.split(text), "FLAGS of train.py.")
    return given


def recipes() -> str:
    """What tasks and presets change, for the help."""
    lines = ["what tasks and presets set, unless a flag does:"]
    for task in TASKS.values():
        for name, changes in ((task.name, task.settings), (f"{task.name} tiny", task.tiny),
                              (f"{task.name} tiny, on own data", task.tiny_own),
                              (f"{task.name} large", task.large)):
            text = ", ".join(f"{field} {value!r}" for field, value in changes.items())
            if text:
                lines += textwrap.wrap(f"{name}: {text}", 96, initial_indent="  ",
                                       subsequent_indent="      ")
    return "\n".join(lines)


def resolve(given: dict, start: dict | None = None) -> tuple[BLIPConfig, TrainConfig]:
    """Model and training configuration of what was given, by field name.

    start: the {model_config, train_config} of the checkpoint that a finetuning starts from. Raises
    SettingError for what is unknown or out of range.
    """
    task, start = given.get("task", "pretrain"), start or {}
    if task not in TASKS:
        raise SettingError(f"{task!r} is no task; choose one of {', '.join(TASKS)}")
    of_start = start.get("train_config", {}).get("preset", "base" if start else TrainConfig.preset)
    preset = given.get("preset", of_start)
    settings = preset_settings(task, preset, bool(given.get("data"))) | {"preset": preset}
    recipe = TrainConfig(**(settings | given_for(TrainConfig, given)))
    own = given_for(BLIPConfig, given)
    if not start:
        if task != "pretrain":
            raise SettingError(f"finetuning ({task}) starts from a pretrained model: give --init "
                               "CHECKPOINT (python train.py writes runs/pretrain/checkpoint.pt)")
        return BLIPConfig(**{**SIZES[preset], **own}), recipe
    model = start["model_config"]
    for name, value in own.items():
        if name not in FREE_IN_FINETUNING and value != model[name]:
            raise SettingError(f"{flag_name(name)} is {model[name]} in the weights of --init and "
                               f"cannot be {value}; leave it out")
    if task != "pretrain" and preset != "tiny":
        model = {**model, **TASKS[task].model_settings}
    return BLIPConfig(**{**model, **own}), recipe
