"""Visual dialog: the model, its files, its measures, its evaluation; the world's dialogs."""

import json
import math

import pytest
import torch
from conftest import FINETUNE, toy_batch, toy_model
from PIL import Image

import eval as eval_
import train
from config import TrainConfig
from data.datasets import DialogRound
from data.files import InputError
from data.text import Tokenizer
from reports.metrics import dialog_scores, ndcg
from tasks import visdial
from tasks.registry import make_model
from tasks.task import TrainedModel
from world.datasets import Dialogs, all_texts
from world.dialogs import FORMS, ROUNDS, SAME, VALUES


def toy_visdial(**changes) -> visdial.VisDial:
    config = toy_model(**changes).config
    torch.manual_seed(1)
    return make_model("visdial", config).eval()


# ---- the model -----------------------------------------------------------------------------------

def test_a_dialogs_candidates_are_judged_as_one_by_one():
    """Stacked, padded and with the caption's padding in the context: as each by itself."""
    model = toy_visdial(vit_width=48, vit_heads=4)
    batch = toy_batch(6, 7)
    caption = toy_batch(2, 5)
    padded = [torch.nn.functional.pad(caption[name], (0, 4)) for name in ("ids", "mask")]
    together = model.logits(model.encode_context(batch["image"][:2], *padded), batch["ids"],
                            batch["mask"])
    for i in range(6):
        d = i // 3
        real = int(caption["mask"][d].sum())
        alone = model.encode_context(batch["image"][d:d + 1], caption["ids"][d:d + 1, :real],
                                     caption["mask"][d:d + 1, :real])
        length = int(batch["mask"][i].sum())
        one = model.logits(alone, batch["ids"][i:i + 1, :length], batch["mask"][i:i + 1, :length])
        assert torch.allclose(together[i:i + 1], one, atol=1e-5)


def test_the_caption_and_the_image_both_matter():
    model, batch = toy_visdial(vit_width=48, vit_heads=4), toy_batch(4, 7)
    def logits(image, ids):
        kv = model.encode_context(image, ids, torch.ones_like(ids))
        return model.logits(kv, batch["ids"], batch["mask"])
    ids = batch["ids"][:, :4]
    base = logits(batch["image"], ids)
    assert not torch.allclose(base, logits(batch["image"].flip(0), ids), atol=1e-3)
    assert not torch.allclose(base, logits(batch["image"], ids.flip(0)), atol=1e-3)
    with pytest.raises(ValueError, match="must be equal"):
        toy_visdial()


def test_image_and_caption_are_projected_once_for_a_dialog(monkeypatch):
    model = toy_visdial(vit_width=48, vit_heads=4, image_size=64, vocab_size=300)
    tokenizer = Tokenizer.train(all_texts(), 290)
    seen = []
    for module, name in ((model.vit, "forward"), (model.med, "project"),
                         (model.med, "encode_grounded")):
        original = getattr(module, name)
        def counting(x, *rest, original=original, label=name, **options):
            seen.append((label, len(x)))
            return original(x, *rest, **options)
        monkeypatch.setattr(module, name, counting)
    trained = TrainedModel(model, tokenizer, {"max_tokens": 30})
    records = visdial.rank_candidates(trained, Dialogs("val", 2))
    rounds = 2 * ROUNDS
    assert len(records) == rounds and seen.count(("forward", 1)) == 2 == seen.count(("project", 1))
    assert seen.count(("encode_grounded", 100)) == rounds


# ---- measures ------------------------------------------------------------------------------------

def test_dialog_measures_by_hand():
    found = dialog_scores([0, 1, 9, 99])
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 100) / 4)
    assert (found["r1"], found["r5"], found["r10"]) == (0.25, 0.5, 0.75)
    assert found["mean_rank"] == pytest.approx((1 + 2 + 10 + 100) / 4)
    # two relevant ones: K = 2; found at ranks 1 (0.5) and 3 (not counted)
    expected = (0.5 / math.log2(2)) / (1.0 / math.log2(2) + 0.5 / math.log2(3))
    assert ndcg([0.9, 0.1, 0.5, 0.2], [0.5, 1.0, 0.0, 0.0]) == pytest.approx(expected)
    nan = float("nan")
    for scores, rank in (([0.1, 0.9, 0.9], 1), ([nan, nan, nan], 2), ([0.1, 0.9, nan], 1)):
        assert visdial.answer_ranks([{"scores": scores, "target": 1}]) == [rank]
    assert ndcg([3.0, 2.0, 1.0], [1.0, 0.5, 0.0]) == 1.0 and ndcg([1.0, 2.0], [0.0, 0.0]) == 0.0


# ---- files ---------------------------------------------------------------------------------------

def visdial_file(folder, candidates: int = 100) -> str:
    """A dialog of two rounds in VisDial's format, with dense relevance for the second."""
    (folder / "d.json").write_text(json.dumps({"split": "val2018", "data": {
        "questions": ["is it red", "what is it"], "answers": [f"answer {i}" for i in range(120)],
        "dialogs": [{"image_id": 7, "caption": "a red thing", "dialog": [
            {"question": 0, "answer": 3, "gt_index": 3, "answer_options": list(range(candidates))},
            {"question": 1, "answer": 12, "gt_index": 2,
             "answer_options": list(range(10, 10 + candidates))}]}]}}))
    (folder / "dense.json").write_text(json.dumps(
        [{"image_id": 7, "round_id": 2, "gt_relevance": [0.0] * 98 + [1.0, 0.5]}]))
    return f"{folder}/d.json,{folder}/dense.json"


def test_visdial_files(tmp_path):
    dialog, = visdial.read_dialogs(visdial_file(tmp_path))
    assert dialog.image == "VisualDialog_val2018_000000000007.jpg"
    first, second = dialog.rounds
    assert first.candidates[first.target] == first.answer == "answer 3"
    assert second.question == "what is it" and second.candidates[second.target] == "answer 12"
    assert dialog.relevance[0] == 1 and sum(dialog.relevance[1]) == 1.5
    with pytest.raises(InputError, match="dialog 0, round 1: it has 99 candidate answers and must"):
        visdial.read_dialogs(visdial_file(tmp_path, 99))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="is no VisDial 1.0 file"):
        visdial.read_dialogs(str(tmp_path / "x.json"))
    data = visdial_file(tmp_path)
    notes = json.loads((tmp_path / "dense.json").read_text())
    (tmp_path / "dense.json").write_text(json.dumps([notes[0] | {"image_id": 8}]))
    with pytest.raises(InputError, match="dense.json: none of its 1 images is that of a dialog"):
        visdial.read_dialogs(data)


def test_what_the_dialog_encoder_reads():
    """[CLS] history [SEP] question [SEP] candidate [SEP]; a history that is too long loses its
    beginning."""
    tokenizer = Tokenizer.train(["is it red yes no what where a circle top left"] * 3, 200)
    rounds = [DialogRound("is it red?", "yes", (), 0),
              DialogRound("where is it?", "top left", (), 0),
              DialogRound("what is it?", "a circle", (), 0)]
    (row,) = visdial.dialog_ids(tokenizer, rounds, 2, ["a circle"], 60)
    assert tokenizer.decode(row).replace("[UNK] ", "") == (
        "what is it a circle where is it top left is it red yes")
    assert row.count(tokenizer.sep) == 4 and row[-1] == tokenizer.sep
    short, = visdial.dialog_ids(tokenizer, rounds, 2, ["a circle"], len(row) - 3)
    assert short == row[:-3]  # the oldest is gone
    long = [visdial.dialog_ids(tokenizer, rounds, 2, [text], 12)[0]
            for text in ("a circle", "a circle and a circle and a circle and a circle")]
    assert all(len(r) <= 12 and r.count(tokenizer.sep) >= 2 for r in long)


# ---- the world's dialogs -------------------------------------------------------------------------

def test_the_worlds_dialogs():
    data = Dialogs("val", 40)
    needs_history = 0
    for i in range(40):
        item = data[i]
        for turn, asked in enumerate(item["example"].rounds):
            assert len(set(asked.candidates)) == 100
            assert asked.candidates[asked.target] == asked.answer
            plain = {form.format(value): value for values in VALUES.values()
                     for value in values for form in FORMS}
            meant = next((words for words in SAME if plain[asked.answer] in words),
                         {plain[asked.answer]})
            right = [text for text in asked.candidates if plain[text] in meant]
            assert right == [asked.answer]  # no other way to say the same is among them
            same_kind = next(values for values in VALUES.values()
                             if plain[asked.answer] in values)
            wrong = sum(plain[text] in same_kind for text in asked.candidates) - 1
            assert wrong == min(80, 23 * len(set(same_kind) - meant))
            needs_history += "it?" in asked.question.split() and turn > 0
    assert needs_history > 15


def test_a_training_batch_of_dialogs():
    """Of each dialog two rounds, the same in the whole batch; the answer first, then three others;
    the text of a row belongs to dialog row // 8."""
    tokenizer = Tokenizer.train(all_texts(), 400)
    data = Dialogs("train", 4)
    items = [data[i] for i in range(4)]
    batch = visdial.collate(tokenizer, TrainConfig(max_tokens=60), None)(items)
    assert batch["label"].tolist() == [1, 0, 0, 0] * 8 and len(batch["ids"]) == 32
    turns = []
    for row, (ids, mask) in enumerate(zip(batch["ids"], batch["mask"])):
        rounds = items[row // 8]["example"].rounds
        meant, = [(turn, i) for turn, asked in enumerate(rounds) for i, text in enumerate(
            visdial.dialog_ids(tokenizer, rounds, turn, asked.candidates, 60))
            if text == ids[mask.bool()].tolist()]
        assert (meant[1] == rounds[meant[0]].target) == (row % 4 == 0)
        turns.append(meant[0])
    first, second = turns[0], turns[4]
    assert first != second and turns == [first, first, first, first, second, second, second,
                                         second] * 4


# ---- commands ------------------------------------------------------------------------------------

def test_train_and_evaluate_a_dialog(pretrained, tmp_path, capsys):
    assert train.main(["visdial", "--init", str(pretrained), "--out", str(tmp_path / "r"),
                       *FINETUNE, "--scenes", "16", "--eval-size", "2", "--max-tokens",
                       "40"]) == 0
    best = str(tmp_path / "r" / "best.pt")
    folder = tmp_path / "d"
    folder.mkdir()
    data = visdial_file(folder)
    Image.new("RGB", (40, 30)).save(folder / "VisualDialog_val2018_000000000007.jpg")
    assert eval_.main(["visdial", "--checkpoint", best, "--data", data, "--out",
                       str(tmp_path / "e")]) == 0
    numbers = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert 0 <= numbers["ndcg"] <= 1 and numbers["rounds"] == 2 and "blank_mrr" not in numbers
    told = json.loads((tmp_path / "e" / "answers.json").read_text())
    assert [(r["image_id"], r["round_id"]) for r in told] == [(7, 1), (7, 2)]
    assert sorted(told[0]["ranks"]) == list(range(1, 101))
