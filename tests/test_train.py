"""The command line, the schedules, and whole runs small enough for a test."""

import argparse
import ast
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, equal_states, photographs, run
from PIL import Image

import blip
import train
from blip import BLIP
from config import (
    OBJECTIVES,
    BLIPConfig,
    TrainConfig,
    alpha_at,
    learning_rate,
    objectives_at,
    setting,
)
from data.datasets import ImageDataset, Pair
from data.files import InputError
from tasks.registry import TASKS
from tasks.task import SOME_READ, EvalSettings
from training import checkpoints, distributed, program
from training.code import code_of
from training.run import EpochBatches, Run, digest_of_data, open_datasets
from training.settings import add_flags, parse, resolve, training_flags
from world.datasets import World

# ---- command line ----

@pytest.mark.parametrize("flags, message", [
    (["--nonsense", "1"], "unrecognized arguments: --nonsense"),
    (["--batch", "8"], "unrecognized arguments"),  # no abbreviations
    (["--augment", "maybe"], "neither true nor false"),
    (["--data", ""], "--data is empty; give a name, or leave the flag out"),
    (["--out", ""], "--out is empty"),
    (["captions"], "'captions' is no task; choose one of pretrain, retrieval, caption")])
def test_a_wrong_flag_is_an_error(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(flags, "")
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--schedule", "linear"], "--schedule is 'linear'; choose one of step, cosine"),
    (["--preset", "huge"], "choose one of base, large, tiny"),
    (["--vit-heads", "7"], "not a multiple of --vit-heads"),
    (["--itc-weight", "0", "--itm-weight", "0", "--lm-weight", "0"], "above 0"),
    (["--prompt", "a"], "--prompt does nothing in pretrain; leave it out (it is a setting of"),
    (["pretrain", "--all-negatives", "true"], "--all-negatives does nothing in pretrain"),
    (["vqa", "--lm-weight", "2"], "--lm-weight does nothing in vqa"),
    (["vqa", "--alpha", "0"], "--alpha does nothing in vqa"),
    (["nlvr2", "--label-smoothing", "0"], "--label-smoothing does nothing in nlvr2"),
    (["pretrain-clip", "--queue-size", "0"], "--queue-size does nothing in pretrain-clip"),
    (["--val", "val.json"], "--val is of own data"),
    (["--image-root", "pictures"], "--image-root is of own data"),
    (["--min-length", "31"], "--min-length 31 is more than --max-length 30"),
    (["--batch-size", "4", "--accumulate", "4"], "ITM needs a second one as a negative"),
    (["language-model", "--heads", "5"], "--width 128 is not a multiple of --heads 5"),
    (["language-model", "--heads", "2"], "--near-heads 4 is more than --heads 2"),
    (["caption"], "caption starts from another model: give --init CHECKPOINT, which "
                  "`python train.py` writes")])
def test_a_setting_that_cannot_be_is_one_sentence(flags, message, capsys):
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("task", ["pretrain", "caption", "vqa", "nlvr2", "pretrain-clip"])
def test_help_lists_every_field_that_a_task_reads_with_its_meaning(task, capsys):
    with pytest.raises(SystemExit):
        parse([task, "--help"], "")
    text = " ".join(capsys.readouterr().out.split())
    for f in (*fields(TrainConfig), *fields(BLIPConfig)):
        if f.metadata.get("flag", True):
            about = " ".join(f.metadata["about"].split())
            shown = f"--{f.name.replace('_', '-')} " in text and about in text
            assert about and shown == (f.name not in SOME_READ or f.name in TASKS[task].reads)


def test_a_flag_of_a_file_knows_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(["--out=~/runs", "--prompt", ""], "")[0] == {"out": "/home/me/runs", "prompt": ""}


def test_a_length_is_compared_with_the_presets_not_with_the_papers():
    assert training_flags("--min-length 25") == {"min_length": 25}
    assert resolve({"min_length": 25})[1].max_length == 30


def test_a_setting_that_there_is_not_is_told():
    with pytest.raises(ValueError, match="caption has no setting 'label_smoothin'"):
        resolve({"task": "caption", "label_smoothin": 0.1})


def test_a_flag_of_another_type_is_told():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        margin: float | None = setting(None, "of mine")
    with pytest.raises(TypeError, match="Mine.margin is a float | None, and a flag must be"):
        add_flags(argparse.ArgumentParser(), Mine, {})


def test_a_loss_of_ones_own_has_the_weight_that_the_settings_give_it():
    @dataclasses.dataclass(frozen=True)
    class Mine(TrainConfig):
        own_weight: float = 3.0
    run = SimpleNamespace(config=Mine(lm_weight=0.5), task=TASKS["pretrain-albef"])
    weights = [Run.weight_of(run, loss) for loss in ("itc", "lm", "mlm", "own", "other")]
    assert weights == [1.0, 0.5, 0.5, 3.0, 1.0]


def test_a_field_needs_no_text_and_no_range():
    """A student's new setting is a flag at once."""
    @dataclasses.dataclass(frozen=True)
    class Mine:
        margin: float = 0.1
        depth: int = setting(3, "how deep", least=1, most=9)
    parser = argparse.ArgumentParser()
    add_flags(parser, Mine, {})
    given = vars(parser.parse_args(["--margin", "0.5"]))
    assert given == {"margin": 0.5} and "--depth" in parser.format_help()


@pytest.mark.parametrize("given, message", [
    ({"lr": 0.0}, "--lr is 0.0; it must be above 0"),
    ({"epochs": 0}, "--epochs is 0; it must be at least 1"),
    ({"alpha": 1.5}, "--alpha is 1.5; it must be at most 1"),
    ({"max_broken": float("nan")}, "--max-broken is nan; give a number"),
    ({"temp": float("inf")}, "--temp is inf; give a number"),
    ({"max_positions": 16, "max_length": 16}, "--max-tokens is 30, more than the model's 16"),
    ({"task": "nothing"}, "'nothing' is no task; choose one of pretrain")])
def test_what_is_out_of_range_is_told_before_anything_starts(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(given)


def test_blip2s_images_fit_the_patches_of_their_start():
    """The paper's 364 and 490 are multiples of 14; this project's ViT has patches of 16."""
    model, recipe = resolve({"task": "blip2-stage1"}, {
        "model_config": dataclasses.asdict(BLIPConfig()), "train_config": {"preset": "base"}})
    assert not recipe.rand_augment and TrainConfig().rand_augment
    for task, size in (("blip2-retrieval", 368), ("blip2-caption", 368), ("blip2-vqa", 496)):
        before = "blip2-stage1" if task == "blip2-retrieval" else "blip2-stage2"
        start = {"model_config": dataclasses.asdict(TASKS[before].config(**{
                     f.name: getattr(model, f.name) for f in fields(model)})),
                 "train_config": {"preset": "base", "task": before}}
        assert resolve({"task": task}, start)[0].image_size == size


def test_presets_are_the_papers_and_flags_override_them():
    model, recipe = resolve(parse(["--preset", "base"], "")[0])
    assert (model == BLIPConfig()
            and (recipe.lr, recipe.batch_size, recipe.epochs) == (3e-4, 2880, 20))
    model, recipe = resolve(parse(["--preset", "large", "--lr", "1e-4"], "")[0])
    assert (model.vit_width, model.drop_path, recipe.lr, recipe.batch_size) == (
        1024, 0.1, 1e-4, 2400)


def test_finetuning_takes_the_papers_recipe_and_the_checkpoints_model():
    start = {"model_config": dataclasses.asdict(BLIPConfig(vit_depth=3)),
             "train_config": {"preset": "base"}}
    model, recipe = resolve({"task": "retrieval"}, start)
    assert (model.vit_depth, model.image_size) == (3, 384) and recipe.objective_weights()["lm"] == 0
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.max_tokens, recipe.schedule,
            recipe.warmup_steps, recipe.crop_min, recipe.min_lr) == (
                1e-5, 256, 6, 35, "epoch_cosine", 0, 0.5, 0.0)
    model, recipe = resolve({"task": "caption", "image_size": 224}, start)
    assert model.image_size == 224 and (recipe.prompt, recipe.epochs, recipe.max_tokens) == (
        "a picture of", 5, 40)
    assert [learning_rate(recipe, step, 10) for step in (0, 9, 10, 49)] == pytest.approx(
        [1e-5, 1e-5, 1e-5 * (1 + math.cos(math.pi / 5)) / 2,
         1e-5 * (1 + math.cos(math.pi * 4 / 5)) / 2])
    start["train_config"]["preset"] = "large"
    assert resolve({"task": "caption"}, start)[1].lr == 2e-6
    with pytest.raises(ValueError, match="--vit-depth is 3 in the weights of --init"):
        resolve({"task": "caption", "vit_depth": 4}, start)


# ---- schedules ----

def test_learning_rate_of_the_paper():
    base = TrainConfig(preset="base", warmup_steps=10)
    rates = [learning_rate(base, step, 100) for step in (0, 5, 10, 99, 100, 250, 1900)]
    assert rates == pytest.approx([1e-6, 1e-6 + (3e-4 - 1e-6) / 2, 3e-4, 3e-4, 3e-4 * 0.85,
                                   3e-4 * 0.85 ** 2, max(3e-4 * 0.85 ** 19, 1e-6)])
    cosine = TrainConfig(schedule="cosine", epochs=1, warmup_steps=0, lr=1.0, min_lr=0.0)
    assert [learning_rate(cosine, s, 100) for s in (0, 50)] == pytest.approx([1.0, 0.5])
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.0)
    for schedule in ("step", "cosine"):  # below --min-lr it is left as it was asked for
        low = TrainConfig(schedule=schedule, warmup_steps=0, lr=1e-8)
        assert learning_rate(low, 0, 100) == learning_rate(low, 300, 100) == 1e-8


def test_alpha_ramps_from_the_first_step_with_itc():
    early = TrainConfig(alpha_epochs=2)
    assert [alpha_at(early, s, 100) for s in (0, 100, 200, 900)] == pytest.approx(
        [0, 0.2, 0.4, 0.4])
    late = TrainConfig(alpha_epochs=1, lm_only_steps=50)
    assert [alpha_at(late, s, 100) for s in (50, 100, 150)] == pytest.approx([0, 0.2, 0.4])
    without_lm = TrainConfig(alpha_epochs=1, lm_only_steps=50, lm_weight=0)
    assert [alpha_at(without_lm, s, 100) for s in (0, 50, 100)] == pytest.approx([0, 0.2, 0.4])


def test_objectives_follow_weights_and_warm_start():
    assert objectives_at(TrainConfig(), 0) == ("itc", "itm", "lm")
    warm = TrainConfig(lm_only_steps=5, itm_weight=0)
    assert objectives_at(warm, 4) == ("lm",) and objectives_at(warm, 5) == ("itc", "lm")
    late = TrainConfig(itm_from=5)
    assert objectives_at(late, 4) == ("itc", "lm") and objectives_at(late, 5) == OBJECTIVES
    assert objectives_at(TrainConfig(lm_only_steps=5, lm_weight=0), 0) == ("itc", "itm")
    alone = TrainConfig(itc_weight=0, lm_weight=0, itm_from=5)
    assert objectives_at(alone, 0) == ("itm",)  # there is nothing else to begin with


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


# ---- whole runs ----

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


def finetune(task, init, out, *flags) -> int:
    return train.main([task, "--init", str(init), "--out", str(out), "--batch-size", "8",
                       "--scenes", "32", "--eval-size", "12", "--eval-top-k", "3",
                       "--min-steps", "0",
                       "--log-every", "1", "--workers", "0", *map(str, flags)])


@pytest.mark.parametrize("task, own, other", [("caption", {"lm"}, {"itc", "itm"}),
                                              ("retrieval", {"itc", "itm"}, {"lm"})])
def test_finetuning_in_the_world_keeps_the_best_epoch(tmp_path, pretrained, monkeypatch, task, own,
                                                      other):
    scores, out = iter([0.5, 0.9, 0.7]), tmp_path / "a"
    monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task],
                                                         score=lambda numbers: next(scores)))
    assert finetune(task, pretrained, out, "--epochs", 3) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["val_score"] for line in log if "val_score" in line] == [0.5, 0.9, 0.7]
    assert own <= set(log[0]) and not other & set(log[0])
    best, last = (checkpoints.load(out / f"{name}.pt") for name in ("best", "checkpoint"))
    assert best["step"] == 8 and "optimizer" not in best and last["best"] == 0.9
    assert not all(map(torch.equal, best["model"].values(), last["model"].values()))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["best_step"] == 8 and metrics["settings"]["task"] == task
    assert Image.open(out / "samples.png").size[0] > 500


def watch_forward(monkeypatch) -> list[dict]:
    """The arguments of each forward pass of the model."""
    seen, forward = [], BLIP.forward
    def watch(self, **arguments):
        seen.append(arguments)
        return forward(self, **arguments)
    monkeypatch.setattr(BLIP, "forward", watch)
    return seen


def test_the_prompt_stands_before_each_caption_and_gives_no_loss(tmp_path, pretrained, monkeypatch):
    seen = watch_forward(monkeypatch)
    assert finetune("caption", pretrained, tmp_path / "a", "--epochs", 1, "--prompt", "a red") == 0
    _, tokenizer = checkpoints.load_model(tmp_path / "a/best.pt")
    prompt = tokenizer.piece_ids("a red")
    for arguments in seen:
        assert "image_ids" not in arguments and "finetuning" not in arguments
        assert arguments["prompt_length"] == 1 + len(prompt)
        assert all(row[1:1 + len(prompt)].tolist() == prompt for row in arguments["ids"])


def test_retrieval_knows_which_texts_share_an_image(tmp_path, pretrained, monkeypatch):
    seen = watch_forward(monkeypatch)
    assert finetune("retrieval", pretrained, tmp_path / "a", "--epochs", 1, "--all-negatives",
                    "true") == 0
    image_ids = {World("train", 32).example(i).image_id for i in range(32)}
    assert {i for arguments in seen for i in arguments["image_ids"].tolist()} == image_ids
    assert all(arguments["finetuning"] and arguments["all_negatives"] for arguments in seen)


def test_twins_move_once_before_the_first_step_of_a_finetuning(tmp_path, pretrained):
    """As in the released code, which moves them before the features of a step."""
    start = checkpoints.load(pretrained)["model"]
    run = train.start({"task": "retrieval", "init": str(pretrained), "scenes": 16, "batch_size": 8,
                       "device": "cpu", "out": str(tmp_path / "r")})
    online, twin = start["vit.cls_token"], start["vit_m.cls_token"]
    assert torch.allclose(run.model.vit_m.cls_token, 0.99 * twin + 0.01 * online, atol=1e-7)
    assert not torch.equal(run.model.vit_m.cls_token, twin)


def test_a_resumed_finetuning_remembers_the_best_score(tmp_path, pretrained):
    assert finetune("retrieval", pretrained, tmp_path / "a", "--epochs", 2) == 0
    best = checkpoints.load(tmp_path / "a/checkpoint.pt")["best"]
    assert train.main(["retrieval", "--resume", "--out", str(tmp_path / "a")]) == 0
    assert checkpoints.load(tmp_path / "a/checkpoint.pt")["best"] == best > 0
    assert train.main(["caption", "--resume", "--out", str(tmp_path / "a")]) == 2


def test_images_of_another_size_and_ids_that_are_all_the_same(tmp_path, pretrained):
    """Positions are resized; a batch whose captions all belong to one image is no crash."""
    folder = photographs(tmp_path)
    rows = json.loads((folder / "train.json").read_text())
    (folder / "one.json").write_text(json.dumps([{**row, "image_id": "x"} for row in rows]))
    assert finetune("retrieval", pretrained, tmp_path / "a", "--data", folder / "one.json",
                    "--val", folder / "val.json", "--image-size", 48, "--epochs", 1) == 0
    model, _ = checkpoints.load_model(tmp_path / "a/best.pt")
    assert model.config.image_size == 48 and model.vit.pos_embed.shape[1] == 10


@pytest.mark.parametrize("task, flags, message", [
    ("caption", ["--vit-width", 32], "--vit-width is 16 in the weights of --init"),
    ("retrieval", ["--init", "LM"], "is a checkpoint of another task (pretrain): it was trained "
                                    "without ITC and ITM"),
    ("caption", ["--init", "nothing.pt"], "nothing.pt does not exist"),
    ("caption", ["--vocab", "VOCAB"], "is not the vocabulary of")])
def test_a_finetuning_that_cannot_start_says_why(tmp_path, pretrained, capsys, task, flags,
                                                 message):
    folder = photographs(tmp_path)
    state = checkpoints.load(pretrained)
    state["train_config"] |= {"itc_weight": 0.0, "itm_weight": 0.0}
    checkpoints.save(tmp_path / "lm.pt", state)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthing\n")
    places = {"LM": str(tmp_path / "lm.pt"), "VOCAB": str(folder / "vocab.txt")}
    flags = [places.get(flag, flag) for flag in flags]
    assert finetune(task, pretrained, tmp_path / "a", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "a").exists()


def test_a_start_in_the_runs_folder_is_refused(pretrained, tmp_path, capsys):
    """It would be moved aside, and the same command would not find it again."""
    (tmp_path / "run").mkdir()
    start = tmp_path / "run/best.pt"
    start.write_bytes(pretrained.read_bytes())
    assert finetune("caption", start, tmp_path / "run") == 2
    assert "best.pt lies in the folder" in capsys.readouterr().err and start.exists()


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


def test_annotations_that_are_trained_on_do_not_judge(tmp_path):
    """COCO's file has no splits: without --val there is no evaluation, and no best epoch."""
    folder = photographs(tmp_path)
    records = json.loads((folder / "train.json").read_text())
    (folder / "coco.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": record["image"]} for i, record in enumerate(records)],
        "annotations": [{"image_id": i, "caption": "a thing"} for i in range(len(records))]}))
    config = TrainConfig(data=str(folder / "coco.json"), out=str(tmp_path / "run"))
    datasets = open_datasets(TASKS["caption"], config, 32)
    assert len(datasets.train) == len(records) and datasets.val is None and datasets.final is None


@pytest.mark.parametrize("given", ["--data", "--val"])
def test_a_karpathy_files_val_chooses_and_its_test_judges(tmp_path, given):
    """Also when it is given with --val, beside another training file."""
    folder = photographs(tmp_path)
    names = [record["image"] for record in json.loads((folder / "train.json").read_text())][:6]
    splits = ["train", "train", "train", "val", "test", "test"]
    (folder / "karpathy.json").write_text(json.dumps({"images": [
        {"filename": name, "split": split, "sentences": [{"raw": "a thing"}]}
        for name, split in zip(names, splits)]}))
    data = folder / ("karpathy.json" if given == "--data" else "train.json")
    config = TrainConfig(task="retrieval", data=str(data), out=str(tmp_path / "run"),
                         val=str(folder / "karpathy.json") if given == "--val" else "")
    datasets = open_datasets(TASKS["retrieval"], config, 32)
    assert (len(datasets.val), len(datasets.final)) == (1, 2)


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


def test_docstrings_are_not_code_and_all_else_is():
    def code(about, sign, comment):
        text = f'def f(x):\n    """{about}"""\n    return x {sign} 1  # {comment}'
        return code_of(ast.parse(text))
    assert code("a", "+", "b") == code("c", "+", "d") != code("a", "-", "b")


def test_an_evaluation_draws_no_number_of_the_trainings(pretrained):
    trained = checkpoints.open_model(str(pretrained))
    state = torch.get_rng_state()
    TASKS["retrieval"].evaluate(trained, World("val", 8, trained.image_size), EvalSettings())
    assert torch.equal(torch.get_rng_state(), state)


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
