"""5. Each twin moves a small step towards the model."""

from torch import Tensor


def update_momentum(online: list[Tensor], twins: list[Tensor], momentum: float) -> None:
    """In place."""
    for parameter, twin in zip(online, twins):
        twin.copy_(momentum * twin + (1 - momentum) * parameter)
