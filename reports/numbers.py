"""Numbers on the screen and in metrics.json."""

from pathlib import Path

from data.files import write_json


def trivial_levels(numbers: dict) -> tuple[dict, dict]:
    """What chance gives, or a constant caption, for each measure; and the latter alone."""
    constant = {k: v for k, v in numbers.get("constant", {}).items() if k != "caption"}
    return numbers.get("chance", {}) | constant, constant


def print_numbers(numbers: dict) -> None:
    """One line for each measure, with chance, or what the constant caption scores, beside it.

    A measure NAME_by holds one value for each kind.
    """
    trivial, constant = trivial_levels(numbers)
    for name, value in numbers.items():
        level = trivial.get(name.removesuffix("_rerank"))
        if isinstance(value, float):
            print(number_line(name, value, level, "constant caption" if name in constant
                              else "chance"))
        elif name.endswith("_by"):
            shown = []
            for kind, of_kind in value.items():
                chance = f" (chance {100 * level[kind]:.1f})" if level else ""
                shown.append(f"{kind} {100 * of_kind:.1f}{chance}")
            print(f"{name:24}   " + ", ".join(shown))


def print_highlights(highlights: tuple, numbers: dict) -> bool:
    """Print the numbers that matter most, in words; False if there are none.

    highlights: for each line one or several (name of a number, what it says, the paper's
    counterpart); the first one whose number is there is printed, with chance beside it.
    """
    trivial, _ = trivial_levels(numbers)
    printed = False
    for choices in highlights:
        for name, words, paper in choices:
            if name in numbers:
                level = trivial.get(name.removesuffix("_rerank"))
                beside = "" if level is None else f" (chance {100 * level:.1f})"
                beside += f"; {paper}" if paper else ""
                print(f"{100 * numbers[name]:7.1f}  {words}{beside}")
                printed = True
                break
    return printed


def number_line(name: str, value: float, level: float | None, level_name: str) -> str:
    """A measure with its trivial level; ranks as they are, the rest in percent."""
    factor, digits = factor_and_digits(name)
    beside = "" if level is None else f"   ({level_name} {factor * level:.1f})"
    return f"{name:24}{factor * value:8.{digits}f}{beside}"


def factor_and_digits(name: str) -> tuple[int, int]:
    """How a measure is shown: ranks as they are, the rest in percent."""
    return (1, 2) if "_rank" in name.removesuffix("_rerank") else (100, 1)


def write_numbers(path: Path, numbers: dict, settings: dict) -> None:
    """metrics.json: the numbers, and everything that they depend on."""
    write_json(path, numbers | {"settings": settings})
