"""docs/losses.md: what it says to add a loss is all that is needed."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import toy_batch, toy_model
from torch import nn

import blip
import train
from config import BLIPConfig
from data.files import InputError
from objectives.models import CLIPLike
from tasks import registry
from training import checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_the_example_trains(tmp_path, monkeypatch):
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)[1]
    (tmp_path / "filip_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry.register("filip_example")
    try:
        out = tmp_path / "run"
        assert train.main(["pretrain-filip", "--scenes", "96", "--eval-size", "8", "--eval-top-k",
                           "4", "--lm-only-steps", "1", "--log-every", "1", "--out", str(out)]) == 0
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert {"lm", "filip"} <= lines[0].keys() and "itc" not in lines[0]
        assert all({"itc", "itm", "lm", "filip"} <= line.keys() for line in lines[1:])
    finally:
        del registry.TASKS["pretrain-filip"]


def test_other_objectives_start_from_blip_and_blip_from_them(pretrained, tmp_path):
    """Weights go both ways; where the start has no twins, these are exact copies."""
    few = ["--scenes", "32", "--batch-size", "8", "--eval-size", "8", "--eval-top-k", "4",
           "--device", "cpu"]
    assert train.main(["pretrain-negatives", "--init", str(pretrained), *few, "--lm-only-steps",
                       "0", "--out", str(tmp_path / "n")]) == 0
    assert train.main(["retrieval", "--init", str(tmp_path / "n/checkpoint.pt"), *few, "--epochs",
                       "1", "--out", str(tmp_path / "r")]) == 0
    source = checkpoints.open_model(tmp_path / "n/checkpoint.pt", to_train=True)
    without = CLIPLike(source.model.config)
    fresh = checkpoints.initialise(source.model, without)
    assert any("_m." in name for name in fresh)
    source.model.update_momentum(0.0)
    assert all(torch.equal(p, twin) for p, twin in source.model.twin_parameters)


def test_a_weight_of_lm_weighs_masked_tokens(tmp_path):
    """ALBEF's loss stands in LM's place."""
    few = ["pretrain-albef", "--scenes", "32", "--batch-size", "8", "--eval-size", "8",
           "--eval-top-k", "4", "--lm-only-steps", "0", "--itc-weight", "0", "--itm-weight", "0",
           "--log-every", "1", "--device", "cpu", "--warmup-steps", "0"]
    norms = []
    for weight in ("1", "0.5"):
        out = tmp_path / weight
        assert train.main([*few, "--lm-weight", weight, "--out", str(out)]) == 0
        norms.append(json.loads((out / "log.jsonl").read_text().splitlines()[0])["grad_norm"])
    assert abs(norms[1] / norms[0] - 0.5) < 0.01
    with pytest.raises(InputError, match="trained without LM"):  # its decoder cannot describe
        checkpoints.open_model(out / "checkpoint.pt", ("lm",))


def test_every_recipe_stands_on_the_page():
    text = PAGE.read_text()
    for name in registry.TASKS:
        if name.startswith("pretrain-"):
            assert f"`python train.py {name}`" in text


def test_the_pages_backbone_trains_with_its_twin(monkeypatch):
    """A ConvNet without biases: twin alike at the start, its statistics follow, it is trained."""
    code, = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
             if "def make_vit" in block]
    names = {"nn": nn, "torch": torch, "BLIPConfig": BLIPConfig}
    exec(code, names)
    monkeypatch.setattr(blip, "make_vit", names["make_vit"])
    model = toy_model(vit_width=16).train()
    twin = dict(model.vit_m.named_parameters())
    assert all(torch.equal(p, twin[name]) for name, p in model.vit.named_parameters())
    assert any(name.endswith("running_mean") for name, _ in model.vit_m.named_buffers())
    start = {name: p.clone() for name, p in model.vit.named_parameters()}
    batch = toy_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses, _ = model(batch["image"], batch["ids"], batch["mask"])
    sum(losses.values()).backward()
    optimizer.step()
    model.update_momentum(0.5)
    assert not any(torch.equal(p, start[name]) for name, p in model.vit.named_parameters())
    statistics = dict(model.vit.named_buffers())
    for name, buffer in model.vit_m.named_buffers():
        assert torch.equal(buffer, statistics[name]), name
    assert statistics["layers.1.running_mean"].abs().sum() > 0
