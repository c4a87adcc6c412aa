"""Files of pairs: formats, one clear sentence for each mistake."""

import pytest
from test_files import write_json

from data.datasets import Pair, name_hash
from data.files import InputError
from data.pairs import is_karpathy, merge_captions, read_pairs


def test_blip_json(tmp_path):
    path = write_json(tmp_path / "p.json",
                      [{"image": "a.jpg", "caption": "A dog.", "image_id": "x"},
                       {"image": "b.jpg", "caption": ["One!", "Two"]},
                       {"image": "a.jpg", "caption": "A cat", "image_id": "x"}])
    assert read_pairs(path) == [Pair("a.jpg", ("A dog.",), name_hash("x"), "x"),
                                Pair("b.jpg", ("One!", "Two"), name_hash("b.jpg"), "b.jpg"),
                                Pair("a.jpg", ("A cat",), name_hash("x"), "x")]


def test_an_image_id_that_is_none_names_no_image(tmp_path):
    """null and NaN: the path does, else all pictures would be one."""
    path = write_json(tmp_path / "p.json", [
        {"image": f"{i}.jpg", "caption": "A dog.", "image_id": i}
        for i in (None, float("nan"), None, 0)])
    assert [pair.name for pair in read_pairs(path)] == ["None.jpg", "nan.jpg", "None.jpg", 0]


def test_only_karpathys_files_hold_all_splits(tmp_path):
    images = [{"filename": "a.jpg", "split": "val", "sentences": [{"raw": "x"}]}]
    assert is_karpathy(write_json(tmp_path / "karpathy.json", {"images": images}))
    assert not is_karpathy(write_json(tmp_path / "coco.json", {"images": [], "annotations": []}))
    assert not is_karpathy(write_json(tmp_path / "list.json", [{"image": "a", "caption": "b"}]))
    assert not is_karpathy(tmp_path / "shards.tar")


def test_coco_and_nocaps_annotations(tmp_path):
    content = {"images": [{"id": 7, "file_name": "a.jpg", "domain": "in-domain"},
                          {"id": 9, "file_name": "b.jpg", "domain": "out-domain"}],
               "annotations": [{"image_id": 9, "caption": "A cat."},
                               {"image_id": 7, "caption": "A dog."},
                               {"image_id": 9, "caption": "Cats"}]}
    path = write_json(tmp_path / "coco.json", content)
    assert read_pairs(path) == [Pair("a.jpg", ("A dog.",), name_hash(7), 7, "in-domain"),
                                Pair("b.jpg", ("A cat.", "Cats"), name_hash(9), 9, "out-domain")]
    path = write_json(tmp_path / "test.json", [{"image": "c.jpg", "img_id": 3}])
    assert read_pairs(path, need_captions=False) == [Pair("c.jpg", (), name_hash(3), 3)]
    alone = write_json(tmp_path / "alone.json", {"images": content["images"]})  # NoCaps' test set
    assert [pair.image for pair in read_pairs(alone, need_captions=False)] == ["a.jpg", "b.jpg"]
    assert not is_karpathy(alone)
    content["annotations"].append({"image_id": 7})
    with pytest.raises(InputError, match="annotation 3: 'caption' is missing"):
        read_pairs(write_json(path, content))


def test_karpathy_json(tmp_path):
    def image(name, split):
        return {"filepath": "val2014", "filename": name, "split": split,
                "sentences": [{"raw": "A dog."}, {"raw": "Dogs"}]}
    path = write_json(tmp_path / "k.json",
                      {"images": [image("a.jpg", "train"), image("b.jpg", "restval"),
                                  image("c.jpg", "val"), image("d.jpg", "test")]})
    assert [p.image for p in read_pairs(path)] == ["val2014/a.jpg", "val2014/b.jpg"]
    assert read_pairs(path, split="test") == [
        Pair("val2014/d.jpg", ("A dog.", "Dogs"), name_hash("val2014/d.jpg"),
             "val2014/d.jpg")]
    with pytest.raises(InputError, match="k.json .* in split 'dev'; set .split. to 'dev' in some"):
        read_pairs(path, split="dev")


@pytest.mark.parametrize("content, message", [
    ('[{"image": "a.jpg", "caption": }]', "not valid json: .* line 1, column 32"),
    ([{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg"}], "record 1: 'caption' is missing"),
    ([{"image": "a.jpg", "caption": 3}], "record 0: image must be a path and caption a text"),
    (["a.jpg"], "record 0: it is 'a.jpg'"),
    ({"a": 1}, "neither a list .* nor a Karpathy or COCO file"),
    ([{"image": "../../etc/a.jpg", "caption": "x"}],
     "record 0: image .* lies outside the image root"),
    ([{"image": "/etc/a.jpg", "caption": "x"}], "record 0: image .* lies outside the image root"),
    ([{"image": "a.jpg", "caption": " . "}], "no image with a caption"),
    ({"images": [{"filename": "a.jpg", "split": "train"}]}, "record 0: 'sentences' is missing"),
])
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    path = write_json(tmp_path / "p.json", content)
    with pytest.raises(InputError, match=message) as error:
        read_pairs(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.json does not exist"):
        read_pairs(tmp_path / "nothing.json")


def test_empty_captions_are_left_out_and_counted(tmp_path, capsys):
    path = write_json(tmp_path / "p.json",
                      [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "!"},
                       {"image": "c.jpg", "caption": ["", "y"]}])
    assert [p.captions for p in read_pairs(path)] == [("x",), ("y",)]
    assert "1 records have an empty caption (the first: " in capsys.readouterr().err


def test_rows_of_one_image_are_merged_for_evaluation():
    pairs = [Pair("a", ("x",), 1), Pair("b", ("y",), 2), Pair("a", ("z",), 1)]
    assert merge_captions(pairs) == [Pair("a", ("x", "z"), 1), Pair("b", ("y",), 2)]
    two = [Pair("a", ("x",), 1), Pair("b", ("y",), 1)]  # one id for two pictures
    assert merge_captions(two) == two
