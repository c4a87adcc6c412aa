"""Ranks, recall, chance, and re-ranking against the sum done pair by pair."""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import toy_model

from config import TrainConfig
from data.datasets import ImageDataset
from data.images import prepare_images
from data.text import Tokenizer
from reports.metrics import rank_statistics, ranks, recall, recall_chance
from tasks import retrieval
from tasks.retrieval import Gallery, chance_of_truth, encode, evaluate, rerank
from tasks.task import EvalSettings, TrainedModel
from world.datasets import World
from world.language import all_captions


def test_what_is_no_number_earns_nothing():
    positives = torch.eye(3).bool()
    assert ranks(torch.full((3, 3), float("nan")), positives).tolist() == [2, 2, 2]
    scores = torch.eye(3)
    scores[0, 1] = float("nan")
    assert ranks(scores, positives).tolist() == [1, 0, 0]


def test_a_gallery_of_few_images_and_many_texts_is_judged_whole(monkeypatch):
    """Each image has as many texts to look at as were asked for, though there are fewer images."""
    trained, world, gallery = small_gallery()
    asked = []
    monkeypatch.setattr(retrieval, "rerank", lambda model, gallery, top_k, *rest: asked.append(
        top_k) or (gallery.sim(), gallery.sim().T))
    numbers_of(gallery, trained, world, monkeypatch, top_k=15)
    assert asked == [15]


def test_ranks_by_hand_with_ties_against_the_positive():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2], [0.1, 0.5, 0.9]])
    positives = torch.tensor([[True, False, False], [False, True, False], [True, True, False]])
    assert ranks(scores, positives).tolist() == [0, 2, 1]  # the best of several positives counts
    assert recall(torch.tensor([0, 2, 1, 7]), "t2i") == pytest.approx(
        {"t2i_r1": 0.25, "t2i_r5": 0.75, "t2i_r10": 1.0})


def test_chance_by_hand():
    assert recall_chance(10, 1, "a")["a_r5"] == pytest.approx(0.5)
    assert recall_chance(4, 2, "a") == pytest.approx({"a_r1": 0.5, "a_r5": 1.0, "a_r10": 1.0})
    # 5 captions of 5,000 belong to an image, 10 are drawn.
    assert recall_chance(5000, 5, "a")["a_r10"] == pytest.approx(
        1 - math.comb(4995, 10) / math.comb(5000, 10))


def test_chance_that_a_text_is_true_of_a_random_picture_counts_its_own():
    """At least 1 / N; here no text is true of another scene than its own."""
    assert chance_of_truth(World("held-out", 5, 32)) == pytest.approx(1 / 5)


def small_gallery() -> tuple[TrainedModel, World, Gallery]:
    tokenizer, world = Tokenizer.train(all_captions(300), 400), World("held-out", 6, 32)
    model = toy_model(**tokenizer.config()).eval()
    trained = TrainedModel(model, tokenizer, asdict(TrainConfig()))
    return trained, world, encode(trained, world)


def numbers_of(gallery: Gallery, trained: TrainedModel, world: World, monkeypatch,
               top_k: int = 0) -> dict:
    """What an evaluation finds in a gallery; top_k 0: by ITC alone."""
    monkeypatch.setattr(retrieval, "encode", lambda trained, dataset: gallery)
    return evaluate(trained, world, EvalSettings(top_k=top_k)).numbers


def test_rerank_equals_every_pair_by_itself():
    trained, _, gallery = small_gallery()
    model = trained.model
    t2i, i2t = rerank(model, gallery, 6, torch.device("cpu"))
    for i in range(6):
        tokens, feat = model.encode_image(prepare_images(gallery.images([i]), "cpu"))
        for t in range(6):
            ids, mask = gallery.ids[t:t + 1], gallery.mask[t:t + 1]
            matched = model.match(model.project(tokens), ids, mask)[0, 1]
            expected = (matched + (model.encode_text(ids, mask) @ feat.T)[0, 0]).item()
            assert t2i[t, i].item() == pytest.approx(expected, abs=1e-4)
            assert i2t[i, t].item() == pytest.approx(expected, abs=1e-4)


def test_rerank_keeps_the_rest_behind():
    trained, _, gallery = small_gallery()
    model = trained.model
    sim = gallery.text_feat @ gallery.image_feat.T
    t2i, i2t = rerank(model, gallery, 2, torch.device("cpu"))
    for scores, by_itc in ((t2i, sim), (i2t, sim.T)):
        order, itc_order = (x.argsort(1, descending=True) for x in (scores, by_itc))
        assert order[:, :2].sort(1).values.equal(itc_order[:, :2].sort(1).values)
        assert order[:, 2:].equal(itc_order[:, 2:])
        # Clearly behind: no candidate of any row is as low as what was not looked at.
        best = scores.sort(1, descending=True).values
        assert best[:, :2].min() > best[:, 2:].max()


@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
def test_the_rest_is_behind_whatever_itm_says(shift):
    trained, _, gallery = small_gallery()
    trained.model.itm_head.bias.data[1] += shift
    sim = gallery.text_feat @ gallery.image_feat.T
    for scores, by_itc in zip(rerank(trained.model, gallery, 2, torch.device("cpu")),
                              (sim, sim.T)):
        chosen = scores.topk(2, dim=1).indices.sort(1).values
        assert chosen.equal(by_itc.topk(2, dim=1).indices.sort(1).values)


def test_perfect_features_score_one_and_chance_is_beside(monkeypatch):
    trained, world, gallery = small_gallery()
    gallery.image_feat = gallery.text_feat = torch.eye(6, 16)
    numbers = numbers_of(gallery, trained, world, monkeypatch)
    measures = [value for name, value in numbers.items() if name.startswith(("t2i", "i2t"))]
    assert len(measures) == 12 and all(value == 1.0 for value in measures)
    assert numbers["chance"]["t2i_r1"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("images, texts", [(1, 1), (2, 3), (4, 100), (100, 100)])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_blocks_of_any_size_give_the_same_scores(images, texts, top_k):
    trained, _, gallery = small_gallery()
    model = trained.model
    whole = rerank(model, gallery, top_k, torch.device("cpu"), 6, 1000)
    blocked = rerank(model, gallery, top_k, torch.device("cpu"), images, texts)
    for a, b in zip(whole, blocked):
        assert torch.allclose(a, b, atol=1e-5)


def test_an_image_is_encoded_and_projected_once(monkeypatch):
    trained, _, gallery = small_gallery()
    model = trained.model
    projected, project = [], type(model.med).project
    def count(self, context, mask=None):
        projected.append(len(context))
        return project(self, context, mask)
    monkeypatch.setattr(type(model.med), "project", count)
    rerank(model, gallery, 4, torch.device("cpu"), images=4, texts=8)
    assert projected == [4, 2]  # blocks of four images; never more than those are held


def test_several_captions_of_an_image(monkeypatch):
    trained, world, gallery = small_gallery()
    gallery.image_of = torch.tensor([0, 0, 1, 1, 2, 2])
    gallery.index, gallery.image_feat = gallery.index[:3], torch.eye(3, 16)
    # Image 0 and 1 find their second and first caption, image 2 one of image 1's.
    gallery.text_feat = torch.stack([torch.eye(3, 16)[axis] * length for axis, length in (
        (1, 0.9), (0, 1.0), (1, 1.0), (2, 1.0), (2, 0.8), (0, 0.7))])
    numbers = numbers_of(gallery, trained, world, monkeypatch)
    assert numbers["t2i_r1"] == pytest.approx(3 / 6) and numbers["i2t_r1"] == pytest.approx(2 / 3)
    assert numbers["chance"]["i2t_r1"] == pytest.approx(2 / 6)


def test_texts_that_repeat_are_told(monkeypatch, capsys):
    """A label as a caption: R@k counts it as right for its own image alone."""
    trained, _, gallery = small_gallery()
    data = ImageDataset([], ".", 32)
    gallery.texts = ["dog", "dog", "cat", "cat", "dog", "cow"]
    monkeypatch.setattr(retrieval, "encode", lambda trained, dataset: gallery)
    monkeypatch.setattr(retrieval, "truth_in", lambda gallery: lambda t, i: True)
    monkeypatch.setattr(retrieval, "sections", lambda *arguments: [])
    evaluate(trained, data, EvalSettings(top_k=0))
    assert "50% of the texts repeat another one" in capsys.readouterr().out
    gallery.texts = ["a", "b", "c", "d", "e", "f"]
    evaluate(trained, data, EvalSettings(top_k=0))
    assert "repeat" not in capsys.readouterr().out


def test_median_and_mean_rank():
    assert rank_statistics(torch.tensor([0, 0, 3, 9]), "t2i") == {
        "t2i_median_rank": 2.5, "t2i_mean_rank": 4.0}


def test_what_ranks_send_one_another_is_no_view_of_something_larger(monkeypatch):
    """A view is pickled with all that it views: a row of a batch of 64 would be 64 times as large.
    """
    sent = []
    def gather(items):
        sent.extend(items)
        return items
    monkeypatch.setattr(retrieval.distributed, "gather", gather)
    trained, _, gallery = small_gallery()
    rerank(trained.model, gallery, 6, torch.device("cpu"), images=2, texts=4)
    tensors = [value for item in sent for value in item if isinstance(value, torch.Tensor)]
    assert len(tensors) > 4
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
