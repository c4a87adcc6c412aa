"""Checkpoints and released weights."""

import pickle
from dataclasses import asdict

import pytest
import torch
from conftest import toy_batch, toy_model

from blip import BLIP
from config import BLIPConfig
from data.files import InputError
from data.text import Tokenizer
from training import checkpoints
from training.checkpoints import initialise
from vit import resize_positions


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_that_holds_code_is_refused(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match="holds pickled code or is no checkpoint: refused"):
            checkpoints.load(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


def test_missing_cut_short_and_foreign_checkpoints(tmp_path):
    with pytest.raises(InputError, match="nothing.pt does not exist"):
        checkpoints.load(tmp_path / "nothing.pt")
    checkpoints.save(tmp_path / "whole.pt", {"weight": torch.randn(1000)})
    (tmp_path / "short.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    with pytest.raises(InputError, match="short.pt"):
        checkpoints.load(tmp_path / "short.pt")
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        checkpoints.load(tmp_path / "whole.pt")


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "c.pt", {"step": 1})
    def fail(*args, **kwargs):
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match="c.pt could not be written .disk full.; what was there "
                       "before is as it was"):
        checkpoints.save(tmp_path / "c.pt", {"step": 2})
    assert torch.load(tmp_path / "c.pt", weights_only=True) == {"step": 1}


def test_round_trip(tmp_path):
    tokenizer = Tokenizer.train(["a dog and a cat"] * 3, 100)
    model = toy_model(**tokenizer.config()).eval()
    checkpoints.save(tmp_path / "c.pt",
                     {"model": model.state_dict(), "model_config": asdict(model.config),
                      "tokenizer": tokenizer.state()})
    again, vocabulary = checkpoints.load_model(tmp_path / "c.pt")
    batch = toy_batch()
    ids = batch["ids"].clamp(max=tokenizer.config()["vocab_size"] - 1)
    assert torch.equal(model.encode_text(ids, batch["mask"]), again.encode_text(ids, batch["mask"]))
    assert vocabulary.vocab == tokenizer.vocab and not again.training


def test_a_finetuning_starts_from_all_of_the_weights():
    source = toy_model()
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
        source.queue_ptr.fill_(3)
    larger = toy_model(image_size=64)
    initialise(larger, source)
    for name, value in source.state_dict().items():
        if name.endswith("pos_embed"):
            value = resize_positions(value, 17)
        assert torch.equal(larger.state_dict()[name], value), name
    other_queue = toy_model(queue_size=4)
    initialise(other_queue, source)
    assert other_queue.queue_ptr == 0 and torch.equal(other_queue.vit.norm.weight,
                                                      source.vit.norm.weight)


def test_a_model_that_is_loaded_to_be_used_has_no_twins_and_no_queues(pretrained):
    """It encodes as before, and in half of the memory at base size."""
    whole = checkpoints.open_model(pretrained, to_train=True).model
    used = checkpoints.open_model(pretrained).model
    parts = {name.partition(".")[0] for name in used.state_dict()}
    assert not any(part.endswith("_m") for part in parts)
    assert sum(value.numel() for name, value in used.state_dict().items() if "queue" in name) == 1
    for name, value in used.named_parameters():
        assert torch.equal(value, whole.get_parameter(name))
    used.eval()
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(used.encode_image(image)[1], whole.encode_image(image)[1])
    with torch.device("meta"):
        model = BLIP(BLIPConfig())
    sizes = []
    for _ in range(2):
        tensors = [*model.parameters(), *model.buffers()]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9)
        checkpoints.for_use(model)
    assert sizes[0] > 1.8 and sizes[1] < 1.02, sizes
