"""How captions are sampled: what is measured of them, and the plots."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from data.files import read_json
from reports.charts import COLOURS
from tools import plots, sampling
from world.datasets import World
from world.language import describe


def test_truth_variety_and_what_the_filter_keeps():
    """Ten true captions; the even ones under another scene are false, and the filter sees half."""
    world, rng = World("held-out", 10), random.Random(0)
    captions = [describe(world.scene(i), rng) for i in range(10)]
    numbers = sampling.judge_captions(captions, [1.0] * 10, world)
    assert numbers["true"] == numbers["kept_true"] == 1 and numbers["rejected"] == 0
    shifted = [captions[(i + 1) % 10] if i % 2 == 0 else captions[i] for i in range(10)]
    scores = [0.1 if i in (0, 2) else 0.9 for i in range(10)]
    numbers = sampling.judge_captions(shifted, scores, world)
    assert numbers["true"] == 0.5 and numbers["rejected"] == pytest.approx(0.2)
    assert numbers["kept_true"] == pytest.approx(5 / 8)
    # Five words are two sequences of four; the same caption twice has two different ones of four.
    numbers = sampling.judge_captions(["a b c d e"] * 2, [1, 1], World("held-out", 2))
    assert numbers["distinct"] == 0.5


def test_the_command_keeps_experiments_side_by_side(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "WAYS", {name: sampling.WAYS[name]
                                           for name in ("beam search", "p 0.9")})
    flags = ["--size", "3", "--device", "cpu", "--out", str(tmp_path / "r" / "sampling")]
    one = ["--captioner", str(pretrained), "--filter", str(pretrained)]
    assert sampling.main([*flags, *one]) == 0
    assert sampling.main([*flags, "--captioner", *[str(pretrained)] * 2, "--filter",
                          *[str(pretrained)] * 2, "--name", "another"]) == 0
    experiments = read_json(tmp_path / "r" / "sampling.json")
    assert [len(ways["p 0.9"]) for ways in experiments.values()] == [1, 2]
    text = (tmp_path / "r" / "sampling.md").read_text()
    assert "## another\n\n2 seeds" in text and text.count("| beam search |") == 2
    assert sampling.main([*flags, "--captioner", str(pretrained), "--filter",
                          *[str(pretrained)] * 2]) == 2
    assert "1 captioners and 2 filters" in capsys.readouterr().err
    for foreign in ("[1]", '{"a": 1}', '{"a": {"b": [{"true": 1}]}}'):
        (tmp_path / "r" / "sampling.json").write_text(foreign)
        assert sampling.main([*flags, *one]) == 2
        assert "is not a file of this program" in capsys.readouterr().err
        assert (tmp_path / "r" / "sampling.json").read_text() == foreign


def colours_of(path) -> list[int]:
    """How many pixels have each of the first three colours."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return [int((pixels == colour).all(-1).sum()) for colour in COLOURS[:3]]


def test_plots_have_a_curve_for_each_kind(tmp_path, capsys):
    row = dict.fromkeys(plots.NOISE, 0.5)
    cells = {f"{kind}, {level}% bad": [row] for kind in ("raw", "CapFilt") for level in (0, 50)}
    (tmp_path / "noise.json").write_text(json.dumps({"seeds": [0], "cells": cells}))
    assert plots.main([str(tmp_path / "noise.json")]) == 0
    first, second, third = colours_of(tmp_path / "noise.png")
    assert second > 200 and third == 0  # the raw curve lies under CapFilt's here
    places = {"beam search": (0.1, 0.9), "p 0.8": (0.2, 0.8), "p 1.0": (0.4, 0.5)}
    ways = {way: [{"distinct": x, "true": y}] for way, (x, y) in places.items()}
    (tmp_path / "sampling.json").write_text(json.dumps({"a": ways}))
    assert plots.main([str(tmp_path / "sampling.json")]) == 0
    assert colours_of(tmp_path / "sampling.png")[0] > 200
    assert plots.main([str(tmp_path / "other.json")]) == 2
    assert "noise.json and of sampling.json" in capsys.readouterr().err
