"""NLVR2: the model, its files, its evaluation; the world's statements."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import toy_batch, toy_model
from PIL import Image

from config import TrainConfig
from data.datasets import NLVR2Example
from data.files import InputError
from data.text import Tokenizer
from reports.metrics import consistency
from tasks import nlvr2
from tasks.registry import make_model, preset_settings
from tasks.task import EvalSettings, TrainedModel
from training import checkpoints
from weights.names import names_of
from weights.released import load_released
from world.datasets import Statements
from world.scenes import split_of


def toy_nlvr2(**changes) -> nlvr2.NLVR2:
    config = toy_model(**changes).config
    torch.manual_seed(1)
    return make_model("nlvr2", config).eval()


# ---- the model -----------------------------------------------------------------------------------

def test_two_equal_images_are_one_image_below_the_merge():
    """NLVR2 averages: with two equal cross-attentions and equal images the layer is that of the
    pretrained one."""
    blip = toy_model(text_width=32, text_heads=2).eval()
    model = nlvr2.NLVR2(replace(blip.config, merge_from=2)).eval()
    checkpoints.initialise(model, blip)
    batch = toy_batch()
    tokens = blip.vit(batch["image"])
    pair = model.med.project(torch.stack([tokens, tokens], 1))
    assert torch.allclose(model.med.encode_grounded(batch["ids"], batch["mask"], pair),
                          blip.med.encode_grounded(batch["ids"], batch["mask"],
                                                   blip.med.project(tokens)), atol=1e-5)


def test_nlvr2_by_hand():
    """A merging layer: both images' outputs side by side, through the Linear, then the residual."""
    model, batch = toy_nlvr2(), toy_batch()
    layer = model.med.layers[1].cross_attn
    x, first, second = (torch.randn(4, 7, 48), torch.randn(4, 5, 32), torch.randn(4, 5, 32))
    kv = layer.attn.project(torch.stack([first, second], 1))
    outputs = [attention(x, attention.project(image)) for attention, image in
               ((layer.attn.first, first), (layer.attn.second, second))]
    expected = layer.add.norm(x + layer.attn.merge(torch.cat(outputs, -1)))
    assert torch.allclose(layer(x, kv, None), expected, atol=1e-5)
    image = torch.stack([batch["image"], batch["image"].flip(0)], 1)
    one = model.logits(image, batch["ids"], batch["mask"])
    other = model.logits(image.flip(1), batch["ids"], batch["mask"])
    assert one.shape == (4, 2) and not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("merge_from, expected", [(-1, [0, 0, 1, 1]), (1, [0, 1, 1, 1]),
                                                  (4, [0, 0, 0, 0])])
def test_the_layers_that_merge(merge_from, expected):
    model = make_model("nlvr2", replace(toy_model(text_depth=4).config, merge_from=merge_from))
    assert [layer.cross_attn.attn.merge is not None for layer in model.med.layers] == expected


def test_released_nlvr2_names_all_find_their_place(tmp_path):
    """Written with the released names, read back: the same model."""
    model = toy_nlvr2(vit_heads=2, text_depth=3)
    state = {}
    for ours, theirs in names_of("nlvr2", model.config):
        if ours in model.state_dict():
            parts = model.state_dict()[ours].chunk(len(theirs))
            state |= {name: part.clone() for name, part in zip(theirs, parts)}
    assert "text_encoder.encoder.layer.0.crossattention.self1.query.weight" in state
    assert "text_encoder.encoder.layer.0.crossattention.output.dense0.weight" in state
    assert "text_encoder.encoder.layer.1.crossattention.output.merge_layer.bias" in state
    assert "text_encoder.encoder.layer.0.crossattention.output.merge_layer.bias" not in state
    torch.save({"model": state}, tmp_path / "nlvr.pth")
    again, report = load_released(tmp_path / "nlvr.pth", vit_heads=2, text_heads=4)
    assert report.kind == "nlvr2" and not report.missing and not report.left_over
    batch = toy_batch()
    image = torch.stack([batch["image"], batch["image"].flip(0)], 1)
    batch["ids"] %= 30
    again.med.enc_id = model.med.enc_id
    assert torch.allclose(again.logits(image, batch["ids"], batch["mask"]),
                          model.logits(image, batch["ids"], batch["mask"]), atol=1e-5)


def test_consistency_wants_all_pairs_of_a_sentence():
    assert consistency([True, True, False, True], ["a", "a", "b", "b"]) == 0.5
    assert consistency([True] * 3, ["a", "b", "b"]) == 1.0


# ---- the world's statements ----------------------------------------------------------------------

def test_statements_are_balanced_true_and_in_their_split():
    data = Statements("held-out", 200)
    labels = []
    for i in range(200):
        sentence, label, (left, right) = data.statement(i)
        labels.append(label)
        assert split_of(left) == split_of(right) == "held-out"
        if sentence == "the images have the same background":
            assert label == (left.background == right.background)
        match = re.fullmatch(r"the (left|right) image shows a (\w+) thing", sentence)
        if match:
            scene = left if match[1] == "left" else right
            assert label == any(thing.colour == match[2] for thing in scene.things)
    assert sum(labels) == 100
    sentences = [data.statement(i)[0] for i in range(8)]
    assert len(set(sentences[:4])) == len(set(sentences[4:])) == 1
    assert data[5]["image"].shape == (2, 3, 64, 64)


# ---- files ---------------------------------------------------------------------------------------

def test_official_nlvr2_and_images_of_different_sizes(tmp_path):
    (tmp_path / "dev.jsonl").write_text(json.dumps(
        {"sentence": "The left one is red.", "identifier": "dev-1-2-0", "label": "False"}) + "\n")
    stated, = nlvr2.read_statements(tmp_path / "dev.jsonl")
    assert stated.images == ("dev-1-2-img0.png", "dev-1-2-img1.png") and not stated.label
    Image.new("RGB", (30, 50), (255, 0, 0)).save(tmp_path / stated.images[0])
    Image.new("RGB", (64, 20), (0, 0, 255)).save(tmp_path / stated.images[1])
    item = nlvr2.StatementDataset([stated], tmp_path, 16)[0]
    assert item["image"].shape == (2, 3, 16, 16)
    swapped = nlvr2.swap_images(item)
    assert swapped["example"].sentence == "The right one is red."
    assert torch.equal(swapped["image"][0], item["image"][1])
    seen = set()
    data = nlvr2.StatementDataset([stated], tmp_path, 16, augment=True)
    for epoch in range(20):
        data.set_epoch(epoch)
        one = data[0]
        red_first = bool(one["image"][0, 0].float().mean() > one["image"][1, 0].float().mean())
        assert ("left" in one["example"].sentence) == red_first
        seen.add(red_first)
    assert seen == {True, False}
    (tmp_path / stated.images[1]).write_bytes(b"nothing")
    broken = nlvr2.StatementDataset([stated], tmp_path, 16)[0]
    assert broken["image"] is None and "damaged" in broken["broken"][0]


def test_statements_are_cleaned_as_captions_and_cut_at_40_words_alone():
    tokenizer = Tokenizer.train(["two dogs one at 10 30"] * 3, 100)
    config = TrainConfig(**preset_settings("nlvr2", "base"))
    collate = nlvr2.collate(tokenizer, config, None)
    def words(sentence):
        example = NLVR2Example(("a", "b"), sentence, True, "x")
        item = {"image": torch.zeros(2, 3, 8, 8), "example": example, "index": 0, "broken": []}
        return tokenizer.decode(collate([item])["ids"][0].tolist())
    assert words("Two dogs;one at 10:30.") == "two dogs one at 10 30"
    assert words("dogs " * 60) == " ".join(["dogs"] * 40)
    assert len(collate.encode([{"example": NLVR2Example(("a", "b"), "zwei " * 40, True, "x")}]
                              )["ids"][0]) > 40


def test_mistakes_in_statements(tmp_path):
    def statements(content):
        (tmp_path / "s.json").write_text(json.dumps(content))
        with pytest.raises(InputError) as error:
            nlvr2.read_statements(tmp_path / "s.json")
        return str(error.value)
    assert "record 0: images must name two images" in statements(
        [{"images": ["a.jpg"], "sentence": "x", "label": "True"}])
    assert "label is 'maybe'; it must be True or False" in statements(
        [{"images": ["a.jpg", "b.jpg"], "sentence": "x", "label": "maybe"}])
    assert "'sentence' is missing" in statements([{"images": ["a", "b"], "label": "True"}])


# ---- evaluation ----------------------------------------------------------------------------------

def test_a_blind_model_falls_to_its_prior(monkeypatch):
    """The grey evaluation replaces every image: a model that answers by the image's brightness is
    right with images, at the prior without."""
    data = Statements("val", 40)
    tokenizer = Tokenizer.train(["the left image shows a red thing"] * 3, 100)
    bright = {i: data.statement(i)[1] for i in range(40)}
    class Stub(torch.nn.Module):
        def logits(self, image, ids, mask):
            grey = image.flatten(1).std(1) < 0.5
            labels = torch.tensor([bright[i] for i in self.rows])
            told = torch.where(grey, torch.ones(len(image), dtype=torch.long), labels.long())
            return torch.nn.functional.one_hot(told, 2).float()
    stub = Stub()
    stub.parameter = torch.nn.Parameter(torch.zeros(1))  # says on which device the model is
    original = nlvr2.evaluation_batches
    def watching(*args, **options):
        for batch in original(*args, **options):
            stub.rows = batch["index"]
            yield batch
    monkeypatch.setattr(nlvr2, "evaluation_batches", watching)
    trained = TrainedModel(stub, tokenizer, {"max_words": 40, "max_tokens": 40})
    numbers = nlvr2.evaluate(trained, data, EvalSettings()).numbers
    assert numbers["accuracy"] == 1.0 and numbers["consistency"] == 1.0
    assert numbers["blank_accuracy"] == 0.5 == numbers["chance"]["accuracy"]
