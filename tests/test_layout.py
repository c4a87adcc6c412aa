"""The house: who may import whom, how long files and functions are, what docstrings look like."""

import ast
import re
from pathlib import Path

import pytest
import torch

from tasks import registry
from tools import bench
from training.code import imports_of

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in ROOT.rglob("*.py")
               if path.parts[len(ROOT.parts)] not in ("tests", ".venv", "runs"))
COMMANDS = {"train", "eval", "capfilt", "ablate"}
LEAVES = {"attention", "losses", "decoding", "config", "training.distributed",
          "training.trainable"}
CORE = LEAVES | {"vit", "med", "blip"}
MAY_IMPORT_COMMANDS = {"ablate": {"capfilt", "train"}, "capfilt": {"train"},
                       "exercises.checks": {"capfilt"}, "exercises.tour": {"train"},
                       "tools.sampling": {"capfilt"}}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(path) for path in FILES}


def own_imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    return set(imports_of(ast.parse(path.read_text()))) & MODULES


def room_of(name: str) -> str:
    return name.rpartition(".")[0]


def allowed(name: str) -> set[str]:
    """The seven rules."""
    rooms = {room: {m for m in MODULES if room_of(m) == room}
             for room in ("data", "reports", "world", "tasks", "training", "weights", "tools",
                          "blip2", "objectives")}
    if name in LEAVES:  # 1
        return set()
    if name in CORE:  # 2
        return CORE
    if name.startswith(("data.", "reports.")):  # 3
        return LEAVES | rooms["data"] | rooms["reports"]
    if name.startswith("world."):  # 4
        return LEAVES | rooms["data"] | rooms["world"]
    if name == "training.checkpoints" or name.startswith("weights."):  # 5
        return CORE | rooms["data"] | rooms["weights"] | {
            "tasks.registry", "tasks.task", "training.precision"}
    if name.startswith("tasks."):  # 6
        others = {"tasks.task"}
        # Pretraining is judged as retrieval and captions are; video is retrieval and VQA on clips.
        others |= {"tasks.pretraining": {"tasks.retrieval", "tasks.captioning"},
                   "tasks.video": {"tasks.retrieval", "tasks.vqa"}}.get(name, set())
        return CORE | rooms["data"] | rooms["world"] | rooms["reports"] | others
    if name.startswith("objectives."):  # 6, for other objectives
        return CORE | rooms["tasks"] - {"tasks.registry"} | rooms["objectives"]
    if name.startswith("blip2."):  # 6, for the second paper: it may build on the first one's tasks
        return (CORE | rooms["data"] | rooms["world"] | rooms["reports"] | rooms["blip2"]
                | rooms["weights"] | rooms["tasks"] - {"tasks.registry"})
    return MODULES - COMMANDS | MAY_IMPORT_COMMANDS.get(name, set())  # 7


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_seven_rules(path):
    assert own_imports(path) <= allowed(name_of(path))


def test_there_is_no_cycle():
    def visit(name: str, above: tuple[str, ...]):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in imports[name]:
                visit(other, (*above, name))
            done.add(name)
    imports, done = {name_of(path): own_imports(path) for path in FILES}, set()
    imports["tasks.registry"] |= set(registry.MODULES)
    for name in imports:
        visit(name, ())


def test_the_root_holds_what_the_paper_and_its_commands_are():
    assert {name for name in MODULES if not room_of(name)} == {
        "attention", "vit", "med", "losses", "decoding", "blip", "capfilt", "train", "eval",
        "ablate", "config"}
    solutions = ROOT / "exercises" / "solutions"  # apart: a student looks there last
    rooms = [path.parent for path in FILES if path.parent not in (ROOT, solutions)]
    assert all(room.parent == ROOT and (room / "__init__.py").exists() for room in rooms)
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "misc")]


def test_a_room_says_what_it_is_and_exports_nothing():
    for path in ROOT.glob("*/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, path


def test_the_paper_is_short():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines())
             for name in ("attention", "vit", "med", "losses", "decoding", "blip", "capfilt")}
    assert sum(lines.values()) <= 1500, lines


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_files_of_tests_stay_short():
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_docstrings_open_with_one_short_sentence(path):
    """At most 88 characters, then a blank line; every public function and class has one."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    public = [node for body in [tree.body, *(node.body for node in classes)] for node in body
              if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    without = [node.name for node in public if not ast.get_docstring(node)]
    assert without == [], "no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            first, *rest = ast.get_docstring(node).splitlines()
            assert len(first) <= 88, f"{node.name}: {first}"
            assert not rest or not rest[0], f"{node.name}: the first sentence goes on"


def test_losses_see_tensors_only():
    assert "self" not in re.findall(r"\w+", (ROOT / "losses.py").read_text())


# ---- speed that shows without a clock ----

@pytest.mark.slow
def test_a_full_size_step_costs_two_thirds_of_the_released_one():
    assert bench.step_gflop("base", batch=8) <= 0.68 * bench.RELEASED_GFLOP


@pytest.mark.slow
def test_counting_without_computing_counts_the_same():
    torch.manual_seed(0)
    assert bench.step_gflop("tiny", 8, "cpu") == pytest.approx(
        bench.step_gflop("tiny", 8), rel=1e-3)  # the kernels of attention are counted apart


def test_the_benchmarks_run():
    seconds = bench.generation_seconds("tiny", batch=1, repeats=1)
    assert all(0 < value < 60 for value in seconds.values()) and "beam 3" in seconds
    answering = bench.answering_seconds("tiny", repeats=1)
    assert all(0 < value < 60 for value in answering.values()) and "rank 128" in answering
    numbers = bench.step_speed("tiny", 2, "cpu", False, False, False, repeats=1)
    assert 0 < numbers["share_of_peak"] < 1.5 and numbers["pairs_per_s"] > 0
