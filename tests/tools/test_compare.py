"""Runs beside each other: groups, numbers and tests, on folders made by hand."""

import json
import statistics
from pathlib import Path

import pytest
from PIL import Image

from reports.curves import draw_curves
from reports.statistics import paired_test, smallest_visible
from tools import compare


def make_run(folder: Path, seed: int, score: float, rank: float = 2.0, **settings) -> Path:
    folder.mkdir(parents=True)
    log = [{"step": step, "lm": 5.0 - step, "lr": 0.1, "pairs_per_s": 9.0} for step in (1, 2, 4)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    saved = {"seed": seed, "out": str(folder), "lr": 0.1, "model": {"queue_size": 10}}
    for name, value in settings.items():
        (saved["model"] if name in saved["model"] else saved)[name] = value
    (folder / "metrics.json").write_text(json.dumps(
        {"t2i_r1": score, "t2i_mean_rank": rank, "train_minutes": 3.0, "steps": 4,
         "chance": {"t2i_r1": 0.1}, "settings": saved}))
    return folder


def colours(path: Path) -> int:
    return len(Image.open(path).convert("RGB").getcolors(1 << 24))


def test_two_groups_of_three_seeds(tmp_path, capsys):
    scores = {10: [0.50, 0.60, 0.70], 0: [0.45, 0.52, 0.69]}
    folders = [make_run(tmp_path / f"{size}-{seed}", seed, value, queue_size=size)
               for size, values in scores.items() for seed, value in enumerate(values)]
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out"), "--at", "3"]) == 0
    table = (tmp_path / "out/table.md").read_text()
    assert table in capsys.readouterr().out
    header, _, first, rank, *rest = table.splitlines()
    assert "`--queue-size 10` (seeds 0, 1, 2)" in header and "--seed" not in header
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    differences = [100 * (b - a) for a, b in zip(scores[10], scores[0])]
    assert cells == ["t2i_r1", "10.0", f"60.0 ± {statistics.stdev([50, 60, 70]):.1f}",
                     f"55.3 ± {statistics.stdev([45, 52, 69]):.1f}",
                     f"-4.7 (p {paired_test(differences):.3f}; "
                     f"{smallest_visible(differences):.1f} would be seen)"]
    assert rank.startswith("| t2i_mean_rank |  | 2.00 ± 0.00 | 2.00 ± 0.00 | +0.00 ")
    assert "| lm | 3 ± 0 |" in rest and "train_minutes" not in table
    assert colours(tmp_path / "out/curves.png") > 20


def test_a_step_that_the_run_did_not_reach_has_no_number(tmp_path, capsys):
    folder = make_run(tmp_path / "a", 0, 0.5)
    assert compare.main([str(folder), f"{folder}/", "--out", str(tmp_path / "o"), "--at", "4",
                         "5"]) == 0
    assert "| lm | 1 |  |" in capsys.readouterr().out  # one run, though it is named twice


@pytest.mark.parametrize("name, content", [("log.jsonl", '{"a": 1}'), ("log.jsonl", "[1]"),
                                           ("metrics.json", "[1]"), ("metrics.json", '{"a": 1}')])
def test_files_of_something_else_are_one_sentence(tmp_path, capsys, name, content):
    (make_run(tmp_path / "a", 0, 0.5) / name).write_text(content)
    assert compare.main([str(tmp_path / "a"), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert name in error and "give the folder of a run of train.py" in error


def test_more_micro_batches_are_another_group(tmp_path):
    """A micro-batch has its own negatives: --accumulate changes the result."""
    runs = [compare.open_run(str(make_run(tmp_path / f"{parts}", seed, 0.5, accumulate=parts)))
            for seed, parts in enumerate((1, 8))]
    assert len(compare.group_runs(runs)) == 2


def test_other_seeds_are_not_paired_and_an_unfinished_run_is_named(tmp_path, capsys):
    folders = [make_run(tmp_path / "a", 0, 0.5), make_run(tmp_path / "b", 1, 0.6, lr=0.2),
               make_run(tmp_path / "c", 0, 0.6, lr=0.2)]
    (folders[2] / "metrics.json").unlink()
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "minus the first" not in table and "No test where a group has other seeds" in table
    assert "only in the curves: " + str(tmp_path / "c") in table
    assert "`--lr 0.1` (seed 0)" in table and "| 50.0 | 60.0 |" in table


def test_a_run_of_another_version_is_another_group(tmp_path):
    folders = [make_run(tmp_path / "a", 0, 0.5), make_run(tmp_path / "b", 0, 0.6, new_setting=3),
               make_run(tmp_path / "c", 1, 0.6, new_setting=3)]
    groups = compare.group_runs([compare.open_run(folder) for folder in folders])
    assert [(name, compare.seeds_of(members)) for name, members in groups.items()] == [
        ("all runs", [0]), ("all runs, other version", [0, 1])]


def test_what_is_no_run_is_one_sentence(tmp_path, capsys):
    assert compare.main([str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "log.jsonl cannot be read; give the folder of a run" in error


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [1.0, float("nan"), 3.0],
                                    [float("inf")], [1e-5, 2e-5], [12000.0, 90000.0]])
def test_any_values_can_be_drawn(tmp_path, values):
    log = [{"step": step, "mine": value} for step, value in enumerate(values)]
    draw_curves(tmp_path / "c.png", {"a": log, "b": log[:1]}, {"mine": 0.0})
    assert colours(tmp_path / "c.png") > 10


def test_runs_of_edited_code_are_not_pooled_with_others(tmp_path, capsys):
    """The same flags and seeds, another loss: two groups, which are tested against each other."""
    folders = [make_run(tmp_path / f"{code}-{seed}", seed, 0.5 + 0.1 * (code == "b"), code=code)
               for code in ("a", "b") for seed in (0, 1)]
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    header, *rest = capsys.readouterr().out.splitlines()
    assert "`code a` (seeds 0, 1)" in header and "`code b` (seeds 0, 1)" in header
    assert f"- `code b`: {folders[2]}, {folders[3]}" in rest  # which runs these are


def test_finetunings_from_a_start_for_each_seed_are_one_group(tmp_path, capsys):
    """runs/a-0 with seed 0 and runs/a-1 with seed 1; another family of starts is another group."""
    folders = [make_run(tmp_path / f"{name}-{seed}", seed, 0.5, init=f"runs/{name}-{seed}/c-10.pt")
               for name in ("a", "b") for seed in (0, 1)]
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert "`--init runs/a-SEED/c-10.pt` (seeds 0, 1)" in header and "b-SEED" in header


def test_one_start_for_all_seeds_is_one_group(tmp_path, capsys):
    """Also where a seed's number stands in its path."""
    folders = [make_run(tmp_path / f"c-{seed}", seed, 0.5, init="runs/seed0/checkpoint.pt")
               for seed in range(3)]
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert "`all runs` (seeds 0, 1, 2)" in capsys.readouterr().out
