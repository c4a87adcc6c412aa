"""From the command line to a configuration: defaults, the task's settings, the preset's, the flags.
"""

import argparse
import math
import os
import shlex
from dataclasses import MISSING, fields

from config import MOST, SettingError, TrainConfig
from tasks.registry import TASKS, preset_settings
from tasks.task import SOME_READ

# What may differ from the checkpoint when a run is resumed: what another machine may need. (The
# data may have moved; they must be the same, Run.require_same_data.)
FREE_ON_RESUME = {"out", "device", "workers", "log_every", "save_every", "save_minutes", "keep",
                  "accumulate", "compile", "data", "val", "image_root"}


# What names files or folders.
FILES = {"init", "init_vit", "init_text", "data", "val", "image_root", "vocab", "out", "answers",
         "text_from"}

# What a program that trains several models (capfilt.py, ablate.py) sets itself.
SET_BY_THE_PROGRAM = ("data", "image_root", "init", "out", "seed", "device")

EPILOG = ("`python train.py TASK --help` shows the settings of a task; on your own data "
          "(--data) epochs are added until there are --min-steps. The tiny preset has other "
          "defaults there: {own}")


def boolean(text: str) -> bool:
    """A flag's value: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def at_least(least: int, most: float = MOST):
    """A flag's value: a whole number from `least` to `most`."""
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"it is {text} and must be between {least} and "
                                             f"{most:g}")
        return value
    return number


class FileFlag(argparse.Action):
    """A flag that names a file or a folder; "~" is the home folder.

    An empty name is refused: it comes from a variable of the shell that nobody set.
    """

    def __call__(self, parser, namespace, value, option_string=None):
        if not value:
            parser.error(f"{option_string} is empty; give a name, or leave the flag out")
        setattr(namespace, self.dest, os.path.expanduser(value))


def flag_name(field_name: str) -> str:
    """batch_size -> --batch-size."""
    return "--" + field_name.replace("_", "-")


def add_flags(parser, config_class: type, defaults: dict, base: dict | None = None,
              skip: tuple[str, ...] = (), unread: tuple[str, ...] = ()) -> None:
    """A flag for each field of a dataclass, without a default: only what is given is there.

    defaults: what a field is when nothing is given, where that is not the field's default. base:
    the same with `--preset base`, shown beside it. unread: fields that the help leaves out.
    """
    for f in fields(config_class):
        if not f.metadata.get("flag", True) or f.default is MISSING or f.name in skip:
            continue
        default = defaults.get(f.name, f.default)
        shown = f"default {default!r}"
        if base is not None and base.get(f.name, f.default) != default:
            shown += f"; with --preset base {base.get(f.name, f.default)!r}"
        if f.type not in (bool, int, float, str):
            raise TypeError(f"{config_class.__name__}.{f.name} is a {f.type}, and a flag must be a "
                            "bool, int, float or str; give the field setting(..., flag=False)")
        about = f"{f.metadata.get('about', '')} ({shown})".strip()
        about = argparse.SUPPRESS if f.name in unread else about.replace("%", "%%")
        parser.add_argument(flag_name(f.name), type=boolean if f.type is bool else f.type,
                            action=FileFlag if f.name in FILES else "store",
                            default=argparse.SUPPRESS, help=about)


def flags_of(config) -> dict:
    """The settings of a configuration that have a flag, by field name."""
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.metadata.get("flag", True)}


def given_for(config_class: type, given: dict) -> dict:
    """The part of what was given that belongs to a dataclass."""
    return {f.name: given[f.name] for f in fields(config_class) if f.name in given}


def own_data_defaults(name: str) -> str:
    """What the tiny preset of a task changes on own data, as flags."""
    changes = TASKS[name].tiny_own if name in TASKS else {}
    return ", ".join(f"{flag_name(field)} {value}" for field, value in changes.items()) or "none"


def parse(arguments: list[str], description: str) -> tuple[dict, bool]:
    """What was given, by field name, and whether to resume. `description` heads the help."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else "pretrain"
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     usage=f"%(prog)s [{' | '.join(TASKS)}] [flags]",
                                     epilog=EPILOG.format(own=own_data_defaults(name)),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if name not in TASKS:  # argparse would take a wrong flag's value for a task
        parser.error(f"{name!r} is no task; choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    parser.add_argument("--resume", action="store_true",
                        help="continue from checkpoint.pt in --out")
    unread = unread_settings(task)
    add_flags(parser.add_argument_group(f"training ({task.name}: {task.about})"), TrainConfig,
              preset_settings(name, "tiny"), preset_settings(name, "base"), unread=unread)
    model = task.sizes["tiny"]
    group = parser.add_argument_group(
        "model", "with --init its sizes come from there" if task.starts_from else None)
    add_flags(group, task.config, model, task.sizes["base"] | task.model_settings, unread=unread)
    given = vars(parser.parse_args(arguments[1:] if named else arguments))
    resume = given.pop("resume")
    return ({"task": name} if named else {}) | given, resume


def training_flags(text: str) -> dict:
    """FLAGS of train.py in one text -> settings by field name, each in its range."""
    try:
        if os.name == "nt":
            text = text.replace("\\", "\\\\")  # they stand in paths there
        given, _ = parse(shlex.split(text), "FLAGS of train.py.")
        taken = [flag_name(name) for name in SET_BY_THE_PROGRAM if name in given]
        if taken:
            raise SettingError(f"{', '.join(taken)} cannot be given here: this program sets it")
        task = TASKS[given.get("task", "pretrain")]
        TrainConfig(**given_for(TrainConfig, given))
        own = given_for(task.config, given)
        task.config(**(task.sizes[given.get("preset", TrainConfig.preset)] | own))
    except ValueError as error:  # of shlex, or a SettingError
        raise argparse.ArgumentTypeError(f"{text!r}: {error}")
    return given


def check_positions(model_config, recipe: TrainConfig) -> None:
    """SettingError where texts may be longer than the model's positions."""
    positions = getattr(model_config, "text_positions",
                        getattr(model_config, "max_positions", math.inf))
    for name in ("max_tokens", "max_length"):
        if getattr(recipe, name) > positions:
            raise SettingError(f"{flag_name(name)} is {getattr(recipe, name)}, more than the "
                               f"model's {positions} positions; give a smaller one")


def unread_settings(task) -> tuple[str, ...]:
    """The fields of its two configurations that do nothing in a task."""
    return tuple(name for name in SOME_READ if name not in task.reads)


def check_read(task, given: dict) -> None:
    """SettingError where something was given that the task does not read."""
    for name in unread_settings(task):
        default = getattr(TrainConfig, name, getattr(task.config, name, None))
        if name in given and given[name] != default:
            readers = ", ".join(other.name for other in TASKS.values() if name in other.reads)
            raise SettingError(f"{flag_name(name)} does nothing in {task.name}; leave it out (it "
                               f"is a setting of {readers})")


def resolve(given: dict, start: dict | None = None) -> tuple[object, TrainConfig]:
    """Model and training configuration of what was given, by field name: checked.

    start: the {model_config, train_config} of the checkpoint that a finetuning starts from. Raises
    SettingError for what is unknown or out of range.
    """
    model_config, recipe = combine(given, start)
    check_positions(model_config, recipe)
    return model_config, recipe


def combine(given: dict, start: dict | None) -> tuple[object, TrainConfig]:
    """What `resolve` returns, before one configuration is compared with the other."""
    name, start = given.get("task", "pretrain"), start or {}
    if name not in TASKS:
        raise SettingError(f"{name!r} is no task; choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    known = {f.name for f in (*fields(TrainConfig), *fields(task.config))}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise SettingError(f"{name} has no setting {unknown[0]!r}; `python train.py {name} --help` "
                           "lists them")
    of_start = start.get("train_config", {}).get("preset", "base" if start else TrainConfig.preset)
    preset = given.get("preset", of_start)
    settings = preset_settings(name, preset, bool(given.get("data"))) | {"preset": preset}
    recipe = TrainConfig(**(settings | given_for(TrainConfig, given)))
    check_read(task, given)
    for flag in ("val", "image_root"):
        if getattr(recipe, flag) and not recipe.data:
            raise SettingError(f"{flag_name(flag)} is of own data: give --data too, or leave it "
                               "out")
    own = given_for(task.config, given)
    if not start:
        if task.start_is_needed:
            makers = " or ".join(f"`python train.py {other}`" for other in task.starts_from)
            raise SettingError(f"{name} starts from another model: give --init CHECKPOINT, which "
                               f"{makers.replace(' pretrain', '')} writes")
        return task.config(**(task.sizes[preset] | own)), recipe
    start_task = TASKS[start["train_config"].get("task", "pretrain")]
    model = dict(task.from_start(start["model_config"], start["train_config"]))
    for f in fields(task.config):
        of_weights = model.get(f.name)
        if f.metadata.get("in_weights") and f.name in model and own.get(
                f.name, of_weights) != of_weights:
            raise SettingError(f"{flag_name(f.name)} is {of_weights} in the weights of --init "
                               f"and cannot be {own[f.name]}; leave it out")
    if start_task.config is not task.config:
        return task.config(**(task.sizes[preset] | model | own)), recipe
    if task.start_is_needed and preset != "tiny":
        model |= task.model_settings
        # BLIP-2's sizes fit patches of 14; with others the next size that fits.
        patches = math.ceil(model["image_size"] / model["patch_size"])
        model["image_size"] = patches * model["patch_size"]
    return task.config(**(model | own)), recipe
