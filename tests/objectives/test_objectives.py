"""Other objectives: hand-computed losses, and models whose every parameter is trained or frozen."""

import math

import pytest
import torch
from conftest import TOY, toy_batch

from config import OBJECTIVES, BLIPConfig, TrainConfig
from data.files import InputError
from losses import itm_loss
from objectives import losses, models
from training.diagnostics import ITM_CHANCE, chance_levels
from training.reach import reached_parameters, require_reached
from training.run import trainable_names

EYE = torch.eye(2)


def test_clip_loss_by_hand():
    """Two pairs, orthogonal features: each row is (1, 0) / temp."""
    loss = losses.clip_itc_loss(EYE, EYE, 0.5, EYE.bool())
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2.0)))
    alike = torch.ones(2, 4) / 2  # all features equal: chance
    assert losses.clip_itc_loss(alike, alike, 0.07, EYE.bool()).item() == pytest.approx(math.log(2))


def test_clip_trains_both_sides():
    image, text = EYE.clone().requires_grad_(), EYE.flip(0).clone().requires_grad_()
    losses.clip_itc_loss(image, text, 1.0, EYE.bool()).backward()
    assert image.grad.abs().sum() > 0 and text.grad.abs().sum() > 0


def test_sigmoid_loss_by_hand():
    loss = losses.sigmoid_itc_loss(EYE, EYE, 0.5, -1.0, EYE.bool())
    own, other = math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(-1.0))  # 2 - 1; -(0 - 1)
    assert loss.item() == pytest.approx(own + other)


def test_hidden_tokens():
    ids = torch.tensor([[101, 5, 6, 7, 102], [101, 8, 102, 0, 0]])
    mask = (ids != 0).long()
    draw = torch.tensor([[0.0, 0.9, 0.1, 0.9, 0.0], [0.0, 0.9, 0.0, 0.0, 0.0]])
    masked, targets = losses.mask_tokens(ids, mask, 103, [0, 101, 102], 0.15, draw)
    assert masked.tolist() == [[101, 5, 103, 7, 102], [101, 103, 102, 0, 0]]  # one at least
    assert targets.tolist() == [[-100, -100, 6, -100, -100], [-100, 8, -100, -100, -100]]


def test_focal_loss_weighs_easy_pairs_down():
    logits = torch.tensor([[0.0, 0.0], [-4.0, 4.0]])
    matched, valid = torch.tensor([1, 1]), torch.tensor([True, True])
    assert torch.equal(losses.focal_itm_loss(logits, matched, valid, 0.0),
                       itm_loss(logits, matched, valid))
    expected = (0.25 * math.log(2) + 0) / 2  # (1 - 1/2) ** 2
    assert losses.focal_itm_loss(logits, matched, valid).item() == pytest.approx(expected, abs=1e-5)


def test_filip_similarity_by_hand():
    patches = torch.stack([EYE, EYE.flip(0)])  # (2, 2, 2)
    words = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    similarity = losses.filip_similarity(patches, words, torch.tensor([[1, 1]]))
    assert torch.allclose(similarity, torch.full((2, 1), 0.9))
    first = losses.filip_similarity(patches, words, torch.tensor([[1, 0]]))
    assert torch.allclose(first, torch.ones(2, 1))


@pytest.mark.parametrize("share", ["all_but_sa", "none"])
@pytest.mark.parametrize("task", models.TASKS, ids=lambda task: task.name)
def test_every_parameter_of_every_objective_is_trained(task, share):
    """With all objectives on; and each alone gives a finite loss and a gradient."""
    torch.manual_seed(0)
    config = BLIPConfig(**TOY | dict(share=share))
    model, inputs = task.model(config), toy_batch() | {"alpha": 0.4}
    require_reached(model, trainable_names(model), inputs)
    for name in OBJECTIVES:
        model.set_objectives((name,))
        values, keys = model(**inputs)
        assert len(values) == 1 and all(value.isfinite() for value in values.values())
        reached, losses = reached_parameters(model, inputs)
        assert reached and losses == set(values)
        model.update_momentum()
        model.enqueue(keys)
        model.clamp_temperature()


def test_three_negatives_are_the_pairs_that_their_rows_say():
    """Each logit is that of `match` on the pair alone, and positives are not repeated."""
    torch.manual_seed(0)
    model = models.ManyNegatives(BLIPConfig(**TOY)).eval()
    drawn = []
    def likeliest(weights):
        drawn.append(weights.argmax(1))
        return drawn[-1]
    model.draw_negative = likeliest
    batch = toy_batch()
    tokens, _ = model.encode_image(batch["image"])
    kv, count = model.project(tokens), len(batch["ids"])
    logits, matched, valid = model._itm_pairs(tokens, kv, batch["ids"], batch["mask"], None, None,
                                              False, False)
    assert logits.shape == (7 * count, 2) and matched.tolist() == [1] * count + [0] * 6 * count
    own = model.match(kv, batch["ids"], batch["mask"])
    assert torch.allclose(logits[:count], own, atol=1e-5)
    for number, rows in enumerate(logits[count:].split(2 * count)):
        texts, images = drawn[2 * number:2 * number + 2]
        assert torch.allclose(rows[:count], model.match(kv, batch["ids"][texts],
                                                        batch["mask"][texts]), atol=1e-5)
        assert torch.allclose(rows[count:], model.match(kv.select(images), batch["ids"],
                                                        batch["mask"]), atol=1e-5)
    assert valid.all()


def test_three_negatives_are_three_different_ones():
    """The likeliest is not drawn again while another one has any weight."""
    torch.manual_seed(0)
    model = models.ManyNegatives(BLIPConfig(**TOY))
    asked = []
    model.draw_negative = lambda weights: asked.append(weights.clone()) or weights.argmax(1)
    batch = toy_batch()
    model(batch["image"], batch["ids"], batch["mask"])
    drawn = [weights.argmax(1) for weights in asked]
    assert len(drawn) == 6  # texts and images in turn
    for side in (drawn[0::2], drawn[1::2]):
        for row in torch.stack(side).T.tolist():
            assert len(set(row)) == min(3, len(batch["ids"]) - 1)


def test_each_objectives_chance_is_its_own():
    def levels(task: str, queue_size: int = 64) -> dict[str, float]:
        return chance_levels(BLIPConfig(**TOY | {"queue_size": queue_size}),
                             TrainConfig(task=task, batch_size=8))
    words = math.log(BLIPConfig(**TOY).vocab_size)
    assert levels("pretrain")["itc"] == math.log(72) and levels("pretrain")["itm"] == ITM_CHANCE
    assert levels("pretrain-clip", 0)["itc"] == math.log(8)
    assert "itc" not in levels("pretrain-siglip", 0)
    one_in_seven = -(math.log(1 / 7) / 7 + 6 / 7 * math.log(6 / 7))
    assert levels("pretrain-negatives")["itm"] == pytest.approx(one_in_seven, abs=1e-4)
    assert levels("pretrain-albef")["mlm"] == words and levels("vqa") == {}


@pytest.mark.parametrize("broken, said", [
    (lambda loss: loss[None].expand(3), r"the loss 'itc' has shape \(3,\)"),
    (lambda loss: loss.detach(), "the loss 'itc' has no gradient")])
def test_a_loss_that_cannot_train_is_named(monkeypatch, broken, said):
    model = models.BLIP(BLIPConfig(**TOY))
    own = model.forward
    def forward(*arguments, **named):
        losses, keys = own(*arguments, **named)
        return losses | {"itc": broken(losses["itc"])}, keys
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(InputError, match=said):
        require_reached(model, trainable_names(model), toy_batch())
