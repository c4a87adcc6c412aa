"""BLIP-2's commands on a small world: each starts from the one before, and what is frozen stays."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import photographs

import eval as eval_command
import train
from blip2 import demo, task_language, task_stage2
from blip2.demo import effective_rank
from blip2.language import LanguageConfig, make_language
from blip2.stage1 import Stage1
from blip2.stage2 import Stage2
from blip2.task_language import TextModel
from blip2.task_stage1 import SIZES, vision_of
from blip2.task_stage2 import (
    answer_questions,
    caption_batches,
    caption_writer,
    is_text,
    question_batches,
)
from blip2.texts import open_tokenizer, question_prompt
from config import TrainConfig
from data.datasets import Pair
from data.images import prepare_images
from data.text import clean_question
from tasks.task import EvalSettings
from training.checkpoints import initialise, load, open_model, save
from world.datasets import Questions

SMALL = ["--epochs", "1", "--batch-size", "8", "--eval-size", "8", "--warmup-steps", "0",
         "--device", "cpu", "--log-every", "1"]
SEE = ["--eval-top-k", "4"]


def run(task: str, out, *flags) -> int:
    return train.main([task, *SMALL, "--out", str(out), *map(str, flags)])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with pretrain, stage1, language and stage2."""
    folder = tmp_path_factory.mktemp("blip2")
    assert train.main([*SMALL, *SEE, "--scenes", "16", "--lm-only-steps", "0", "--vit-depth", "2",
                       "--out", str(folder / "pretrain")]) == 0
    assert run("blip2-stage1", folder / "stage1", *SEE, "--scenes", 32, "--depth", 2, "--init",
               folder / "pretrain/checkpoint.pt") == 0
    for kind in ("decoder", "encoder-decoder"):
        assert run("language-model", folder / kind, "--scenes", 16, "--depth", 1, "--kind",
                   kind) == 0
        assert run("blip2-stage2", folder / f"stage2-{kind}", "--scenes", 32, "--init",
                   folder / "stage1/checkpoint.pt", "--language-model",
                   folder / f"{kind}/checkpoint.pt") == 0
    return folder


def weights(path) -> dict:
    return load(path)["model"]


def test_stage1_trains_the_queries_and_leaves_the_vit(models):
    start, after = weights(models / "pretrain/checkpoint.pt"), weights(
        models / "stage1/checkpoint.pt")
    config = load(models / "stage1/checkpoint.pt")["model_config"]
    vit = [name for name in after if name.startswith("vit.")]
    assert vit and all(torch.equal(after[name], start[name]) for name in vit)
    assert config["queries"] == SIZES["tiny"]["queries"] and config["vision"] == "vit"
    numbers = json.loads((models / "stage1/metrics.json").read_text())
    assert {"t2i_r1", "i2t_r1_rerank", "caption_true", "itm_swap"} <= numbers.keys()


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_stage2_takes_both_and_trains_the_bridge_alone(models, kind):
    after = weights(models / f"stage2-{kind}/checkpoint.pt")
    language = weights(models / f"{kind}/checkpoint.pt")
    stage1 = weights(models / "stage1/checkpoint.pt")
    for name, value in language.items():
        assert torch.equal(after[name], value), name
    assert torch.equal(after["vit.cls_token"], stage1["vit.cls_token"])
    assert not torch.equal(after["qformer.queries"], stage1["qformer.queries"])
    assert not any("ffn_text" in name for name in after)
    numbers = json.loads((models / f"stage2-{kind}/metrics.json").read_text())
    assert {"caption_true", "accuracy", "dialog_accuracy", "blank_accuracy",
            "other_accuracy"} <= numbers.keys()


def test_stage2_takes_what_stage1_learnt_but_for_its_new_layers(models):
    stage1 = open_model(models / "stage1/checkpoint.pt", kinds=(Stage1,)).model
    config = open_model(models / "stage2-decoder/checkpoint.pt", kinds=(Stage2,)).model.config
    for new_layers, expected in ((0, set()), (1, {"1"}), (2, {"0", "1"})):
        model = Stage2(replace(config, new_layers=new_layers))
        fresh = initialise(model, stage1)
        layers = {name.split(".")[2] for name in fresh if name.startswith("qformer.layers.")}
        assert layers == expected and "qformer.queries" not in fresh
        taken = model.state_dict()["qformer.layers.0.attn.attn.out.weight"]
        original = stage1.state_dict()["qformer.layers.0.attn.attn.out.weight"]
        assert torch.equal(taken, original) == (new_layers < 2)


def test_a_frozen_part_has_no_gradient_and_no_dropout(models):
    model = open_model(models / "stage2-decoder/checkpoint.pt", kinds=(Stage2,)).model.train()
    assert not model.language.training and not model.vit.training and model.qformer.training
    frozen = {name.partition(".")[0] for name, p in model.named_parameters()
              if not p.requires_grad}
    assert frozen == {"vit", "language"}


def test_finetuning_for_questions_lets_the_queries_read_them(models, tmp_path):
    start = models / "stage2-decoder/checkpoint.pt"
    assert run("blip2-vqa", tmp_path / "vqa", "--scenes", 16, "--init", start, "--lr", 0.01) == 0
    config = load(tmp_path / "vqa/best.pt")["model_config"]
    assert config["question_to_queries"] and config["train_vision"]
    assert config["text_from"] == str(models / "stage1/checkpoint.pt")  # that stage 2 started from
    after, stage1 = weights(tmp_path / "vqa/best.pt"), weights(models / "stage1/checkpoint.pt")
    assert after["qformer.word.weight"].shape == stage1["qformer.word.weight"].shape
    assert not torch.equal(after["vit.cls_token"], stage1["vit.cls_token"])
    assert run("blip2-vqa", tmp_path / "more", "--scenes", 16, "--init", tmp_path / "vqa/best.pt",
               "--lr", 1e-12) == 0  # from its own text stream, not from stage 1's once more
    again = weights(tmp_path / "more/best.pt")["qformer.word.weight"]
    torch.testing.assert_close(again, after["qformer.word.weight"])
    assert not torch.allclose(again, stage1["qformer.word.weight"])
    assert run("blip2-vqa", tmp_path / "no", "--scenes", 16, "--init", tmp_path / "vqa/best.pt",
               "--text-from", models / "stage1/checkpoint.pt") == 0  # it is the same
    assert run("blip2-vqa", tmp_path / "no", "--scenes", 16, "--init", tmp_path / "vqa/best.pt",
               "--text-from", "another.pt") == 2
    assert run("blip2-caption", tmp_path / "caption", "--scenes", 16, "--init",
               tmp_path / "vqa/best.pt") == 0  # which needs no text stream
    assert not any("ffn_text" in name for name in weights(tmp_path / "caption/best.pt"))
    assert run("blip2-retrieval", tmp_path / "retrieval", *SEE, "--scenes", 16, "--init",
               models / "stage1/checkpoint.pt") == 0


def test_the_text_stream_is_that_of_stage1(models):
    stage2 = open_model(models / "stage2-decoder/checkpoint.pt", kinds=(Stage2,)).model
    model = Stage2(replace(stage2.config, question_to_queries=True,
                           text_from=str(models / "stage1/checkpoint.pt")))
    task_stage2.initialise(model, model.config, stage2)
    stage1 = weights(models / "stage1/checkpoint.pt")
    names = [name for name in model.state_dict() if name.startswith("qformer.") and is_text(name)]
    assert len(names) > 8
    assert all(torch.equal(model.state_dict()[name], stage1[name]) for name in names)


def test_own_captions_that_the_language_model_never_read_are_told(models, tmp_path, capsys):
    """Its pieces are counted, not those of the stage 1 before it."""
    folder = photographs(tmp_path / "data",
                         caption="zygomorphic quetzalcoatlus juxtaposed beyond jigsaw")
    assert run("blip2-stage2", tmp_path / "s2", "--data", folder / "train.json", "--epochs", 1,
               "--max-tokens", 12, "--init", models / "stage1/checkpoint.pt", "--language-model",
               models / "decoder/checkpoint.pt") == 0
    printed = capsys.readouterr().out
    assert "the language model needs" in printed and "are longer than --max-tokens" in printed


def test_finetuning_keeps_the_language_model_of_its_start(models, tmp_path):
    """Also where another one has taken its file's place, or none is there."""
    start, file = models / "stage2-decoder/checkpoint.pt", models / "decoder/checkpoint.pt"
    file.rename(tmp_path / "away.pt")
    try:
        assert run("blip2-caption", tmp_path / "caption", "--scenes", 16, "--init", start) == 0
    finally:
        (tmp_path / "away.pt").rename(file)
    before, after = weights(start), weights(tmp_path / "caption/best.pt")
    language = [name for name in before if name.startswith("language.")]
    assert language and all(torch.equal(after[name], before[name]) for name in language)


def test_a_text_stream_of_other_sizes_is_one_sentence(models, tmp_path, capsys):
    state = torch.load(models / "stage1/checkpoint.pt", weights_only=True)
    state["model"] = {name: value for name, value in state["model"].items()
                      if "layers.1.ffn_text" not in name}  # as with one layer less
    save(tmp_path / "one_layer.pt", state)
    assert run("blip2-vqa", tmp_path / "vqa", "--scenes", 16, "--init",
               models / "stage2-decoder/checkpoint.pt", "--text-from",
               tmp_path / "one_layer.pt") == 2
    assert "the text stream of" in capsys.readouterr().err


def test_a_question_is_answered_from_the_picture_that_belongs_to_it(models, monkeypatch):
    """Grey: from a picture of one colour. shift: from another item's. And the queries read it."""
    trained = open_model(models / "stage2-decoder/checkpoint.pt", kinds=(Stage2,))
    trained.model.config = replace(trained.model.config, question_to_queries=True)
    seen = []
    def generate(images, ids, mask, **options):
        seen.append((images, options))
        return [[]] * len(images)
    monkeypatch.setattr(trained.model, "generate", generate)
    questions = Questions("held-out", 4, 64, 0)
    own, grey, other = (
        (answer_questions(trained, questions, EvalSettings(), **how), seen.pop())[1]
        for how in ({}, {"grey": True}, {"shift": 1}))
    assert torch.equal(other[0], own[0].roll(-1, 0)) and not torch.equal(other[0], own[0])
    assert (grey[0] == grey[0][0, :, :1, :1]).all()
    ids, mask = trained.tokenizer.encode(
        [clean_question(questions.example(i).question) for i in range(4)], trained.max_tokens)
    for _, options in (own, grey, other):
        assert torch.equal(options["question_ids"], ids)
        assert torch.equal(options["question_mask"], mask)
        lengths = {name: options[name] for name in ("min_length", "max_length")}
        assert lengths == {"min_length": 1, "max_length": 11}  # 10 tokens (released code)
        assert options["length_penalty"] == -1 and options["beams"] == 5  # BLIP-2 sec. 4.1


def test_the_answer_that_most_people_give_is_learnt(models):
    config = open_model(models / "stage2-decoder/checkpoint.pt", kinds=(Stage2,)).model.config
    tokenizer = open_model(models / "stage1/checkpoint.pt", kinds=(Stage1,)).tokenizer
    example = SimpleNamespace(question="what colour?", answers=("blue", "red", "red"))
    batch = question_batches(tokenizer, TrainConfig(), config).encode([{"example": example}])
    written = [i for i in batch["targets"][0].tolist() if i >= 0]
    assert open_tokenizer(config.language).decode(written).split()[0] == "red"
    assert tokenizer.decode(batch["question_ids"][0].tolist()) == "what colour?"
    read = batch["ids"][0][batch["mask"][0] > 0].tolist()
    words = open_tokenizer(config.language).decode(read)
    assert words.startswith("question : what colour? answer :")


def test_chat_and_queries(models, tmp_path, capsys):
    from PIL import Image
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    checkpoint = str(models / "stage2-decoder/checkpoint.pt")
    assert eval_command.main(["chat", str(tmp_path / "p.png"), "what colour is it?", "where?",
                              "--checkpoint", checkpoint]) == 0
    assert capsys.readouterr().out.count("answer:") == 2
    assert eval_command.main(["queries", str(tmp_path / "p.png"), "--checkpoint", checkpoint,
                              "--out", str(tmp_path)]) == 0
    assert Image.open(tmp_path / "queries.png").size[0] > 300
    assert "queries differ in about" in capsys.readouterr().out
    assert eval_command.main(["chat", str(tmp_path / "p.png"), "what? " * 150, "--checkpoint",
                              checkpoint]) == 2
    assert "does not fit the language model's" in capsys.readouterr().err
    assert eval_command.main(["chat", str(tmp_path / "p.png"), "is it ☃?", " .", "--checkpoint",
                              checkpoint]) == 2
    assert "does not have '☃'" in (error := capsys.readouterr().err)
    assert "the text has no words" in error


def test_a_chat_shows_the_questions_before_and_their_answers(models, monkeypatch):
    trained = open_model(models / "stage2-decoder/checkpoint.pt", kinds=(Stage2,))
    dialogs = []
    def answer(trained, images, questions, before, **options):
        dialogs.append((questions, [list(dialog) for dialog in before], options))
        return [f"answer {len(dialogs)}"]
    monkeypatch.setattr(demo, "answer", answer)
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    said = demo.chat(trained, picture, ["what is it?", "where?", "how large?"])
    assert said == [("what is it?", "answer 1"), ("where?", "answer 2"), ("how large?", "answer 3")]
    assert [before for _, before, _ in dialogs] == [[[]], [said[:1]], [said[:2]]]
    assert all(options == {"min_length": 2} for _, _, options in dialogs)  # no empty answer


def test_where_a_query_looks_is_read_from_the_last_layer(models):
    """Without [CLS]: the heat of a patch stands in its own place."""
    trained = open_model(models / "stage2-decoder/checkpoint.pt", kinds=(Stage2,))
    picture = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    _, heat, _ = demo.query_attention(trained, picture)
    model, maps = trained.model, []
    tokens = model.encode_tokens(prepare_images(picture[None], torch.device("cpu")))
    model.qformer.encode_queries(model.qformer.project(tokens), maps)
    last = maps[-1][0].mean(0)[:, 1:]
    side = round(last.shape[1] ** 0.5)
    half = 64 // side // 2
    centres = heat[:, half::64 // side, half::64 // side].flatten(1)
    assert torch.equal(centres.argmax(1), last.argmax(1))


def test_a_vit_of_many_blocks_gives_its_second_last_layer():
    """BLIP-2 sec. 3.4. A small one keeps its last block (results/blip2_tried.md)."""
    start = dict(image_size=64, patch_size=16, vit_width=32, vit_heads=2)
    assert vision_of(start | {"vit_depth": 12}, {})["vit_depth"] == 11
    assert vision_of(start | {"vit_depth": 4}, {})["vit_depth"] == 4
    assert vision_of({"queries": 8, "vit_depth": 11}, {})["vit_depth"] == 11  # of a BLIP-2


def test_in_how_many_directions_queries_differ():
    assert effective_rank(torch.eye(4)) == pytest.approx(3)  # the mean is taken off
    one_direction = torch.tensor([[1.0], [2.0], [4.0]]) * torch.ones(3, 8)
    assert effective_rank(one_direction) == pytest.approx(1)
    assert effective_rank(torch.ones(4, 8)) == pytest.approx(1)  # all are the same


@pytest.mark.parametrize("task, flags, message", [
    ("blip2-stage2", ["--init", "stage1/checkpoint.pt", "--language-model", ""],
     "needs a language model"),
    ("blip2-stage2", ["--init", "stage1/checkpoint.pt", "--language-model",
                      "stage1/checkpoint.pt"], "is not a checkpoint of `python train.py language"),
    ("blip2-caption", ["--init", "stage1/checkpoint.pt"], "is a checkpoint of another task"),
    ("blip2-stage1", ["--init", "decoder/checkpoint.pt"], "is a checkpoint of another task"),
    ("blip2-stage1", ["--init", "pretrain/checkpoint.pt", "--vit-width", 32],
     "--vit-width is 128 in the weights of --init"),  # else a random image encoder would be frozen
    ("blip2-stage2", ["--init", "stage1/checkpoint.pt", "--width", 32, "--heads", 4],
     "in the weights of --init and cannot be"),
    ("blip2-stage2", ["--init", "stage1/checkpoint.pt", "--language-model", "no/such/model"],
     "transformers library"),
    ("blip2-stage2", ["--init", "stage1/checkpoint.pt"],
     "runs/language/checkpoint.pt does not exist; train it with `python train.py language-model`"),
    ("blip2-stage2", ["--init", "stage1/checkpoint.pt", "--language-model", "decoder"],
     "decoder is the folder of a run; give decoder/checkpoint.pt"),
    ("blip2-caption", ["--init", "stage2-decoder/checkpoint.pt", "--language-model",
                       "encoder-decoder/checkpoint.pt"], "--init holds its language model"),
    ("blip2-stage2", ["--init", "stage1/checkpoint.pt", "--itg-smoothing", 0.3],
     "--itg-smoothing does nothing in blip2-stage2"),
    ("blip2-stage2", ["--init", "stage1/checkpoint.pt", "--new-layers", 9],
     "--new-layers 9 is more than the Q-Former's 2 layers")])
def test_mistakes_are_one_sentence(models, tmp_path, capsys, monkeypatch, task, flags, message):
    monkeypatch.chdir(models)
    assert run(task, tmp_path / "x", "--scenes", 16, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_how_much_of_a_caption_an_encoder_decoder_has_to_write(models):
    """A part of it, as in the paper; or all of it: the tiny preset, and every finetuning."""
    model_config = open_model(models / "stage2-encoder-decoder/checkpoint.pt",
                              kinds=(Stage2,)).model.config
    assert not model_config.split_captions
    whole = "a large red star on a grey background"
    items = [{"example": Pair("p.png", (whole,), 0), "seed": seed} for seed in range(20)]
    train_config = TrainConfig(prompt="a photo of", max_tokens=40)
    pieces = open_tokenizer(model_config.language)
    for split in (False, True):
        encode = caption_batches(None, train_config, replace(model_config, split_captions=split))
        batch = encode.encode(items)
        read = [pieces.decode(row) for row in batch["ids"].tolist()]
        written = [pieces.decode([i for i in row if i >= 0]) for row in batch["targets"].tolist()]
        assert {f"{r} {w}" for r, w in zip(read, written)} == {f"a photo of {whole}"}
        assert len(set(written)) == (5 if split else 1)  # behind word 0, 1 ... 4 of 8
        assert (whole in written) and ("a photo of" in read)
    assert caption_writer(vars(replace(model_config, split_captions=True)), {})[
        "split_captions"] is False


def test_questions_are_judged_alone_and_in_a_dialog(models, monkeypatch):
    """In both tasks the second time, behind the dialog of their own picture."""
    questions, settings = Questions("held-out", 6, 64), EvalSettings()
    dialogs = [questions.dialog_before(i) for i in range(6)]
    prompts = []
    def question_prompt_seen(kind, question, dialog=(), finetuned=False):
        prompts.append((question, list(dialog)))
        return question_prompt(kind, question, dialog, finetuned)
    for module in (task_stage2, task_language):
        monkeypatch.setattr(module, "question_prompt", question_prompt_seen)
    asked = [clean_question(questions.example(i).question) for i in range(6)]
    for name, kind, evaluate in (
            ("stage2-decoder", Stage2, task_stage2.evaluate_questions),
            ("decoder", TextModel, task_language.evaluate)):
        prompts.clear()
        evaluate(open_model(models / name / "checkpoint.pt", kinds=(kind,)), questions, settings)
        texts = [(clean_question(question), dialog) for question, dialog in prompts]
        assert texts[:6] == [(question, []) for question in asked]
        assert len({str(item) for item in texts if item[1]}) == 6
        assert all(item in texts for item in zip(asked, dialogs))


def test_dialogs_that_do_not_fit_are_left_out(models, capsys):
    """And the training before is not lost: the other numbers are written."""
    trained = open_model(models / "stage2-decoder/checkpoint.pt", kinds=(Stage2,))
    language = trained.model.language
    language.config = replace(language.config, max_positions=70)
    numbers = task_stage2.evaluate_questions(trained, Questions("held-out", 6, 64),
                                             EvalSettings()).numbers
    assert "dialog_accuracy" not in numbers and "other_accuracy" in numbers
    assert "do not fit the language model's 70 positions" in capsys.readouterr().out


def test_parameters_at_full_size():
    """BLIP-2: 188 M in stage 1 (paper), 107 M trained in stage 2 with OPT-2.7B (Table 2)."""
    from blip2.config import Blip2Config
    from blip2.stage2 import Stage2Config

    def millions(model, *without: str) -> float:
        return sum(p.numel() for name, p in model.named_parameters()
                   if p.requires_grad and not name.startswith(without)) / 1e6
    with torch.device("meta"):
        stage1 = Stage1(Blip2Config())
        language = make_language(LanguageConfig(width=2560, depth=1, heads=32))
        stage2 = Stage2(Stage2Config(), language)
    assert 186 < millions(stage1) < 188
    assert millions(stage2) == pytest.approx(107.1, abs=0.1)
