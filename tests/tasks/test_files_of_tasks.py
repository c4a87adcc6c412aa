"""The files of all tasks: where pictures may lie, forms of records, a sentence for each mistake."""

import json
import math

import pytest
from test_visdial import visdial_file

from data.files import InputError
from tasks import captioning, nlvr2, retrieval, video, visdial, vqa
from tasks.task import EvalSettings, Source, broken_images
from world.datasets import Questions

OPEN = {"vqa": vqa.open_data, "nlvr2": nlvr2.open_data, "visdial": visdial.open_data,
        "video-retrieval": video.open_clips, "video-qa": video.open_clip_questions,
        "retrieval": retrieval.TASK.open_data}


def source(path, **changes) -> Source:
    return Source(str(path), "", "val", 0, 16, frames=2, index=path.parent / "index", **changes)


def record_of(task: str, image: str) -> dict | list:
    """What a file of the task holds about one image."""
    text = {"caption": "a dog", "question": "what?", "answer": "dog", "sentence": "a dog",
            "label": "True"}
    if task == "nlvr2":
        return {**text, "images": ["a.jpg", image]}
    return {**text, "clip_name" if task.startswith("video") else "image": image}


@pytest.mark.parametrize("task", OPEN)
@pytest.mark.parametrize("image", ["../a.jpg", "/etc/a.jpg", "b/../../a.jpg", "../s.tar::0:5"])
def test_no_task_reads_a_picture_outside_the_image_root(tmp_path, task, image):
    if task == "visdial":
        path = tmp_path / "d.json"
        content = json.loads((tmp_path / visdial_file(tmp_path).split(",")[0]).read_text())
        content["data"]["dialogs"][0]["image"] = image
        path.write_text(json.dumps(content))
    else:
        path = tmp_path / "p.json"
        path.write_text(json.dumps([record_of(task, image)]))
    with pytest.raises(InputError, match="lies outside the image root") as error:
        OPEN[task](source(path))
    assert str(path) in str(error.value) and image in str(error.value)


@pytest.mark.parametrize("task", [task for task in OPEN if task != "visdial"])
def test_one_record_a_line_is_read_by_every_task(tmp_path, task):
    lines = [json.dumps(record_of(task, f"{name}.jpg")) for name in "abc"]
    (tmp_path / "p.json").write_text("\n".join(lines) + "\n")
    assert len(OPEN[task](source(tmp_path / "p.json"))) == 3


@pytest.mark.parametrize("task", OPEN)
def test_what_is_no_json_is_told_what_is_read(tmp_path, task):
    (tmp_path / "p.csv").write_text("image,caption\na.jpg,a dog\n")
    with pytest.raises(InputError, match="is no json .* give a json list, json with one record"):
        OPEN[task](source(tmp_path / "p.csv"))


def test_an_answer_that_is_a_number_is_its_text(tmp_path):
    rows = [{"image": "a.jpg", "question": "how many?", "answer": answer}
            for answer in (3, [2, "two"], 1.5)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    examples = vqa.read_questions(str(tmp_path / "q.json"))
    assert [example.answers for example in examples] == [("3",), ("2", "two"), ("1.5",)]
    (tmp_path / "c.json").write_text(json.dumps([{**rows[0], "video": "v"}]))
    assert video.read_clip_questions(str(tmp_path / "c.json"))[0].answers == ("3",)
    (tmp_path / "a.json").write_text('["yes", 3]')
    assert vqa.read_answers(tmp_path / "a.json") == ["yes", "3"]


@pytest.mark.parametrize("change, message", [
    ({"gt_index": -1}, "round 1: gt_index is -1; it must be a number from 0"),
    ({"gt_index": "3.0"}, "round 1: gt_index is '3.0';"),
    ({"question": "x"}, "dialog 0: TypeError"),
    ({"answer_options": 7}, "dialog 0: TypeError"), ({"question": 99}, "dialog 0: IndexError")])
def test_mistakes_in_a_round(tmp_path, change, message):
    path = visdial_file(tmp_path).split(",")[0]
    content = json.loads((tmp_path / path).read_text())
    content["data"]["dialogs"][0]["dialog"][0].update(change)
    (tmp_path / "d.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        visdial.read_dialogs(path)


@pytest.mark.parametrize("read, content, message", [
    (visdial.read_dialogs, {"data": {"questions": [3], "answers": [], "dialogs": []}},
     "is no VisDial 1.0 file"),
    (visdial.read_dialogs, {"data": {"questions": [], "answers": [], "dialogs": 4}},
     "is no VisDial 1.0 file"),
    (visdial.read_dialogs, {"data": {"questions": [], "answers": [], "dialogs": [
        {"image_id": 1, "caption": "x", "dialog": []}]}}, "dialog 0: TypeError.'no round"),
    (visdial.read_relevance, [{"image_id": 1, "round_id": 2, "gt_relevance": [0.5]}],
     "record 0: ValueError"),
    (vqa.read_questions, {"annotations": [3]}, "annotation 0: "),
    (vqa.read_questions, {"annotations": [{"question_id": []}]}, "annotation 0: "),
    (vqa.read_questions, [3], "record 0: it is 3 and must be an object; it needs image, question"),
    (visdial.read_relevance, [{"image_id": 1, "round_id": 2, "gt_relevance": [math.nan] * 100}],
     "record 0: .*a relevance that is no number"),
    (video.read_clips, [{"video": "a", "caption": 3}], "record 0: caption must be a text"),
    (video.read_clips, [{"video": ["a"], "caption": "x"}], "record 0: video must be a text"),
    (nlvr2.read_statements, [["a"]], "record 0: it is \\['a'\\] and must be an object")])
def test_mistakes_in_files_are_one_sentence(tmp_path, read, content, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        read(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- captions to score ---------------------------------------------------------------------------

def test_cocos_form_of_references_and_predictions_is_scored(tmp_path):
    """What `eval.py caption` writes, lists, and one record a line give the same."""
    notes = [{"image_id": i, "id": n, "caption": f"a {word} dog"}
             for n, (i, word) in enumerate(((7, "red"), (8, "big"), (7, "small")))]
    told = [{"image_id": 8, "image": "b.jpg", "caption": "a dog"},
            {"image_id": 7, "image": "a.jpg", "caption": "a cat"}]
    (tmp_path / "references.json").write_text(json.dumps(
        {"info": {}, "images": [{"id": 7}, {"id": 8}], "annotations": notes}))
    (tmp_path / "captions.json").write_text(json.dumps(told))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, told)))
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": told}))
    for name in ("captions.json", "lines.json", "coco.json"):
        assert captioning.read_scored(tmp_path / name, tmp_path / "references.json") == (
            ["a dog", "a cat"], [["a big dog"], ["a red dog", "a small dog"]])
    (tmp_path / "bad.json").write_text(json.dumps({"annotations": [{"caption": "x"}]}))
    with pytest.raises(InputError, match="bad.json must be a list of .* or COCO's"):
        captioning.read_scored(tmp_path / "bad.json", tmp_path / "references.json")


# ---- what an evaluation counts and shows ---------------------------------------------------------

def test_a_broken_image_is_counted_once(tmp_path):
    rows = [{"image": image, "question": "what?", "answer": "x"} for image in "aabbbc"]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    data = vqa.open_data(source(tmp_path / "q.json"))
    assert broken_images(data, [{"index": 5}]) == 2 and broken_images(data, []) == 3


def test_the_sheet_of_questions_shows_best_worst_and_random_ones():
    """Also where the first questions are all right; of a test set random ones."""
    data = Questions("val", 60, 16)
    def answer(trained, dataset, settings, grey=False):
        return [{"question_id": i, "index": i, "answer": "x" if i == 50 else
                 dataset.example(i).answers[0]} for i in range(len(dataset))]
    class Trained:
        max_tokens = 99
        class tokenizer:  # noqa: N801
            piece_ids = staticmethod(list)
    found = vqa.evaluate(Trained, data, EvalSettings(baselines=False), answer)
    assert found.numbers["broken"] == 0
    titles = [heading.rpartition(": ")[2] for heading, _ in found.sections]
    assert titles == ["best", "worst", "random"]
    worst = found.sections[1][1][0][0]
    assert worst.lines[1][0] == "x"
