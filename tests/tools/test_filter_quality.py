"""How good CapFilt's filter is, by human pairs: shares, AUC, threshold, what is said."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from data.sources import PairIndex
from data.text import clean_caption
from tools.filter_quality import filter_quality, print_quality, report_filters
from world.datasets import World


def test_shares_auc_and_threshold():
    own, others = np.array([0.9, 0.8, 0.7, 0.2]), np.array([0.6, 0.3, 0.2, 0.1])
    quality = filter_quality(own, others, threshold=0.5)
    assert quality["accepted"] == {"true": 0.75, "false": 0.25}
    # 0.9, 0.8, 0.7 beat all four; 0.2 beats one and ties with one
    assert quality["auc"] == pytest.approx((3 * 4 + 1.5) / 16)
    assert quality["best_threshold"] == 0.7
    assert quality["accepted_at_best"] == {"true": 0.75, "false": 0.0}


def test_the_threshold_that_is_printed_accepts_what_is_said(capsys):
    """Rounded up to 1 it would accept nothing."""
    own, others = np.array([0.9987, 0.9986, 0.9985]), np.array([0.99, 0.5, 0.4])
    print_quality(filter_quality(own, others, threshold=0.5), 0.5, "filter")
    assert "--threshold 0.9985 would accept 100 % and 0 %" in capsys.readouterr().out


@dataclass
class Filter:
    """Stands in for a TrainedModel."""

    image_size: int = 32
    device: torch.device = torch.device("cpu")


@pytest.fixture()
def human(tmp_path) -> PairIndex:
    World("train", 40, seed=3).save(tmp_path, "human")
    return PairIndex.open(str(tmp_path / "human.json"), None, tmp_path / "index")


def test_a_filter_that_knows_and_one_that_guesses(human, capsys):
    """Own texts are told from others by their pictures; a guess is warned about."""
    truth = {clean_caption(pair.captions[0]) for pair in human}
    seen = []

    def knows(filter, images, texts):
        assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.float32
        seen.extend(texts)
        return [[0.4 if clean_caption(text) in truth and place == 0 else 0.1
                 for place, text in enumerate(of_image)] for of_image in texts]

    quality, = report_filters([Filter()], human, knows, 0.5)
    assert len(seen) == 40 and all(own != other for own, other in seen)
    assert {clean_caption(own) for own, _ in seen} == truth
    assert quality["pairs"] == 40 and quality["auc"] == 1.0
    assert quality["accepted"] == {"true": 0.0, "false": 0.0}
    said = capsys.readouterr().out
    assert "accepts 0 % and 0 % at threshold 0.5" in said and "AUC 1.00" in said
    assert "--threshold 0.4 would accept 100 % and 0 %" in said

    qualities = report_filters([Filter(), Filter()], human,
                               lambda _, images, texts: [[0.7, 0.7]] * len(texts), 0.5)
    assert [quality["auc"] for quality in qualities] == [0.5, 0.5]
    assert "WARNING filter 2 can hardly tell" in capsys.readouterr().out
