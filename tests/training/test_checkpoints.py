"""Checkpoints and released weights."""

import json
import pickle
import random
import re
from dataclasses import asdict

import pytest
import torch
from conftest import photographs, run, toy_batch, toy_model
from PIL import Image

import train
from blip import BLIP
from config import BLIPConfig
from data.files import InputError, read_tensors
from data.text import Tokenizer
from eval import main as eval_main
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


def test_a_checkpoint_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "whole.pt", {"weight": torch.randn(10)})
    def refuse(*arguments, **options):
        raise PermissionError("denied")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(InputError, match="whole.pt may not be read; give yourself the permission"):
        checkpoints.load(tmp_path / "whole.pt")


def test_missing_cut_short_and_foreign_checkpoints(tmp_path):
    with pytest.raises(InputError, match="nothing.pt does not exist"):
        checkpoints.load(tmp_path / "nothing.pt")
    checkpoints.save(tmp_path / "whole.pt", {"weight": torch.randn(1000)})
    (tmp_path / "short.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    with pytest.raises(InputError, match="short.pt"):
        checkpoints.load(tmp_path / "short.pt")
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        checkpoints.load(tmp_path / "whole.pt")


def test_a_flipped_bit_is_noticed(tmp_path):
    """Wherever it lies in what was saved: torch.load accepts five of six."""
    state = {"model": {"weight": torch.randn(3000)}, "model_config": {"vit_depth": 2},
             "tokenizer": ["a"] * 500, "optimizer": {"exp_avg": torch.randn(3000)}}
    checkpoints.save(tmp_path / "whole.pt", state)
    content = (tmp_path / "whole.pt").read_bytes()
    rng, accepted = random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / "flip.pt").write_bytes(damaged)
        try:
            again = read_tensors(tmp_path / "flip.pt")
            accepted += not (torch.equal(again["model"]["weight"], state["model"]["weight"])
                             and torch.equal(again["optimizer"]["exp_avg"],
                                             state["optimizer"]["exp_avg"])
                             and again["model_config"] == state["model_config"]
                             and again["tokenizer"] == state["tokenizer"])
        except InputError as error:
            assert "flip.pt" in str(error)
    assert accepted == 0


def test_weights_that_are_not_finite_are_refused(tmp_path, pretrained, capsys):
    state = checkpoints.load(pretrained)
    state["model"]["itm_head.weight"][0, 0] = float("nan")
    checkpoints.save(tmp_path / "nan.pt", state)
    assert eval_main(["retrieval", "--checkpoint", str(tmp_path / "nan.pt")]) == 2
    error = capsys.readouterr().err
    assert "nan.pt: itm_head.weight holds numbers that are not finite" in error
    assert error.count("\n") == 1


def test_a_buffer_may_be_infinite_and_not_nan():
    """The best value so far starts at inf; statistics or a queue of nan give scores of nan."""
    model = torch.nn.BatchNorm1d(2)
    model.register_buffer("best", torch.tensor(float("inf")))
    assert checkpoints.first_not_finite(model) == ""
    model.running_mean[0] = float("nan")
    assert checkpoints.first_not_finite(model) == "running_mean"


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


def without(name):
    def change(state):
        part, _, field = name.rpartition(".") if name[:6] != "model." else ("model", "", name[6:])
        del (state[part] if part else state)[field]
    return change


def other(name, value):
    def change(state):
        part, _, field = name.rpartition(".")
        (state[part] if part else state)[field] = value
    return change


@pytest.mark.parametrize("change, message", [
    (without("model_config.vit_depth"), "lacks the field 'vit_depth'"),
    (other("model_config.vit_depth", 3), "Missing key"),
    (other("model_config.vit_depth", "two"), "--vit-depth is 'two'; it must be of type int"),
    (other("model_config", [1, 2]), ""), (other("train_config", None), ""),
    (other("train_config.task", "dance"), "its task 'dance' is unknown"),
    (other("train_config.lr", "fast"), "--lr is 'fast'"),
    (other("model", {}), "Missing key"), (other("model", 5), ""), (other("tokenizer", 5), ""),
    (other("tokenizer", ["a"]), ""), (without("model.itm_head.weight"), "Missing key")])
def test_a_checkpoint_of_another_form_is_one_sentence(tmp_path, pretrained, capsys, change,
                                                      message):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/checkpoint.pt"
    state = read_tensors(pretrained)
    change(state)
    checkpoints.save(path, state)
    for status in (lambda: eval_main(["retrieval", "--checkpoint", str(path)]),
                   lambda: train.main(["--resume", "--out", str(tmp_path / "a")])):
        capsys.readouterr()
        assert status() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error


@pytest.mark.parametrize("name", "optimizer step seconds best rng rng_device seen broken".split())
@pytest.mark.parametrize("wrong", ["absent", "text", None])
def test_a_run_that_lacks_something_is_one_sentence(tmp_path, pretrained, capsys, name, wrong):
    if name in ("rng", "rng_device", "seen", "broken") and wrong != "absent":
        return
    (tmp_path / "a").mkdir()
    state = read_tensors(pretrained)
    state.pop(name) if wrong == "absent" else state.update({name: wrong})
    checkpoints.save(tmp_path / "a/checkpoint.pt", state)
    status = train.main(["--resume", "--out", str(tmp_path / "a")])
    error = capsys.readouterr().err
    if name == "rng_device":  # not needed on a CPU
        return
    assert status == 2 and "checkpoint.pt" in error.splitlines()[-1], error


@pytest.mark.parametrize("content", [{}, [1], {"stamps": ["a"], "features": None},
                                     {"stamps": ["a", "b"], "features": torch.zeros(1, 8)}])
def test_a_search_cache_of_another_form_is_one_sentence(tmp_path, pretrained, capsys, content):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "p.png")
    flags = ["search", "a circle", "--images", str(tmp_path / "p.png"), "--checkpoint",
             str(pretrained), "--out", str(tmp_path / "out")]
    assert eval_main(flags) == 0
    store, = (tmp_path / "out").glob("features-*.pt")
    torch.save(content, store)
    assert eval_main(flags) == 2
    assert f"{store} holds no features of pictures; delete it" in capsys.readouterr().err


def test_keep_counts_this_runs_checkpoints_only(tmp_path):
    """Neither those of an earlier run, nor later ones, from before it was set back."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/checkpoint-00009000.pt").write_bytes(b"of another run")
    assert run(tmp_path / "a", "--scenes", 48, "--save-every", 2, "--keep", 2) == 0
    names = sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*.pt"))
    assert names == ["checkpoint-00000004.pt", "checkpoint-00000006.pt"]
    assert (tmp_path / "a.old1/checkpoint-00009000.pt").exists()
    (tmp_path / "a/checkpoint-00000002-good.pt").write_bytes(b"somebody's own copy")
    checkpoints.save(tmp_path / "a/checkpoint.pt", {"step": 5}, keep=2)
    assert sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*.pt")) == [
        "checkpoint-00000002-good.pt", "checkpoint-00000004.pt", "checkpoint-00000005.pt",
        "checkpoint-00000006.pt"]


def test_new_pieces_start_as_the_mean_of_what_spelt_them():
    source = toy_model(vocab_size=60)
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    wider = toy_model(vocab_size=62)
    fresh = initialise(wider, source, [[7, 8, 9], [11]])
    assert not fresh
    for name in ("med.embeddings.word.weight", "med_m.embeddings.word.weight",
                 "med.lm_head.bias"):
        old, new = source.state_dict()[name], wider.state_dict()[name]
        assert torch.equal(new[:60], old) and torch.equal(new[61], old[11])
        assert torch.allclose(new[60], (old[7] + old[8] + old[9]) / 3)
    assert initialise(toy_model(vocab_size=62), source)  # without a spelling they start afresh


def test_own_words_are_added_to_a_worlds_vocabulary(pretrained, tmp_path, capsys):
    """Else they are spelt by letters: it is said, and the remedy works."""
    folder = photographs(tmp_path / "photos")
    rows = [{"image": f"{i}.jpg", "caption": f"{1 + i % 3} wooden tables beside a bicycle"}
            for i in range(16)]
    (folder / "own.json").write_text(json.dumps(rows))
    flags = ["retrieval", "--init", str(pretrained), "--data", str(folder / "own.json"),
             "--epochs", "1", "--batch-size", "8", "--augment", "false", "--workers", "0",
             "--device", "cpu", "--eval-top-k", "4"]
    assert train.main([*flags, "--new-pieces", "0", "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr()
    assert "words are spelt. --new-pieces" in said.out
    assert train.main([*flags, "--out", str(tmp_path / "b")]) == 0  # the preset's 4,000
    said = capsys.readouterr().out
    assert re.search(r"pieces added .* 1\.0 for a word of .* instead of [3-6]\.", said)
    before = checkpoints.load_model(pretrained)[1].vocab
    model, tokenizer = checkpoints.load_model(tmp_path / "b" / "checkpoint.pt")
    assert tokenizer.vocab[:len(before)] == before  # a known piece keeps its number
    assert len(tokenizer.piece_ids("2 wooden tables beside a bicycle")) == 6
    assert len(model.med.embeddings.word.weight) == len(tokenizer.vocab)
    assert train.main(["--resume", "--out", str(tmp_path / "b")]) == 0
