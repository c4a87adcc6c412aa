"""How long a run is: epochs, and what ramps up at its start, fitted to the size of the data."""

import math
from dataclasses import replace

from config import TrainConfig
from tasks.registry import TASKS
from training.settings import flag_name, unread_settings

# What the beginning of a run may take of it at most.
WARMUP_SHARE, LM_ONLY_SHARE, ITM_SHARE, ALPHA_SHARE = 0.1, 0.5, 0.7, 0.25


def fit(config: TrainConfig, given: dict, pairs: int) -> tuple[TrainConfig, list[str]]:
    """The settings fitted to this many pairs, and sentences that say what was changed and why.

    What was given on the command line stays, and what the task does not read. On own data epochs
    are added until there are `min_steps`; warm-up, steps of LM alone and alpha's ramp are cut to a
    share of the run.
    """
    changes, reasons = {}, {}
    fixed = {*given, *unread_settings(TASKS[config.task])}
    steps_per_epoch = max(1, pairs // config.batch_size)
    if config.data and config.epochs * steps_per_epoch < config.min_steps:
        changes["epochs"] = math.ceil(config.min_steps / steps_per_epoch)
        reasons["epochs"] = f"the preset needs about {config.min_steps} steps"
        if "epochs" not in fixed:  # the ramp keeps its share of the run
            changes["alpha_epochs"] = config.alpha_epochs * changes["epochs"] / config.epochs
    changes = {name: value for name, value in changes.items() if name not in fixed}
    epochs = changes.get("epochs", config.epochs)
    steps = epochs * steps_per_epoch
    for name, share in (("warmup_steps", WARMUP_SHARE), ("lm_only_steps", LM_ONLY_SHARE),
                        ("itm_from", ITM_SHARE)):
        if getattr(config, name) > share * steps and name not in fixed:
            changes[name] = int(share * steps)
            reasons[name] = f"at most {share:.0%} of the run"
    if changes.get("alpha_epochs", config.alpha_epochs) > ALPHA_SHARE * epochs and (
            "alpha_epochs" not in fixed):
        changes["alpha_epochs"] = ALPHA_SHARE * epochs
        reasons["alpha_epochs"] = f"at most {ALPHA_SHARE:.0%} of the run"
    sentences = [f"  {flag_name(name)} {changes[name]:g} instead of {getattr(config, name):g}: "
                 f"{reason}" for name, reason in reasons.items() if name in changes]
    if config.data and steps < config.min_steps / 2:
        sentences.append(f"  only {steps} steps: the preset needs about {config.min_steps} to "
                         "learn anything; give more --epochs")
    return replace(config, **changes), sentences


def fit_captions(config: TrainConfig, lengths: list[int]) -> tuple[TrainConfig, list[str]]:
    """--min-length such that captions as short as the training ones can be written.

    lengths: how many pieces these have. The shortest 2 % are left out; a caption's length counts
    its first token too. A sentence says how many captions are cut.
    """
    if not lengths:
        return config, []
    sentences = []
    cut = sum(length > config.max_tokens - 2 for length in lengths) / len(lengths)  # [CLS], [SEP]
    if cut > 0.02:
        sentences.append(f"  {cut:.0%} of the captions of --data are longer than --max-tokens "
                         f"{config.max_tokens} and are cut")
    shortest = sorted(lengths)[len(lengths) // 50] + 1
    if shortest < config.min_length:
        sentences.append(f"  --min-length {shortest} instead of {config.min_length}: captions of "
                         "--data are as short as that")
        config = replace(config, min_length=shortest)
    return config, sentences


def describe(config: TrainConfig, pairs: int) -> str:
    """The length of a run in words."""
    steps = pairs // config.batch_size
    return (f"plan     {config.epochs * steps} steps: {config.epochs} epochs of {steps} steps "
            f"({pairs} pairs in batches of {config.batch_size})")
