"""VQA: the model, its files, its measures, its evaluation; the world's questions."""

import json
import random
import re

import pytest
import torch
from conftest import FINETUNE, REFERENCE, photographs, reference, toy_batch, toy_model

import eval as eval_
import train
from data.files import InputError
from data.text import Tokenizer, clean_question
from reports.metrics import normalise_answer, vqa_accuracy
from tasks import vqa
from tasks.registry import make_model
from tasks.task import EvalSettings, TrainedModel
from training import checkpoints
from weights.released import load_released
from world.datasets import Questions
from world.questions import ask
from world.scenes import Scene, Thing


def toy_vqa(**changes) -> vqa.VQA:
    config = toy_model(**changes).config
    torch.manual_seed(1)
    return make_model("vqa", config).eval()


# ---- the model -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released VQA model with its inputs and outputs."""
    given = reference("f_vqa.pt")
    path = tmp_path_factory.mktemp("vqa") / "vqa.pth"
    torch.save({"model": given["model"]}, path)
    tokenizer = Tokenizer.from_file(REFERENCE / "vocab.txt")
    model, report = load_released(path, vit_heads=4, text_heads=4, tokenizer=tokenizer)
    assert isinstance(model, vqa.VQA) and report.kind == "vqa"
    assert not report.missing and not report.left_over
    return model, tokenizer, given["inputs"], given["outputs"]


def test_training_loss_and_gradients_equal_the_released_ones(released):
    model, tokenizer, given, expected = released
    ids, mask = expected["question_ids"], expected["question_mask"]
    kv = model.question.project(model.vit(given["image"]))
    states = model.question.encode_grounded(ids, mask, kv)
    assert torch.allclose(states, expected["question_states"], atol=1e-4)
    counts = torch.tensor(given["n"])
    loss, keys = model(given["image"], ids, mask, *tokenizer.encode(given["answers"], 30), counts,
                       given["weights"])
    assert keys == {} and loss["vqa"].item() == pytest.approx(expected["train_loss"].item(),
                                                              abs=1e-4)
    loss["vqa"].backward()
    norms = expected["grad_norms"]
    ours = dict(model.named_parameters())
    for name, there in (("vit.cls_token", "visual_encoder.cls_token"),
                        ("question.layers.0.cross_attn.attn.out.weight",
                         "text_encoder.encoder.layer.0.crossattention.output.dense.weight"),
                        ("answer.layers.0.cross_attn_dec.attn.q.weight",
                         "text_decoder.bert.encoder.layer.0.crossattention.self.query.weight")):
        assert ours[name].grad.norm().item() == pytest.approx(float(norms[there]), rel=1e-3)
    model.zero_grad()


def test_ranking_and_generation_equal_the_released_ones(released):
    model, tokenizer, given, expected = released
    ids, mask = expected["question_ids"], expected["question_mask"]
    with torch.no_grad():
        kv = model.encode_question(given["image"], ids, mask)
        found, nll = model.rank(kv, expected["answer_list_ids"], expected["answer_list_mask"],
                                given["k_test"], label_smoothing=0.1)
        assert torch.equal(found, expected["rank_topk_ids"])
        assert torch.allclose(nll, expected["rank_candidate_nll"], atol=1e-4)
        chosen = found.gather(1, nll.argmin(1, keepdim=True)).flatten()
        assert torch.equal(chosen, expected["rank_max_ids"])
        kv = model.encode_question(given["image"], ids, mask, attend_padding=True)
        told = model.generate(kv)
    assert [tokenizer.decode(tokens) for tokens, _ in told] == expected["generate"]["answers"]
    assert torch.allclose(torch.tensor([score for _, score in told]),
                          expected["generate"]["sequences_scores"], atol=1e-4)


def test_question_padding_is_not_read():
    model, batch = toy_vqa(), toy_batch(4, 7)
    def likelihood(ids, mask):
        return model.answer_nll(model.encode_question(batch["image"], ids, mask), ids, mask)
    short = likelihood(batch["ids"], batch["mask"])
    padded = [torch.nn.functional.pad(batch[name], (0, 3)) for name in ("ids", "mask")]
    assert torch.allclose(short, likelihood(*padded), atol=1e-5)
    released = model.encode_question(batch["image"], *padded, attend_padding=True)
    assert not torch.allclose(model.answer_nll(released, *padded), short, atol=1e-3)


def test_answers_are_weighted_and_belong_to_their_question():
    model, batch = toy_vqa(label_smoothing=0.0), toy_batch(4, 7)
    ids, mask = batch["ids"][:2], batch["mask"][:2]
    counts, weights = torch.tensor([3, 1]), torch.tensor([0.5, 0.3, 0.2, 1.0])
    loss, _ = model(batch["image"][:2], ids, mask, batch["ids"], batch["mask"], counts, weights)
    each = []
    for a, q in enumerate((0, 0, 0, 1)):
        kv = model.encode_question(batch["image"][q:q + 1], ids[q:q + 1], mask[q:q + 1])
        each.append(model.answer_nll(kv, batch["ids"][a:a + 1], batch["mask"][a:a + 1]))
    assert loss["vqa"].item() == pytest.approx((weights @ torch.cat(each)).item() / 2, abs=1e-5)


def test_ranking_finds_the_likeliest_answer():
    """With all answers as candidates: the one of the smallest negative log-likelihood; with fewer,
    those whose first token is likeliest."""
    model, batch = toy_vqa(), toy_batch(4, 7)
    with torch.no_grad():
        kv = model.encode_question(batch["image"], batch["ids"], batch["mask"])
        answers = toy_batch(6, 5)
        answers["ids"][:, 1] = torch.arange(6, 12)
        found, nll = model.rank(kv, answers["ids"], answers["mask"], 6)
        for q in range(4):
            one = kv.select(torch.tensor([q] * 6))
            expected = model.answer_nll(one, answers["ids"], answers["mask"])
            assert torch.allclose(nll[q], expected[found[q]], atol=1e-5)
        few, _ = model.rank(kv, answers["ids"], answers["mask"], 2)
        assert torch.equal(few, found[:, :2])


# ---- measures ------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("The Dog", "dog"), ("two dogs", "2 dogs"), ("none", "0"), ("dont know", "don't know"),
    ("yes.", "yes"), ("it's", "it's"), ("10,000", "10000"), ("red/white", "red white"),
    ("red, white", "red white"), ("3.5", "3.5"), ("black-and-white", "black and white"),
    ("a\n man", "man"), ("what?", "what"), ("(left)", "left"),
])
def test_answers_are_normalised_as_the_official_script_does(text, expected):
    assert normalise_answer(text) == expected


def test_vqa_accuracy_leaves_one_person_out():
    people = ["red"] * 3 + ["blue"] * 7
    # 3 red: in 3 of 10 rounds two others say so (2/3), in 7 rounds three do (1)
    assert vqa_accuracy("red", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("blue", people) == 1.0 and vqa_accuracy("green", people) == 0.0
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(9 * (1 / 3) / 10)
    assert vqa_accuracy("the red", people) == vqa_accuracy("red", people)
    assert vqa_accuracy("the red", ["red"] * 10) == 0.0  # all agree: nothing is normalised
    assert vqa_accuracy("2", ["two"] * 5 + ["2"] * 5) == 1.0
    assert vqa_accuracy("red", ["red"]) == 1.0
    for count in (2, 3, 4):  # fewer people than the official measure knows
        assert vqa_accuracy("red", ["red"] * count) == 1.0
    assert vqa_accuracy("red", ["red", "red", "blue"]) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_the_likeliest_answer_is_told():
    class Stub(torch.nn.Module):
        def encode_question(self, image, ids, mask):
            return len(image)
        def rank(self, count, ids, mask, top_k):
            return torch.tensor([[2, 0, 1]] * count), torch.tensor([[5.0, 1.0, 3.0]] * count)
    stub = Stub()
    stub.parameter = torch.nn.Parameter(torch.zeros(1))  # says on which device the model is
    trained = TrainedModel(stub, Tokenizer.train(["a b c"] * 3, 50),
                           {"max_words": 50, "max_tokens": 35}, ["a", "b", "c"])
    found = vqa.answer_questions(trained, Questions("val", 3), EvalSettings())
    assert [record["answer"] for record in found] == ["a"] * 3
    assert [record["question_id"] for record in found] == [0, 1, 2]


# ---- the world's questions -----------------------------------------------------------------------

def test_the_worlds_answers_are_right():
    scene = Scene("pink", (Thing("bottom right", "blue", "star", "small"),
                           Thing("top left", "red", "circle", "large")))
    known = {}
    for seed in range(600):
        asked = ask(scene, random.Random(seed))
        known.setdefault(asked.text, set()).update(asked.answers)
        assert len(asked.answers) == 10
    def answers(text):
        return known[text]
    assert answers("what colour is the background?") == {"pink"}
    assert answers("what colour is the star?") == {"blue"}
    assert answers("how many things are there?") == {"two"}
    assert answers("where is the star?") == {"bottom right", "lower right"}
    assert answers("what is the red thing?") == {"circle", "disc"}
    assert answers("how large is the blue star?") == {"small", "little"}
    yes_no = {text: given for text, given in known.items() if text.startswith("is there")}
    assert all(given in ({"yes"}, {"no"}) for given in yes_no.values()) and len(yes_no) > 20
    for text, given in yes_no.items():
        match = re.fullmatch(r"is there a (\w+) (\w+)\?", text)
        if match and match[1] in ("blue", "red"):
            shapes = {"blue": ("star",), "red": ("circle", "disc")}[match[1]]
            assert (given == {"yes"}) == (match[2] in shapes), text


def test_a_question_names_one_thing():
    """Two things alike in shape: "the circle" would be either."""
    scene = Scene("pink", (Thing("bottom right", "blue", "circle", "small"),
                           Thing("top left", "red", "circle", "small")))
    texts = {ask(scene, random.Random(s)).text for s in range(400)}
    assert "what colour is the circle?" not in texts and "where is the blue circle?" in texts
    assert not any(re.search(r"the (small|little) (circle|disc)", text) for text in texts)


def test_a_question_knows_the_thing_that_it_is_about():
    """Small and large ones, under any of their names; none where it is about no single one."""
    scene = Scene("pink", (Thing("bottom right", "blue", "star", "small"),
                           Thing("top left", "red", "circle", "large")))
    star, circle = scene.things
    about = {}
    for seed in range(2000):
        asked = ask(scene, random.Random(seed))
        about.setdefault(asked.text, set()).add(asked.thing)
    for text, things in about.items():
        words = set(text.rstrip("?").split())
        assert len(things) == 1, text
        if text.startswith(("how many", "what colour is the background", "what is the background")):
            assert things == {None}
        elif text.startswith("is there"):
            assert things <= {star, circle, None}
        else:
            assert things == ({star} if words & {"star", "blue", "bottom", "lower"} else {circle})
    assert about["how large is the blue star?"] == about["is there a little star?"] == {star}
    assert about["is there a big disc?"] == {circle} and about["is there a red star?"] == {None}


# ---- files ---------------------------------------------------------------------------------------

def test_blip_and_official_questions_read_alike(tmp_path):
    (tmp_path / "blip.json").write_text(json.dumps([
        {"dataset": "vqa", "image": "val2014/COCO_val2014_000000000042.jpg", "question": "Is it?",
         "question_id": 7, "answer": ["yes"] * 9 + ["no"]},
        {"dataset": "vg", "image": "vg/1.jpg", "question": "What?", "question_id": 8,
         "answer": "dog"}]))
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": [
        {"image_id": 42, "question": "Is it?", "question_id": 7}]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [
        {"question_id": 7, "image_id": 42, "answer_type": "yes/no",
         "answers": [{"answer": "yes"}] * 9 + [{"answer": "no"}]}]}))
    one, genome = vqa.read_questions(str(tmp_path / "blip.json"))
    other, = vqa.read_questions(f"{tmp_path}/q.json,{tmp_path}/a.json")
    assert (one.image, one.question, one.question_id, one.answers) == (
        other.image, other.question, other.question_id, other.answers)
    assert other.kind == "yes/no" and genome.weight == 0.2 and one.weight == 1.0
    tokenizer = Tokenizer.train(["is it what yes no dog"] * 3, 100)
    items = [{"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "example": example, "index": i,
              "seed": "", "broken": []} for i, example in enumerate((one, genome))]
    batch = vqa.question_collate(tokenizer, 50, 35)(items)
    assert batch["weights"].tolist() == pytest.approx([0.9, 0.1, 0.2])
    assert batch["counts"].tolist() == [2, 1]


def test_questions_keep_their_question_mark():
    assert clean_question('What is "this"? A dog.') == "what is this? a dog"
    assert len(clean_question("word " * 80, 50).split()) == 50


def test_mistakes_in_questions(tmp_path):
    def questions(content):
        (tmp_path / "q.json").write_text(json.dumps(content))
        with pytest.raises(InputError) as error:
            vqa.read_questions(str(tmp_path / "q.json"))
        return str(error.value)
    assert "record 0: 'question' is missing" in questions([{"image": "a.jpg"}])
    assert "record 0: it has no answer to learn from" in questions(
        [{"image": "a.jpg", "question": "what?"}])
    assert "record 1: image and question must be texts" in questions(
        [{"image": "a.jpg", "question": "what?", "answer": "x"},
         {"image": "a.jpg", "question": "what?", "answer": [None]}])
    assert "neither a list" in questions({"something": 1})
    assert "it has no answer" in questions({"questions": [
        {"image_id": 1, "question": "what?", "question_id": 3}]})


# ---- commands ------------------------------------------------------------------------------------

def test_train_on_files_and_write_the_servers_result_file(pretrained, tmp_path, capsys):
    folder = photographs(tmp_path / "photos", 12)
    rows = [{"image": f"{i}.jpg", "question": "what is it?", "question_id": 100 + i,
             "answer": ["red"] * 7 + ["blue"] * 3} for i in range(12)]
    (folder / "vqa.json").write_text(json.dumps(rows))
    assert train.main(["vqa", "--init", str(pretrained), "--out", str(tmp_path / "r"), *FINETUNE,
                       "--data", str(folder / "vqa.json"), "--val", str(folder / "vqa.json"),
                       "--epochs", "2"]) == 0
    (folder / "test.json").write_text(json.dumps(
        [{key: row[key] for key in ("image", "question", "question_id")} for row in rows]))
    assert eval_.main(["vqa", "--checkpoint", str(tmp_path / "r" / "best.pt"), "--data",
                       str(folder / "test.json"), "--out", str(tmp_path / "e")]) == 0
    told = json.loads((tmp_path / "e" / "answers.json").read_text())
    assert [r["question_id"] for r in told] == list(range(100, 112))
    assert {r["answer"] for r in told} <= {"red", "blue"}
    assert "12 of 12 questions have no answers: no accuracy" in capsys.readouterr().out


def test_answers_that_cannot_be_spelt_are_left_out_of_training(pretrained, tmp_path, capsys):
    folder = photographs(tmp_path / "photos", 12)
    rows = [{"image": f"{i}.jpg", "question": "what is it?", "answer": ["red", "blue"]}
            for i in range(12)]
    rows[3]["answer"], rows[5]["answer"] = ["\u7d05"], ["red", "\u9752", "\u9752"]
    (folder / "vqa.json").write_text(json.dumps(rows))
    assert train.main(["vqa", "--init", str(pretrained), "--out", str(tmp_path / "r"), *FINETUNE,
                       "--data", str(folder / "vqa.json")]) == 0
    told = capsys.readouterr().out
    assert "2 of 4 answers cannot be spelt" in told and "1 of 12 questions that have" in told
    assert "11 pairs" in told
    assert checkpoints.load(tmp_path / "r" / "checkpoint.pt")["answers"] == ["red", "blue"]
    (folder / "vqa.json").write_text(json.dumps([row | {"answer": "\u7d05"} for row in rows]))
    assert train.main(["vqa", "--init", str(pretrained), "--out", str(tmp_path / "n"), *FINETUNE,
                       "--data", str(folder / "vqa.json")]) == 2
    assert "there are 0 training examples, fewer than --batch-size" in capsys.readouterr().err
