"""Which parameters the objectives reach, found by a backward pass: nobody has to keep a list."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor, nn

from config import OBJECTIVES, TrainConfig
from data.files import InputError
from training import devices
from training.settings import flag_name

WeightOf = Callable[[str], float]  # name of a loss -> its weight in the sum


def each_counts(loss: str) -> float:
    """The weight of each loss is 1."""
    return 1.0


def reached_parameters(model: nn.Module, inputs: dict,
                       weight_of: WeightOf = each_counts) -> tuple[set[str], set[str]]:
    """Names of the parameters that the losses of this moment reach, and of these losses.

    inputs: arguments of the model's forward. A loss of weight 0 reaches nothing. Neither the model
    (its buffers are put back) nor the random generators change. Raises InputError for a loss that
    is no scalar or has no gradient.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with devices.generators_kept(device):
        losses, _ = model.forward(**inputs)  # not model(...): Diagnostics does not hear this pass
    for name, loss in losses.items():
        if not isinstance(loss, Tensor):
            raise InputError(f"the loss {name!r} is a {type(loss).__name__}; it must be a tensor: "
                             "where there is nothing to learn, 0 times one that has a gradient")
        if loss.ndim:
            raise InputError(f"the loss {name!r} has shape {tuple(loss.shape)}; it must be a "
                             "scalar: take its mean")
        if not loss.requires_grad:
            raise InputError(f"the loss {name!r} has no gradient, so it would train nothing; is it "
                             "made of detached tensors, or within torch.no_grad()?")
    counted = [loss for name, loss in losses.items() if weight_of(name)]
    if not counted:
        raise InputError("all losses are switched off; give one of them a weight above 0")
    gradients = torch.autograd.grad(sum(counted), list(named.values()), allow_unused=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    reached = {name for name, gradient in zip(named, gradients) if gradient is not None}
    return reached, set(losses)


def require_reached(model: nn.Module, trainable: set[str], inputs: dict) -> None:
    """InputError, by name, for a parameter that none of the model's objectives reaches.

    It would stay as it started, and nobody would notice.
    """
    model.set_objectives(OBJECTIVES)
    reached, _ = reached_parameters(model, inputs)
    idle = sorted(trainable - reached)
    if idle:
        raise InputError(f"no loss reaches {', '.join(idle[:5])}{' ...' if idle[5:] else ''}: it "
                         "would never be trained; use it in a loss of the model's forward (a loss "
                         "that begins later is in every step too, times 0 until then), or leave it "
                         "out of the model")


def freeze_unreached(model: nn.Module, trainable: set[str], inputs: dict,
                     weight_of: WeightOf = each_counts) -> set[str]:
    """Freeze what the losses of this moment do not reach, alone; names of the losses.

    trainable: names of the parameters that the run trains at all. DistributedDataParallel waits for
    a gradient of every parameter that is not frozen; wrap the model again after this.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name in trainable)
    reached, losses = reached_parameters(model, inputs, weight_of)
    for name, p in model.named_parameters():
        p.requires_grad_(name in reached)
    return losses


def require_read_weights(config: TrainConfig, losses: set[str]) -> None:
    """InputError for the weight of a loss of one's own, which this task does not have.

    Those of BLIP's own objectives are checked with the flags, before there is a model.
    """
    for f in fields(config):
        name = f.name.removesuffix("_weight")
        changed = name != f.name and getattr(config, f.name) != f.default
        if changed and name not in losses and name not in OBJECTIVES:
            raise InputError(f"{flag_name(f.name)} does nothing in {config.task}: its model "
                             f"returns no loss {name!r}, but {', '.join(sorted(losses))}; leave "
                             "it out, or name the task that has this loss")


def require_same_losses(losses: dict, expected: set[str], step: int) -> None:
    """InputError where a step has other losses than those that decided what is trained."""
    other = sorted(set(losses) ^ expected)
    if other:
        raise InputError(f"the loss {other[0]!r} is in some steps only (step {step}); return it in "
                         "every step, times 0 where it is not wanted: what no loss reaches is "
                         "frozen")
