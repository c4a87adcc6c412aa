"""Whole runs, small enough for a test: what they write, refuse and resume."""

import functools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, equal_states, finetune, photographs, run
from PIL import Image

import blip
import train
from config import TrainConfig
from data.datasets import ImageDataset, Pair
from data.files import InputError
from tasks.registry import TASKS
from training import checkpoints, distributed, program
from training.run import EpochBatches, Run, digest_of_data
from training.settings import parse


def test_data_order_is_a_function_of_seed_epoch_and_step(monkeypatch):
    whole = list(EpochBatches(50, 8, seed=1, epoch=2, first_step=0))
    assert len(whole) == 6 and len({i for batch in whole for i in batch}) == 48
    assert list(EpochBatches(50, 8, 1, 2, 4)) == whole[4:]
    assert list(EpochBatches(50, 8, 1, 3, 0)) != whole
    monkeypatch.setattr(train.distributed, "world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(train.distributed, "rank", lambda rank=rank: rank)
        halves.append(list(EpochBatches(50, 8, 1, 2, 0)))
    assert [a + b for a, b in zip(*halves)] == whole


def test_a_run_on_the_world_writes_what_it_says(tmp_path, capsys):
    assert run(tmp_path / "a", "--scenes", 80) == 0
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4, 6, 8, 10]
    assert (set(log[0]) & {"itc", "itm", "lm"} == {"lm"}
            and {"itc", "itm", "lm", "temp", "alpha"} <= set(log[-1]))
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    for name in "t2i_r1 i2t_r1 t2i_true1 i2t_true1 itm_swap caption_true t2i_r1_rerank".split():
        level = metrics["constant" if name == "caption_true" else "chance"]
        assert 0 <= metrics[name] <= 1 and name.removesuffix("_rerank") in level
    assert set(metrics["itm_swap_by"]) == {"background", "colour", "shape", "size", "place"}
    assert all(Image.open(tmp_path / "a" / name).size[0] > 500
               for name in ("samples.png", "curves.png"))
    assert metrics["settings"]["model"]["queue_size"] == 20
    model, tokenizer = checkpoints.load_model(tmp_path / "a/checkpoint.pt")
    assert model.config.vocab_size == len(tokenizer.vocab)
    out = capsys.readouterr().out
    assert "ITM: negatives judged not to match (chance 50.00)" in out
    assert "chance" in out and str(tmp_path / "a") in out and "'batch_size': 8" in out
    # A second run does not write over the first.
    assert run(tmp_path / "a", "--scenes", 16) == 0
    assert (tmp_path / "a.old1/metrics.json").exists() and "moved to" in capsys.readouterr().out


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    flags = ("--scenes", 48, "--epochs", 2, "--dropout", 0.1, "--save-every", 5)
    assert run(tmp_path / "whole", *flags) == 0
    step, add = [0], train.Log.add
    def interrupted(self, *args, **kwargs):
        step[0] += 1
        if step[0] == 8:  # three steps after the checkpoint of step 5
            raise MemoryError
        add(self, *args, **kwargs)
    monkeypatch.setattr(train.Log, "add", interrupted)
    with pytest.raises(MemoryError):
        run(tmp_path / "part", *flags)
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path / "part")]) == 0
    assert equal_states(tmp_path / "whole", tmp_path / "part")
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "part")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]


def test_a_checkpoint_that_was_brought_here_alone_is_judged(tmp_path, capsys):
    """Its log stayed elsewhere: no curves, but numbers and no error."""
    assert run(tmp_path / "a", "--scenes", 32) == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "a/checkpoint.pt").rename(tmp_path / "b/checkpoint.pt")
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(tmp_path / "b")]) == 0
    assert "metrics.json" in capsys.readouterr().out and (tmp_path / "b/metrics.json").exists()
    assert not (tmp_path / "b/curves.png").exists()


def test_data_and_validation_file_may_move(tmp_path):
    folder = photographs(tmp_path / "data")
    assert run(tmp_path / "run", "--data", folder / "train.json", "--val", folder / "val.json",
               "--epochs", 1, "--eval-top-k", 2) == 0
    moved = folder.rename(tmp_path / "moved")
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--data",
                       str(moved / "train.json"), "--val", str(moved / "val.json")]) == 0


def test_resume_refuses_other_settings(tmp_path, capsys):
    assert run(tmp_path / "a", "--scenes", 16) == 0
    assert train.main(["--resume", "--out", str(tmp_path / "a"), "--lr", "0.5"]) == 2
    assert "--lr cannot change when a run is resumed" in capsys.readouterr().err
    assert train.main(["caption", "--resume", "--out", str(tmp_path / "a")]) == 2
    assert "is of pretrain, not of caption; begin with" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_an_interrupt_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    add = train.Log.add
    def press(self, *args, **kwargs):
        add(self, *args, **kwargs)
        if args[2] == 3:
            os.kill(os.getpid(), program.signal.SIGINT)
    monkeypatch.setattr(train.Log, "add", press)
    assert run(tmp_path / "a", "--scenes", 80) == 130
    assert "continue with: python train.py --resume" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "a/checkpoint.pt")["step"] in (3, 4)


def test_real_pairs(tmp_path, capsys):
    folder = photographs(tmp_path)
    (folder / "3.jpg").write_bytes(b"broken")
    assert run(tmp_path / "run", "--data", folder / "train.json", "--val", folder / "val.json",
               "--epochs", 2, "--workers", 1) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["images"] == 9 and metrics["texts"] == 18 and metrics["broken"] == 1
    assert metrics["chance"]["t2i_r1"] == pytest.approx(1 / 9) and metrics["train_broken"] >= 1
    assert metrics["train_broken_by"] == {"damaged or no image": metrics["train_broken"]}
    assert "images could not be read and were replaced" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_data(tmp_path, capsys):
    folder = photographs(tmp_path / "p")
    data, flags = folder / "train.json", ["--resume", "--out", str(tmp_path / "a")]
    assert run(tmp_path / "a", "--data", data, "--epochs", 1) == 0
    whole = data.read_text()
    images = [row["image"] for row in json.loads(whole)]
    for rows in (json.loads(whole)[:30], json.loads(whole)[:3],
                 [row | {"caption": "a dog"} for row in json.loads(whole)],
                 [row | {"image": name} for row, name in zip(json.loads(whole), images[::-1])]):
        data.write_text(json.dumps(rows))
        capsys.readouterr()
        assert train.main(flags) == 2
        error = capsys.readouterr().err
        assert f"is not what it was when the run in {tmp_path}/a began" in error
        assert f"now it has {len(rows)} examples" in error
    data.write_text(whole)
    assert train.main(flags) == 0
    (tmp_path / "p").rename(tmp_path / "q")  # the same data elsewhere
    assert train.main([*flags, "--data", str(tmp_path / "q/train.json")]) == 0


def test_one_changed_example_of_many_is_noticed():
    pairs = [Pair(f"{i}.png", (f"text {i}",), i) for i in range(5000)]
    def digest(pairs):
        return digest_of_data(TrainConfig(data="a.json"), ImageDataset(pairs, ".", 8))
    before = digest(pairs)
    assert digest(list(pairs)) == before
    for i in (1, 2501, 4999):
        assert digest(pairs[:i] + [Pair("x.png", (f"text {i}",), i)] + pairs[i + 1:]) != before
        assert digest(pairs[:i] + [Pair(f"{i}.png", ("other",), i)] + pairs[i + 1:]) != before


def test_ranks_agree_on_a_signal_after_every_step(monkeypatch):
    """torchrun kills them 30 seconds after it, and 20 steps may take longer."""
    run = SimpleNamespace(step=7, steps=100, steps_per_epoch=50, config=TrainConfig(log_every=20),
                          task=TASKS["pretrain"], datasets=None)
    now = time.perf_counter()
    def decided(signals: list, of_another_rank: tuple[bool, bool]) -> tuple[bool, bool]:
        monkeypatch.setattr(distributed, "gather", lambda own: own + [of_another_rank])
        return train.decide_together(run, signals, now)
    assert decided([], (False, False)) == (False, False)
    assert decided([], (True, False)) == decided(["a signal"], (False, False)) == (True, True)
    assert decided([], (False, True)) == (False, True)  # a checkpoint is due


def test_broken_pictures_that_come_first_by_chance_do_not_stop_a_run():
    """Of 240 pictures 20 are broken, fewer than a tenth; 11 of them are among the first 107."""
    run = Run.__new__(Run)
    run.config, run.seen, run.broken = TrainConfig(max_broken=0.1), 0, Counter()
    run.datasets = SimpleNamespace(train=range(240))
    def batch(whole: int, broken: int) -> dict:
        return {"image": torch.zeros(whole, 1), "broken": ["a.jpg (missing)"] * broken}
    run.count(batch(96, 11))
    run.count(batch(0, 0))
    assert run.seen == 107 and run.broken == {"missing": 11}
    with pytest.raises(InputError, match=r"32 of 128 .*the last: a.jpg \(missing\)"):
        run.count(batch(0, 21))


def test_more_examples_than_are_judged_are_told(tmp_path, capsys):
    folder = photographs(tmp_path)
    assert run(tmp_path / "run", "--data", folder / "train.json", "--val", folder / "val.json",
               "--eval-size", 7) == 0
    assert "of 10 examples of" in (said := capsys.readouterr().out)
    assert "the first 7 are judged" in said


def test_words_that_the_vocabulary_cannot_spell_are_told(tmp_path, pretrained, capsys):
    """Of a language with other letters; --init's vocabulary gets pieces for them."""
    folder = photographs(tmp_path / "p", caption="собака бежит по траве ☃")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh", "☃"]))
    flags = ["--data", folder / "train.json", "--batch-size", 8]
    assert run(tmp_path / "a", *flags, "--vocab", vocab) == 0
    assert "cannot spell 80% of the words of" in (said := capsys.readouterr().out)
    assert "'собака'" in said
    for new_pieces, told in ((0, True), (4000, False)):
        assert finetune("caption", pretrained, tmp_path / str(new_pieces), *flags, "--epochs", 1,
                        "--new-pieces", new_pieces) == 0
        said = capsys.readouterr().out
        assert ("cannot spell 100% of the words of" in said) == told
    assert "pieces added to --init's vocabulary" in said


@pytest.mark.parametrize("flags, message", [
    (["--data", "nothing.json"], "nothing.json does not exist"),
    (["--batch-size", "500", "--scenes", "100"], "fewer than --batch-size 500"),
    (["--vocab", "nothing.txt"], "vocabulary nothing.txt cannot be read"),
])
def test_bad_input_is_one_sentence(tmp_path, flags, message):
    done = subprocess.run([sys.executable, "train.py", *SMALL, "--out", str(tmp_path / "a"),
                           *flags], text=True, capture_output=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.strip().count("\n") == 0 and "Traceback" not in done.stderr


def test_own_files_in_the_runs_folder_are_refused_and_left_alone(tmp_path, capsys):
    folder = photographs(tmp_path / "p")
    (folder / "notes.tmp").write_text("mine")
    assert run(folder, "--data", folder / "train.json") == 2
    assert "train.json lies in the folder" in capsys.readouterr().err
    rows = json.loads((folder / "train.json").read_text())  # a list elsewhere, its pictures here
    (tmp_path / "list.json").write_text(json.dumps([
        row | {"image": f"{folder.name}/{row['image']}"} for row in rows]))
    assert run(folder, "--data", tmp_path / "list.json", "--image-root", tmp_path) == 2
    assert "0.jpg lies in the folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    for name in ("notes.tmp", "checkpoint.pt.123.tmp"):  # the second one is of a killed run
        (tmp_path / "run" / name).write_text("")
    assert run(tmp_path / "run", "--data", folder / "train.json", "--epochs", 1) == 0
    assert (tmp_path / "run/notes.tmp").exists() and (folder / "notes.tmp").exists()
    assert not (tmp_path / "run/checkpoint.pt.123.tmp").exists()


def test_a_validation_set_without_a_picture_is_said_before_training(tmp_path, capsys):
    folder = photographs(tmp_path)
    (folder / "gone.json").write_text('[{"image": "gone.jpg", "caption": "a thing"}]')
    assert run(tmp_path / "run", "--data", folder / "train.json", "--val",
               folder / "gone.json", "--eval-top-k", 1) == 2
    error = capsys.readouterr().err
    assert "none of the 1 images of" in error and "gone.json can be read" in error


def test_edited_code_is_not_taken_for_the_models_own(tmp_path, monkeypatch, capsys):
    """Going on with other code is said; a program of several trainings refuses."""
    given = parse([*SMALL, "--scenes", "32"], "")[0]
    train.train_into(tmp_path / "model", given)
    assert train.train_into(tmp_path / "model", given)  # the same code: nothing to do
    monkeypatch.setattr("training.run.digest_of_code", lambda: "edited00")
    with pytest.raises(InputError, match="holds a model of other code"):
        train.train_into(tmp_path / "model", given)
    assert train.main(["--resume", "--out", str(tmp_path / "model")]) == 0
    assert "the code was edited since this run's checkpoint" in capsys.readouterr().out
    code = json.loads((tmp_path / "model/metrics.json").read_text())["settings"]["code"]
    assert code.endswith(", then edited00")


@pytest.mark.parametrize("task, call", [("pretrain", 12), ("retrieval", 9)])
def test_a_model_of_nans_is_neither_judged_nor_kept(tmp_path, pretrained, monkeypatch, capsys,
                                                    task, call):
    """A loss that is finite with a gradient that is not: the model of before stays on the disk.

    In the last step of a pretraining; in the middle of a finetuning.
    """
    itc_loss, steps = blip.itc_loss, []
    def broken(*arguments):
        loss = itc_loss(*arguments)
        steps.append(loss)
        return loss + (loss - loss).sqrt() if len(steps) == call else loss
    monkeypatch.setattr(blip, "itc_loss", broken)
    flags = ["--scenes", 32, "--epochs", 3, "--save-every", 4, "--log-every", 100]
    start = functools.partial(finetune, task, pretrained) if task == "retrieval" else run
    assert start(tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert "holds numbers that are not finite; look for an operation" in error
    state = checkpoints.load(tmp_path / "run/checkpoint.pt")
    assert all(value.isfinite().all() for value in state["model"].values()) and state["step"] > 0
    if task == "retrieval":
        checkpoints.load_model(tmp_path / "run/best.pt")


def test_too_many_unreadable_images_stop_the_run(tmp_path, capsys):
    folder = photographs(tmp_path, 120)
    for i in range(0, 120, 3):
        (folder / f"{i}.jpg").unlink()
    assert run(tmp_path / "run", "--data", folder / "train.json", "--epochs", 5) == 2
    assert "images could not be read, more than --max-broken 0.1 allows" in capsys.readouterr().err
    for picture in folder.glob("*.jpg"):  # not one picture in the very first batch
        picture.write_bytes(b"broken")
    assert run(tmp_path / "first", "--data", folder / "train.json", "--epochs", 5) == 2
    assert "images could not be read, more than --max-broken 0.1 allows" in capsys.readouterr().err


def test_two_lists_are_a_mixture_without_validation(tmp_path):
    folder = photographs(tmp_path / "photos", 16)
    both = f"{folder}/train.json,{folder}/val.json"
    assert run(tmp_path / "a", "--data", both) == 0
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["steps"] == (16 + 20) // 8
