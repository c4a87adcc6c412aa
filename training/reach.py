"""Which parameters the objectives reach, found by a backward pass: nobody has to keep a list."""

import torch
from torch import Tensor, nn

from config import OBJECTIVES
from data.files import InputError
from training import devices


def reached_parameters(model: nn.Module, inputs: dict) -> tuple[set[str], set[str]]:
    """Names of the parameters that the losses of this moment reach, and of these losses.

    inputs: arguments of the model's forward. Neither the model (its buffers are put back) nor the
    random generators change. Raises InputError for a loss that is no scalar or has no gradient.
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
    gradients = torch.autograd.grad(sum(losses.values()), list(named.values()), allow_unused=True)
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


def freeze_unreached(model: nn.Module, trainable: set[str], inputs: dict) -> set[str]:
    """Freeze what the objectives of this moment do not reach, alone; names of their losses.

    trainable: names of the parameters that the run trains at all. DistributedDataParallel waits for
    a gradient of every parameter that is not frozen; wrap the model again after this.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name in trainable)
    reached, losses = reached_parameters(model, inputs)
    for name, p in model.named_parameters():
        p.requires_grad_(name in reached)
    return losses


def require_same_losses(losses: dict, expected: set[str], step: int) -> None:
    """InputError where a step has other losses than those that decided what is trained."""
    other = sorted(set(losses) ^ expected)
    if other:
        raise InputError(f"the loss {other[0]!r} is in some steps only (step {step}); return it in "
                         "every step, times 0 where it is not wanted: what no loss reaches is "
                         "frozen")
