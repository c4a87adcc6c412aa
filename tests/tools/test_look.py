"""What the losses see: the matrices are those that the losses get, the pictures are drawn."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import photographs
from PIL import Image

import blip
import losses
from data.files import InputError, read_tensors
from data.images import batch_to
from tools import look
from training.checkpoints import open_model

PICTURES = {"itc.png", "negatives.png", "itm.png", "lm.png", "masks.png"}


def colours(path: Path) -> int:
    return len(Image.open(path).convert("RGB").getcolors(1 << 24))


def batch_of(trained, *flags):
    parser_batch = {"data": "", "image_root": "", "noise": None, "batch": 6} | dict(flags)
    return look.open_batch(trained, type("Options", (), parser_batch)())


def test_what_is_seen_is_what_the_losses_get(pretrained, monkeypatch):
    trained = open_model(pretrained, to_train=True)
    model, batch = trained.model, batch_of(trained)
    moved = batch_to(batch, "cpu")
    seen = look.see(trained, batch)
    assert blip.itc_loss is losses.itc_loss and model.draw_negative is losses.draw_one  # restored
    with torch.no_grad():
        tokens, image_feat = model.encode_image(moved["image"])
        text_m = model.med_m.encode_text(moved["ids"], moved["mask"])[:, 0]
        keys = torch.cat([blip.l2_normalize(model.text_proj_m(text_m)), model.text_queue])
        kv = model.project(tokens)
        matched = model.match(kv, moved["ids"], moved["mask"])
        hard = model.match(kv, moved["ids"][seen.text_neg], moved["mask"][seen.text_neg])
        torch.testing.assert_close(seen.sim, image_feat @ keys.T / model.temp)
        torch.testing.assert_close(seen.itm_logits[:12], torch.cat([matched, hard]))
    assert torch.equal(seen.targets[0.0], torch.eye(6, 6 + 20))
    own = seen.targets[0.4].diagonal()
    assert ((own >= 0.6) & (own < 1)).all() and seen.lm_logits.shape[:2] == seen.lm_targets.shape
    assert (seen.text_weights.diagonal() == 0).all() and seen.texts[0] in [
        example.texts[0] for example in batch["examples"]]
    # A loss that was changed is shown as it is.
    def with_margin(image_feat, text_feat, image_keys, text_keys, temp, alpha, positives=None):
        truth = torch.eye(len(image_feat), len(text_keys))
        return F.cross_entropy((image_feat @ text_keys.T - 0.5 * truth) / temp, truth)
    monkeypatch.setattr(losses, "itc_loss", with_margin)
    monkeypatch.setattr(blip, "itc_loss", with_margin)
    changed = look.see(trained, batch)
    torch.testing.assert_close(changed.sim, seen.sim - 0.5 * torch.eye(6, 26) / model.temp)


def test_masks_are_those_of_the_three_modes(pretrained):
    trained = open_model(pretrained, to_train=True)
    ids, mask = trained.tokenizer.encode(["a red star", "a red star on white"], 30)
    image = torch.zeros(1, 3, trained.image_size, trained.image_size)
    masks = look.masks_of(trained, image, ids[:1], mask[:1])
    real, length = int(mask[0].sum()), ids.shape[1]
    everything = torch.zeros(length, length, dtype=torch.bool)
    everything[:, :real] = True
    assert torch.equal(masks["encode_text"].self_mask, everything)
    assert torch.equal(masks["encode_grounded"].self_mask, everything)
    assert torch.equal(masks["decode"].self_mask, everything.tril()[:-1, :-1])
    assert masks["encode_text"].cross_mask is None
    assert masks["decode"].cross_mask.shape == (length - 1, 5) and masks["decode"].cross_mask.all()
    assert [masks[mode].words[0] for mode in masks] == ["[CLS]", "[ENC]", "[DEC]"]


def test_the_queue_holds_the_pairs_that_it_is_said_to_hold(pretrained):
    """Twins hardly move in a few steps: a wrong order of the data would show at once."""
    trained = open_model(pretrained, to_train=True)
    pairs = look.queue_pairs(trained, read_tensors(pretrained))
    assert len(pairs.items) == len(set(pairs.slots)) == 20
    curves = look.staleness(trained, pairs)
    assert set(curves) == {"image, twin", "image, online", "text, twin", "text, online"}
    assert all(cosine > 0.99 for _, cosine in curves["image, twin"] + curves["text, twin"])
    pairs.slots = pairs.slots[1:] + pairs.slots[:1]
    assert look.staleness(trained, pairs)["text, twin"][0][1] < 0.9
    trained.model.queue_ptr += 1  # another enqueue than BLIP's
    assert look.queue_pairs(trained, read_tensors(pretrained)) is None
    trained.model.queue_ptr -= 1
    trained.settings["data"] = "own.json"
    assert look.queue_pairs(trained, read_tensors(pretrained)) is None


def test_all_pictures_are_drawn(pretrained, tmp_path, capsys):
    assert look.main(["--checkpoint", str(pretrained), "--out", str(tmp_path / "a"),
                      "--batch", "5", "--noise", "0.5"]) == 0
    drawn = {path.name for path in (tmp_path / "a").iterdir()}
    assert drawn == PICTURES | {"queue.png"} and "queue.png" in capsys.readouterr().out
    for name in drawn:
        assert colours(tmp_path / "a" / name) > 20, name
        assert min(Image.open(tmp_path / "a" / name).size) > 300, name


def test_own_pairs_and_what_cannot_be_shown(pretrained, tmp_path, capsys):
    folder, out = photographs(tmp_path / "photos", 6), tmp_path / "a"
    flags = ["--checkpoint", str(pretrained), "--out", str(out)]
    state = read_tensors(pretrained)
    state["train_config"]["data"] = "own.json"
    torch.save(state, tmp_path / "own.pt")
    assert look.main(["--checkpoint", str(tmp_path / "own.pt"), "--out", str(out), "--data",
                      str(folder / "train.json")]) == 0
    assert {path.name for path in out.iterdir()} == PICTURES
    assert "no queue.png: it needs" in capsys.readouterr().out
    (folder / "one.json").write_text(json.dumps([{"image": "0.jpg", "caption": "a star"}]))
    assert look.main([*flags, "--data", str(folder / "one.json")]) == 2
    error = capsys.readouterr().err
    assert "gives fewer than two pairs" in error and error.strip().count("\n") == 0
    for noise, message in (("5", "it must be at most 1"), ("nan", "give a number")):
        assert look.main([*flags, "--noise", noise]) == 2
        assert f"--noise is {float(noise)}; {message}" in capsys.readouterr().err


def test_calls_are_noted_by_the_arguments_names():
    with pytest.raises(KeyError), look.calls_of(F, "relu") as calls:
        F.relu(torch.tensor([-1.0]), inplace=False)
        raise KeyError
    assert set(calls[0][0]) == {"input", "inplace"} and calls[0][1] == 0 and len(calls) == 1
    F.relu(torch.tensor([1.0]))
    assert len(calls) == 1


def test_a_loss_that_was_renamed_is_a_sentence():
    """An edit such as `from objectives.losses import focal_itm_loss` in blip.py."""
    with pytest.raises(InputError, match="blip has no itm_loss_of_old any more"):
        with look.calls_of(blip, "itm_loss_of_old"):
            pass
