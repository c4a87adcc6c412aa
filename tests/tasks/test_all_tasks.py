"""What the tasks have in common: where they start, their commands, mistakes in their sizes."""

import json

import pytest
import torch
from conftest import FINETUNE, SumsInAnyOrder, run, toy_model
from PIL import Image

import eval as eval_
import train
from tasks.registry import make_model
from training import checkpoints


def test_a_task_starts_from_the_pretrained_model():
    blip = toy_model(text_width=32, text_heads=2)
    vqa = make_model("vqa", blip.config)
    checkpoints.initialise(vqa, blip)
    theirs = blip.state_dict()
    for name, value in vqa.state_dict().items():
        assert torch.equal(value, theirs[vqa.pretrained_name(name)]), name
    nlvr2 = make_model("nlvr2", blip.config)
    checkpoints.initialise(nlvr2, blip)
    ours = nlvr2.state_dict()
    for which in ("first", "second"):
        for part in ("q", "kv", "out"):
            assert torch.equal(ours[f"med.layers.1.cross_attn.attn.{which}.{part}.weight"],
                               theirs[f"med.layers.1.cross_attn.attn.{part}.weight"])
    fresh = {name for name in ours if nlvr2.pretrained_name(name) not in theirs}
    assert fresh == {"med.layers.1.cross_attn.attn.merge.weight",
                     "med.layers.1.cross_attn.attn.merge.bias", "head.0.weight", "head.0.bias",
                     "head.2.weight", "head.2.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pretrain", "retrieval", "caption", "vqa", "nlvr2", "visdial",
                                  "blip2-stage1", "language-model"])
def test_no_task_leaves_a_sum_to_chance(task, pretrained, tmp_path):
    start = [] if task in ("pretrain", "language-model") else ["--init", str(pretrained)]
    with SumsInAnyOrder() as sums:
        assert train.main([task, *start, *FINETUNE, "--scenes", "16", "--out",
                           str(tmp_path / "r")]) == 0
    assert sums.count == 0


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_train_and_evaluate_in_the_world(task, pretrained, tmp_path, capsys):
    """Two commands; what is written; the checkpoint is known for what it is."""
    assert train.main([task, "--init", str(pretrained), "--out", str(tmp_path / "r"), *FINETUNE,
                       "--scenes", "40"]) == 0
    numbers = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert 0 <= numbers["accuracy"] <= 1 and "blank_accuracy" in numbers
    assert numbers["chance"]["accuracy"] > 0.1 and numbers["steps"] == 5
    best = str(tmp_path / "r" / "best.pt")
    assert eval_.main([task, "--checkpoint", best, "--size", "14", "--out",
                       str(tmp_path / "e")]) == 0
    assert "accuracy" in capsys.readouterr().out
    told = json.loads((tmp_path / "e" / "answers.json").read_text())
    assert len(told) == 14 and Image.open(tmp_path / "e" / "sheet.png").size[0] > 100
    assert eval_.main(["caption", "--checkpoint", best, "--out", str(tmp_path / "x")]) == 2
    assert (f"checkpoint of another task ({task}); give one of pretrain or retrieval or caption"
            in capsys.readouterr().err)
    assert eval_.main([task, "--checkpoint", str(pretrained), "--out", str(tmp_path / "x")]) == 2
    assert f"(pretrain); give one of {task}" in capsys.readouterr().err
    if task == "vqa":
        state = torch.load(best, weights_only=True)
        assert {"yes", "one", "small"} <= set(state["answers"])  # of 40 questions
        Image.new("RGB", (40, 30)).save(tmp_path / "p.png")
        assert eval_.main(["ask", str(tmp_path / "p.png"), "what colour is it?", "--checkpoint",
                           best]) == 0
        assert capsys.readouterr().out.strip().splitlines()[-1] in state["answers"]
        assert eval_.main(["ask", str(tmp_path / "p.png"), "what colour is it " * 12,
                           "--checkpoint", best]) == 2
        assert "more than the 35 that the model reads; shorten it" in capsys.readouterr().err


def test_sizes_that_do_not_fit_a_task_are_one_sentence(tmp_path, capsys):
    assert run(tmp_path / "wide", "--scenes", 16, "--vit-width", 32) == 0
    flags = ["visdial", "--init", str(tmp_path / "wide" / "checkpoint.pt"), *FINETUNE, "--scenes",
             "16", "--out", str(tmp_path / "r")]
    assert train.main(flags) == 2
    assert "vit_width 32 and text_width 16 must be equal" in capsys.readouterr().err
    assert train.main(["caption", *flags[1:]]) == 0
