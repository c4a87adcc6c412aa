"""Several training runs beside each other: their curves in one picture, their numbers in one table.

    python -m tools.compare runs/a runs/b                     two runs
    python -m tools.compare runs/a-? runs/b-?                 two settings, several seeds each
    python -m tools.compare runs/a-? --at 100 300             also the log after these steps

Runs whose settings differ in nothing but the seed are one group: the table has its mean and its
spread (standard deviation). So are finetunings with the seeds 0, 1 ... from runs/a-0, runs/a-1 ...
Two groups with the same seeds are compared seed by seed: p is the probability that chance alone
makes so large a mean difference (paired t-test). A difference below the one that "would be seen" is
no evidence that there is none. Writes curves.png and table.md into --out.
"""

import argparse
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from data.files import InputError, make_folder, read_json
from reports.curves import NO_PANEL, draw_curves, read_log
from reports.numbers import factor_and_digits, trivial_levels
from reports.statistics import mean_and_spread, paired_test, smallest_visible
from reports.tables import markdown_row
from training.program import exit_status
from training.settings import FileFlag, flag_name

# Settings that do not make another group.
SAME_RUN = {"seed", "out", "device", "workers", "log_every", "save_every", "save_minutes", "keep"}
STARTS = {"init", "language_model", "text_from"}  # checkpoints that a run starts from
NO_FLAGS = ("code", "processes")  # of metrics.json's settings


@dataclass
class RunFolder:
    """What a run has left in its folder; numbers and settings are empty before its end."""

    name: str
    log: list[dict]
    numbers: dict
    settings: dict

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.settings["seed"]


def open_run(folder: str | Path) -> RunFolder:
    """Read a run's folder. Raises InputError."""
    path, numbers = Path(folder), {}
    if (path / "metrics.json").exists():
        numbers = read_json(path / "metrics.json")
        settings = numbers.get("settings") if isinstance(numbers, dict) else None
        if not isinstance(settings, dict) or "seed" not in settings:
            raise InputError(f"{path}/metrics.json does not tell the run's settings; give the "
                             "folder of a run of train.py")
    settings = dict(numbers.pop("settings", {}))
    return RunFolder(str(path), read_log(path), numbers, settings | settings.pop("model", {}))


# ---- groups --------------------------------------------------------------------------------------

def group_runs(runs: list[RunFolder]) -> dict[str, list[RunFolder]]:
    """The finished runs by their settings, the seed left aside -> a group's name -> its runs.

    A name is what differs between the groups, as flags. A setting that some of the runs do not have
    (they are of another version) makes another group, but is not in the name.
    """
    finished, by_settings = [run for run in runs if run.numbers], {}
    for run in finished:
        settings = {name: str(value) for name, value in run.settings.items()
                    if name not in SAME_RUN}
        for name in STARTS & settings.keys():
            seeds = {other.seed for other in finished
                     if str(other.settings.get(name)) == settings[name]}
            if len(seeds) == 1:  # a start of each seed's own: the number stands in its path
                settings[name] = re.sub(rf"(?<!\d){run.seed}(?!\d)", "SEED", settings[name])
        key = tuple(sorted(settings.items()))
        by_settings.setdefault(key, []).append(run)
    groups = {}
    for key, members in by_settings.items():
        own = [f"{name if name in NO_FLAGS else flag_name(name)} {value}" for name, value in key
               if all(name in run.settings for run in finished)
               and any((name, value) not in other for other in by_settings)]
        name = " ".join(own) or "all runs"
        while name in groups:
            name += ", other version"
        groups[name] = sorted(members, key=lambda run: run.seed)
    return groups


def seeds_of(members: list[RunFolder]) -> list[int]:
    """The seeds of a group's runs, in order."""
    return [run.seed for run in members]


def heading(name: str, members: list[RunFolder]) -> str:
    """A group's name with its seeds, for the table."""
    seeds = ", ".join(map(str, seeds_of(members)))
    return f"`{name}` (seed{'s' if len(members) > 1 else ''} {seeds})"


# ---- tables --------------------------------------------------------------------------------------

def measures_of(groups: dict[str, list[RunFolder]]) -> list[str]:
    """The numbers that all finished runs have, in the order of the first one."""
    runs = [run for members in groups.values() for run in members]
    return [name for name, value in runs[0].numbers.items()
            if name != "train_minutes" and all(isinstance(run.numbers.get(name), float)
                                               for run in runs)]


def difference_words(name: str, first: list[RunFolder], other: list[RunFolder]) -> str:
    """other - first, seed by seed: "+1.2 (p 0.03; 0.8 would be seen)"."""
    factor, digits = factor_and_digits(name)
    differences = [factor * (b.numbers[name] - a.numbers[name]) for a, b in zip(first, other)]
    words = f"{statistics.mean(differences):+.{digits}f}"
    if len(differences) < 2:
        return f"{words} (one seed: no test)"
    return (f"{words} (p {paired_test(differences):.3f}; "
            f"{smallest_visible(differences):.{digits}f} would be seen)")


def final_table(groups: dict[str, list[RunFolder]]) -> list[str]:
    """Markdown: a row for each number of metrics.json, a column for each group.

    Behind them the differences from the first group, for each other group that has the same seeds.
    """
    (_, first), *others = groups.items()
    paired = [(name, members) for name, members in others
              if seeds_of(members) == seeds_of(first)
              and len(set(seeds_of(members))) == len(members)]
    levels, _ = trivial_levels(first[0].numbers)
    columns = ["%, ranks as they are", "chance", *(heading(*group) for group in groups.items())]
    columns += [f"`{name}` minus the first" for name, _ in paired]
    lines = [markdown_row(columns), "|---" * len(columns) + "|"]
    for name in measures_of(groups):
        factor, digits = factor_and_digits(name)
        level = levels.get(name.removesuffix("_rerank"))
        row = [name, "" if level is None else f"{factor * level:.{digits}f}"]
        row += [mean_and_spread([run.numbers[name] for run in members], factor, digits)
                for members in groups.values()]
        row += [difference_words(name, first, members) for _, members in paired]
        lines.append(markdown_row(row))
    if len(groups) > 1:
        lines += ["", *(f"- `{name}`: {', '.join(run.name for run in members)}"
                        for name, members in groups.items())]
    if len(paired) < len(others):
        lines += ["", "No test where a group has other seeds than the first one, or a seed twice."]
    return lines


def log_table(name: str, runs: list[RunFolder], steps: list[int]) -> list[str]:
    """Markdown: what the logs say after some steps, mean and spread over the runs."""
    lines = [markdown_row([name, *(f"after {step:,} steps" for step in steps)]),
             "|---" * (len(steps) + 1) + "|"]
    names = dict.fromkeys(key for run in runs for line in run.log if "lr" in line for key in line)
    for key in names:
        if key in NO_PANEL:
            continue
        row = [key]
        for step in steps:
            values = [value_after(run.log, key, step) for run in runs]
            values = [value for value in values if value is not None]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        lines.append(markdown_row(row))
    return lines


def value_after(log: list[dict], key: str, step: int) -> float | None:
    """The number in the last line up to a step.

    None where that line lacks it, and where the run has not come so far.
    """
    lines = [line for line in log if line["step"] <= step and "lr" in line]
    if not lines or log[-1]["step"] < step:
        return None
    return lines[-1].get(key)


# ---- command line --------------------------------------------------------------------------------

def compare(folders: list[str], out: str, steps: list[int]) -> None:
    """Print the tables; write them and the curves. Raises InputError."""
    runs = [open_run(folder) for folder in dict.fromkeys(map(Path, folders))]
    groups = group_runs(runs)
    lines = final_table(groups) if groups else []
    unfinished = [run.name for run in runs if not run.numbers]
    if unfinished:
        lines += ["", "Not finished, so only in the curves: " + ", ".join(unfinished)]
    if steps:
        for name, members in (groups or {"all runs": runs}).items():
            lines += ["", *log_table(f"`{name}`", members, steps)]
    folder = make_folder(out)
    draw_curves(folder / "curves.png", {run.name: run.log for run in runs})
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"wrote {folder}/table.md, curves.png")


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="folders of train.py's runs")
    parser.add_argument("--out", default="runs/compare", action=FileFlag,
                        help="folder (default runs/compare)")
    parser.add_argument("--at", nargs="+", type=int, default=[], metavar="STEP",
                        help="also a table of the log after these steps")
    o = parser.parse_args(arguments)
    return exit_status(lambda: compare(o.run, o.out, o.at))


if __name__ == "__main__":
    sys.exit(main())
