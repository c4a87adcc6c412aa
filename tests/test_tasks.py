"""VQA and NLVR2: models, data, measures, commands."""

import json
import re

import pytest
import torch
from conftest import SMALL, photographs, reference, toy_batch, toy_model
from PIL import Image

import checkpoints
import eval as eval_
import task_data
import task_eval
import tasks
import train
import world_tasks
from data import InputError, Tokenizer, clean_question
from metrics import consistency, normalise_answer, vqa_accuracy
from weights import load_released
from world import Scene, Thing

TASK = SMALL[SMALL.index("--batch-size"):]  # finetuning takes the sizes from the checkpoint


# ---- models --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released VQA model with its inputs and outputs."""
    given = reference("f_vqa.pt")
    path = tmp_path_factory.mktemp("vqa") / "vqa.pth"
    torch.save({"model": given["model"]}, path)
    tokenizer = Tokenizer.from_file(str(reference.__globals__["REFERENCE"] / "vocab.txt"))
    model, report = load_released(path, vit_heads=4, text_heads=4, tokenizer=tokenizer)
    assert isinstance(model, tasks.VQA) and report.kind == "vqa"
    assert not report.missing and not report.left_over
    return model, tokenizer, given["inputs"], given["outputs"]


def test_training_loss_and_gradients_equal_the_released_ones(released):
    model, tokenizer, given, expected = released
    ids, mask = expected["question_ids"], expected["question_mask"]
    kv = model.question.project(model.vit(given["image"]))
    states = model.question.encode_grounded(ids, mask, kv)
    assert torch.allclose(states, expected["question_states"], atol=1e-4)
    counts = torch.tensor(given["n"])
    loss, keys = model(given["image"], ids, mask, *tokenizer.encode(given["answers"]), counts,
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
        kv = model.read(given["image"], ids, mask)
        found, nll = model.rank(kv, expected["answer_list_ids"], expected["answer_list_mask"],
                                given["k_test"], label_smoothing=0.1)
        assert torch.equal(found, expected["rank_topk_ids"])
        assert torch.allclose(nll, expected["rank_candidate_nll"], atol=1e-4)
        chosen = found.gather(1, nll.argmin(1, keepdim=True)).flatten()
        assert torch.equal(chosen, expected["rank_max_ids"])
        kv = model.read(given["image"], ids, mask, attend_padding=True)
        told = model.generate(kv)
    assert [tokenizer.decode(tokens) for tokens, _ in told] == expected["generate"]["answers"]
    assert torch.allclose(torch.tensor([score for _, score in told]),
                          expected["generate"]["sequences_scores"], atol=1e-4)


def toy_task(task: str, **changes):
    torch.manual_seed(1)
    return tasks.make_model(task, toy_model(**changes).config).eval()


def test_question_padding_is_not_read():
    model, batch = toy_task("vqa"), toy_batch(4, 7)
    def likelihood(ids, mask):
        return model.answer_nll(model.read(batch["image"], ids, mask), ids, mask)
    short = likelihood(batch["ids"], batch["mask"])
    padded = [torch.nn.functional.pad(batch[name], (0, 3)) for name in ("ids", "mask")]
    assert torch.allclose(short, likelihood(*padded), atol=1e-5)
    released = model.read(batch["image"], *padded, attend_padding=True)
    assert not torch.allclose(model.answer_nll(released, *padded), short, atol=1e-3)


def test_answers_are_weighted_and_belong_to_their_question():
    model, batch = toy_task("vqa", label_smoothing=0.0), toy_batch(4, 7)
    ids, mask = batch["ids"][:2], batch["mask"][:2]
    counts, weights = torch.tensor([3, 1]), torch.tensor([0.5, 0.3, 0.2, 1.0])
    loss, _ = model(batch["image"][:2], ids, mask, batch["ids"], batch["mask"], counts, weights)
    each = [model.answer_nll(model.read(batch["image"][q:q + 1], ids[q:q + 1], mask[q:q + 1]),
                             batch["ids"][a:a + 1], batch["mask"][a:a + 1])
            for a, q in enumerate((0, 0, 0, 1))]
    assert loss["vqa"].item() == pytest.approx((weights @ torch.cat(each)).item() / 2, abs=1e-5)


def test_ranking_finds_the_likeliest_answer():
    """With all answers as candidates: the one of the smallest negative log-likelihood; with fewer,
    those whose first token is likeliest."""
    model, batch = toy_task("vqa"), toy_batch(4, 7)
    with torch.no_grad():
        kv = model.read(batch["image"], batch["ids"], batch["mask"])
        answers = toy_batch(6, 5)
        answers["ids"][:, 1] = torch.arange(6, 12)
        found, nll = model.rank(kv, answers["ids"], answers["mask"], 6)
        for q in range(4):
            one = kv.select(torch.tensor([q] * 6))
            expected = model.answer_nll(one, answers["ids"], answers["mask"])
            assert torch.allclose(nll[q], expected[found[q]], atol=1e-5)
        few, _ = model.rank(kv, answers["ids"], answers["mask"], 2)
        assert torch.equal(few, found[:, :2])


def test_a_task_starts_from_the_pretrained_model():
    blip = toy_model(text_width=32, text_heads=2)
    vqa = tasks.make_model("vqa", blip.config)
    checkpoints.initialise(vqa, blip)
    theirs = blip.state_dict()
    for name, value in vqa.state_dict().items():
        assert torch.equal(value, theirs[vqa.pretrained_name(name)]), name
    nlvr2 = tasks.make_model("nlvr2", blip.config)
    checkpoints.initialise(nlvr2, blip)
    ours = nlvr2.state_dict()
    for twin in (0, 1):
        for part in ("q", "kv", "out"):
            assert torch.equal(ours[f"med.layers.1.cross_attn.attn.twins.{twin}.{part}.weight"],
                               theirs[f"med.layers.1.cross_attn.attn.{part}.weight"])
    fresh = {name for name in ours if nlvr2.pretrained_name(name) not in theirs}
    assert fresh == {"med.layers.1.cross_attn.attn.merge.weight",
                     "med.layers.1.cross_attn.attn.merge.bias", "head.0.weight", "head.0.bias",
                     "head.2.weight", "head.2.bias"}


def test_two_equal_images_are_one_image_below_the_merge():
    """NLVR2 averages: with equal twins and equal images the layer is that of the pretrained one."""
    blip = toy_model(text_width=32, text_heads=2).eval()
    nlvr2 = tasks.NLVR2(blip.config, merge_from=2).eval()
    checkpoints.initialise(nlvr2, blip)
    batch = toy_batch()
    tokens = blip.vit(batch["image"])
    pair = nlvr2.med.project(torch.stack([tokens, tokens], 1))
    assert torch.allclose(nlvr2.med.encode_grounded(batch["ids"], batch["mask"], pair),
                          blip.med.encode_grounded(batch["ids"], batch["mask"],
                                                   blip.med.project(tokens)), atol=1e-5)


def test_nlvr2_by_hand():
    """A merging layer: both images' outputs side by side, through the Linear, then the residual."""
    model, batch = toy_task("nlvr2"), toy_batch()
    layer = model.med.layers[1].cross_attn
    x, first, second = (torch.randn(4, 7, 48), torch.randn(4, 5, 32), torch.randn(4, 5, 32))
    kv = layer.attn.project(torch.stack([first, second], 1))
    outputs = [twin(x, twin.project(image))
               for twin, image in zip(layer.attn.twins, (first, second))]
    expected = layer.add.norm(x + layer.attn.merge(torch.cat(outputs, -1)))
    assert torch.allclose(layer(x, kv, None), expected, atol=1e-5)
    image = torch.stack([batch["image"], batch["image"].flip(0)], 1)
    one = model.logits(image, batch["ids"], batch["mask"])
    other = model.logits(image.flip(1), batch["ids"], batch["mask"])
    assert one.shape == (4, 2) and not torch.allclose(one, other, atol=1e-3)


def test_merge_from_is_read_from_the_weights(tmp_path):
    config = toy_model(text_depth=4).config
    for first in (1, 3, 4):
        weights = tasks.NLVR2(config, first).state_dict()
        again = tasks.make_model("nlvr2", config, weights)
        again.load_state_dict(weights)
    assert [layer.cross_attn.attn.merge is not None for layer in
            tasks.NLVR2(config).med.layers] == [False, False, True, True]


def test_released_nlvr2_names_all_find_their_place(tmp_path):
    """Written with the released names, read back: the same model."""
    from weights import names_of
    model = toy_task("nlvr2", vit_heads=2, text_depth=3)
    state = {}
    for ours, theirs in names_of("nlvr2", model.config):
        if ours in model.state_dict():
            parts = model.state_dict()[ours].chunk(len(theirs))
            state |= {name: part.clone() for name, part in zip(theirs, parts)}
    assert "text_encoder.encoder.layer.0.crossattention.self1.query.weight" in state
    assert "text_encoder.encoder.layer.0.crossattention.output.dense0.weight" in state
    assert "text_encoder.encoder.layer.1.crossattention.output.merge_layer.bias" in state
    assert "text_encoder.encoder.layer.0.crossattention.output.merge_layer.bias" not in state
    torch.save({"model": state}, tmp_path / "nlvr.pth")
    again, report = load_released(tmp_path / "nlvr.pth", vit_heads=2, text_heads=4)
    assert report.kind == "nlvr2" and not report.missing and not report.left_over
    batch = toy_batch()
    image = torch.stack([batch["image"], batch["image"].flip(0)], 1)
    batch["ids"] %= 30
    again.med.enc_id = model.med.enc_id
    assert torch.allclose(again.logits(image, batch["ids"], batch["mask"]),
                          model.logits(image, batch["ids"], batch["mask"]), atol=1e-5)


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


def test_the_likeliest_answer_is_told():
    class Stub(torch.nn.Module):
        def read(self, image, ids, mask):
            return len(image)
        def rank(self, count, ids, mask, top_k):
            return torch.tensor([[2, 0, 1]] * count), torch.tensor([[5.0, 1.0, 3.0]] * count)
    found = task_eval.answer_questions(Stub(), Tokenizer.train(["a b c"] * 3, 50),
                                       world_tasks.Questions("val", 3), torch.device("cpu"),
                                       ["a", "b", "c"])
    assert [record["answer"] for record in found] == ["a"] * 3
    assert [record["question_id"] for record in found] == [0, 1, 2]


def test_consistency_wants_all_pairs_of_a_sentence():
    assert consistency([True, True, False, True], ["a", "a", "b", "b"]) == 0.5
    assert consistency([True] * 3, ["a", "b", "b"]) == 1.0


# ---- the world's questions and statements --------------------------------------------------------

def test_the_worlds_answers_are_right():
    scene = Scene("pink", (Thing("bottom right", "blue", "star", "small"),
                           Thing("top left", "red", "circle", "large")))
    import random
    known = {}
    for seed in range(600):
        asked = world_tasks.ask(scene, random.Random(seed))
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
    import random
    scene = Scene("pink", (Thing("bottom right", "blue", "circle", "small"),
                           Thing("top left", "red", "circle", "small")))
    texts = {world_tasks.ask(scene, random.Random(s)).text for s in range(400)}
    assert "what colour is the circle?" not in texts and "where is the blue circle?" in texts
    assert not any(re.search(r"the (small|little) (circle|disc)", text) for text in texts)


def test_statements_are_balanced_true_and_in_their_split():
    from world import split_of
    data = world_tasks.Statements("held-out", 200)
    labels = []
    for i in range(200):
        sentence, label, (left, right) = data.statement(i)
        labels.append(label)
        assert split_of(left) == split_of(right) == "held-out"
        if sentence == "the images have the same background":
            assert label == (left.background == right.background)
        match = re.fullmatch(r"the (left|right) image shows a (\w+) thing", sentence)
        if match:
            scene = left if match[1] == "left" else right
            assert label == any(thing.colour == match[2] for thing in scene.things)
    assert sum(labels) == 100
    sentences = [data.statement(i)[0] for i in range(8)]
    assert len(set(sentences[:4])) == len(set(sentences[4:])) == 1
    assert data[5]["image"].shape == (2, 3, 64, 64)


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
    one, genome = task_data.read_questions(str(tmp_path / "blip.json"))
    other, = task_data.read_questions(f"{tmp_path}/q.json,{tmp_path}/a.json")
    assert (one.image, one.question, one.question_id, one.answers) == (
        other.image, other.question, other.question_id, other.answers)
    assert other.kind == "yes/no" and genome.weight == 0.2 and one.weight == 1.0
    tokenizer = Tokenizer.train(["is it what yes no dog"] * 3, 100)
    items = [{"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "question": asked.question,
              "answers": asked.answers, "question_id": asked.question_id, "kind": asked.kind,
              "weight": asked.weight, "index": i, "broken": []}
             for i, asked in enumerate((one, genome))]
    batch = task_data.QuestionCollate(tokenizer)(items)
    assert batch["weights"].tolist() == pytest.approx([0.9, 0.1, 0.2])
    assert batch["counts"].tolist() == [2, 1]


def test_questions_keep_their_question_mark():
    assert clean_question('What is "this"? A dog.') == "what is this? a dog"
    assert len(clean_question("word " * 80).split()) == 50


def test_mistakes_in_questions_and_statements(tmp_path):
    def questions(content):
        (tmp_path / "q.json").write_text(json.dumps(content))
        with pytest.raises(InputError) as error:
            task_data.read_questions(str(tmp_path / "q.json"))
        return str(error.value)
    assert "record 0: 'question' is missing" in questions([{"image": "a.jpg"}])
    assert "record 0: it has no answer to learn from" in questions(
        [{"image": "a.jpg", "question": "what?"}])
    assert "record 1: image and question must be texts" in questions(
        [{"image": "a.jpg", "question": "what?", "answer": "x"},
         {"image": "a.jpg", "question": "what?", "answer": [3]}])
    assert "neither a list" in questions({"something": 1})
    assert "it has no answer" in questions({"questions": [
        {"image_id": 1, "question": "what?", "question_id": 3}]})
    def statements(content):
        (tmp_path / "s.json").write_text(json.dumps(content))
        with pytest.raises(InputError) as error:
            task_data.read_statements(tmp_path / "s.json")
        return str(error.value)
    assert "record 0: images must name two images" in statements(
        [{"images": ["a.jpg"], "sentence": "x", "label": "True"}])
    assert "label is 'maybe'; it must be True or False" in statements(
        [{"images": ["a.jpg", "b.jpg"], "sentence": "x", "label": "maybe"}])
    assert "'sentence' is missing" in statements([{"images": ["a", "b"], "label": "True"}])


def test_official_nlvr2_and_images_of_different_sizes(tmp_path):
    (tmp_path / "dev.jsonl").write_text(json.dumps(
        {"sentence": "The left one is red.", "identifier": "dev-1-2-0", "label": "False"}) + "\n")
    stated, = task_data.read_statements(tmp_path / "dev.jsonl")
    assert stated.images == ("dev-1-2-img0.png", "dev-1-2-img1.png") and not stated.label
    Image.new("RGB", (30, 50), (255, 0, 0)).save(tmp_path / stated.images[0])
    Image.new("RGB", (64, 20), (0, 0, 255)).save(tmp_path / stated.images[1])
    item = task_data.StatementDataset([stated], tmp_path, 16)[0]
    assert item["image"].shape == (2, 3, 16, 16)
    swapped = task_data.swap_images(item)
    assert swapped["sentence"] == "The right one is red."
    assert torch.equal(swapped["image"][0], item["image"][1])
    seen = set()
    data = task_data.StatementDataset([stated], tmp_path, 16, augment=True)
    for epoch in range(20):
        data.set_epoch(epoch)
        one = data[0]
        red_first = bool(one["image"][0, 0].float().mean() > one["image"][1, 0].float().mean())
        assert ("left" in one["sentence"]) == red_first
        seen.add(red_first)
    assert seen == {True, False}
    (tmp_path / stated.images[1]).write_bytes(b"nothing")
    broken = task_data.StatementDataset([stated], tmp_path, 16)[0]
    assert broken["image"] is None and "damaged" in broken["broken"][0]


# ---- commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_train_and_evaluate_in_the_world(task, pretrained, tmp_path, capsys):
    """Two commands; what is written; the checkpoint is known for what it is."""
    assert train.main([task, "--init", str(pretrained), "--out", str(tmp_path / "r"), *TASK,
                       "--world-size", "40"]) == 0
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
    assert f"checkpoint of another task ({task}); give one of BLIP" in capsys.readouterr().err
    assert eval_.main([task, "--checkpoint", str(pretrained), "--out", str(tmp_path / "x")]) == 2
    assert f"give one of {task.upper()}" in capsys.readouterr().err
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


def test_train_on_files_and_write_the_servers_result_file(pretrained, tmp_path):
    folder = photographs(tmp_path / "photos", 12)
    rows = [{"image": f"{i}.jpg", "question": "what is it?", "question_id": 100 + i,
             "answer": ["red"] * 7 + ["blue"] * 3} for i in range(12)]
    (folder / "vqa.json").write_text(json.dumps(rows))
    assert train.main(["vqa", "--init", str(pretrained), "--out", str(tmp_path / "r"), *TASK,
                       "--data", str(folder / "vqa.json"), "--val", str(folder / "vqa.json"),
                       "--epochs", "2"]) == 0
    (folder / "test.json").write_text(json.dumps(
        [{key: row[key] for key in ("image", "question", "question_id")} for row in rows]))
    assert eval_.main(["vqa", "--checkpoint", str(tmp_path / "r" / "best.pt"), "--data",
                       str(folder / "test.json"), "--out", str(tmp_path / "e")]) == 0
    told = json.loads((tmp_path / "e" / "answers.json").read_text())
    assert [r["question_id"] for r in told] == list(range(100, 112))
    assert {r["answer"] for r in told} <= {"red", "blue"}


def test_answers_that_cannot_be_spelt_are_left_out_of_training(pretrained, tmp_path, capsys):
    folder = photographs(tmp_path / "photos", 12)
    rows = [{"image": f"{i}.jpg", "question": "what is it?", "answer": ["red", "blue"]}
            for i in range(12)]
    rows[3]["answer"], rows[5]["answer"] = ["\u7d05"], ["red", "\u9752", "\u9752"]
    (folder / "vqa.json").write_text(json.dumps(rows))
    assert train.main(["vqa", "--init", str(pretrained), "--out", str(tmp_path / "r"), *TASK,
                       "--data", str(folder / "vqa.json")]) == 0
    told = capsys.readouterr().out
    assert "2 of 4 answers cannot be spelt" in told and "1 of 12 questions that have" in told
    assert "11 pairs" in told
    assert checkpoints.read(tmp_path / "r" / "checkpoint.pt")["answers"] == ["red", "blue"]


def test_a_blind_model_falls_to_its_prior(monkeypatch):
    """The grey evaluation replaces every image: a model that answers by the image's brightness is
    right with images, at the prior without."""
    data = world_tasks.Statements("val", 40)
    tokenizer = Tokenizer.train(["the left image shows a red thing"] * 3, 100)
    bright = {i: data.statement(i)[1] for i in range(40)}
    class Stub(torch.nn.Module):
        def logits(self, image, ids, mask):
            grey = image.flatten(1).std(1) < 0.5
            labels = torch.tensor([bright[i] for i in self.rows])
            told = torch.where(grey, torch.ones(len(image), dtype=torch.long), labels.long())
            return torch.nn.functional.one_hot(told, 2).float()
    stub = Stub()
    original = task_eval.batches
    def watching(*args):
        for batch, *rest in original(*args):
            stub.rows = batch["index"]
            yield batch, *rest
    monkeypatch.setattr(task_eval, "batches", watching)
    numbers, _, _ = task_eval.evaluate_nlvr2(stub, tokenizer, data, torch.device("cpu"))
    assert numbers["accuracy"] == 1.0 and numbers["consistency"] == 1.0
    assert numbers["blank_accuracy"] == 0.5 == numbers["chance"]["accuracy"]


# ---- visual dialog -------------------------------------------------------------------------------

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


def test_dialog_measures_by_hand():
    from metrics import dialog_scores, ndcg
    found = dialog_scores([0, 1, 9, 99])
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 100) / 4)
    assert (found["r1"], found["r5"], found["r10"]) == (0.25, 0.5, 0.75)
    assert found["mean_rank"] == pytest.approx((1 + 2 + 10 + 100) / 4)
    # two relevant ones: K = 2; found at ranks 1 (0.5) and 3 (not counted)
    import math
    expected = (0.5 / math.log2(2)) / (1.0 / math.log2(2) + 0.5 / math.log2(3))
    assert ndcg([0.9, 0.1, 0.5, 0.2], [0.5, 1.0, 0.0, 0.0]) == pytest.approx(expected)
    assert ndcg([3.0, 2.0, 1.0], [1.0, 0.5, 0.0]) == 1.0 and ndcg([1.0, 2.0], [0.0, 0.0]) == 0.0


def test_visdial_files(tmp_path):
    dialog, = task_data.read_dialogs(visdial_file(tmp_path))
    assert dialog.image == "VisualDialog_val2018_000000000007.jpg"
    first, second = dialog.rounds
    assert first.candidates[first.target] == first.answer == "answer 3"
    assert second.question == "what is it" and second.candidates[second.target] == "answer 12"
    assert dialog.relevance[0] == 1 and sum(dialog.relevance[1]) == 1.5
    with pytest.raises(InputError, match="dialog 0, round 1: it has 99 candidate answers and must"):
        task_data.read_dialogs(visdial_file(tmp_path, 99))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="is no VisDial 1.0 file"):
        task_data.read_dialogs(str(tmp_path / "x.json"))


def test_what_the_dialog_encoder_reads():
    """[CLS] history [SEP] question [SEP] candidate [SEP]; a history that is too long loses its
    beginning."""
    tokenizer = Tokenizer.train(["is it red yes no what where a circle top left"] * 3, 200)
    rounds = [world_tasks.Round("is it red?", "yes", (), 0),
              world_tasks.Round("where is it?", "top left", (), 0),
              world_tasks.Round("what is it?", "a circle", (), 0)]
    (row,) = task_data.dialog_ids(tokenizer, rounds, 2, ["a circle"], 60)
    assert tokenizer.decode(row).replace("[UNK] ", "") == (
        "what is it a circle where is it top left is it red yes")
    assert row.count(tokenizer.sep) == 4 and row[-1] == tokenizer.sep
    short, = task_data.dialog_ids(tokenizer, rounds, 2, ["a circle"], len(row) - 3)
    assert short == row[:-3]  # the oldest is gone
    long = [task_data.dialog_ids(tokenizer, rounds, 2, [text], 12)[0]
            for text in ("a circle", "a circle and a circle and a circle and a circle")]
    assert all(len(r) <= 12 and r.count(tokenizer.sep) >= 2 for r in long)


def test_a_dialogs_candidates_are_judged_as_one_by_one():
    """Stacked, padded and with the caption's padding in the context: as each by itself."""
    model = toy_task("visdial", vit_width=48, vit_heads=4)
    batch = toy_batch(6, 7)
    caption = toy_batch(2, 5)
    padded = [torch.nn.functional.pad(caption[name], (0, 4)) for name in ("ids", "mask")]
    together = model.logits(model.read(batch["image"][:2], *padded), batch["ids"], batch["mask"])
    for i in range(6):
        d = i // 3
        real = int(caption["mask"][d].sum())
        alone = model.read(batch["image"][d:d + 1], caption["ids"][d:d + 1, :real],
                           caption["mask"][d:d + 1, :real])
        length = int(batch["mask"][i].sum())
        one = model.logits(alone, batch["ids"][i:i + 1, :length], batch["mask"][i:i + 1, :length])
        assert torch.allclose(together[i:i + 1], one, atol=1e-5)


def test_the_caption_and_the_image_both_matter():
    model, batch = toy_task("visdial", vit_width=48, vit_heads=4), toy_batch(4, 7)
    def logits(image, ids):
        kv = model.read(image, ids, torch.ones_like(ids))
        return model.logits(kv, batch["ids"], batch["mask"])
    ids = batch["ids"][:, :4]
    base = logits(batch["image"], ids)
    assert not torch.allclose(base, logits(batch["image"].flip(0), ids), atol=1e-3)
    assert not torch.allclose(base, logits(batch["image"], ids.flip(0)), atol=1e-3)
    with pytest.raises(ValueError, match="must be equal"):
        toy_task("visdial")


def test_image_and_caption_are_projected_once_for_a_dialog(monkeypatch):
    model = toy_task("visdial", vit_width=48, vit_heads=4, image_size=64, vocab_size=300)
    tokenizer = Tokenizer.train(world_tasks.all_texts(), 290)
    seen = []
    for module, name in ((model.vit, "forward"), (model.med, "project"),
                         (model.med, "encode_grounded")):
        original = getattr(module, name)
        def counting(x, *rest, original=original, label=name, **options):
            seen.append((label, len(x)))
            return original(x, *rest, **options)
        monkeypatch.setattr(module, name, counting)
    records = task_eval.rank_candidates(model, tokenizer, world_tasks.Dialogs("val", 2),
                                        torch.device("cpu"), 30)
    rounds = 2 * world_tasks.ROUNDS
    assert len(records) == rounds and seen.count(("forward", 1)) == 2 == seen.count(("project", 1))
    assert seen.count(("encode_grounded", 100)) == rounds


def test_the_worlds_dialogs():
    data = world_tasks.Dialogs("val", 40)
    needs_history = 0
    for i in range(40):
        item = data[i]
        for turn, asked in enumerate(item["rounds"]):
            assert len(set(asked.candidates)) == 100
            assert asked.candidates[asked.target] == asked.answer
            plain = {form.format(value): value for values in world_tasks.VALUES.values()
                     for value in values for form in world_tasks.FORMS}
            meant = next((words for words in world_tasks.SAME if plain[asked.answer] in words),
                         {plain[asked.answer]})
            right = [text for text in asked.candidates if plain[text] in meant]
            assert right == [asked.answer]  # no other way to say the same is among them
            same_kind = next(values for values in world_tasks.VALUES.values()
                             if plain[asked.answer] in values)
            wrong = sum(plain[text] in same_kind for text in asked.candidates) - 1
            assert wrong == min(80, 23 * len(set(same_kind) - meant))
            needs_history += "it?" in asked.question.split() and turn > 0
    assert needs_history > 15


def test_a_training_batch_of_dialogs():
    """Of each dialog two rounds, the same in the whole batch; the answer first, then three others;
    the text of a row belongs to dialog row // 8."""
    tokenizer = Tokenizer.train(world_tasks.all_texts(), 400)
    data = world_tasks.Dialogs("train", 4)
    items = [data[i] for i in range(4)]
    batch = task_data.DialogCollate(tokenizer, 60)(items)
    assert batch["label"].tolist() == [1, 0, 0, 0] * 8 and len(batch["ids"]) == 32
    turns = []
    for row, (ids, mask) in enumerate(zip(batch["ids"], batch["mask"])):
        rounds = items[row // 8]["rounds"]
        meant, = [(turn, i) for turn, asked in enumerate(rounds) for i, text in enumerate(
            task_data.dialog_ids(tokenizer, rounds, turn, asked.candidates, 60))
            if text == ids[mask.bool()].tolist()]
        assert (meant[1] == rounds[meant[0]].target) == (row % 4 == 0)
        turns.append(meant[0])
    first, second = turns[0], turns[4]
    assert first != second and turns == [first, first, first, first, second, second, second,
                                         second] * 4


def test_train_and_evaluate_a_dialog(pretrained, tmp_path, capsys):
    assert train.main(["visdial", "--init", str(pretrained), "--out", str(tmp_path / "r"), *TASK,
                       "--world-size", "16", "--eval-size", "2", "--max-tokens", "40"]) == 0
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


# ---- clips ---------------------------------------------------------------------------------------

def test_uniform_frames():
    from video import frame_numbers
    assert frame_numbers(8, 8) == list(range(8)) and frame_numbers(8, 1) == [4]
    assert frame_numbers(100, 4) == [12, 37, 62, 87] and frame_numbers(1, 8) == [0] * 8
    assert frame_numbers(3, 6) == [0, 0, 1, 1, 2, 2]


def test_clips_in_every_form_are_the_same_frames(tmp_path):
    import numpy as np

    from video import load_clip
    shades = [0, 60, 120, 180, 240]
    frames = [Image.new("RGB", (20, 10), (shade, 255 - shade, 30)) for shade in shades]
    (tmp_path / "folder").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "folder" / f"{i:03d}.png")
    (tmp_path / "folder" / "notes.txt").write_text("no frame")
    array = np.stack([np.asarray(frame) for frame in frames])
    np.save(tmp_path / "array.npy", array)
    np.save(tmp_path / "other.npy", array.transpose(0, 3, 1, 2))
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:],
                   lossless=True)
    frames[0].save(tmp_path / "gif.gif", save_all=True, append_images=frames[1:])
    expected = load_clip(tmp_path / "folder", 3, 8)
    assert expected.shape == (3, 3, 8, 8) and expected[:, 0, 0, 0].tolist() == [0, 120, 240]
    for name in ("array", "array.npy", "other.npy", "moving.webp", "moving", "gif.gif"):
        clip = load_clip(tmp_path / name, 3, 8)
        assert (clip.int() - expected.int()).abs().max() <= (8 if "gif" in name else 0), name


def test_clips_that_cannot_be_read(tmp_path):
    import numpy as np

    from video import load_clip
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gif").write_bytes(b"nothing")
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    np.save(tmp_path / "flat.npy", np.zeros((4, 8, 8), np.uint8))
    for name, reason in (("empty", "a folder without pictures"), ("nowhere", "missing"),
                         ("x.gif", "damaged or no clip"), ("flat.npy", "damaged or no clip"),
                         ("x.mp4", "the package av|damaged")):
        with pytest.raises(OSError, match=reason):
            load_clip(tmp_path / name, 2, 8)
    one = Image.new("RGB", (9, 9), (5, 6, 7))
    (tmp_path / "torn").mkdir()
    one.save(tmp_path / "torn" / "1.png")
    (tmp_path / "torn" / "2.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match="frame 2.png: damaged"):
        load_clip(tmp_path / "torn", 2, 8)
    one.save(tmp_path / "one.png")
    assert load_clip(tmp_path / "one", 4, 8).shape == (4, 3, 8, 8)  # a clip of one frame


def test_a_clips_features_are_the_mean_and_its_tokens_all():
    model = toy_model().eval()
    clip = torch.randn(2, 3, 3, 32, 32)
    tokens, feat = model.encode_image(clip)
    each = [model.encode_image(clip[:, f])[0] for f in range(3)]
    assert torch.allclose(tokens, torch.cat(each, 1), atol=1e-5)
    mean = torch.stack([model.vision_proj(t[:, 0]) for t in each]).mean(0)
    assert torch.allclose(feat, mean / mean.norm(dim=-1, keepdim=True), atol=1e-5)
    one, one_feat = model.encode_image(clip[:, :1])
    assert torch.allclose(one_feat, model.encode_image(clip[:, 0])[1], atol=1e-5)
    vqa, batch = toy_task("vqa"), toy_batch(2, 5)
    def states(image):
        return vqa.read(image, batch["ids"], batch["mask"]).dec[0][0]
    still = clip[:, :1].expand(-1, 4, -1, -1, -1)
    assert torch.allclose(states(still), states(clip[:, 0]), atol=1e-5)
    assert not torch.allclose(states(clip), states(clip[:, 1]), atol=1e-3)


def test_the_worlds_clips_need_several_frames():
    from world import is_true
    data = world_tasks.Clips("held-out", 30)
    several = [i for i in range(30) if data.needs_time(i)]
    assert 8 < len(several) < 26
    for i in several:
        shown = world_tasks.film(data.world.scene(i))
        assert not any(is_true(data[i]["text"], frame) for frame in shown)
    assert data[0]["image"].shape == (8, 3, 64, 64)
    assert world_tasks.Clips("held-out", 30, frames=1)[0]["image"].shape == (1, 3, 64, 64)


def test_video_commands(pretrained, tmp_path, capsys):
    import numpy as np
    for i in range(6):
        np.save(tmp_path / f"video{i}.npy", np.random.default_rng(i).integers(
            0, 255, (5, 20, 20, 3), dtype=np.uint8))
    (tmp_path / "t.jsonl").write_text("\n".join(
        json.dumps({"clip_name": f"video{i}", "caption": f"a red circle {i}"}) for i in range(6)))
    assert eval_.main(["video-retrieval", "--checkpoint", str(pretrained), "--data",
                       f"{tmp_path}/t.jsonl", "--frames", "4", "--out", str(tmp_path / "e")]) == 0
    numbers = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert numbers["clips"] == 6 and 1 <= numbers["t2i_median_rank"] <= 6
    assert eval_.main(["video-retrieval", "--checkpoint", str(pretrained), "--size", "8", "--out",
                       str(tmp_path / "w")]) == 0
    assert "t2i_several_r1" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text('{"caption": "a dog"}')
    assert eval_.main(["video-retrieval", "--checkpoint", str(pretrained), "--data",
                       f"{tmp_path}/bad.jsonl"]) == 2
    assert "record 0: it names no clip; give clip_name" in capsys.readouterr().err
    assert train.main(["vqa", "--init", str(pretrained), "--out", str(tmp_path / "r"), *TASK,
                       "--world-size", "16"]) == 0
    (tmp_path / "q.json").write_text(json.dumps(
        [{"video_id": i, "question": "what is it?", "answer": "small"} for i in range(6)]))
    assert eval_.main(["video-qa", "--checkpoint", str(tmp_path / "r/best.pt"), "--data",
                       f"{tmp_path}/q.json", "--frames", "2", "--out", str(tmp_path / "q")]) == 0
    assert "accuracy" in json.loads((tmp_path / "q" / "metrics.json").read_text())


def test_sizes_that_do_not_fit_a_task_are_one_sentence(tmp_path, capsys):
    from conftest import run
    assert run(tmp_path / "wide", "--world-size", 16, "--vit-width", 32) == 0
    flags = ["visdial", "--init", str(tmp_path / "wide" / "checkpoint.pt"), *TASK, "--world-size",
             "16", "--out", str(tmp_path / "r")]
    assert train.main(flags) == 2
    assert "vit_width 32 and text_width 16 must be equal" in capsys.readouterr().err
    assert train.main(["caption", *flags[1:]]) == 0
