"""The paired test, against closed forms."""

import math
import statistics

import pytest

from reports.statistics import paired_test, smallest_visible, verdict


@pytest.mark.parametrize("differences", [[1.0, 2.0, 3.0], [0.5, -0.5, 0.1], [4.0, 5.0],
                                         [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_the_paired_test(differences):
    """Against closed forms of Student's t (1, 2 and 4 degrees of freedom)."""
    n = len(differences)
    t = abs(statistics.mean(differences)) / statistics.stdev(differences) * math.sqrt(n)
    expected = {1: 1 - 2 * math.atan(t) / math.pi, 2: 1 - t / math.sqrt(2 + t * t),
                4: 1 - (1 + 2 / (4 + t * t)) * t / math.sqrt(4 + t * t)}[n - 1]
    assert paired_test(differences) == pytest.approx(expected, abs=1e-6)
    assert paired_test([-d for d in differences]) == pytest.approx(expected, abs=1e-6)


def test_one_seed_proves_nothing():
    assert paired_test([5.0]) == 1.0 and paired_test([0.0, 0.0]) == 1.0
    assert verdict([5.0]) == "a look" and smallest_visible([5.0]) is None
    assert verdict([5.0, 5.1, 4.9, 5.0]) == "a look"  # four seeds: a difference, but no verdict


def test_the_smallest_difference_that_could_have_been_seen():
    """2.776 standard errors with five seeds (Student's t, 4 degrees of freedom, 5 %)."""
    differences = [1.0, 2.0, 3.0, 4.0, 5.0]
    error = statistics.stdev(differences) / math.sqrt(5)
    assert smallest_visible(differences) == pytest.approx(2.776 * error, abs=1e-3)
    assert verdict(differences) == "yes" and verdict([-d for d in differences]) == "no"
    assert verdict([d - 2.0 for d in differences]) == "tie"
