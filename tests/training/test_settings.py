"""The command line's settings: what is refused, what presets and a start decide."""

import argparse
import dataclasses
import math
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest

import train
from config import BLIPConfig, TrainConfig, learning_rate, setting
from tasks.registry import TASKS
from tasks.task import SOME_READ
from training.run import Run
from training.settings import add_flags, parse, resolve, training_flags


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
