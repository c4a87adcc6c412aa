"""Measures that stay the same when a loss changes, and what they cost the training: nothing."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, equal_states, toy_batch, toy_model
from tqdm import tqdm

import train
from config import TrainConfig
from losses import next_token_targets
from training import diagnostics
from training.diagnostics import Diagnostics, chance_levels, final_lines
from training.log import Log
from training.settings import parse


def test_the_training_is_the_same_to_the_last_bit_without_them(tmp_path, monkeypatch):
    def train_small(name):
        flags = [*SMALL, "--out", str(tmp_path / name), "--scenes", "32", "--dropout", "0.1"]
        assert train.train(train.start(parse(flags, "")[0]))
    train_small("with")
    monkeypatch.setattr(diagnostics, "BLIP", str)  # so that no model is listened to
    train_small("without")
    assert equal_states(tmp_path / "with", tmp_path / "without")
    log = [json.loads(line) for line in (tmp_path / "with/log.jsonl").read_text().splitlines()]
    assert set(diagnostics.ABOUT) <= set(log[-1])
    assert {"lm_nll", "grad_norm"} == set(diagnostics.ABOUT) & set(log[0])  # LM alone


def test_what_is_measured_is_what_the_models_own_functions_say():
    model, batch = toy_model(label_smoothing=0.1).train(), toy_batch(6)
    heard = Diagnostics(model)
    losses, _ = model(**batch, alpha=0.4)
    found = heard.take(torch.tensor(2.0))
    with torch.no_grad():
        tokens, image_feat = model.encode_image(batch["image"])
        text_feat = model.encode_text(batch["ids"], batch["mask"])
        own = torch.arange(6)
        assert found["itc_i2t_acc"] == ((image_feat @ text_feat.T).argmax(1) == own).float().mean()
        assert found["itc_t2i_acc"] == ((text_feat @ image_feat.T).argmax(1) == own).float().mean()
        kv = model.project(tokens)
        matched = model.match(kv, batch["ids"], batch["mask"]).argmax(1).float().mean()
        assert found["itm_pos_acc"] == matched
        states, _ = model.med.decode(batch["ids"][:, :-1], batch["mask"][:, :-1], kv)
        targets = next_token_targets(batch["ids"], batch["mask"])
        nll = F.cross_entropy(model.med.logits(states).transpose(1, 2), targets)
    assert found["lm_nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert abs(losses["lm"].item() - nll.item()) > 1e-3 and found["grad_norm"] == 2.0


def test_pairs_of_one_image_stand_for_one_another():
    model, batch = toy_model().train(), toy_batch(4)
    heard = Diagnostics(model)
    model(**batch, image_ids=torch.zeros(4, dtype=torch.long))
    found = heard.take(torch.tensor(1.0))
    assert found["itc_i2t_acc"] == found["itc_t2i_acc"] == 1


def test_a_forward_that_was_changed_is_measured_as_far_as_it_is_known():
    model, batch = toy_model().train(), toy_batch(4)
    heard = {model.text_proj: [torch.eye(4), torch.eye(9)], model.vision_proj: [torch.eye(4)],
             model.itm_head: [torch.zeros(4, 2)], model.med.lm_head: [torch.zeros(4, 3, 40)]}
    assert diagnostics.measure(model, heard, batch) == {"itc_i2t_acc": 1, "itc_t2i_acc": 1}


def test_an_evaluation_and_another_model_are_not_listened_to():
    model, batch = toy_model().eval(), toy_batch()
    heard = Diagnostics(model)
    model(**batch)
    model.generate(batch["image"], max_length=6)
    assert not heard.heard and set(heard.take(torch.tensor(1.0))) == {"grad_norm"}
    assert Diagnostics(torch.nn.Linear(2, 2)).take(torch.tensor(1.0)) == {"grad_norm": 1.0}


def test_an_objective_that_begins_between_two_lines_has_its_own_mean(tmp_path):
    log, bar = Log(tmp_path, 0, every=4), tqdm(total=4, disable=True)
    one = torch.tensor(1.0)
    for step in range(1, 5):
        losses = {"lm": one} if step <= 2 else {"lm": one, "itc": 6 * one}
        log.add(losses, bar, step, False, 8, {})
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["lm"], line["itc"]) == (1.0, 6.0)


def test_chance_is_printed_and_a_loss_that_stands_there_is_told(monkeypatch):
    model = toy_model()
    monkeypatch.setattr(diagnostics.distributed, "world_size", lambda: 2)
    chance = chance_levels(model.config, TrainConfig(batch_size=8, accumulate=2))
    assert chance["itc"] == pytest.approx(math.log(2 + 10)) and chance["itc_i2t_acc"] == 1 / 2
    assert chance["itm"] == pytest.approx(-math.log(1 / 3) / 3 - 2 * math.log(2 / 3) / 3, abs=1e-4)
    assert chance_levels(object(), TrainConfig()) == {}
    log = [{"step": 20 * i, "lr": 1.0, "itc": 2.46, "itm": 0.4, "lm": 1.0, "itc_i2t_acc": 0.5,
            "grad_norm": 3.0} for i in range(1, 9)]
    lines = final_lines(log, chance)
    assert lines[0] == "in the training batches of the last 100 steps:"
    assert "50.00 %" in lines[1] and "(chance 50.00)" in lines[1] and "3.00" in lines[2]
    assert len(lines) == 4 and "docs/healthy.md" in lines[3]
    assert lines[3].startswith("itc still stands at chance (loss 2.460; of one that knows nothing")
    assert final_lines(log, {}) == []


def test_where_texts_repeat_chance_is_higher():
    """Half of the other texts are equal to one's own: they count as right."""
    assert diagnostics.share_of_equal(["a", "a", "b", "b"]) == pytest.approx(1 / 3)
    assert diagnostics.share_of_equal(["a", "b", "c"]) == diagnostics.share_of_equal([]) == 0
    chance = chance_levels(toy_model().config, TrainConfig(batch_size=4), equal=0.5)
    assert chance["itc_i2t_acc"] == chance["itc_t2i_acc"] == pytest.approx((1 + 3 / 2) / 4)


def test_the_loss_alone_does_not_tell_chance():
    """ITC's falls as soon as the queue's random vectors are told from texts."""
    chance = {"itc": 6.96, "itc_i2t_acc": 0.03, "itc_t2i_acc": 0.03, "itm": 0.6365,
              "itm_pos_acc": 0.5, "itm_neg_acc": 0.5}
    stuck = {"itc": 5.5, "itc_i2t_acc": 0.04, "itc_t2i_acc": 0.05, "itm": 0.6,
             "itm_pos_acc": 0.03, "itm_neg_acc": 0.99}
    assert diagnostics.stands_at_chance("itc", stuck, chance)
    assert diagnostics.stands_at_chance("itm", stuck, chance)  # it says no to everything
    learnt = stuck | {"itc_i2t_acc": 0.6, "itc_t2i_acc": 0.8, "itm_pos_acc": 0.8}
    assert not diagnostics.stands_at_chance("itc", learnt, chance)
    assert not diagnostics.stands_at_chance("itm", learnt, chance)
    assert not diagnostics.stands_at_chance("itc", {"itc": 5.5}, chance)  # an older log
