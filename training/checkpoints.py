"""Checkpoints: written whole or not at all, read without running any code in them.

    save(path, state)      a run's whole state
    load(path)             that state, checked
    load_model(path)       -> (model, tokenizer): a checkpoint is enough to rebuild both
    open_model(path, ...)  -> TrainedModel, for a purpose that the checkpoint must fit
    initialise(new, old)   start a finetuning from another model's weights

    python -m training.checkpoints export CKPT FOLDER --kind caption    for the transformers library
"""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import nn

from blip import BLIP
from config import TrainConfig
from data.files import InputError, read_tensors, whole_file
from data.text import Tokenizer
from tasks.registry import TASKS, make_model, preset_settings
from tasks.task import TrainedModel
from training.precision import speed_up_generation
from vit import resize_positions
from weights.released import export, load_released
from weights.transformers_library import export_transformers

# Fields and parameters of checkpoints that were written under another name.
OLD_FIELDS = {"world_size": "scenes"}
OLD_PARAMETERS = {".twins.0.": ".first.", ".twins.1.": ".second."}


def save(path: str | Path, state: dict, keep: int = 1) -> None:
    """Write `state`; the old file is whole until the new one is. Raises InputError.

    With keep > 1 the last `keep` of them stay, as checkpoint-STEP.pt; checkpoint.pt is the newest.
    """
    path = Path(path)
    if keep == 1:
        with whole_file(path, "wb") as file:
            torch.save(state, file)
        return
    numbered = path.with_name(f"{path.stem}-{state['step']:08d}{path.suffix}")
    with whole_file(numbered, "wb") as file:
        torch.save(state, file)
    second_name(numbered, path)
    digits = "[0-9]" * 8  # (not a copy that somebody made: checkpoint-00000500-good.pt)
    until_now = [other for other in sorted(path.parent.glob(f"{path.stem}-{digits}{path.suffix}"))
                 if other.name <= numbered.name]  # later ones are of a run that went on otherwise
    for old in until_now[:-keep]:
        old.unlink()


def second_name(path: Path, name: Path) -> None:
    """Give a file a second name, whole or not at all; a copy where there are no hard links."""
    temporary = Path(f"{name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, name)
    except OSError:
        with open(path, "rb") as source, whole_file(name, "wb") as file:
            shutil.copyfileobj(source, file)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict:
    """A checkpoint of this project; InputError if the file is something else."""
    state = read_tensors(path)
    if not is_ours(state):
        raise InputError(f"{path} is not a checkpoint of this project; released weights go through "
                         "load_released")
    with understood(path):
        return with_new_names(state)


@contextlib.contextmanager
def understood(path: str | Path) -> Iterator[None]:
    """Within it, what a checkpoint of another form makes the code raise becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        reason = f"it lacks the field {reason}" if isinstance(error, KeyError) else reason
        raise InputError(f"{path} cannot be used ({reason}); it was written by another version or "
                         "changed since: give another checkpoint, or train again")


def is_ours(state) -> bool:
    """Whether what a file holds is a checkpoint of this project."""
    return isinstance(state, dict) and {"model", "model_config", "tokenizer"} <= state.keys()


def with_new_names(state: dict) -> dict:
    """A checkpoint under today's names; what exists no longer is left out."""
    model = {}
    for name, value in state["model"].items():
        for old, new in OLD_PARAMETERS.items():
            name = name.replace(old, new)
        model[name] = value
    settings = {OLD_FIELDS.get(name, name): value
                for name, value in state.get("train_config", {}).items()}
    task, preset = settings.get("task", "pretrain"), settings.get("preset", "base")
    if task not in TASKS:
        raise ValueError(f"its task {task!r} is unknown")
    for f in fields(TASKS[task].config):  # what is not in the weights may have its default
        if f.metadata.get("in_weights") and f.name not in state["model_config"]:
            raise KeyError(f.name)
    settings = preset_settings(task, preset) | known_fields(TrainConfig, settings)
    settings = asdict(TrainConfig(**settings))
    return state | {"model": model, "train_config": settings,
                    "model_config": known_fields(TASKS[task].config, state["model_config"])}


def known_fields(config_class: type, values: dict) -> dict:
    """Without the fields that the class does not have."""
    names = {f.name for f in fields(config_class)}
    return {name: value for name, value in values.items() if name in names}


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Tokenizer]:
    """-> the model, in eval mode, and its tokenizer. Raises InputError."""
    trained = open_model(path, device=device, to_train=True)
    return trained.model, trained.tokenizer


def open_model(path: str | Path, needs: Iterable[str] = (), vocab: str = "",
               device: str | torch.device = "cpu", kinds: tuple[type, ...] = (BLIP,),
               heads: dict[str, int] | None = None, to_train: bool = False) -> TrainedModel:
    """A checkpoint of this project, or released weights, with a model in eval mode.

    Released weights need BERT's vocab.txt as `vocab`, and of unusual widths {"vit_heads",
    "text_heads"} as `heads`. `needs` names the objectives that must have been trained: a model
    finetuned for captions can no longer match. kinds: the classes that the model may have. Without
    to_train it lacks what only training reads (`for_use`). Raises InputError.
    """
    state = read_tensors(path)
    if is_ours(state):
        with understood(path):
            state = with_new_names(state)
            settings, tokenizer = state["train_config"], Tokenizer(state["tokenizer"])
            task = settings.get("task", "pretrain")
            model = make_model(task, TASKS[task].config(**state["model_config"]))
            model.load_state_dict(state["model"])
            answers = list(state.get("answers", []))
    elif vocab:
        tokenizer = Tokenizer.from_file(vocab)
        model, report = load_released(path, tokenizer=tokenizer, **(heads or {}))
        settings, answers = report.settings(), []
        print(report, file=sys.stderr)
    else:
        raise InputError(f"{path} is not a checkpoint of this project; if it holds released "
                         "weights, give --vocab with the vocab.txt of bert-base-uncased")
    task = settings.get("task", "pretrain")
    if not isinstance(model, kinds):
        fitting = [name for name, other in TASKS.items() if issubclass(other.model, kinds)
                   and not set(needs) & set(other.replaces)]
        raise InputError(f"{path} is a checkpoint of another task ({task}); give one of "
                         f"{' or '.join(fitting)}")
    untrained = [name for name in needs if not settings.get(f"{name}_weight", 1.0)
                 or name in TASKS[task].replaces]
    if untrained:
        losses = " and ".join(name.upper() for name in untrained)
        raise InputError(f"{path} is a checkpoint of another task ({task}): it was trained without "
                         f"{losses}, which this needs; give one of pretraining, or one finetuned "
                         "for this")
    require_finite(model, path)
    if not to_train:
        for_use(model)
    model = speed_up_generation(model.to(device).eval())
    return TrainedModel(model, tokenizer, settings, answers, released=not is_ours(state))


def for_use(model: nn.Module) -> None:
    """Take a model's momentum twins and queues away: they are half of it at base size.

    Only BLIP has them. What is left encodes, matches and writes, and cannot be trained.
    """
    if isinstance(model, BLIP):
        for name, _ in list(model.named_children()):
            if name.endswith("_m"):
                setattr(model, name, nn.Identity())
        for name in ("image_queue", "text_queue", "queue_ids"):
            setattr(model, name, getattr(model, name)[:0].clone())


def require_finite(model: nn.Module, path: str | Path) -> None:
    """InputError where a weight is infinite or no number: every score would be nan."""
    name = first_not_finite(model)
    if name:
        raise InputError(f"{path}: {name} holds numbers that are not finite; its training went "
                         "wrong: give an older checkpoint, or train again with a smaller --lr")


def first_not_finite(model: nn.Module) -> str:
    """The name of a weight that is infinite or nan, or of a buffer with nan; "": none is.

    A buffer of one's own may be infinite, as the best value so far is at the start.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return name
    for name, buffer in model.named_buffers():
        if buffer.isnan().any():
            return name
    return ""


def initialise(model: nn.Module, source: nn.Module,
               spelt: list[list[int]] = ()) -> list[str]:
    """Copy the weights of `source`, positions resized -> names of what starts afresh.

    The queues come along unless their length differs; then they start anew. Of a
    pretrained model a task's takes every parameter whose name (TaskModel.pretrained_name) and shape
    match. spelt: of each piece that the model's vocabulary has more, the pieces of the source's
    that it is made of; its rows start as their mean.
    """
    theirs, fresh = source.state_dict(), []
    alike = type(model) is type(source) or isinstance(model, BLIP) and isinstance(source, BLIP)
    for name, ours in model.state_dict().items():  # aliases the parameters
        value = theirs.get(name if alike else model.pretrained_name(name))
        if value is not None and name.endswith("pos_embed"):
            value = resize_positions(value, ours.shape[1])
        if value is not None and ours.shape == value.shape:
            ours.copy_(value)
        elif (value is not None and spelt and ours.shape[1:] == value.shape[1:]
              and len(ours) == len(value) + len(spelt)):
            ours.copy_(torch.cat([value, torch.stack([value[ids].mean(0) for ids in spelt])]))
        else:
            fresh.append(name)
    if isinstance(model, BLIP) and model.config.queue_size != source.config.queue_size:
        model.queue_ptr.zero_()
    return fresh


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description="Export a checkpoint to the transformers library.",
                                     allow_abbrev=False)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint")
    parser.add_argument("folder", help="for from_pretrained")
    parser.add_argument("--kind", choices=["caption", "retrieval"], required=True,
                        help="BlipForConditionalGeneration or BlipForImageTextRetrieval")
    o = parser.parse_args(arguments)
    try:
        trained = open_model(o.checkpoint, TASKS[o.kind].needs)
        export_transformers(export(trained.model, o.kind), trained.model.config,
                            trained.tokenizer, Path(o.folder), o.kind)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {o.folder}/pytorch_model.bin, config.json, vocab.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
