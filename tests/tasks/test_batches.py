"""How an evaluation reads its pictures."""

import json

import pytest
import torch
from conftest import photographs, run

import eval as eval_
from config import TrainConfig
from data.datasets import Pair
from data.text import Tokenizer
from tasks import task


@pytest.fixture
def loaders(monkeypatch) -> list[dict]:
    """The options of every loader that an evaluation makes."""
    made = []
    class Loader(torch.utils.data.DataLoader):
        def __init__(self, dataset, **options):
            made.append(options)
            super().__init__(dataset, **options)
    monkeypatch.setattr(task, "DataLoader", Loader)
    return made


def test_an_evaluation_reads_photographs_with_the_workers_of_the_training(tmp_path, loaders):
    files = photographs(tmp_path / "photos", 16)
    assert run(tmp_path / "a", "--scenes", 16, "--workers", 1) == 0
    assert [options["num_workers"] for options in loaders] == [0] * len(loaders) and loaders
    loaders.clear()
    asked = ["caption", "--checkpoint", str(tmp_path / "a" / "checkpoint.pt"),
             "--data", str(files / "val.json"), "--out", str(tmp_path / "e")]
    assert eval_.main(asked) == 0
    assert [options["num_workers"] for options in loaders] == [1]
    assert loaders[0]["pin_memory"] == torch.cuda.is_available()
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["images"] == 10


def test_pairs_with_the_same_caption_are_no_negatives_if_asked():
    tokenizer = Tokenizer.train(["a red dog"] * 3, 100)
    items = [{"image": torch.zeros(3, 4, 4), "example": Pair("", (caption,), number),
              "index": number, "broken": []}
             for number, caption in enumerate(("a dog", "A  dog.", "a red dog"))]
    ids = task.collate_pairs(tokenizer, TrainConfig(equal_texts=True), None)(items)["image_ids"]
    assert ids[0] == ids[1] != ids[2]
    assert "image_ids" not in task.collate_pairs(tokenizer, TrainConfig(), None)(items)
