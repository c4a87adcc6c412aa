"""Check an exercise.

    python -m exercises.check 2              your answer in exercises/e02_itc_loss.py
    python -m exercises.check 2 --hint       the same, with a hint
    python -m exercises.check 2 --solution   the solution instead of your answer
    python -m exercises.check all            all of them

Prints one line for each check. Where the project has tests of the same function, they run too, with
your function in its place. Exit status 0: all passed; 1: something is wrong or not written yet.
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from exercises import checks
from exercises.grading import Grader, in_words

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Exercise:
    """One exercise: its file (with the number in front), its checks."""

    file: str
    check: Callable[[ModuleType, Grader], None]
    replaces: str = ""  # the project's function, "losses:itc_loss", whose tests run as well
    tests: str = ""  # pytest's arguments that choose them


COURSE = [
    Exercise("e01_next_token_targets", checks.check_targets, "losses:next_token_targets",
             "tests/test_losses.py -k lm_targets"),
    Exercise("e02_itc_loss", checks.check_itc, "losses:itc_loss", "tests/test_losses.py -k itc"),
    Exercise("e03_mine_hard_negatives", checks.check_mining),
    Exercise("e04_med_mask", checks.check_med_mask),
    Exercise("e05_momentum_update", checks.check_momentum),
    Exercise("e06_queue", checks.check_queue),
    Exercise("e07_top_p_filter", checks.check_top_p, "decoding:top_p_filter",
             "tests/test_decoding.py -k top_p_by_hand"),
    Exercise("e08_beams_done", checks.check_done, "decoding:Beams.done",
             "tests/test_decoding.py -k 'beam or beams'"),
    Exercise("e09_capfilt_decision", checks.check_capfilt),
    Exercise("e10_qformer_masks", checks.check_qformer),
    Exercise("e11_predict_losses", checks.check_predictions),
    Exercise("e12_predict_capfilt", checks.check_predictions),
    Exercise("e13_hunt_in_losses", checks.check_hunt_in_losses),
    Exercise("e14_hunt_in_the_model", checks.check_hunt_in_the_model),
]


def load(exercise: Exercise, solution: bool) -> ModuleType:
    """The student's module, or the solution's."""
    room = "exercises.solutions" if solution else "exercises"
    return importlib.import_module(f"{room}.{exercise.file}")


def grade(exercise: Exercise, module: ModuleType) -> Grader:
    """Run the checks of one exercise. The random numbers are the same each time."""
    torch.manual_seed(0)
    grader = Grader()
    try:
        exercise.check(module, grader)
    except (Exception, SystemExit) as error:  # for instance a function that was deleted
        grader.add(False, in_words(error))
    return grader


def run_own_tests(number: int, solution: bool) -> bool:
    """The project's tests of the function, in a process of their own; prints what they say."""
    command = [sys.executable, "-m", "exercises.own_tests", str(number)]
    result = subprocess.run(command + ["--solution"] * solution, cwd=ROOT)
    return result.returncode == 0


def check(number: int, solution: bool, hint: bool, own_tests: bool) -> bool:
    """Check and print one exercise; True where all passed."""
    exercise = COURSE[number - 1]
    print(f"== {number}: exercises/{'solutions/' * solution}{exercise.file}.py")
    try:
        module = load(exercise, solution)
    except (Exception, SystemExit) as error:  # a file that is no Python, too
        print(f"WRONG   the file cannot be read: {in_words(error)}")
        return False
    grader = grade(exercise, module)
    for line in grader.lines:
        print(line)
    passed = grader.passed()
    if passed and own_tests and exercise.replaces:
        sys.stdout.flush()
        passed = run_own_tests(number, solution)
    if hint:
        print(f"hint    {getattr(load(exercise, False), 'HINT', 'it was deleted from the file')}")
    elif not passed:
        print(f"        for a hint: python -m exercises.check {number} --hint")
    return passed


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = [str(number) for number in range(1, len(COURSE) + 1)]
    p.add_argument("number", choices=[*numbers, "all"], metavar="NUMBER",
                   help=f"1 to {len(COURSE)}, or all")
    p.add_argument("--hint", action="store_true", help="print a hint")
    p.add_argument("--solution", action="store_true", help="check the solution instead")
    p.add_argument("--quick", action="store_true", help="leave the project's own tests out")
    o = p.parse_args(arguments)
    chosen = numbers if o.number == "all" else [o.number]
    results = [check(int(number), o.solution, o.hint, not o.quick) for number in chosen]
    print(f"{sum(results)} of {len(results)} exercises passed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
