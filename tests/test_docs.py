"""What the README and docs/ say: links lead somewhere, commands are understood, names exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import ablate
import capfilt
import eval as eval_command
from tasks.registry import BENCHMARKS, TASKS
from training.settings import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "results").glob("*.md")), ROOT / "exercises" / "README.md",
         ROOT / "blip2" / "README.md"]


def commands(page: Path) -> list[str]:
    """The lines of a page's code blocks that start one of our programs, continuations joined."""
    lines = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("#")[0].strip()
            program = r"((?:train|eval|capfilt|ablate)\.py\b.*)"
            part = re.search(rf"(?:python|torchrun.*?) {program}", line)
            if part:
                lines.append(part[1])
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_understood(page):
    for command in commands(page):
        program, *arguments = shlex.split(command)
        if program == "train.py":
            arguments = ["vqa" if a == "TASK" else a for a in arguments]
            parse(arguments, "")
        elif program == "eval.py":
            eval_command.command_line().parse_args(arguments)
        elif program == "capfilt.py":
            capfilt.command_line().parse_args([a for a in arguments if "FLAGS" not in a])
        else:
            ablate.command_line().parse_args(arguments)


def test_the_readme_is_one_that_one_wants_to_read():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 170
    assert [line for line in lines if len(line) > 130 and not line.startswith("|")] == []
    text = "\n".join(lines)
    assert text.index("python train.py") < text.index("python -m pytest") < text.index("## ")


def test_the_paper_table_names_what_is_there():
    """Every name behind a file in the README's table stands in one of the files of its row."""
    rows = re.findall(r"^\| .*?`\w[\w/]*\.py`.* \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 15
    for row in rows:
        _, files, names = row.strip("|").split("|")
        extra = re.findall(r"`([\w/]+\.py)`", names)
        text = "".join((ROOT / name).read_text()
                       for name in re.findall(r"`([\w/]+\.py)`", files) + extra)
        for name in re.findall(r"`([A-Za-z_.]+)`", names):
            if not name.endswith(".py"):
                assert re.search(rf"\b{re.escape(name.split('.')[-1])}\b", text), (row, name)


def test_every_task_and_benchmark_is_documented():
    text = "".join(page.read_text() for page in PAGES)
    for name in [*TASKS, *BENCHMARKS]:
        assert re.search(rf"(train|eval)\.py {name}[`\s]", text) or name == "pretrain", name


def count_lines(path: Path, names: list[str]) -> int:
    """Lines of these functions, classes and methods ("BLIP.forward"); no names: of the file."""
    text = path.read_text()
    if not names:
        return len(text.splitlines())
    total = 0
    for name in names:
        node = ast.parse(text)
        for part in name.split("."):
            node = next(child for child in node.body if getattr(child, "name", "") == part)
        total += node.end_lineno - node.lineno + 1
    return total


def test_the_reading_order_counts_its_lines():
    page = ROOT / "docs" / "reading.md"
    row = r"^\| \d+ \| \[([\w/.]+)\]\(\S+\)(.*?) \| (\d+) \| (\d+) \|"
    rows = re.findall(row, page.read_text(), re.M)
    assert len(rows) == 16 and len(page.read_text().splitlines()) <= 150
    for file, names, stated, _ in rows:
        lines = count_lines(ROOT / file, re.findall(r"`([\w.]+)`", names))
        assert abs(int(stated) - lines) <= max(4, 0.1 * lines), (file, names, stated, lines)
    assert 370 <= sum(int(minutes) for *_, minutes in rows) <= 410  # "about six and a half hours"


def test_every_step_of_the_reading_order_has_questions_and_answers():
    _, _, questions, *_, answers = (ROOT / "docs" / "reading.md").read_text().split("\n## ")
    for part in (questions, answers):
        assert len(re.findall(r"^\d+\. a\) .+ b\) ", part, re.M)) == 16
