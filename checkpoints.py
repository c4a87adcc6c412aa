"""Checkpoints: written atomically, read without running any code in them.

    save(path, state)      a run's whole state
    load(path)             that state, checked
    load_model(path)       -> (model, tokenizer): a checkpoint is enough to rebuild both
    open_model(path, ...)  the same for a purpose, which the checkpoint's task must fit
    initialise(new, old)   start a finetuning from another model's weights

    python checkpoints.py export CKPT FOLDER --kind caption    for the transformers library
"""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from blip import BLIP, BLIPConfig
from data import InputError, Tokenizer
from tasks import make_model
from vit import resize_positions
from weights import export_transformers, load_released, read


def save(path: str | Path, state: dict, keep: int = 1) -> None:
    """Write `state` to path + ".tmp", flush it to the disk, then rename: the old file is whole
    until the new one is. With keep > 1 the last so many stay, as checkpoint-STEP.pt beside
    checkpoint.pt, which is the newest."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep > 1:
            numbered = path.with_name(f"{path.stem}-{state['step']:08d}{path.suffix}")
            numbered.unlink(missing_ok=True)
            os.link(temporary, numbered)  # the same file under a second name
            for old in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))[:-keep]:
                old.unlink()
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise InputError(f"checkpoint {path} could not be written ({str(error).splitlines()[0]}); "
                         "the previous one, if any, is as it was")


def load(path: str | Path) -> dict:
    """A checkpoint of this project; InputError if the file is something else."""
    state = read(path)
    if not is_ours(state):
        raise InputError(f"{path} is not a checkpoint of this project; released weights go through "
                         "load_released")
    return state


def is_ours(state) -> bool:
    """Whether what a file holds is a checkpoint of this project."""
    return isinstance(state, dict) and {"model", "model_config", "tokenizer"} <= state.keys()


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[BLIP, Tokenizer]:
    """-> the model, in eval mode, and its tokenizer."""
    model, tokenizer, _ = open_model(path, device=device)
    return model, tokenizer


def open_model(path: str | Path, needs: tuple[str, ...] = (), vocab: str = "",
               device: str | torch.device = "cpu",
               kinds: tuple[type, ...] = (BLIP,)) -> tuple[nn.Module, Tokenizer, dict]:
    """A checkpoint of this project or released weights (these need BERT's vocab.txt as `vocab`) ->
    the model, in eval mode, its tokenizer, and the settings that it was trained with.

    `needs` names the objectives that must have been trained: a model finetuned for captions can no
    longer match. `kinds`: the classes that the model may have (tasks.MODELS). Raises InputError.
    """
    state = read(path)
    if is_ours(state):
        settings, tokenizer = state.get("train_config", {}), Tokenizer(state["tokenizer"])
        known = {f.name for f in fields(BLIPConfig)}
        config = BLIPConfig(**{k: v for k, v in state["model_config"].items() if k in known})
        model = make_model(settings.get("task", "pretrain"), config, state["model"])
        model.load_state_dict(state["model"])
    elif vocab:
        tokenizer = Tokenizer.from_file(vocab)
        model, report = load_released(path, tokenizer=tokenizer)
        settings = report.settings()
        print(report, file=sys.stderr)
    else:
        raise InputError(f"{path} is not a checkpoint of this project; if it holds released "
                         "weights, give --vocab with the vocab.txt of bert-base-uncased")
    if not isinstance(model, kinds):
        task = settings.get("task", "pretrain")
        raise InputError(f"{path} is a checkpoint of another task ({task}); give one of "
                         f"{' or '.join(kind.__name__ for kind in kinds)}")
    untrained = [name for name in needs if not settings.get(f"{name}_weight", 1.0)]
    if untrained:
        losses = " and ".join(map(str.upper, untrained))
        raise InputError(f"{path} is a checkpoint of another task ({settings.get('task')}): it was "
                         f"trained without {losses}, which this needs; give one of pretraining, "
                         "or one finetuned for this")
    return model.to(device).eval(), tokenizer, settings


def initialise(model: nn.Module, source: nn.Module) -> None:
    """Copy the weights of `source`, positions resized to the model's grid; the queues too unless
    their length differs, which then start anew. A task's model takes from a pretrained one what it
    has a place for (tasks.py)."""
    theirs, alike = source.state_dict(), type(model) is type(source)
    for name, ours in model.state_dict().items():  # aliases the parameters
        value = theirs.get(name if alike else model.pretrained_name(name))
        if value is not None and name.endswith("pos_embed"):
            value = resize_positions(value, ours.shape[1])
        if value is not None and ours.shape == value.shape:
            ours.copy_(value)
    if isinstance(model, BLIP) and model.config.queue_size != source.config.queue_size:
        model.queue_ptr.zero_()


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
        needs = ("lm",) if o.kind == "caption" else ("itc", "itm")
        model, tokenizer, _ = open_model(o.checkpoint, needs)
        export_transformers(model, tokenizer, Path(o.folder), o.kind)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {o.folder}/pytorch_model.bin, config.json, vocab.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
