"""What an objective reaches is trained, what none reaches is told by name."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import SMALL, run, toy_batch, toy_model

import train
from blip import BLIP
from config import OBJECTIVES, SettingError, TrainConfig, setting
from data.files import InputError
from tasks.registry import TASKS
from training.checkpoints import load
from training.reach import (
    freeze_unreached,
    reached_parameters,
    require_reached,
    require_read_weights,
)
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


class Counting(BLIP):
    """With a loss that only the training has, its head, and a buffer that counts the passes."""

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(config.embed_dim, 1)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, image, ids, mask, **options):
        losses, keys = super().forward(image, ids, mask, **options)
        if self.training:
            losses["own"] = self.head(self.encode_image(image)[1]).square().mean()
            self.passes += 1
        return losses, keys


class Late(BLIP):
    """With a loss that begins in the middle of the run."""

    passes = 0

    def forward(self, image, ids, mask, **options):
        losses, keys = super().forward(image, ids, mask, **options)
        self.passes += 1
        if self.passes > 4:
            losses["own"] = self.text_proj.weight.square().mean()
        return losses, keys


def run_own(model: type[BLIP], out, monkeypatch) -> int:
    """A short run of a task of one's own."""
    task = replace(TASKS["pretrain"], name="pretrain-own", model=model)
    monkeypatch.setitem(TASKS, "pretrain-own", task)
    return train.main(["pretrain-own", *SMALL, "--lm-only-steps", "0", "--scenes", "48",
                       "--out", str(out)])


def test_a_loss_of_the_training_alone_and_a_buffer(tmp_path, monkeypatch):
    """The pass that finds what is reached sees the loss, and leaves the buffer as it was."""
    assert run_own(Counting, tmp_path, monkeypatch) == 0
    state = load(tmp_path / "checkpoint.pt")
    assert state["model"]["passes"] == state["step"] == 6


def test_a_loss_that_begins_later_is_told(tmp_path, monkeypatch, capsys):
    """What it alone reaches would be frozen, and nobody would notice."""
    assert run_own(Late, tmp_path, monkeypatch) == 2
    assert "the loss 'own' is in some steps only (step" in capsys.readouterr().err


class Own(BLIP):
    """With a loss of its own, which has a layer of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(config.embed_dim, 1)

    def forward(self, image, ids, mask, **options):
        losses, keys = super().forward(image, ids, mask, **options)
        losses["own"] = self.head(self.encode_image(image)[1]).square().mean()
        return losses, keys


def test_a_loss_of_ones_own_can_be_switched_off_or_be_alone():
    """With weight 0 what it alone reaches is frozen: weight decay would shrink it."""
    model, inputs = Own(toy_model().config), dict(toy_batch(), alpha=0.4)
    trainable = trainable_names(model)
    require_reached(model, trainable, inputs)
    losses = freeze_unreached(model, trainable, inputs, lambda name: float(name != "own"))
    assert "own" in losses and not model.head.weight.requires_grad
    assert model.vision_proj.weight.requires_grad
    model.set_objectives(())
    freeze_unreached(model, trainable, inputs, lambda name: 1.0)
    assert model.head.weight.requires_grad and model.vit.cls_token.requires_grad
    assert not model.text_proj.weight.requires_grad
    with pytest.raises(InputError, match="all losses are switched off"):
        freeze_unreached(model, trainable, inputs, lambda name: 0.0)


@dataclass(frozen=True)
class OwnConfig(TrainConfig):
    """As docs/losses.md gives a loss its weight."""

    own_weight: float = setting(1.0, "of mine")


def test_the_weight_of_a_loss_that_is_not_there_is_told():
    """Else --own-weight 0.5 without the name of the task would do nothing, unseen."""
    require_read_weights(OwnConfig(own_weight=0.5), {"itc", "own"})
    require_read_weights(OwnConfig(itc_weight=0.5), {"lm"})  # ITC begins later
    with pytest.raises(InputError, match="--own-weight does nothing in pretrain: its model returns "
                                         "no loss 'own', but itc, lm"):
        require_read_weights(OwnConfig(own_weight=0.5), {"itc", "lm"})
    OwnConfig(itc_weight=0.0, itm_weight=0.0, lm_weight=0.0)  # its own loss alone
    with pytest.raises(SettingError, match="all losses are switched off"):
        OwnConfig(itc_weight=0.0, itm_weight=0.0, lm_weight=0.0, own_weight=0.0)


class Twin(BLIP):
    """With a momentum twin of its own, as docs/losses.md makes one."""

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(config.embed_dim, 4)
        self.head_m = copy.deepcopy(self.head).requires_grad_(False)

    def twins(self):
        return super().twins() + ([(self.head, self.head_m)] if hasattr(self, "head_m") else [])


def test_a_twin_of_ones_own_follows():
    model = Twin(toy_model().config)
    assert torch.equal(model.head_m.weight, model.head.weight)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    model.update_momentum(0.75)
    assert torch.allclose(model.head.weight - model.head_m.weight, torch.tensor(0.75))


def test_a_group_has_its_own_part_of_the_learning_rate(tmp_path, monkeypatch):
    """A ViT with lr_scale 0 stays as it is; the rest learns."""
    def make_optimizer(model, config):
        vit = list(model.vit.parameters())
        rest = [p for name, p in model.named_parameters()
                if p.requires_grad and not name.startswith("vit.")]
        return torch.optim.AdamW([{"params": vit, "lr_scale": 0.0}, {"params": rest}])
    monkeypatch.setattr("training.run.make_optimizer", make_optimizer)
    assert run(tmp_path, "--scenes", 48, "--save-every", 2, "--keep", 9) == 0
    first, last = (load(tmp_path / f"checkpoint-{step:08d}.pt")["model"] for step in (2, 6))
    stayed = {name for name in first if torch.equal(first[name], last[name])}
    assert {name for name in first if name.startswith("vit.")} <= stayed
    assert not stayed & {"vision_proj.weight", "itm_head.weight", "med.lm_head.dense.weight"}


def test_a_loss_that_is_no_tensor_is_told():
    model, inputs = toy_model(), dict(toy_batch(), alpha=0.4)
    forward = model.forward
    model.forward = lambda **given: (forward(**given)[0] | {"own": 0.0}, {})
    with pytest.raises(InputError, match="the loss 'own' is a float; it must be a tensor"):
        reached_parameters(model, inputs)


def test_a_parameter_that_was_frozen_on_purpose_stays_so():
    model, inputs = toy_model(), dict(toy_batch(), alpha=0.4)
    model.vit.requires_grad_(False)
    trainable = trainable_names(model)
    require_reached(model, trainable, inputs)
    freeze_unreached(model, trainable, inputs)
    assert not any(p.requires_grad for p in model.vit.parameters())
    with pytest.raises(InputError, match="no loss reaches vit.blocks"):
        require_reached(model, trainable | {"vit.blocks.0.fc1.weight"}, inputs)
