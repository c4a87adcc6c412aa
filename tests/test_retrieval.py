"""Ranks, recall, chance, and re-ranking against the sum done pair by pair."""

import math

import pytest
import torch
from conftest import toy_model

from data import Tokenizer, normalise
from metrics import rank_statistics, ranks, recall, recall_chance
from retrieval import BEHIND, encode, rerank, retrieval, retrieval_chance
from world import World, all_captions


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
        tokens, feat = model.encode_image(normalise(gallery.images([i])))
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


@pytest.mark.parametrize("images, texts", [(1, 1), (2, 3), (4, 100), (100, 100)])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_blocks_of_any_size_give_the_same_scores(images, texts, top_k):
    model, _, _, gallery = small_gallery()
    whole = rerank(model, gallery, top_k, torch.device("cpu"), 6, 1000)
    blocked = rerank(model, gallery, top_k, torch.device("cpu"), images, texts)
    for a, b in zip(whole, blocked):
        assert torch.allclose(a, b, atol=1e-5)


def test_an_image_is_encoded_and_projected_once(monkeypatch):
    model, _, _, gallery = small_gallery()
    projected, project = [], type(model.med).project
    def count(self, context, mask=None):
        projected.append(len(context))
        return project(self, context, mask)
    monkeypatch.setattr(type(model.med), "project", count)
    rerank(model, gallery, 4, torch.device("cpu"), images=4, texts=8)
    assert projected == [4, 2]  # blocks of four images; never more than those are held


def test_several_captions_of_an_image():
    model, tokenizer, _, gallery = small_gallery()
    gallery.image_of = torch.tensor([0, 0, 1, 1, 2, 2])
    gallery.index, gallery.image_feat = gallery.index[:3], torch.eye(3, 16)
    # Image 0 and 1 find their second and first caption, image 2 one of image 1's.
    gallery.text_feat = torch.stack([torch.eye(3, 16)[axis] * length for axis, length in (
        (1, 0.9), (0, 1.0), (1, 1.0), (2, 1.0), (2, 0.8), (0, 0.7))])
    numbers, _ = retrieval(model, gallery, 0, torch.device("cpu"))
    assert numbers["t2i_r1"] == pytest.approx(3 / 6) and numbers["i2t_r1"] == pytest.approx(2 / 3)
    assert retrieval_chance(gallery)["i2t_r1"] == pytest.approx(2 / 6)


def test_median_and_mean_rank():
    assert rank_statistics(torch.tensor([0, 0, 3, 9]), "t2i") == {
        "t2i_median_rank": 2.5, "t2i_mean_rank": 4.0}
