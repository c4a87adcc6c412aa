"""Ranks, recall, chance, and re-ranking against the sum done pair by pair."""

import math

import pytest
import torch
from conftest import toy_model

from data import Tokenizer, normalise
from eval import BEHIND, encode, evaluate_world, rerank, retrieval, retrieval_chance
from metrics import ranks, recall, recall_chance
from world import ATTRIBUTES, World, all_captions


def test_ranks_by_hand_with_ties_against_the_positive():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2], [0.1, 0.5, 0.9]])
    positives = torch.tensor([[True, False, False], [False, True, False], [True, True, False]])
    assert ranks(scores, positives).tolist() == [0, 2, 1]  # the best of several positives counts
    assert recall(torch.tensor([0, 2, 1, 7]), "t2i") == pytest.approx(
        {"t2i_r1": 0.25, "t2i_r5": 0.75, "t2i_r10": 1.0})


def test_chance_by_hand():
    assert recall_chance(10, 10, 1, "a")["a_r5"] == pytest.approx(0.5)
    assert recall_chance(2, 4, 2, "a") == pytest.approx({"a_r1": 0.5, "a_r5": 1.0, "a_r10": 1.0})
    # 5 captions of 5,000 belong to an image, 10 are drawn.
    assert recall_chance(1000, 5000, 5, "a")["a_r10"] == pytest.approx(
        1 - math.comb(4995, 10) / math.comb(5000, 10))


def small_gallery():
    tokenizer, world = Tokenizer.train(all_captions(300), 400), World("held-out", 6, 32)
    model = toy_model(**tokenizer.config()).eval()
    return model, tokenizer, world, encode(model, tokenizer, world, torch.device("cpu"))


def test_rerank_equals_every_pair_by_itself():
    model, _, _, gallery = small_gallery()
    t2i, i2t = rerank(model, gallery, 6, torch.device("cpu"))
    for i in range(6):
        tokens, feat = model.encode_image(normalise(gallery.images[i:i + 1]))
        for t in range(6):
            ids, mask = gallery.ids[t:t + 1], gallery.mask[t:t + 1]
            matched = model.match(model.med.project(tokens), ids, mask)[0, 1]
            expected = (matched + (model.encode_text(ids, mask) @ feat.T)[0, 0]).item()
            assert t2i[t, i].item() == pytest.approx(expected, abs=1e-4)
            assert i2t[i, t].item() == pytest.approx(expected, abs=1e-4)


def test_rerank_keeps_the_rest_behind():
    model, _, _, gallery = small_gallery()
    sim = gallery.text_feat @ gallery.image_feat.T
    t2i, i2t = rerank(model, gallery, 2, torch.device("cpu"))
    for scores, by_itc in ((t2i, sim), (i2t, sim.T)):
        assert ((scores > -BEHIND / 2).sum(1) == 2).all()
        chosen = scores.topk(2, dim=1).indices.sort(1).values
        assert chosen.equal(by_itc.topk(2, dim=1).indices.sort(1).values)


def test_perfect_features_score_one_and_chance_is_beside():
    model, tokenizer, world, gallery = small_gallery()
    gallery.image_feat = gallery.text_feat = torch.eye(6, 16)
    numbers, _ = retrieval(model, gallery, 0, torch.device("cpu"))
    assert all(value == 1.0 for value in numbers.values())
    assert retrieval_chance(gallery)["t2i_r1"] == pytest.approx(1 / 6)


def test_a_model_that_ignores_the_image_earns_chance_on_swaps(monkeypatch):
    model, tokenizer, world, _ = small_gallery()
    monkeypatch.setattr(type(model), "match", lambda self, kv, ids, mask: torch.zeros(len(ids), 2))
    numbers = evaluate_world(model, tokenizer, world, torch.device("cpu"), top_k=0)
    assert numbers["itm_swap"] == 0.0 and set(numbers["itm_swap_by"]) == set(ATTRIBUTES)
    assert numbers["chance"]["itm_swap"] == 0.5 and "t2i_r1_rerank" not in numbers
