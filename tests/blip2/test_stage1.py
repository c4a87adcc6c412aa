"""Stage 1's losses, computed by hand, and what it mines and matches."""

import math

import pytest
import torch

from blip2.config import Blip2Config
from blip2.losses import query_itc_loss, query_similarity
from blip2.stage1 import Stage1
from config import TrainConfig
from losses import draw_one, lm_loss, next_token_targets
from tasks.retrieval import Gallery
from training.diagnostics import Diagnostics, chance_levels

SIZES = dict(vision="vit", image_size=32, patch_size=16, vit_width=24, vit_depth=1, vit_heads=2,
             vit_ffn=32, queries=3, width=16, depth=2, heads=2, ffn=32, look_every=1,
             max_positions=16, dropout=0.0, init_std=0.0, embed_dim=8, vocab_size=20, cls_id=1,
             sep_id=2, dec_id=3)
# Two images with two queries each, two texts, all of length 1.
IMAGES = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, -0.8]]])
TEXTS = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
SIM = [[0.8, 0.6], [0.36 - 0.64, 0.8]]  # [image][text], of the best query


def small(seed: int = 0, **changes) -> Stage1:
    torch.manual_seed(seed)
    return Stage1(Blip2Config(**SIZES | changes)).eval()


def batch(count: int = 4, length: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, and texts of different lengths: [CLS] words [SEP] padding."""
    torch.manual_seed(1)
    ids, mask = torch.zeros(count, length, dtype=torch.long), torch.zeros(count, length).bool()
    for row in range(count):
        words = 2 + row % 3
        ids[row, :words + 2] = torch.tensor([1, *torch.randint(4, 20, (words,)), 2])
        mask[row, :words + 2] = True
    return torch.randn(count, 3, 32, 32), ids, mask


def test_the_best_query_decides_how_alike_image_and_text_are():
    torch.testing.assert_close(query_similarity(IMAGES, TEXTS), torch.tensor(SIM))


def test_the_evaluation_ranks_by_the_similarity_that_is_trained():
    """Else candidates for re-ranking are chosen by another score: change Gallery.sim too."""
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(40, 3, 8), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(7, 8), dim=-1)
    gallery = Gallery(None, list(range(40)), [], torch.zeros(7), None, None, images, texts, [])
    torch.testing.assert_close(gallery.sim(), query_similarity(images, texts).T)


def test_itc_by_hand():
    """Both directions, label smoothing over all columns, two true columns share the target."""
    temp, e = 0.5, 0.1

    def cross_entropy(row: list[float], target: list[float]) -> float:
        logits = [value / temp for value in row]
        log_sum = math.log(sum(map(math.exp, logits)))
        return sum(share * (log_sum - logit) for share, logit in zip(target, logits))
    own = [[1 - e / 2, e / 2], [e / 2, 1 - e / 2]]
    columns = list(zip(*SIM))
    expected = (sum(cross_entropy(SIM[i], own[i]) for i in (0, 1)) / 2
                + sum(cross_entropy(columns[t], own[t]) for t in (0, 1)) / 2) / 2
    loss = query_itc_loss(IMAGES, TEXTS, IMAGES, TEXTS, temp, torch.eye(2).bool(), e)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    both = (sum(cross_entropy(row, [0.5, 0.5]) for row in (*SIM, *columns)) / 4)
    loss = query_itc_loss(IMAGES, TEXTS, IMAGES, TEXTS, temp, torch.ones(2, 2).bool(), 0.0)
    assert loss.item() == pytest.approx(both, abs=1e-6)


def test_the_columns_of_itc_have_no_gradient(monkeypatch):
    """A row trains its own side alone: the keys come without gradient, the rows with it."""
    given = []
    monkeypatch.setattr("blip2.stage1.query_itc_loss", lambda *arguments: (
        given.append(arguments), query_itc_loss(*arguments))[1])
    image, ids, mask = batch()
    small()(image, ids, mask)
    image_feat, text_feat, image_keys, text_keys = given[0][:4]
    assert image_feat.requires_grad and text_feat.requires_grad
    assert not image_keys.requires_grad and not text_keys.requires_grad
    assert torch.equal(image_feat, image_keys) and torch.equal(text_feat, text_keys)


@pytest.mark.parametrize("hard", [True, False])
def test_negatives_are_drawn_by_similarity_over_temperature(hard):
    """Over negatives alone; false: each other one with the same weight."""
    model, weights = small(hard_negatives=hard, temp=0.2), []
    model.draw_negative = lambda given: (weights.append(given), draw_one(given))[1]
    image, ids, mask = batch()
    with torch.no_grad():
        model(image, ids, mask)
        sim = query_similarity(model.encode_image(image)[1], model.encode_text(ids, mask))
    others = ~torch.eye(4).bool()
    for given, of_rows in zip(weights, (sim, sim.T)):
        logits = of_rows / 0.2 if hard else torch.zeros(4, 4)
        expected = logits.masked_fill(~others, float("-inf")).softmax(1)
        torch.testing.assert_close(given / given.sum(1, keepdim=True), expected)


def test_itm_takes_the_mean_of_the_queries_logits():
    model = small()
    image, ids, mask = batch()
    kv = model.project(model.encode_tokens(image))
    states = model.qformer.encode_both(ids, mask, kv, queries_only=True)
    of_each = states @ model.itm_head.weight.T + model.itm_head.bias
    assert of_each.shape == (4, 3, 2)
    torch.testing.assert_close(model.match(kv, ids, mask), of_each.mean(1))


def test_the_pairs_of_itm():
    """Own pairs are matched; then a hard image for each text, then a hard text for each image."""
    model = small()
    drawn = []
    model.draw_negative = lambda weights: (drawn.append(weights.argmax(1)), drawn[-1])[1]
    image, ids, mask = batch()
    tokens = model.encode_tokens(image)
    kv = model.project(tokens)
    sims = torch.randn(4, 4), torch.randn(4, 4)
    logits, matched, valid = model._itm_pairs(tokens, kv, ids, mask, sims, torch.eye(4).bool())
    text_neg, image_neg = drawn
    own = torch.arange(4)
    assert not (text_neg == own).any() and not (image_neg == own).any()
    images, texts = torch.cat([own, image_neg, own]), torch.cat([own, own, text_neg])
    expected = model.match(model.project(tokens[images]), ids[texts], mask[texts])
    torch.testing.assert_close(logits, expected)
    assert matched.tolist() == [1] * 4 + [0] * 8 and valid.all()


def test_a_text_of_the_same_image_is_no_negative():
    image, ids, mask = batch()
    weights, model = [], small()
    model.draw_negative = lambda given: (weights.append(given), draw_one(given))[1]
    apart, _ = model(image, ids, mask, image_ids=torch.tensor([0, 1, 2, 3]))
    weights.clear()
    losses, _ = model(image, ids, mask, image_ids=torch.tensor([0, 0, 2, 3]))
    for given in weights:
        assert given[0, 1] == given[1, 0] == 0 and given[0, 2] > 0
    assert losses["itc"] != apart["itc"]  # two columns share the target


def test_itg_reads_the_image_and_no_later_token():
    model = small()
    image, ids, mask = batch()
    _, cache = model.qformer.encode_queries(model.project(model.encode_tokens(image)))
    states, _ = model.qformer.decode(ids, mask, cache)
    later = ids.clone()
    later[:, 3] = 7
    changed, _ = model.qformer.decode(later, mask, cache)
    torch.testing.assert_close(states[:, :3], changed[:, :3])
    assert not torch.allclose(states[:, 3], changed[:, 3])
    _, other = model.qformer.encode_queries(model.project(model.encode_tokens(image.flip(0))))
    assert not torch.allclose(states, model.qformer.decode(ids, mask, other)[0])


def test_each_smoothing_changes_its_own_loss():
    image, ids, mask = batch()

    def of(**changes) -> dict:
        model = small(**changes)
        model.draw_negative = lambda weights: weights.argmax(1)
        return {name: loss.item() for name, loss in model(image, ids, mask)[0].items()}
    plain = of(label_smoothing=0.0, itg_smoothing=0.0)
    for setting, name in (("label_smoothing", "itc"), ("itg_smoothing", "lm")):
        smooth = of(**{"label_smoothing": 0.0, "itg_smoothing": 0.0, setting: 0.3})
        assert {n for n in plain if plain[n] != pytest.approx(smooth[n], abs=1e-5)} == {name}


def test_what_the_log_says_of_it(monkeypatch):
    """The measures of BLIP's log, by the model's own functions; chance without a queue."""
    model, (image, ids, mask) = small(itg_smoothing=0.1), batch()
    model.train()  # (dropout is 0)
    heard = Diagnostics(model)
    losses, _ = model(image=image, ids=ids, mask=mask)
    found = heard.take(torch.tensor(1.0))
    with torch.no_grad():
        tokens, image_feat = model.encode_image(image)
        sim = query_similarity(image_feat, model.encode_text(ids, mask))
        own = torch.arange(4)
        assert found["itc_i2t_acc"] == (sim.argmax(1) == own).float().mean()
        assert found["itc_t2i_acc"] == (sim.argmax(0) == own).float().mean()
        kv = model.project(tokens)
        assert found["itm_pos_acc"] == model.match(kv, ids, mask).argmax(1).float().mean()
        _, cache = model.qformer.encode_queries(kv)
        states, _ = model.qformer.decode(ids[:, :-1], mask[:, :-1], cache)
        nll = lm_loss(model.qformer.logits(states), next_token_targets(ids, mask), 0.0)
    assert found["lm_nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert abs(losses["lm"].item() - nll.item()) > 1e-3
    monkeypatch.setattr("training.distributed.world_size", lambda: 2)
    chance = chance_levels(model.config, TrainConfig(task="blip2-stage1", batch_size=8))
    assert chance["itc"] == pytest.approx(math.log(8)) and chance["itc_i2t_acc"] == 1 / 4


def test_queries_start_large_and_their_ffn_as_a_copy_of_the_texts():
    by_width, bert = small(), small(init_std=0.02, queries=64)
    assert 0.6 < by_width.qformer.queries.std() < 1.5
    assert 0.015 < bert.qformer.queries.std() < 0.025
    for layer in by_width.qformer.layers:
        for ours, theirs in zip(layer.ffn_query.parameters(), layer.ffn_text.parameters()):
            assert torch.equal(ours, theirs)
