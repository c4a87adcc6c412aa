"""Checkpoints and released weights."""

import pickle

import pytest
import torch
from conftest import reference, toy_batch, toy_model

import checkpoints
from checkpoints import initialise
from data import InputError
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
    with pytest.raises(InputError, match="c.pt could not be written .disk full.; the previous one"):
        checkpoints.save(tmp_path / "c.pt", {"step": 2})
    assert torch.load(tmp_path / "c.pt", weights_only=True) == {"step": 1}


def released(tmp_path, **changes):
    weights = {**reference("b_pretrain_parts.pt")["model"], **changes}
    torch.save({"model": {k: v for k, v in weights.items() if v is not None}},
               tmp_path / "released.pt")
    return tmp_path / "released.pt"


@torch.no_grad()
def test_released_pretraining_model_gives_the_released_outputs(tmp_path):
    model, report = checkpoints.load_released(released(tmp_path), vit_heads=4, text_heads=4)
    ref = reference("b_pretrain_parts.pt")
    inputs, out = ref["inputs"], ref["outputs"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert not report.missing
    assert all(name.startswith("text_encoder_m.") and "crossattention" in name
               for name in report.left_over)
    tokens, image_feat = model.encode_image(inputs["image"])
    kv = model.med.project(tokens)
    decoded, _ = model.med.decode(ids, mask, kv)
    found = {"image_embeds": tokens, "image_feat": image_feat,
             "text_last_hidden": model.med.encode_text(ids, mask),
             "text_feat": model.encode_text(ids, mask), "itm_logits": model.match(kv, ids, mask),
             "multimodal_last_hidden": model.med.encode_grounded(ids, mask, kv),
             "decoder_logits": model.med.logits(decoded)}
    for name, value in found.items():
        assert torch.allclose(value, out[name], atol=1e-4), name
    model.set_objectives(("lm",))
    assert model(inputs["image"], ids, mask)[0]["lm"].item() == pytest.approx(
        out["loss_lm"].item(), abs=1e-5)


def test_released_sizes_are_inferred_and_heads_are_asked_for(tmp_path):
    path = released(tmp_path)
    with pytest.raises(InputError, match="width 48 is no multiple of 64.* give vit_heads"):
        checkpoints.load_released(path)
    with pytest.raises(InputError, match="text_heads=5 does not divide"):
        checkpoints.load_released(path, vit_heads=4, text_heads=5)
    config = checkpoints.load_released(path, vit_heads=4)[0].config
    assert (config.text_heads, config.queue_size, config.vocab_size, config.enc_id) == (
        1, 24, 486, 485)
    larger = checkpoints.load_released(path, image_size=96, vit_heads=4)[0]
    assert larger.vit.pos_embed.shape == (1, 37, 48)


def test_what_is_missing_or_left_over_is_reported(tmp_path):
    path = released(tmp_path, **{"itm_head.weight": None, "something.else": torch.zeros(1)})
    _, report = checkpoints.load_released(path, vit_heads=4, text_heads=4)
    assert report.missing == ["itm_head.weight"] and "something.else" in report.left_over
    assert "itm_head.weight" in str(report) and "left over" in str(report)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a released BLIP"):
        checkpoints.load_released(tmp_path / "other.pt")


def test_round_trip(tmp_path):
    from dataclasses import asdict

    from data import Tokenizer
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
