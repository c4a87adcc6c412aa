"""Tokenizer, transforms, readers, and one clear sentence for each mistake in them."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import REFERENCE, reference
from PIL import Image

from data import (
    Collate,
    InputError,
    Pair,
    PairDataset,
    Tokenizer,
    clean_caption,
    load_image,
    normalise,
    rand_augment,
    random_crop,
    read_pairs,
)

CAPTIONS = ["a dog runs on the grass", "a man on a red surfboard", "two dogs play with a ball",
            "the man runs"] * 3


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def picture(path, size=(40, 30), colour=(200, 30, 30)):
    Image.new("RGB", size, colour).save(path)
    return path


# ---- text ----

def test_captions_are_cleaned_as_in_the_released_code():
    assert clean_caption('A "Dog" (runs).. on #1: the; grass!~*') == "a dog runs on 1 the grass"
    assert clean_caption("word " * 40).split() == ["word"] * 30
    assert clean_caption("it's a dog-house, ok?") == "it's a dog-house, ok?"


def test_tokenizer_round_trip_and_padding():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    ids, mask = tokenizer.encode(["a dog", "a man on a red surfboard"])
    assert ids[0, 0] == tokenizer.cls and ids[0, mask[0].sum() - 1] == tokenizer.sep
    assert (ids[0, mask[0].sum():] == tokenizer.pad).all() and ids.shape[1] == mask[1].sum()
    assert tokenizer.decode(ids[1]) == "a man on a red surfboard"
    again = Tokenizer(tokenizer.state())
    assert again.encode(CAPTIONS)[0].equal(tokenizer.encode(CAPTIONS)[0])
    assert tokenizer.config()["vocab_size"] == len(tokenizer.vocab)
    assert tokenizer.vocab[-2:] == ["[DEC]", "[ENC]"]


def test_a_long_text_is_cut_and_keeps_sep():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    ids, mask = tokenizer.encode(["dog " * 50], 10)
    assert ids.shape == (1, 10) and ids[0, -1] == tokenizer.sep and mask.all()


def test_training_a_vocabulary_repeats():
    texts = [" ".join(random.Random(i).choices(
        "runs running runner jumps jumped dog dogs boat boats".split(), k=6)) for i in range(50)]
    assert len({tuple(Tokenizer.train(texts, size).vocab) for size in (60, 60, 60, 60)}) == 1


def test_bert_vocabulary_gives_the_released_ids():
    ref = reference("b_pretrain_parts.pt")
    tokenizer = Tokenizer.from_file(REFERENCE / "vocab.txt")
    ids, mask = tokenizer.encode(ref["inputs"]["captions"])
    length = ids.shape[1]
    assert (ids.equal(ref["inputs"]["input_ids"][:, :length])
            and mask.equal(ref["inputs"]["attention_mask"][:, :length]))
    assert (tokenizer.dec, tokenizer.enc) == (484, 485)


@pytest.mark.parametrize("content, message",
                         [("[PAD]\n[UNK]\ndog\n", r"lacks \[CLS\], \[SEP\]"),
                          ("[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog\ndog\n", "lists 'dog' twice")])
def test_a_vocabulary_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        Tokenizer.from_file(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "nothing.txt")


# ---- pictures ----

def test_evaluation_resizes_the_whole_picture(tmp_path):
    half = Image.new("RGB", (40, 20), (255, 0, 0))
    half.paste((0, 0, 255), (20, 0, 40, 20))
    half.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 16)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    assert image[:, 8, 2].tolist() == [255, 0, 0] and image[:, 8, 13].tolist() == [0, 0, 255]


def test_jpeg_draft_decoding_changes_little(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(
        (800, 600), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    smooth.save(tmp_path / "a.png")
    difference = (load_image(tmp_path / "a.jpg", 64).float()
                  - load_image(tmp_path / "a.png", 64).float())
    assert difference.abs().mean() < 3


def test_augmentation_repeats_with_its_generator(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    images = [load_image(tmp_path / "a.png", 32, random.Random(seed)) for seed in (1, 1, 2)]
    assert images[0].equal(images[1]) and not images[0].equal(images[2])


def test_random_crops_keep_to_their_range():
    rng = random.Random(0)
    for _ in range(300):
        left, top, right, bottom = random_crop(200, 100, (0.2, 0.5), rng)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        assert 0.2 - 1e-6 <= (right - left) * (bottom - top) / 20000 <= 0.5 + 1e-6
        assert 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6


def test_rand_augment_moves_by_the_recipes_amounts():
    image = Image.new("RGB", (64, 64), (10, 20, 30))
    class Chosen(random.Random):
        def __init__(self, name, sign):
            super().__init__(0)
            self.answers = [name, sign] * 2
        def choice(self, options):
            return self.answers.pop(0)
        def random(self):
            # apply the first operation, not the second
            return 0.1 if len(self.answers) == 2 else 0.9
    def fill(name):
        return (np.asarray(rand_augment(image, Chosen(name, 1))) == 128).all(-1)
    assert fill("translate_x").sum() == 5 * 64  # 5 pixels of grey 128
    assert fill("translate_y").sum() == 5 * 64
    assert (fill("shear_x").any(0).sum() >= 9 and fill("rotate").any()
            and not fill("brightness").any())


def test_no_flip_where_a_caption_says_left_or_right(tmp_path):
    half = Image.new("RGB", (32, 32), (255, 0, 0))
    half.paste((0, 0, 255), (16, 0, 32, 32))
    half.save(tmp_path / "a.png")
    def left_is_red(text):
        data = PairDataset([Pair("a.png", (text,), 0)], tmp_path, 32, augment=True,
                           crop=(0.95, 1.0))
        found = []
        for epoch in range(30):
            data.set_epoch(epoch)
            image = data[0]["image"].float()
            found.append(bool(image[0, 16, 8] > image[0, 16, 24]))
        return sum(found)
    assert left_is_red("a red wall on the left") == 30
    assert 5 < left_is_red("a red wall") < 25


def test_normalise_uses_clips_statistics():
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = [(1 - m) / s for m, s in zip((0.48145466, 0.4578275, 0.40821073),
                                            (0.26862954, 0.26130258, 0.27577711))]
    assert torch.allclose(normalise(image)[0, :, 0, 0], torch.tensor(expected), atol=1e-5)


# ---- files ----

def test_blip_json(tmp_path):
    path = write_json(tmp_path / "p.json",
                      [{"image": "a.jpg", "caption": "A dog.", "image_id": "x"},
                       {"image": "b.jpg", "caption": ["One!", "Two"]},
                       {"image": "a.jpg", "caption": "A cat", "image_id": "x"}])
    assert read_pairs(path) == [Pair("a.jpg", ("A dog.",), 0, "x"),
                                Pair("b.jpg", ("One!", "Two"), 1, "b.jpg"),
                                Pair("a.jpg", ("A cat",), 0, "x")]


def test_coco_and_nocaps_annotations(tmp_path):
    content = {"images": [{"id": 7, "file_name": "a.jpg", "domain": "in-domain"},
                          {"id": 9, "file_name": "b.jpg", "domain": "out-domain"}],
               "annotations": [{"image_id": 9, "caption": "A cat."},
                               {"image_id": 7, "caption": "A dog."},
                               {"image_id": 9, "caption": "Cats"}]}
    path = write_json(tmp_path / "coco.json", content)
    assert read_pairs(path) == [Pair("a.jpg", ("A dog.",), 0, 7, "in-domain"),
                                Pair("b.jpg", ("A cat.", "Cats"), 1, 9, "out-domain")]
    path = write_json(tmp_path / "test.json", [{"image": "c.jpg", "img_id": 3}])
    assert read_pairs(path, need_captions=False) == [Pair("c.jpg", (), 0, 3)]
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
        Pair("val2014/d.jpg", ("A dog.", "Dogs"), 0, "val2014/d.jpg")]


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
    assert "2 records have an empty caption (the first: " in capsys.readouterr().err


def test_unreadable_images_are_replaced_in_training_and_left_out_in_evaluation(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    pairs = [Pair("broken.jpg", ("one",), 0), Pair("good.png", ("two",), 1),
             Pair("missing.png", ("three",), 2)]
    train = PairDataset(pairs, tmp_path, 16, augment=True)
    assert [train[i]["text"] for i in range(3)] == ["two"] * 3
    assert "broken.jpg" in train[0]["broken"][0] and len(train[2]["broken"]) == 2
    collate = Collate(Tokenizer.train(CAPTIONS, 300))
    batch = collate([PairDataset(pairs, tmp_path, 16)[i] for i in range(3)])
    assert (batch["image"].shape == (1, 3, 16, 16) and len(batch["broken"]) == 2
            and batch["texts"] == [["two"]])
    assert collate([PairDataset(pairs, tmp_path, 16)[0]])["image"] is None
