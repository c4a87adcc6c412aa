"""State dicts from files, and how they are copied into a model by names."""

import torch
from torch import Tensor, nn

from data.files import InputError, read_tensors
from vit import resize_positions

Names = list[tuple[str, list[str]]]  # (our name, foreign names that are joined along dim 0)


def state_dict_of(path: str) -> dict[str, Tensor]:
    """The tensors of a file: a state dict, or one under "model" or "state_dict"."""
    weights = read_tensors(path)
    for key in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not weights or not all(
            isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} is not a state dict of tensors")
    return weights


def fill(model: nn.Module, weights: dict[str, Tensor], names: Names, path,
         new_words: int = 0) -> tuple[set, set]:
    """Copy what `weights` holds into the model -> data pointers that were set, names used.

    Positions are resized. new_words: how many words the model may have beyond the given ones; they
    keep their values. Raises InputError where a size does not fit.
    """
    ours, filled, used = model.state_dict(), set(), set()  # state_dict() aliases the parameters
    for name, sources in names:
        if not all(source in weights for source in sources):
            continue
        value = weights[sources[0]]
        if len(sources) > 1:
            value = torch.cat([weights[source] for source in sources])
        if name.endswith("pos_embed"):
            value = resize_positions(value, ours[name].shape[1])
        target = ours[name]
        if name.endswith(("word.weight", "lm_head.bias")) and len(value) == len(target) - new_words:
            target = target[:len(value)]
        if target.shape != value.shape:
            raise InputError(f"{path}: {sources[0]} makes {tuple(value.shape)} where the model has "
                             f"{tuple(target.shape)}; give weights of the model's size")
        target.copy_(value)
        filled.add(ours[name].data_ptr())
        used.update(sources)
    return filled, used


def shorten(names: list[str]) -> str:
    """The first names and how many more."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "none") + more
