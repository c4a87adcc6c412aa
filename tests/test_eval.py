"""The commands of eval.py, as a user would type them, and what they refuse."""

import json
import os
from dataclasses import asdict

import pytest
import torch
from conftest import photographs, toy_model
from PIL import Image

import eval
from config import TrainConfig
from data.images import prepare_images
from data.text import Tokenizer
from reports.metrics import caption_scores
from tasks import captioning, pretraining
from tasks.task import EvalSettings, TrainedModel
from tools import demo
from training import checkpoints
from world.datasets import World
from world.language import all_captions
from world.scenes import ATTRIBUTES


def toy_trained() -> TrainedModel:
    tokenizer = Tokenizer.train(all_captions(300), 400)
    model = toy_model(**tokenizer.config()).eval()
    return TrainedModel(model, tokenizer, asdict(TrainConfig(min_length=5, max_length=20)))


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


# ---- benchmarks ----

def test_a_model_that_ignores_the_image_earns_chance_on_swaps(monkeypatch):
    trained, world = toy_trained(), World("held-out", 6, 32)
    monkeypatch.setattr(type(trained.model), "match",
                        lambda self, kv, ids, mask: torch.zeros(len(ids), 2))
    numbers = pretraining.evaluate(trained, world, EvalSettings(top_k=0)).numbers
    assert numbers["itm_swap"] == 0.0 and set(numbers["itm_swap_by"]) == set(ATTRIBUTES)
    assert numbers["chance"]["itm_swap"] == 0.5 and "t2i_r1_rerank" not in numbers


def test_perfect_and_constant_captions_in_the_world(monkeypatch):
    world, trained = World("held-out", 20, 32), toy_trained()
    def evaluate(texts):
        monkeypatch.setattr(captioning, "caption_all", lambda *args: (
            [{"index": i, "caption": texts[i], "example": world.example(i)} for i in range(20)],
            []))
        return captioning.evaluate(trained, world, EvalSettings())
    found = evaluate([world.references(i)[2] for i in range(20)])
    numbers = found.numbers
    assert numbers["caption_true"] == 1.0 and numbers["cider"] > 3 and numbers["bleu4"] > 0.99
    titles = [title for title, _ in found.sections]
    assert titles[0] == "captions: 100 % are wholly true; three right, three wrong"
    assert [title.split(",")[1].split()[0] for title in titles[1:]] == ["best", "worst", "random"]
    constant = numbers["constant"]["caption"]
    same = evaluate([constant] * 20).numbers
    assert same["cider"] == pytest.approx(numbers["constant"]["cider"])
    # A caption whose facts hold but that leaves one out is not wholly true.
    vague = evaluate([f"on a {world.scene(i).background} background" for i in range(20)]).numbers
    assert vague["caption_true"] == 0.0 and vague["caption_facts_hold"] == 1.0


def test_a_model_without_itm_is_ranked_by_itc_alone(tmp_path, pretrained, capsys):
    """As one of pretrain-clip is: --top-k 0 asks no ITM."""
    state = checkpoints.load(pretrained)
    state["train_config"]["itm_weight"] = 0.0
    checkpoints.save(tmp_path / "itc.pt", state)
    command = ["retrieval", "--checkpoint", str(tmp_path / "itc.pt"), "--size", "8", "--out",
               str(tmp_path / "r")]
    assert eval.main([*command, "--top-k", "4"]) == 2
    assert "it was trained without ITM" in capsys.readouterr().err
    assert eval.main([*command, "--top-k", "0"]) == 0
    assert "t2i_r1" in metrics(tmp_path / "r") and "t2i_r1_rerank" not in metrics(tmp_path / "r")


def test_retrieval_and_caption_in_the_world(tmp_path, pretrained, capsys):
    out = tmp_path / "r"
    assert eval.main(["retrieval", "--checkpoint", str(pretrained), "--size", "12", "--top-k", "4",
                      "--out", str(out)]) == 0
    found = metrics(out)
    assert found["images"] == 12 and 0 <= found["t2i_r5_rerank"] <= 1
    assert found["settings"]["top_k"] == 4 and found["settings"]["model"]["vit_width"] == 16
    assert Image.open(out / "sheet.png").size[0] > 500 and "chance" in capsys.readouterr().out
    out = tmp_path / "c"
    assert eval.main(["caption", "--checkpoint", str(pretrained), "--size", "12", "--prompt", "a",
                      "--max-length", "12", "--out", str(out)]) == 0
    found = metrics(out)
    assert (found["settings"]["max_length"], found["settings"]["prompt"]) == (12, "a")
    assert {"bleu4", "rouge_l", "cider", "caption_true"} <= set(found["constant"]) & set(found)
    assert [r["image_id"] for r in json.loads((out / "captions.json").read_text())] == [*range(12)]


def test_each_batch_draws_its_own_samples(monkeypatch):
    monkeypatch.setattr("tasks.task.BATCH", 4)
    trained, seeds = toy_trained(), []
    def write(images, decoding):
        seeds.append(decoding.seed)
        return [[("a thing", 0.0)]] * len(images)
    decoding = captioning.Decoding(method="nucleus", seed=5)
    world = World("held-out", 8, 32)
    captioning.caption_all(trained, world, decoding, write)
    assert seeds == [5, 9]
    batches = [(["a.png", "b.png"], torch.stack([world.picture(i) for i in (0, 1)]))] * 2
    monkeypatch.setattr(demo, "picture_batches", lambda *rest: batches)
    first, _, second, _ = demo.describe(trained, ["a.png", "b.png"] * 2, decoding)
    assert first["captions"] == second["captions"] and first["samples"] != second["samples"]


def test_captions_of_photographs_and_the_files_for_other_tools(tmp_path, pretrained, capsys):
    folder, out = photographs(tmp_path), tmp_path / "c"
    rows = json.loads((folder / "val.json").read_text())
    write(folder / "val.json", [{**row, "image_id": 100 + i} for i, row in enumerate(rows)])
    (folder / "3.jpg").write_bytes(b"broken")
    common = write(tmp_path / "common.json", [{"image": "a.jpg", "caption": text}
                                              for text in ("x", "A zebra", "a zebra")])
    assert eval.main(["caption", "--checkpoint", str(pretrained), "--data",
                      str(folder / "val.json"), "--constant-from", str(common),
                      "--out", str(out)]) == 0
    found = metrics(out)
    assert found["constant"]["caption"] == "a zebra"
    assert (found["images"], found["broken"]) == (9, 1) and "caption_true" not in found
    results = json.loads((out / "captions.json").read_text())
    assert [r["image_id"] for r in results] == [100, 101, 102, *range(104, 110)]
    coco = json.loads((out / "references.json").read_text())
    assert [image["id"] for image in coco["images"]] == [r["image_id"] for r in results]
    assert [n["id"] for n in coco["annotations"]] == [*range(18)]
    assert coco["annotations"][0] == {"image_id": 100, "id": 0, "caption": rows[0]["caption"][0]}
    # What it wrote can be scored again, with the same result.
    capsys.readouterr()
    told = write(tmp_path / "p.json", results)
    true = write(tmp_path / "t.json", [{"image_id": 100 + i, "caption": row["caption"]}
                                       for i, row in enumerate(rows) if i != 3])
    assert eval.main(["score", "--predictions", str(told), "--references", str(true)]) == 0
    assert json.loads(capsys.readouterr().out)["cider"] == pytest.approx(found["cider"], abs=1e-6)


def test_annotations_in_the_folder_of_the_results_are_left_alone(tmp_path, pretrained, capsys):
    folder = photographs(tmp_path)
    before = (folder / "val.json").rename(folder / "captions.json").read_text()
    assert eval.main(["caption", "--checkpoint", str(pretrained), "--data",
                      str(folder / "captions.json"), "--out", str(folder)]) == 2
    assert "captions.json lies in the folder" in capsys.readouterr().err
    assert (folder / "captions.json").read_text() == before


def test_nocaps_by_domain(tmp_path, pretrained):
    folder, out = photographs(tmp_path), tmp_path / "n"
    content = {"images": [{"id": i, "file_name": f"{i}.jpg", "domain": ("in", "near", "out")[i % 3]}
                          for i in range(9)],
               "annotations": [{"image_id": i, "caption": World("train", 9).example(i).captions[0]}
                               for i in range(9)]}
    data = write(folder / "nocaps.json", content)
    assert eval.main(["nocaps", "--checkpoint", str(pretrained), "--data", str(data), "--out",
                      str(out)]) == 0
    found = metrics(out)
    assert {"in_cider", "near_cider", "out_cider", "cider"} <= set(found)
    assert found["settings"]["repetition_penalty"] == 1.1
    told = {r["image_id"]: r["caption"] for r in json.loads((out / "captions.json").read_text())}
    alone, _ = caption_scores([told[i] for i in (0, 3, 6)],
                              [[content["annotations"][i]["caption"]] for i in (0, 3, 6)])
    assert {f"in_{name}": value for name, value in alone.items()}.items() <= found.items()
    # The test set has no captions: only the result file is written.
    data = write(folder / "test.json", [{"image": "0.jpg", "img_id": 5}])
    assert eval.main(["nocaps", "--checkpoint", str(pretrained), "--data", str(data), "--out",
                      str(tmp_path / "t")]) == 0
    assert json.loads((tmp_path / "t/captions.json").read_text())[0]["image_id"] == 5


# ---- score ----

P = [{"image": "a", "caption": "a dog"}, {"image": "b", "caption": "a cat"}]
R = [{"image": "b", "caption": ["a cat", "cats"]}, {"image": "a", "caption": ["a dog", "dogs"]}]


@pytest.mark.parametrize("told, true, message", [
    (P, R[:1], "1 predictions have no reference in {R} (the first: image a)"),
    (P + P[:1], R, "{P}, record 2: image a occurs a second time"),
    (P, R + R[:1], "{R}, record 2: image b occurs a second time"),
    (P, [{"image": "b", "caption": []}, R[1]], "{R}, record 0: the reference of image b is empty"),
    (P, [R[0], {"image": "a", "caption": ["a", "."]}], "{R}, record 1: the reference of image a"),
    (P[:1], R, "{R}: 1 references have no prediction in {P} (the first: image b)"),
    (P, [{"image_id": 1, "caption": "x"}], "must name the images of all records in the same way"),
    ([{"image": "a", "caption": 3}], R, "{P}, record 0: caption must be a text"),
    ([], R, "{P} must be a list of"),
    ({"a": "a dog"}, R, "{P} must be a list of")])
def test_what_cannot_be_scored_is_one_sentence(tmp_path, capsys, told, true, message):
    told, true = write(tmp_path / "p.json", told), write(tmp_path / "r.json", true)
    assert eval.main(["score", "--predictions", str(told), "--references", str(true)]) == 2
    captured = capsys.readouterr()
    assert message.format(P=told, R=true) in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_a_subset_is_scored_when_asked_and_ids_win_over_paths(tmp_path, capsys):
    told = write(tmp_path / "p.json", [{"image_id": "7", "image": "other", "caption": "a dog"}])
    true = write(tmp_path / "r.json", [{"image_id": 7, "image": "a", "caption": ["A dog."]},
                                       {"image_id": 8, "image": "b", "caption": ["a cat"]}])
    assert eval.main(["score", "--predictions", str(told), "--references", str(true),
                      "--subset"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bleu2"] == 1.0 and found["images"] == 1


# ---- for a person ----

def test_describe_prints_and_writes_captions_of_a_folder(tmp_path, pretrained, capsys):
    folder = photographs(tmp_path, 3)
    (folder / "broken.jpg").write_bytes(b"no image")
    asked = ["describe", str(folder), "--checkpoint", str(pretrained), "--captions", "2",
             "--samples", "2", "--out", str(tmp_path / "o")]
    assert eval.main(asked) == 0
    out = capsys.readouterr().out
    records = json.loads((tmp_path / "o/captions.json").read_text())
    assert [r["image"] for r in records] == [str(folder / f"{i}.jpg") for i in range(3)]
    assert f"wrote {tmp_path}/o/captions.json (3 pictures" in out
    assert "left out" in out and all(text in out for r in records for text, _ in r["captions"])
    assert all(len(r["captions"]) == len(r["samples"]) == 2 for r in records)
    assert all(r["captions"][0][1] >= r["captions"][1][1] for r in records)
    assert eval.main(asked) == 0  # the same seed, the same samples
    assert json.loads((tmp_path / "o/captions.json").read_text()) == records


def test_an_interrupt_keeps_what_is_described_and_encoded(tmp_path, pretrained, monkeypatch):
    batches = demo.picture_batches
    def pressed(*arguments):
        yield next(batches(*arguments))
        raise KeyboardInterrupt
    folder, out = photographs(tmp_path, 3), tmp_path / "o"
    asked = ["--checkpoint", str(pretrained), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "picture_batches", pressed)
        assert eval.main(["describe", str(folder), *asked]) == 130
        assert eval.main(["search", "red", "--images", str(folder), *asked]) == 130
    assert len(json.loads((out / "captions-interrupted.json").read_text())) == 3
    store, = out.glob("features-*.pt")
    assert len(demo.read_features(store)) == 3


def test_a_search_does_not_find_its_own_sheet_or_a_picture_twice(tmp_path, pretrained, capsys):
    folder = photographs(tmp_path, 3)
    asked = ["search", "red", "--images", str(folder), str(folder) + "/", str(folder / "0.jpg"),
             "--checkpoint", str(pretrained), "--out", str(folder / "found")]
    for _ in range(2):
        assert eval.main(asked) == 0
        out = capsys.readouterr().out
        assert out.count("ITC") == out.count(".jpg") == 3


def test_words_that_the_vocabulary_lacks_are_named(tmp_path, pretrained, capsys):
    asked = [str(photographs(tmp_path, 1) / "0.jpg"), "a ☃ red", "--checkpoint",
             str(pretrained)]
    assert eval.main(["match", *asked]) == 0
    assert "the model's vocabulary does not have '☃'" in capsys.readouterr().err


def test_a_search_among_damaged_pictures_is_one_sentence(tmp_path, pretrained, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.png").write_bytes(b"no picture")
    assert eval.main(["search", "a red circle", "--images", str(tmp_path / "p"), "--checkpoint",
                      str(pretrained), "--out", str(tmp_path / "s")]) == 2
    assert "none of the pictures could be read" in capsys.readouterr().err


def test_search_orders_by_both_heads_and_keeps_features(tmp_path, pretrained, monkeypatch, capsys):
    folder, out = photographs(tmp_path / "p", 8), tmp_path / "s"
    asked = ["search", "a red circle", "--images", str(folder), "--checkpoint", str(pretrained),
             "--top-k", "3", "--out", str(out)]
    assert eval.main(asked) == 0
    first = capsys.readouterr().out
    assert first.count(".jpg") == 3 and Image.open(out / "search.png").size[0] > 300
    encoded, batches = [], demo.picture_batches
    def watch(paths, *args):
        encoded.append([path.name for path in paths])
        return batches(paths, *args)
    monkeypatch.setattr(demo, "picture_batches", watch)
    assert eval.main(asked) == 0 and capsys.readouterr().out == first
    Image.new("RGB", (40, 40), "red").save(folder / "4.jpg")  # another picture: encoded again
    assert eval.main(asked) == 0
    os.utime(folder / "5.jpg", (1, 1))
    assert eval.main(asked) == 0
    assert encoded == [[], ["4.jpg"], ["5.jpg"]]
    trained = checkpoints.open_model(pretrained)
    model, paths = trained.model, demo.find_pictures([folder])
    hits = demo.search(trained, "a red circle", paths, pretrained, out, len(paths))
    expected = [demo.match(trained, demo.open_picture(h["image"], 32), "a red circle")
                for h in hits]
    assert [(h["itc"], h["itm"]) for h in hits] == [
        pytest.approx(pair, abs=1e-4) for pair in expected]
    scores = []
    for hit in hits:  # best first by ITC cosine / temperature + ITM's log-odds (tiny preset)
        image = prepare_images(demo.open_picture(hit["image"], 32)[None], "cpu")
        tokens, feat = model.encode_image(image)
        text = trained.tokenizer.encode(["a red circle"], 30)
        logits = model.match(model.project(tokens), *text)
        cosine = (model.encode_text(*text) @ feat.T)[0, 0]
        scores.append((cosine / model.temp + logits[0, 1] - logits[0, 0]).item())
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1


def test_attention_maps_are_gradient_weighted_cross_attention():
    trained = toy_trained()
    model = trained.model
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    words, heat, _ = demo.attention(trained, image, "A red circle.", layer=1)
    assert words == ["a", "red", "circle"] and heat.shape == (3, 32, 32)
    assert heat.amax((1, 2)).tolist() == pytest.approx([1, 1, 1]) and heat.min() >= 0
    # Two layers: the default is the first, since from the last one no word reaches [ENC].
    assert torch.equal(demo.attention(trained, image, "A red circle.")[1], heat)
    with pytest.raises(ValueError, match="--layer 2 cannot be shown; of the model's 2 layers 1"):
        demo.attention(trained, image, "red", layer=2)
    # An image that says nothing (all its value vectors are zero) keeps its attention but loses its
    # gradient: without the weighting the map would not be 0.
    with torch.no_grad():
        for layer in model.med.layers:
            layer.cross_attn.attn.kv.weight[48:] = 0
    assert demo.attention(trained, image, "red", layer=1)[1].max() < 1e-3


def test_match_and_attend(tmp_path, pretrained, capsys):
    folder = photographs(tmp_path, 1)
    asked = [str(folder / "0.jpg"), "a red circle", "--checkpoint", str(pretrained)]
    assert eval.main(["match", *asked]) == 0
    assert "ITC similarity" in capsys.readouterr().out
    assert eval.main(["attend", *asked, "--layer", "1", "--out", str(tmp_path / "a")]) == 0
    assert Image.open(tmp_path / "a/attention.png").size[0] > 300


def test_training_pairs_are_judged_as_others(tmp_path, pretrained):
    """Split "train" of a Karpathy file: an image with all its captions is one item."""
    folder = photographs(tmp_path, 4)
    rows = [{"filename": f"{i}.jpg", "split": "train", "sentences": [{"raw": "a"}, {"raw": "b"}]}
            for i in range(4)]
    (folder / "k.json").write_text(json.dumps({"images": rows}))
    assert eval.main(["retrieval", "--checkpoint", str(pretrained), "--data",
                      str(folder / "k.json"), "--split", "train", "--out",
                      str(tmp_path / "r")]) == 0
    assert (metrics(tmp_path / "r")["images"], metrics(tmp_path / "r")["texts"]) == (4, 8)


def test_a_small_gallery_is_ranked_whole(tmp_path, pretrained, capsys):
    assert eval.main(["retrieval", "--checkpoint", str(pretrained), "--size", "5", "--top-k", "6",
                      "--out", str(tmp_path / "r")]) == 0
    assert "there are 5 images: ITM re-ranks them all" in capsys.readouterr().out
    assert metrics(tmp_path / "r")["top_k"] == 6
    folder = photographs(tmp_path / "p", 3)
    assert eval.main(["search", "x", "--images", str(folder), "--checkpoint", str(pretrained),
                      "--out", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out.count(".jpg") == 3


@pytest.mark.parametrize("arguments, message", [
    (["caption", "--checkpoint", "RETRIEVAL"], "is a checkpoint of another task (retrieval): it "
                                               "was trained without LM"),
    (["retrieval", "--checkpoint", "CAPTION"], "trained without ITC and ITM"),
    (["describe", "FOLDER", "--checkpoint", "C", "--prompt", "a " * 30, "--max-length", "20"],
     "has 30 tokens, which leaves no room in --max-length 20"),
    (["describe", "FOLDER", "--checkpoint", "C", "--max-length", "999"],
     "--max-length 999 is more than the model's 64 positions"),
    (["caption", "--checkpoint", "C", "--method", "greedy"],
     "--method is 'greedy'; choose one of beam, nucleus"),
    (["describe", "nowhere", "--checkpoint", "C"], "nowhere does not exist"),
    (["match", "nowhere.jpg", "x", "--checkpoint", "C"], "picture nowhere.jpg cannot be read"),
    (["match", "x.jpg", "x", "--checkpoint", "nothing.pt"], "nothing.pt does not exist"),
    (["match", "FOLDER/0.jpg", " .", "--checkpoint", "C"], "the text has no words"),
    (["match", "FOLDER/0.jpg", "red " * 99, "--checkpoint", "C"], "has 101 tokens, more than the"),
    (["retrieval", "--checkpoint", "RUN"], "is a folder; give the file of weights in it"),
    (["retrieval", "--checkpoint", "C", "--out", "RUN"], "whose metrics.json would be lost"),
    (["retrieval", "--checkpoint", "C", "--data", "a.tar"], "a.tar: tar shards are for train.py"),
    (["retrieval", "--checkpoint", "C", "--data", "a,b"], "a,b names several files, and what jud"),
    (["retrieval", "--checkpoint", "C", "--vocab", "v"], "--text-heads are for released weights"),
    (["caption", "--checkpoint", "C", "--min-length", "31"], "31 is more than --max-length 30"),
    (["ask", "x.jpg", "x", "--checkpoint", "C"], "of another task (pretrain); give one of vqa"),
    (["queries", "x.jpg", "--checkpoint", "C"], "give one of blip2-stage1 or blip2-retrieval or"),
    (["nocaps", "--checkpoint", "C"], "nocaps needs --data")])
def test_what_cannot_be_evaluated_is_one_sentence(tmp_path, pretrained, capsys, arguments, message):
    state = checkpoints.load(pretrained)
    weights = state["train_config"]
    folder = str(photographs(tmp_path, 3))
    places = {"FOLDER": folder, "FOLDER/0.jpg": f"{folder}/0.jpg", "C": str(pretrained),
              "RUN": str(pretrained.parent)}
    for name, off in (("RETRIEVAL", ("lm",)), ("CAPTION", ("itc", "itm"))):
        state["train_config"] = weights | {"task": name.lower()} | {f"{o}_weight": 0.0 for o in off}
        places[name] = str(tmp_path / f"{name}.pt")
        checkpoints.save(places[name], state)
    capsys.readouterr()
    assert eval.main([places.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("error: ")
