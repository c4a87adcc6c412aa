"""How long a run is: epochs and ramps fitted to the size of the data, and told."""

import json

from conftest import photographs, run

from config import TrainConfig
from training import checkpoints, plan
from training.plan import describe, fit
from training.settings import resolve


def fitted(pairs: int, **given):
    _, config = resolve(given)
    return fit(config, given, pairs)


def test_a_small_set_of_own_pairs_gets_the_steps_that_the_preset_needs():
    config, sentences = fitted(8542, data="a.json")
    assert config.epochs == 7 and config.epochs * (8542 // 32) >= 1600  # 266 steps an epoch
    assert config.lm_only_steps == 260 and config.crop_min == 0.5
    assert abs(config.alpha_epochs - 0.077 * 7) < 1e-9  # the same share of the run
    assert "--epochs 7 instead of 1: the preset needs about 1600 steps" in sentences[0]
    assert describe(config, 8542).endswith("7 epochs of 266 steps (8542 pairs in batches of 32)")


def test_what_is_given_stays_and_the_rest_is_cut_to_a_share():
    config, sentences = fitted(8542, data="a.json", epochs=1)
    assert config.epochs == 1
    assert (config.warmup_steps, config.lm_only_steps) == (26, 133)  # of 266
    assert "only 266 steps" in sentences[-1] and "more --epochs" in sentences[-1]
    config, _ = fitted(8542, data="a.json", epochs=1, lm_only_steps=200, warmup_steps=100)
    assert (config.warmup_steps, config.lm_only_steps) == (100, 200)


def test_the_worlds_and_the_papers_runs_stay_as_they_are():
    for given, pairs in (({}, 41600), ({"preset": "base", "data": "a.json"}, 14_000_000)):
        _, config = resolve(given)
        assert fit(config, given, pairs) == (config, [])


def test_what_a_task_does_not_read_is_not_fitted():
    """Pretraining has momentum twins, whose alpha ramps up; VQA has none."""
    recipe = dict(epochs=1, batch_size=10, warmup_steps=0, alpha_epochs=2.0)
    config, sentences = fit(TrainConfig(**recipe), {}, 1000)
    assert config.alpha_epochs == 0.25 and "--alpha-epochs 0.25 instead of 2" in sentences[0]
    config = TrainConfig(task="vqa", **recipe)
    assert fit(config, {}, 1000) == (config, [])


def test_many_pairs_need_no_more_epochs():
    config, sentences = fitted(100_000, data="a.json")
    assert config.epochs == 1 and not sentences


def test_short_captions_can_be_written():
    """--min-length 5 would forbid names of one or two words."""
    config = TrainConfig(data="a.json", min_length=5)
    fitted, (sentence,) = plan.fit_captions(config, [2] * 10 + [9] * 90)
    assert fitted.min_length == 3 and "--min-length 3 instead of 5" in sentence
    assert plan.fit_captions(config, [1] + [9] * 99) == (config, [])  # one odd caption of hundred
    assert plan.fit_captions(config, []) == (config, [])


def test_long_captions_are_cut_and_the_plan_says_so():
    """Of 12 tokens two are [CLS] and [SEP]."""
    config = TrainConfig(data="a.json", min_length=5, max_tokens=12)
    assert plan.fit_captions(config, [10] * 100) == (config, [])
    same, (sentence,) = plan.fit_captions(config, [10] * 95 + [11] * 5)
    assert same == config
    assert "5% of the captions of --data are longer than --max-tokens 12 and are cut" in sentence


def test_the_length_of_captions_comes_from_the_training_texts(tmp_path, capsys):
    folder = photographs(tmp_path, 40)
    rows = json.loads((folder / "train.json").read_text())
    for row in rows:
        row["caption"] = "star"
    (folder / "short.json").write_text(json.dumps(rows))
    assert run(tmp_path / "a", "--data", folder / "short.json", "--min-steps", "1") == 0
    assert "--min-length 2 instead of 5" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "a/checkpoint.pt")["train_config"]["min_length"] == 2
    assert run(tmp_path / "b", "--data", folder / "short.json", "--min-steps", "1",
               "--min-length", "4") == 0
    assert checkpoints.load(tmp_path / "b/checkpoint.pt")["train_config"]["min_length"] == 4


def test_the_plan_is_printed(tmp_path, capsys):
    folder = photographs(tmp_path, 40)
    assert run(tmp_path / "a", "--data", folder / "train.json", "--min-steps", "12",
               "--warmup-steps", "1") == 0
    out = capsys.readouterr().out
    assert "plan     15 steps: 3 epochs of 5 steps (40 pairs in batches of 8)" in out
    assert "--epochs 3 instead of 1: the preset needs about 12 steps" in out
