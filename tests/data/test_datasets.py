"""Examples with their pictures, and batches of them."""

import torch
from PIL import Image
from test_images import picture
from test_text import CAPTIONS

from data.datasets import (
    DialogExample,
    DialogRound,
    ImageDataset,
    Pair,
    VQAExample,
    caption_collate,
    worker_options,
)
from data.text import Tokenizer


def test_no_flip_where_a_text_says_left_or_right(tmp_path):
    """Unless asked for; all texts of an example count: a caption, an answer, a dialog's rounds."""
    half = Image.new("RGB", (32, 32), (255, 0, 0))
    half.paste((0, 0, 255), (16, 0, 32, 32))
    half.save(tmp_path / "a.png")
    def left_is_red(example, flip="safe"):
        data = ImageDataset([example], tmp_path, 32, augment=True, crop=(0.95, 1.0), flip=flip)
        found = []
        for epoch in range(30):
            data.set_epoch(epoch)
            image = data[0]["image"].float()
            found.append(bool(image[0, 16, 8] > image[0, 16, 24]))
        return sum(found)
    wall, sided = (Pair("a.png", (f"a red wall{side}",), 0) for side in ("", " on the left"))
    question = VQAExample("a.png", "where is the red wall?", 0, ("Left",))
    turns = (DialogRound("where is it?", "on the right", ("yes", "on the right"), 1),)
    assert [left_is_red(e) for e in (sided, question, DialogExample("a.png", "a", turns, 0))] == [
        30, 30, 30]
    assert 5 < left_is_red(wall) < 25 and 5 < left_is_red(sided, "always") < 25
    assert left_is_red(wall, "never") == 30


def test_unreadable_images_are_replaced_in_training_and_left_out_in_evaluation(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    pairs = [Pair("broken.jpg", ("one",), 0), Pair("good.png", ("two",), 1),
             Pair("missing.png", ("three",), 2)]
    train = ImageDataset(pairs, tmp_path, 16, replace_broken=True)
    assert [train[i]["example"].captions for i in range(3)] == [("two",)] * 3
    assert "broken.jpg" in train[0]["broken"][0] and len(train[2]["broken"]) == 2
    collate = caption_collate(Tokenizer.train(CAPTIONS, 300), 30, 30)
    batch = collate([ImageDataset(pairs, tmp_path, 16)[i] for i in range(3)])
    assert (batch["image"].shape == (1, 3, 16, 16) and len(batch["broken"]) == 2
            and [example.captions for example in batch["examples"]] == [("two",)])
    assert collate([ImageDataset(pairs, tmp_path, 16)[0]])["image"] is None


def test_a_batch_of_captions():
    """The first caption is read, cleaned, after the prompt; images have ids where asked for."""
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    pairs = [Pair("a.png", ('A "dog" #runs!', "two"), 7), Pair("b.png", (), 8),
             Pair("a.png", ("a ball",), 7)]
    items = [{"image": torch.zeros(3, 4, 4, dtype=torch.uint8), "example": pair, "index": i,
              "broken": []} for i, pair in enumerate(pairs)]
    batch = caption_collate(tokenizer, 30, 30)(items)
    assert [tokenizer.decode(row) for row in batch["ids"]] == ["a dog runs", "", "a ball"]
    assert (batch["examples"] == pairs and batch["index"] == [0, 1, 2]
            and "image_ids" not in batch)
    batch = caption_collate(tokenizer, 30, 30, "the man", image_ids=True)(items)
    assert [tokenizer.decode(row) for row in batch["ids"]] == [
        "the man a dog runs", "the man", "the man a ball"]
    assert batch["image_ids"].tolist() == [7, 8, 7]
    assert batch["mask"].sum(1).tolist() == [7, 4, 6]
    assert caption_collate(tokenizer, 30, 4)(items)["ids"].shape == (3, 4)


def test_pictures_are_loaded_by_forked_workers_or_by_none(monkeypatch):
    """A Collate cannot be sent to a process that is started anew, as macOS and Windows do."""
    files = ImageDataset([], ".", 32)
    assert worker_options(files, 2) == {"num_workers": 2, "multiprocessing_context": "fork"}
    assert worker_options(files, 0) == worker_options([], 2) == {"num_workers": 0}
    with monkeypatch.context() as mac:
        mac.setattr("sys.platform", "darwin")  # it can fork, but not safely
        assert worker_options(files, 2) == {"num_workers": 0}
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert worker_options(files, 2) == {"num_workers": 0}
