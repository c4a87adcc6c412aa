"""The house: which module may import which, and how long a file may be."""

import ast
from pathlib import Path

import pytest
import torch

import bench

ROOT = Path(__file__).parents[1]
CORE = {"blip", "vit", "med", "attention", "decoding", "losses", "distributed", "data", "world",
        "metrics", "sheets", "checkpoints", "config", "retrieval", "captioning", "logbook",
        "weights", "pairs", "report", "task_data", "task_eval", "tasks", "video", "world_tasks"}
MAY_IMPORT = {
    "attention": set(), "decoding": set(), "losses": set(), "distributed": set(), "data": set(),
    "world": set(), "pairs": {"data"}, "metrics": set(), "sheets": set(),
    "shards": {"data", "distributed", "pairs", "sheets"},
    "vit": {"attention"}, "med": {"attention"},
    "blip": {"vit", "med", "decoding", "losses", "distributed"},
    "tasks": {"blip", "decoding", "losses", "med"}, "world_tasks": {"world"},
    "config": {"blip"}, "weights": {"blip", "data", "tasks", "vit"},
    "checkpoints": {"blip", "data", "tasks", "vit", "weights"},
    "retrieval": {"blip", "data", "distributed", "metrics"},
    "captioning": {"blip", "data", "distributed", "med", "metrics", "pairs", "retrieval"},
    "report": {"data", "distributed"}, "task_data": {"data", "pairs", "world_tasks"},
    "task_eval": CORE - {"task_eval"} | {"demo"},
    "video": {"data", "pairs", "task_data"},
    "run": {"blip", "checkpoints", "config", "data", "distributed", "pairs", "task_data", "tasks",
            "weights", "world", "world_tasks"},
    "logbook": {"data", "distributed"},
    "demo": {"blip", "captioning", "checkpoints", "data", "retrieval", "sheets", "tasks"},
    "eval": CORE | {"demo"}, "train": CORE | {"eval", "run"},
    "webworld": CORE | {"eval", "shards"},
    "bench": CORE | {"eval", "run", "train"},
    "capfilt": CORE | {"eval", "run", "train", "shards", "webworld"},
    "ablate": CORE | {"eval", "run", "train", "shards", "webworld", "capfilt"},
}


def own_imports(path: Path) -> set[str]:
    modules = {p.stem for p in ROOT.glob("*.py")}
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & modules


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_imports_follow_the_graph(path):
    assert own_imports(path) <= MAY_IMPORT[path.stem]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_losses_see_tensors_only():
    assert (own_imports(ROOT / "losses.py") == set()
            and "self" not in (ROOT / "losses.py").read_text().split())


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
    found = bench.step_speed("tiny", 2, "cpu", False, False, False, repeats=1)
    assert 0 < found["share_of_peak"] < 1.5 and found["pairs_per_s"] > 0
