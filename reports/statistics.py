"""Means over seeds, and whether a difference is more than chance."""

import math
import statistics
from functools import cache

import numpy as np

LEVEL = 0.05  # a smaller p-value is called more than chance
SEEDS_FOR_A_VERDICT = 5  # with fewer, one unusual seed decides


def t_test(t: float, df: int) -> float:
    """Two-sided p-value of Student's t with `df` degrees of freedom."""
    # Student's density, integrated over the angle: t = sqrt(df) tan(angle)
    angle = np.linspace(math.atan(abs(t) / math.sqrt(df)), math.pi / 2, 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    values = np.cos(angle) ** (df - 1)
    return float(2 * scale * ((values[1:] + values[:-1]) / 2 * np.diff(angle)).sum())


def paired_test(differences: list[float]) -> float:
    """p-value of the paired t-test: how probable so large a mean difference is by chance.

    Two-sided. 1.0 for a single seed, which tells nothing.
    """
    if len(differences) < 2:
        return 1.0
    spread = statistics.stdev(differences)
    if spread == 0:
        return 0.0 if differences[0] else 1.0
    t = statistics.mean(differences) / spread * math.sqrt(len(differences))
    return t_test(t, len(differences) - 1)


@cache
def critical_t(df: int) -> float:
    """The t whose two-sided p-value is LEVEL."""
    low, high = 0.0, 1000.0
    for _ in range(60):  # halved until they meet
        middle = (low + high) / 2
        if t_test(middle, df) > LEVEL:
            low = middle
        else:
            high = middle
    return high


def smallest_visible(differences: list[float]) -> float | None:
    """The smallest mean difference that the paired test would call more than chance.

    With this spread and so many seeds; None for a single seed.
    """
    if len(differences) < 2:
        return None
    t = critical_t(len(differences) - 1)
    return t * statistics.stdev(differences) / math.sqrt(len(differences))


def verdict(differences: list[float]) -> str:
    """"yes", "no" or "tie": is the first one better? "a look" with fewer than five seeds."""
    if len(differences) < SEEDS_FOR_A_VERDICT:
        return "a look"
    if paired_test(differences) >= LEVEL:
        return "tie"
    return "yes" if statistics.mean(differences) > 0 else "no"


def mean_and_spread(values: list[float], factor: float = 100, digits: int = 1) -> str:
    """In percent: "97.3 ± 1.2"; the standard deviation is left out for a single value."""
    shown = [factor * value for value in values]
    spread = f" ± {statistics.stdev(shown):.{digits}f}" if len(shown) > 1 else ""
    return f"{statistics.mean(shown):.{digits}f}{spread}"
