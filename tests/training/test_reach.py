"""What an objective reaches is trained, what none reaches is told by name."""

import pytest
import torch
from conftest import run, toy_batch, toy_model

from blip import BLIP
from config import OBJECTIVES
from data.files import InputError
from training.checkpoints import load
from training.reach import freeze_unreached, reached_parameters, require_reached
from training.run import trainable_names


def with_a_head(monkeypatch, used: bool) -> None:
    """BLIP with a new head, whose loss is added to ITC's where it is used."""
    build, forward = BLIP.__init__, BLIP.forward
    def new_build(self, config):
        build(self, config)
        self.my_head = torch.nn.Linear(config.embed_dim, 1)
    def new_forward(self, image, **rest):
        losses, keys = forward(self, image, **rest)
        if used and "itc" in losses:
            feat = self.encode_image(image)[1]
            losses["itc"] = losses["itc"] + self.my_head(feat).square().mean()
        return losses, keys
    monkeypatch.setattr(BLIP, "__init__", new_build)
    monkeypatch.setattr(BLIP, "forward", new_forward)


def test_a_new_head_trains_by_itself(tmp_path, monkeypatch):
    with_a_head(monkeypatch, used=True)
    torch.manual_seed(0)  # as the run seeds it
    assert run(tmp_path / "a", "--scenes", 48, "--save-every", 2, "--keep", 9) == 0
    first, last = (load(tmp_path / "a" / f"checkpoint-{step:08d}.pt")["model"]["my_head.weight"]
                   for step in (2, 6))
    assert not torch.equal(first, last)  # LM alone for two steps, then all of it


def test_a_head_that_no_loss_uses_is_told_by_name(tmp_path, monkeypatch, capsys):
    with_a_head(monkeypatch, used=False)
    assert run(tmp_path / "a", "--scenes", 48) == 2
    assert "no loss reaches my_head.bias, my_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_what_the_objective_leaves_alone_is_frozen(objective):
    model, inputs = toy_model(dropout=0.1).train(), dict(toy_batch(), alpha=0.4)
    trainable = trainable_names(model)
    require_reached(model, trainable, inputs)
    model.set_objectives((objective,))
    freeze_unreached(model, trainable, inputs)
    losses, _ = model(**inputs)
    losses[objective].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert model.training
    # All of it trains again when all objectives are on.
    model.set_objectives(OBJECTIVES)
    freeze_unreached(model, trainable, inputs)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_trying_leaves_no_trace():
    model, inputs = toy_model(dropout=0.5).train(), dict(toy_batch(), alpha=0.4)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    reached_parameters(model, inputs)
    assert torch.equal(before, torch.get_rng_state()) and model.med.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.vit_m.training


def test_a_parameter_that_was_frozen_on_purpose_stays_so():
    model, inputs = toy_model(), dict(toy_batch(), alpha=0.4)
    model.vit.requires_grad_(False)
    trainable = trainable_names(model)
    require_reached(model, trainable, inputs)
    freeze_unreached(model, trainable, inputs)
    assert not any(p.requires_grad for p in model.vit.parameters())
    with pytest.raises(InputError, match="no loss reaches vit.blocks"):
        require_reached(model, trainable | {"vit.blocks.0.fc1.weight"}, inputs)
