"""What the programs tell a person: numbers on the screen and in metrics.json, which examples a
sheet shows, how a program ends.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import distributed
from data import InputError


def mean(values) -> float:
    """Of numbers or truth values; 0 for none."""
    values = list(map(float, values))
    return sum(values) / max(len(values), 1)


def examples(values: list[float], count: int) -> Iterator[tuple[str, list[int]]]:
    """("best", indices), ("worst", indices), ("random", indices): at most `count` each, the same
    random ones every time."""
    order = sorted(range(len(values)), key=values.__getitem__)
    yield "best", order[::-1][:count]
    yield "worst", order[:count]
    yield "random", random.Random("examples").sample(range(len(values)), min(count, len(values)))


def print_numbers(numbers: dict) -> None:
    """One line for each measure, with chance, or what the constant caption scores, beside it. A
    measure NAME_by holds one value for each kind."""
    trivial = numbers.get("chance", {}) | {k: v for k, v in numbers.get("constant", {}).items()
                                           if k != "caption"}
    for name, value in numbers.items():
        level = trivial.get(name.removesuffix("_rerank"))
        if isinstance(value, float):
            known = "constant caption" if name in numbers.get("constant", {}) else "chance"
            is_rank = "_rank" in name.removesuffix("_rerank")
            shown = f"{value:8.2f}" if is_rank else f"{100 * value:8.1f}"
            level = level if is_rank or level is None else 100 * level
            print(f"{name:24}{shown}" + ("" if level is None else f"   ({known} {level:.1f})"))
        elif name.endswith("_by"):
            print(f"{name:24}   " + ", ".join(
                f"{kind} {100 * v:.1f}" + (f" (chance {100 * level[kind]:.1f})" if level else "")
                for kind, v in value.items()))


def write_numbers(path: Path, numbers: dict, settings: dict) -> None:
    """metrics.json: the numbers, and everything that they depend on."""
    path.write_text(json.dumps(numbers | {"settings": settings}, indent=1) + "\n")


def exit_status(program: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a program's main part -> its exit status: what it returns, 2 after a user's mistake,
    which is one sentence, 130 after an interrupt."""
    try:
        status = program() or 0
        distributed.barrier()  # a rank that leaves while another still talks may be aborted
        return status
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    finally:
        distributed.finish()
