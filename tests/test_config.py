"""The schedules of config.py: learning rate, alpha, which losses a step has."""

import pytest

from config import OBJECTIVES, TrainConfig, alpha_at, learning_rate, objectives_at


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
