"""log.jsonl and what else a run writes: damaged tails, full disks, empty files."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from PIL import Image
from tqdm import tqdm

import eval as evaluation
import train
from data.files import InputError
from reports.numbers import write_numbers
from reports.sheets import BLACK, Cell, draw_sheet
from training import checkpoints, program
from training.log import Log


@pytest.mark.parametrize("tail", ['{"step": 6, "lo', "\0" * 300, '{"step": 4}\0\0\n', "[1]\n7\n",
                                  "\udcff\udcfe"])
def test_a_damaged_log_does_not_stop_a_resumed_run(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 2}\n{"step": 4}\n' + tail.encode("utf-8", "surrogateescape"))
    log = Log(tmp_path, step=4, every=2)
    log.write({"step": 6})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]


def test_a_log_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n')
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="log.jsonl could not be written"):
        Log(tmp_path, step=2, every=2)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


@pytest.mark.parametrize("content", ["", '{"steps": 2, ', "{}"])
def test_metrics_that_are_not_whole_are_made_again(tmp_path, content):
    assert run(tmp_path / "a", "--scenes", 16) == 0
    (tmp_path / "a/metrics.json").write_text(content)
    train.train_into(tmp_path / "a", {})
    assert json.loads((tmp_path / "a/metrics.json").read_text())["steps"] == 2


def test_a_measure_that_is_no_number_is_left_out(tmp_path):
    """In float16 a gradient may overflow: the line is json all the same."""
    log = Log(tmp_path, 0, 1)
    log.add({"lm": torch.tensor(1.0)}, tqdm(total=2, disable=True), 1, False, 8,
            {"grad_norm": torch.tensor(float("inf")), "lm_nll": torch.tensor(2.0)}, lr=0.1)
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["lm_nll"] == 2.0 and "grad_norm" not in line


def test_a_loss_with_the_name_of_another_number_is_told(tmp_path):
    log = Log(tmp_path, 0, 1)
    with pytest.raises(InputError, match="a loss cannot be called 'temp'"):
        log.add({"temp": torch.tensor(1.0)}, tqdm(total=2, disable=True), 1, False, 8, {}, temp=0.1)


def test_judging_is_not_in_the_rate(tmp_path, monkeypatch):
    """A step a second; after the third one judging takes 100 seconds; a line every two steps."""
    now = iter([0, 2, 2, 103, 104, 104])
    monkeypatch.setattr("training.log.time", SimpleNamespace(perf_counter=lambda: next(now)))
    log = Log(tmp_path, 0, 2)
    for step in (1, 2, 3, 4):
        log.add({"lm": torch.tensor(1.0)}, tqdm(total=4, disable=True), step, False, 8, {})
        if step == 3:
            log.judged({"step": 3, "score": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["pairs_per_s"] for line in lines if "lm" in line] == [8.0, 8.0]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_sentence(tmp_path, pretrained, monkeypatch, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "p.png")
    monkeypatch.setattr(os, "fsync", full_disk)
    for write in (lambda: draw_sheet(tmp_path / "s.png", [("x", [[Cell(None, [("y", BLACK)])]])]),
                  lambda: write_numbers(tmp_path / "m.json", {}, {})):
        with pytest.raises(InputError, match="could not be written .No space left"):
            write()
    picture, common = str(tmp_path / "p.png"), ["--checkpoint", str(pretrained), "--device", "cpu",
                                                "--out", str(tmp_path / "out")]
    commands = [lambda: evaluation.main(["search", "a circle", "--images", picture, *common]),
                lambda: evaluation.main(["attend", picture, "a circle", *common]),
                lambda: evaluation.main(["describe", picture, *common]),
                lambda: checkpoints.main(["export", str(pretrained), str(tmp_path / "export"),
                                          "--kind", "caption"]),
                lambda: run(tmp_path / "run", "--scenes", 16)]
    for command in commands:
        capsys.readouterr()
        assert command() == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and "could not be written (No space left" in error
    left = [path for path in Path(tmp_path).rglob("*") if path.suffix == ".tmp"]
    assert left == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_one_sentence(number, capsys):
    def program_part():
        raise OSError(number, os.strerror(number), "x/y.json")
    assert program.exit_status(program_part) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: x/y.json cannot be used (") and error.count("\n") == 1


def test_the_prior_does_not_depend_on_interruptions(tmp_path, monkeypatch):
    """VQA's commonest answers are those of the last epoch, also when the run was resumed."""
    seen = []
    def look(trained, dataset, settings):
        seen.append([settings.training.example(i) for i in range(8)])
        return train.Evaluation({"x": 1.0}, [])
    monkeypatch.setitem(train.TASKS, "pretrain", replace(train.TASKS["pretrain"], evaluate=look))
    assert run(tmp_path / "a", "--scenes", 16, "--epochs", 2) == 0
    assert train.main(["--resume", "--out", str(tmp_path / "a")]) == 0
    assert seen[0] == seen[1]
