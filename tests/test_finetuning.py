"""Finetuning: where it starts, what it reads, which epoch it keeps."""

import dataclasses
import json

import pytest
import torch
from conftest import finetune, photographs
from PIL import Image

import train
from blip import BLIP
from config import TrainConfig
from tasks.registry import TASKS
from tasks.task import EvalSettings
from training import checkpoints
from training.run import open_datasets
from world.datasets import World


@pytest.mark.parametrize("task, own, other", [("caption", {"lm"}, {"itc", "itm"}),
                                              ("retrieval", {"itc", "itm"}, {"lm"})])
def test_finetuning_in_the_world_keeps_the_best_epoch(tmp_path, pretrained, monkeypatch, task, own,
                                                      other):
    scores, out = iter([0.5, 0.9, 0.7]), tmp_path / "a"
    monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task],
                                                         score=lambda numbers: next(scores)))
    assert finetune(task, pretrained, out, "--epochs", 3) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["val_score"] for line in log if "val_score" in line] == [0.5, 0.9, 0.7]
    assert own <= set(log[0]) and not other & set(log[0])
    best, last = (checkpoints.load(out / f"{name}.pt") for name in ("best", "checkpoint"))
    assert best["step"] == 8 and "optimizer" not in best and last["best"] == 0.9
    assert not all(map(torch.equal, best["model"].values(), last["model"].values()))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["best_step"] == 8 and metrics["settings"]["task"] == task
    assert Image.open(out / "samples.png").size[0] > 500


def watch_forward(monkeypatch) -> list[dict]:
    """The arguments of each forward pass of the model."""
    seen, forward = [], BLIP.forward
    def watch(self, **arguments):
        seen.append(arguments)
        return forward(self, **arguments)
    monkeypatch.setattr(BLIP, "forward", watch)
    return seen


def test_the_prompt_stands_before_each_caption_and_gives_no_loss(tmp_path, pretrained, monkeypatch):
    seen = watch_forward(monkeypatch)
    assert finetune("caption", pretrained, tmp_path / "a", "--epochs", 1, "--prompt", "a red") == 0
    _, tokenizer = checkpoints.load_model(tmp_path / "a/best.pt")
    prompt = tokenizer.piece_ids("a red")
    for arguments in seen:
        assert "image_ids" not in arguments and "finetuning" not in arguments
        assert arguments["prompt_length"] == 1 + len(prompt)
        assert all(row[1:1 + len(prompt)].tolist() == prompt for row in arguments["ids"])


def test_retrieval_knows_which_texts_share_an_image(tmp_path, pretrained, monkeypatch):
    seen = watch_forward(monkeypatch)
    assert finetune("retrieval", pretrained, tmp_path / "a", "--epochs", 1, "--all-negatives",
                    "true") == 0
    image_ids = {World("train", 32).example(i).image_id for i in range(32)}
    assert {i for arguments in seen for i in arguments["image_ids"].tolist()} == image_ids
    assert all(arguments["finetuning"] and arguments["all_negatives"] for arguments in seen)


def test_twins_move_once_before_the_first_step_of_a_finetuning(tmp_path, pretrained):
    """As in the released code, which moves them before the features of a step."""
    start = checkpoints.load(pretrained)["model"]
    run = train.start({"task": "retrieval", "init": str(pretrained), "scenes": 16, "batch_size": 8,
                       "device": "cpu", "out": str(tmp_path / "r")})
    online, twin = start["vit.cls_token"], start["vit_m.cls_token"]
    assert torch.allclose(run.model.vit_m.cls_token, 0.99 * twin + 0.01 * online, atol=1e-7)
    assert not torch.equal(run.model.vit_m.cls_token, twin)


def test_a_resumed_finetuning_remembers_the_best_score(tmp_path, pretrained):
    assert finetune("retrieval", pretrained, tmp_path / "a", "--epochs", 2) == 0
    best = checkpoints.load(tmp_path / "a/checkpoint.pt")["best"]
    assert train.main(["retrieval", "--resume", "--out", str(tmp_path / "a")]) == 0
    assert checkpoints.load(tmp_path / "a/checkpoint.pt")["best"] == best > 0
    assert train.main(["caption", "--resume", "--out", str(tmp_path / "a")]) == 2


def test_images_of_another_size_and_ids_that_are_all_the_same(tmp_path, pretrained):
    """Positions are resized; a batch whose captions all belong to one image is no crash."""
    folder = photographs(tmp_path)
    rows = json.loads((folder / "train.json").read_text())
    (folder / "one.json").write_text(json.dumps([{**row, "image_id": "x"} for row in rows]))
    assert finetune("retrieval", pretrained, tmp_path / "a", "--data", folder / "one.json",
                    "--val", folder / "val.json", "--image-size", 48, "--epochs", 1) == 0
    model, _ = checkpoints.load_model(tmp_path / "a/best.pt")
    assert model.config.image_size == 48 and model.vit.pos_embed.shape[1] == 10


@pytest.mark.parametrize("task, flags, message", [
    ("caption", ["--vit-width", 32], "--vit-width is 16 in the weights of --init"),
    ("retrieval", ["--init", "LM"], "is a checkpoint of another task (pretrain): it was trained "
                                    "without ITC and ITM"),
    ("caption", ["--init", "nothing.pt"], "nothing.pt does not exist"),
    ("caption", ["--vocab", "VOCAB"], "is not the vocabulary of")])
def test_a_finetuning_that_cannot_start_says_why(tmp_path, pretrained, capsys, task, flags,
                                                 message):
    folder = photographs(tmp_path)
    state = checkpoints.load(pretrained)
    state["train_config"] |= {"itc_weight": 0.0, "itm_weight": 0.0}
    checkpoints.save(tmp_path / "lm.pt", state)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthing\n")
    places = {"LM": str(tmp_path / "lm.pt"), "VOCAB": str(folder / "vocab.txt")}
    flags = [places.get(flag, flag) for flag in flags]
    assert finetune(task, pretrained, tmp_path / "a", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "a").exists()


def test_a_start_in_the_runs_folder_is_refused(pretrained, tmp_path, capsys):
    """It would be moved aside, and the same command would not find it again."""
    (tmp_path / "run").mkdir()
    start = tmp_path / "run/best.pt"
    start.write_bytes(pretrained.read_bytes())
    assert finetune("caption", start, tmp_path / "run") == 2
    assert "best.pt lies in the folder" in capsys.readouterr().err and start.exists()


def test_annotations_that_are_trained_on_do_not_judge(tmp_path):
    """COCO's file has no splits: without --val there is no evaluation, and no best epoch."""
    folder = photographs(tmp_path)
    records = json.loads((folder / "train.json").read_text())
    (folder / "coco.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": record["image"]} for i, record in enumerate(records)],
        "annotations": [{"image_id": i, "caption": "a thing"} for i in range(len(records))]}))
    config = TrainConfig(data=str(folder / "coco.json"), out=str(tmp_path / "run"))
    datasets = open_datasets(TASKS["caption"], config, 32)
    assert len(datasets.train) == len(records) and datasets.val is None and datasets.final is None


@pytest.mark.parametrize("given", ["--data", "--val"])
def test_a_karpathy_files_val_chooses_and_its_test_judges(tmp_path, given):
    """Also when it is given with --val, beside another training file."""
    folder = photographs(tmp_path)
    names = [record["image"] for record in json.loads((folder / "train.json").read_text())][:6]
    splits = ["train", "train", "train", "val", "test", "test"]
    (folder / "karpathy.json").write_text(json.dumps({"images": [
        {"filename": name, "split": split, "sentences": [{"raw": "a thing"}]}
        for name, split in zip(names, splits)]}))
    data = folder / ("karpathy.json" if given == "--data" else "train.json")
    config = TrainConfig(task="retrieval", data=str(data), out=str(tmp_path / "run"),
                         val=str(folder / "karpathy.json") if given == "--val" else "")
    datasets = open_datasets(TASKS["retrieval"], config, 32)
    assert (len(datasets.val), len(datasets.final)) == (1, 2)


def test_an_evaluation_draws_no_number_of_the_trainings(pretrained):
    trained = checkpoints.open_model(str(pretrained))
    state = torch.get_rng_state()
    TASKS["retrieval"].evaluate(trained, World("val", 8, trained.image_size), EvalSettings())
    assert torch.equal(torch.get_rng_state(), state)
