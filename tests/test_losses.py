"""The objectives against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import itc_loss, itm_loss, lm_loss, mine_hard_negatives, next_token_targets


def cross_entropy(logits, target):
    """One row, by hand."""
    total = math.log(sum(math.exp(x) for x in logits))
    return -sum(p * (x - total) for x, p in zip(logits, target))


def test_itc_two_by_two_by_hand():
    # Unit vectors on paper: images (1,0) and (0,1), texts (0.6,0.8) and (0,1), temperature 0.5, no
    # queue, alpha 0.
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    # i2t similarities / 0.5: image 1 -> (1.2, 0), image 2 -> (1.6, 2); t2i is the transpose.
    i2t = (cross_entropy([1.2, 0.0], [1, 0]) + cross_entropy([1.6, 2.0], [0, 1])) / 2
    t2i = (cross_entropy([1.2, 1.6], [1, 0]) + cross_entropy([0.0, 2.0], [0, 1])) / 2
    assert itc_loss(image, text, image, text, 0.5, alpha=0.0).item() == pytest.approx(
        (i2t + t2i) / 2, abs=1e-6)


def test_itc_soft_targets_and_queue_by_hand():
    image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    image_keys, text_keys = (torch.tensor([[0.8, 0.6], [0.0, 1.0]]),
                             torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    def softmax(a, b):
        return math.exp(a) / (math.exp(a) + math.exp(b)), math.exp(b) / (math.exp(a) + math.exp(b))
    # The twins' image (0.8, 0.6) sees text columns at (0.8, 0.6), their text (1, 0) sees images
    # at (0.8, 0).
    p, q = softmax(0.8, 0.6), softmax(0.8, 0.0)
    i2t = cross_entropy([1.0, 0.0], [0.4 * p[0] + 0.6, 0.4 * p[1]])
    t2i = cross_entropy([0.6 * 0.8 + 0.8 * 0.6, 0.8], [0.4 * q[0] + 0.6, 0.4 * q[1]])
    assert itc_loss(image, text, image_keys, text_keys, 1.0, alpha=0.4).item() == pytest.approx(
        (i2t + t2i) / 2, abs=1e-6)


def test_itc_shares_the_mass_among_captions_of_one_image():
    feat = F.normalize(torch.randn(2, 4), dim=-1)
    same = torch.tensor([[True, True], [True, True]])
    expected = sum(cross_entropy(row.tolist(), [0.5, 0.5]) for row in feat @ feat.T) / 2
    assert itc_loss(feat, feat, feat, feat, 1.0, 0.0, same).item() == pytest.approx(
        expected, abs=1e-5)


def test_itc_at_chance_is_log_of_the_columns():
    feat, keys = torch.ones(2, 1), torch.ones(50, 1)
    assert itc_loss(feat, feat, keys, keys, 0.07, 0.0).item() == pytest.approx(
        math.log(50), abs=1e-5)


def test_itc_gradient_reaches_the_temperature_and_not_the_keys():
    feat, temp = F.normalize(torch.randn(2, 4), dim=-1), torch.tensor(0.07, requires_grad=True)
    keys = F.normalize(torch.randn(5, 4), dim=-1).requires_grad_(False)
    itc_loss(feat.requires_grad_(), feat, keys, keys, temp, 0.4).backward()
    assert temp.grad.abs() > 0 and feat.grad.abs().sum() > 0


def test_mining_prefers_the_hard_and_never_returns_a_positive():
    torch.manual_seed(0)
    sim = torch.tensor([[9.0, 5.0, 1.0, 1.0]]).expand(2000, 4)
    positives = torch.tensor([[True, False, False, False]]).expand(2000, 4)
    index, valid = mine_hard_negatives(sim, positives, floor=1e-4)
    share = torch.bincount(index, minlength=4) / 2000
    assert valid.all() and share[0] == 0
    # softmax(9,5,1,1) + 1e-4: 0.01797, 0.00033, 0.00033 (+ 1e-4) -> 0.955 of what is left.
    assert share[1].item() == pytest.approx(0.955, abs=0.02)


def test_mining_survives_rows_without_candidates_and_underflow():
    index, valid = mine_hard_negatives(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool),
                                       floor=0.0)
    assert not valid.any() and len(index) == 3
    # All of the softmax's mass on the positive, and no floor: the rest is still drawn from.
    index, valid = mine_hard_negatives(torch.tensor([[1e4, 0.0]]), torch.tensor([[True, False]]),
                                       floor=0.0)
    assert valid.all() and index.item() == 1


def test_itm_averages_over_valid_pairs_only():
    logits, matched = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 0, 0])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-3))) / 2
    assert itm_loss(logits, matched, torch.tensor([True, True, False])).item() == pytest.approx(
        expected, abs=1e-6)


def test_lm_targets_are_shifted_and_mask_padding_and_prompt():
    ids, mask = torch.tensor([[2, 7, 8, 9, 3, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    assert next_token_targets(ids, mask).tolist() == [[7, 8, 9, 3, -100]]
    # A prompt of 3 tokens, [DEC] included: 7 and 8 are given, 9 is the first to be learnt.
    assert next_token_targets(ids, mask, 3).tolist() == [[-100, -100, 9, 3, -100]]


def test_lm_loss_by_hand_and_its_floor():
    logits, targets = torch.tensor([[[2.0, 0.0], [5.0, 5.0]]]), torch.tensor([[0, -100]])
    expected = cross_entropy([2.0, 0.0], [0.95, 0.05])  # smoothing 0.1 over 2 words
    assert lm_loss(logits, targets, 0.1).item() == pytest.approx(expected, abs=1e-6)
    # A perfect model at V = 30,524 still pays the entropy of the smoothed target, 1.358 nats.
    V = 30524
    best = torch.full((1, 1, V), math.log(0.1 / V))
    best[..., 0] = math.log(0.9 + 0.1 / V)
    assert lm_loss(best, torch.tensor([[0]]), 0.1).item() == pytest.approx(1.358, abs=1e-3)
