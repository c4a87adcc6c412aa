"""Run the project's own tests of a function with a student's function in its place.

    python -m exercises.own_tests 2 [--solution]

A process of its own, because the function is replaced before the tests import it.
"""

import importlib
import shlex
import sys

import pytest

from exercises.check import COURSE, load


class Printer:
    """A pytest plugin: one line for each test."""

    def pytest_runtest_logreport(self, report) -> None:
        """Print how a test came out."""
        if report.when != "call" or report.skipped:
            return
        name = report.nodeid.rpartition("::")[2]
        if report.passed:
            print(f"passed  the project's {name}")
        else:
            reason = report.longrepr.reprcrash.message.splitlines()[0]
            print(f"WRONG   the project's {name}: {reason}")


def main(arguments: list[str]) -> int:
    """-> exit status."""
    exercise = COURSE[int(arguments[0]) - 1]
    module_name, _, path = exercise.replaces.partition(":")
    holder = importlib.import_module(module_name)
    *classes, function = path.split(".")
    for name in classes:
        holder = getattr(holder, name)
    setattr(holder, function, getattr(load(exercise, "--solution" in arguments), function))
    quiet = ["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", "--capture=no"]
    return pytest.main([*quiet, *shlex.split(exercise.tests)], plugins=[Printer()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
