"""A new task is one file and its name in tasks/registry.py."""

import json

import torch

import eval as eval_command
import tasks
import train
from tasks import registry
from training.checkpoints import load

COUNTING = '''
"""How many things are there? A toy task."""

import torch
import torch.nn.functional as F
from torch import nn

from blip import init_weights
from data.datasets import Collate
from reports.metrics import mean
from tasks.task import TINY, Evaluation, Task, TaskModel, evaluation_batches
from world.datasets import World


class Counter(TaskModel):
    """vit, and a head on [CLS]."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.vit_width, 3)
        init_weights(self, config.init_std)

    def forward(self, image, number):
        """image (B, 3, S, S), number (B,) -> cross-entropy."""
        return {"counting": F.cross_entropy(self.head(self.vit(image)[:, 0]), number)}, {}


def open_data(source):
    """Scenes of the world."""
    return World(source.split, source.size, source.image_size, source.seed)


def collate(tokenizer, config, model_config):
    """The number of things, from the caption."""
    def encode(items):
        texts = [item["example"].captions[0] for item in items]
        return {"number": torch.tensor([1 + text.count(" and ") for text in texts])}
    return Collate(encode)


def evaluate(trained, dataset, settings):
    """accuracy."""
    right = []
    for batch in evaluation_batches(dataset, collate(None, None, None), trained, "counting"):
        with torch.no_grad():
            logits = trained.model.eval().head(trained.model.vit(batch["image"])[:, 0])
        right += (logits.argmax(1) == batch["number"]).tolist()
    return Evaluation({"accuracy": mean(right)}, [])


TASK = Task("counting", "count things", Counter, open_data, collate, evaluate,
            lambda numbers: numbers["accuracy"], settings=dict(out="runs/counting"),
            tiny=dict(TINY, epochs=1, scenes=64))
BENCHMARKS = (TASK.benchmark("counting", "accuracy of counting"),)
'''


def test_a_new_task_is_one_file_and_one_line(tmp_path, pretrained, monkeypatch, capsys):
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    registry.register("tasks.counting")  # what the line in MODULES does
    try:
        out = tmp_path / "run"
        assert train.main(["counting", "--init", str(pretrained), "--batch-size", "8",
                           "--eval-size", "20", "--log-every", "1", "--out", str(out)]) == 0
        start, best = load(pretrained)["model"], load(out / "best.pt")
        assert best["train_config"]["task"] == "counting" and best["step"] == 8
        assert not torch.equal(start["vit.cls_token"], best["model"]["vit.cls_token"])
        assert json.loads((out / "metrics.json").read_text())["accuracy"] > 0
        assert eval_command.main(["counting", "--checkpoint", str(out / "best.pt"), "--size", "20",
                                  "--out", str(tmp_path / "e")]) == 0
        assert "accuracy" in capsys.readouterr().out
        # A checkpoint of the new task is refused where another one is needed.
        assert train.main(["vqa", "--init", str(out / "best.pt"), "--out", str(out)]) == 2
        assert "is a checkpoint of another task (counting)" in capsys.readouterr().err
    finally:
        del registry.TASKS["counting"], registry.BENCHMARKS["counting"]


def test_every_task_says_what_it_is():
    for name, task in registry.TASKS.items():
        assert task.name == name and task.about and task.settings | task.tiny
        assert set(task.needs) <= {"itc", "itm", "lm"}
    assert set(registry.BENCHMARKS) == {"retrieval", "caption", "nocaps", "vqa", "nlvr2", "visdial",
                                        "video-retrieval", "video-qa", "blip2-retrieval",
                                        "blip2-caption", "blip2-vqa"}
