"""3. Draw a wrong column of each row: the more similar, the likelier."""

from collections.abc import Callable

from torch import Tensor


def mine_hard_negatives(sim: Tensor, positives: Tensor, floor: float,
                        draw: Callable[[Tensor], Tensor]) -> Tensor:
    """sim, positives (B, C) -> index (B,)."""
    weights = sim.softmax(1) + floor
    weights = weights.masked_fill(positives, 0)
    return draw(weights)
