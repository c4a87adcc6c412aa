"""What the training loop asks of every model, for models that have no twins and no queue."""

from torch import Tensor, nn


class Trainable(nn.Module):
    """A model with one objective, no momentum twins, no queue and no clamped temperature.

    forward(**batch) -> (losses by name, keys for a queue). BLIP has all of these methods for real.
    """

    def twins(self) -> list:
        """(online module, momentum twin) pairs: none."""
        return []

    def set_objectives(self, objectives: tuple[str, ...]) -> None:
        """There is one."""

    def update_momentum(self) -> None:
        """There are no twins."""

    def enqueue(self, keys: dict[str, Tensor]) -> None:
        """There is no queue."""

    def clamp_temperature(self) -> None:
        """There is no temperature to clamp."""

    def pretrained_name(self, name: str) -> str:
        """Parameter -> the one of the model that it starts from; "" for none."""
        return name
