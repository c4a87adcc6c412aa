"""Measures, computed from plain numbers and strings."""

from torch import Tensor


def ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """scores (R, C), positives (R, C) bool -> (R,) rank of each row's best-placed
    positive, 0 = first.

    A tie counts against the positive, so that a constant score earns nothing.
    """
    best = scores.masked_fill(~positives, float("-inf")).amax(1, keepdim=True)
    return ((scores >= best) & ~positives).sum(1)


def recall(rank: Tensor, prefix: str, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """rank (R,) -> {prefix_r1: share of rows ranked first, prefix_r5 ..., prefix_r10 ...} as
    fractions."""
    return {f"{prefix}_r{k}": (rank < k).float().mean().item() for k in at}


def recall_chance(rows: int, columns: int, positives_per_row: int, prefix: str,
                  at=(1, 5, 10)) -> dict[str, float]:
    """Expected recall of a random order: 1 - P(no positive among the first k)."""
    chance = {}
    for k in at:
        miss = 1.0
        for i in range(min(k, columns)):
            miss *= max(columns - positives_per_row - i, 0) / (columns - i)
        chance[f"{prefix}_r{k}"] = 1 - miss
    return chance
