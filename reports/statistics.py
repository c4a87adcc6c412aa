"""Means over seeds, and whether a difference is more than chance."""

import math
import statistics

import numpy as np


def paired_test(differences: list[float]) -> float:
    """Paired t-test: how probable so large a mean difference is if there were none.

    Two-sided. 1.0 for a single seed, which tells nothing.
    """
    n = len(differences)
    if n < 2:
        return 1.0
    spread = statistics.stdev(differences)
    if spread == 0:
        return 0.0 if differences[0] else 1.0
    t, df = abs(statistics.mean(differences)) / spread * math.sqrt(n), n - 1
    # Student's density, integrated over the angle: t = sqrt(df) tan(angle)
    angle = np.linspace(math.atan(t / math.sqrt(df)), math.pi / 2, 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    values = np.cos(angle) ** (df - 1)
    return float(2 * scale * ((values[1:] + values[:-1]) / 2 * np.diff(angle)).sum())


def mean_and_spread(values: list[float]) -> str:
    """In percent: "97.3 ± 1.2"; the standard deviation is left out for a single value."""
    percent = [100 * value for value in values]
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{spread}"
