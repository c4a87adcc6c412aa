"""How an answer is judged: each check is one line, passed or what is wrong with it.

A student's function may raise, return nothing, or return another shape. All of these become a line
in plain words, never a traceback.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TOLERANCE = 1e-5  # float32 sums in another order differ by less
LONGEST = 12  # numbers of a tensor that are printed in full


@dataclass
class Line:
    """One check: did it pass, and what is printed."""

    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'WRONG '}  {self.text}"


class Grader:
    """The checks of one exercise so far."""

    def __init__(self):
        self.lines: list[Line] = []

    def passed(self) -> bool:
        """Whether there were checks and none failed."""
        return bool(self.lines) and all(line.passed for line in self.lines)

    def add(self, passed: bool, text: str) -> None:
        """Note one check."""
        self.lines.append(Line(passed, text))

    def compare(self, what: str, call: Callable[[], object], expected: object,
                mistakes: list[tuple[object, str]] | None = None) -> None:
        """Run the student's code and compare what it returns.

        what: the check in a few words. mistakes: (value, sentence) of well-known mistakes; where
        the value comes out, the sentence is printed too.
        """
        try:
            value = call()
        except NotImplementedError:  # the hole: said once, not for each check
            if not self.lines:
                self.add(False, "not written yet; replace the TODO and the last line by your code")
            return
        except Exception as error:  # whatever a student's code may raise
            self.add(False, f"{what}: {in_words(error)}")
            return
        difference = compare_values(value, expected)
        if not difference:
            self.add(True, what)
            return
        for wrong, sentence in mistakes or []:
            if not compare_values(value, wrong):
                difference += f". {sentence}"
                break
        self.add(False, f"{what}: {difference}")


def compare_values(value: object, expected: object) -> str:
    """What came out and what was expected, in words; nothing where they are equal."""
    if value is None:
        return "your function returned None. Does it end with `return`?"
    if isinstance(expected, tuple):
        if not isinstance(value, tuple) or len(value) != len(expected):
            return f"expected {len(expected)} values, got {show(value)}"
        differences = [compare_values(v, e) for v, e in zip(value, expected)]
        return next((text for text in differences if text), "")
    if isinstance(expected, Tensor):
        if not isinstance(value, Tensor):
            return f"expected a tensor {show(expected)}, got {show(value)}"
        if expected.dtype == torch.bool != value.dtype:
            return (f"got numbers of type {value.dtype}, expected True and False: attention adds a "
                    "mask of numbers to the scores, and masks nothing")
        if value.shape != expected.shape:
            return f"got shape {tuple(value.shape)}, expected shape {tuple(expected.shape)}"
        value = value.detach()
        near = torch.isclose(value.double(), expected.double(), TOLERANCE, TOLERANCE)
        if near.all():
            return ""
        if expected.numel() > LONGEST:
            place = (~near).nonzero()[0].tolist()
            got, wanted = value[tuple(place)].item(), expected[tuple(place)].item()
            return (f"the tensor {tuple(value.shape)} is wrong in {(~near).sum()} of "
                    f"{near.numel()} places; at {place} got {show(got)}, expected {show(wanted)}")
    elif isinstance(expected, float):
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(number, int | float) and abs(number - expected) <= TOLERANCE:
            return ""
    elif value == expected:
        return ""
    return f"got {show(value)}, expected {show(expected)}"


def show(value: object) -> str:
    """A value, short enough for one line."""
    if isinstance(value, Tensor):
        if value.numel() > LONGEST:
            return f"a tensor {tuple(value.shape)} that starts with {show(value.flatten()[:4])}"
        value = value.tolist()
    if isinstance(value, list):
        return f"[{', '.join(show(item) for item in value)}]"
    return f"{value:.4f}" if isinstance(value, float) else repr(value)


def in_words(error: Exception) -> str:
    """An exception of the student's code, with the line where it happened."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if "exercises" in frame.filename and "grading.py" not in frame.filename:
            where = f" (line {frame.lineno} of {Path(frame.filename).name})"
    return f"your code raised {type(error).__name__}: {error}{where}"
