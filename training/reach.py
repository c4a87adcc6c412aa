"""Which parameters the objectives reach, found by a backward pass: nobody has to keep a list."""

import torch
from torch import nn

from config import OBJECTIVES
from data.files import InputError
from training import devices


def reached_parameters(model: nn.Module, inputs: dict) -> set[str]:
    """Names of the parameters that get a gradient from the sum of the model's current losses.

    inputs: arguments of the model's forward. Neither the model nor the random generators change.
    Raises InputError for a loss that is no scalar or has no gradient.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # so that no statistics are updated
    with devices.generators_kept(device):
        losses, _ = model.forward(**inputs)  # not model(...): Diagnostics does not hear this pass
    for name, loss in losses.items():
        if loss.ndim:
            raise InputError(f"the loss {name!r} has shape {tuple(loss.shape)}; it must be a "
                             "scalar: take its mean")
        if not loss.requires_grad:
            raise InputError(f"the loss {name!r} has no gradient, so it would train nothing; is it "
                             "made of detached tensors, or within torch.no_grad()?")
    gradients = torch.autograd.grad(sum(losses.values()), list(named.values()), allow_unused=True)
    model.train(was_training)
    return {name for name, gradient in zip(named, gradients) if gradient is not None}


def require_reached(model: nn.Module, trainable: set[str], inputs: dict) -> None:
    """InputError, by name, for a parameter that none of the model's objectives reaches.

    It would stay as it started, and nobody would notice.
    """
    model.set_objectives(OBJECTIVES)
    idle = sorted(trainable - reached_parameters(model, inputs))
    if idle:
        raise InputError(f"no loss reaches {', '.join(idle[:5])}{' ...' if idle[5:] else ''}: it "
                         "would never be trained; use it in a loss of the model's forward, or "
                         "leave it out of the model")


def freeze_unreached(model: nn.Module, trainable: set[str], inputs: dict) -> None:
    """Freeze what the model's current objectives do not reach, and only that.

    trainable: names of the parameters that the run trains at all. DistributedDataParallel waits for
    a gradient of every parameter that is not frozen; wrap the model again after this.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name in trainable)
    reached = reached_parameters(model, inputs)
    for name, p in model.named_parameters():
        p.requires_grad_(name in reached)
