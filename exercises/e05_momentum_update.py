"""5. The momentum twins (BLIP sec. 3.2; ALBEF sec. 3.5; MoCo eq. 2).

The twins follow the model slowly and get no gradient:

    twin = m * twin + (1 - m) * online          m = 0.995 in BLIP

So the features in the queue, computed some steps ago, still fit the ones computed now, and the
twins' predictions change more slowly than the model's. If the twins are too fast, old features in
the queue are useless.
"""

from torch import Tensor


def update_momentum(online: list[Tensor], twins: list[Tensor], momentum: float) -> None:
    """Change each twin in place; `online` stays as it is.

    online, twins: parameters in the same order, of the same shapes. It is called under
    torch.no_grad(). Returns nothing.
    """
    # TODO: a loop over both lists.
    raise NotImplementedError


HINT = """In place means: the tensor object stays the same. `twin = ...` only gives a new tensor the
old name. twin.mul_(m).add_(online, alpha=1 - m) changes the tensor itself, as twin.copy_() does."""
