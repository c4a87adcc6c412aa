"""Hostile files go through the readers: each is read, or refused with one sentence, in time.

    python -m pytest -m slow -s tests/data/test_hostile.py      prints the table of attacks
"""

import contextlib
import io
import json
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import png, shard

from data.clips import load_clip
from data.files import InputError
from data.images import PictureError, load_image, load_whole
from data.pairs import read_pairs
from data.sources import PairIndex
from data.text import Tokenizer, clean_caption
from tasks import captioning, nlvr2, video, visdial, vqa

LIMIT = 10  # seconds for one file
QUICK = 10  # the normal suite makes a tenth of the files
TOKENIZER = Tokenizer.train(["a dog runs", "what is it"] * 3, 100)


class TooLong(BaseException):
    """No Exception: a reader that catches those must not catch it."""


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise TooLong
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attack(name: str, count: int, make: Callable, read: Callable, path: Path) -> None:
    """Write `count` files, read each, print a line of the table; none may be lost."""
    outcomes, lost, start = {"read": 0, "refused": 0}, [], time.perf_counter()
    for number in range(count):
        rng = random.Random(f"{name} {number}")
        path.write_bytes(make(rng))
        try:
            with time_limit():
                read(path, rng)
            outcomes["read"] += 1
        except (InputError, PictureError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, f"{name} {number}"
            assert isinstance(error, PictureError) or str(path.parent) in str(error), error
            outcomes["refused"] += 1
        except (Exception, TooLong) as error:
            lost.append(f"{name} {number}: {error!r:.200}")
    print(f"{name:34} tried {count:4}  survived {sum(outcomes.values()):4} (read "
          f"{outcomes['read']:4}, refused {outcomes['refused']:4})  lost {len(lost):2}  "
          f"{time.perf_counter() - start:5.1f} s")
    assert not lost, lost[:5]


# ---- pictures ------------------------------------------------------------------------------------

def sound_pictures() -> list[bytes]:
    """A small picture in every format that is read, and an animated one."""
    noise = Image.effect_noise((48, 40), 80).convert("RGB")
    contents = []
    for form in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        buffer = io.BytesIO()
        more = dict(save_all=True, append_images=[noise.rotate(9)]) if form == "GIF" else {}
        noise.save(buffer, form, **more)
        contents.append(buffer.getvalue())
    buffer = io.BytesIO()
    noise.convert("RGBA").save(buffer, "PNG", exif=Image.Exif())
    return [*contents, buffer.getvalue()]


PICTURES = sound_pictures()
STARTS = [content[:24] for content in PICTURES] + [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n", b"8BPS\0\1", b"<svg>",
    b"\0\0\1\0\1\0", b"\x93NUMPY\1\0", b"PK\3\4", b"\x1f\x8b\x08\0", b"\0\0\0 ftypavif", b""]


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    """One part is missing: the end, or a piece in the middle."""
    start = rng.randrange(len(content))
    end = rng.choice((len(content), rng.randrange(start, len(content))))
    return content[:start] + content[end:]


def huge(content: bytes, rng: random.Random) -> bytes:
    """Numbers in the header become large."""
    changed, place = bytearray(content), rng.randrange(4, 40)
    changed[place:place + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff",
                                           b"\0\0\xff\xff"))
    return bytes(changed)


PICTURE_ATTACKS = {
    "pictures, bytes flipped": lambda rng: flip(rng.choice(PICTURES), rng),
    "pictures, cut": lambda rng: cut(rng.choice(PICTURES), rng),
    "pictures, large numbers": lambda rng: huge(rng.choice(PICTURES), rng),
    "pictures, random behind a header": lambda rng: (rng.choice(STARTS)
                                                     + rng.randbytes(rng.randrange(2000)))}


def read_picture(path: Path, rng: random.Random) -> None:
    """In the ways of evaluation, training, sheets and clips; refused by one: refused."""
    way = rng.randrange(4)
    if way == 0:
        assert load_image(path, 16).shape == (3, 16, 16)
    elif way == 1:
        assert load_image(io.BytesIO(path.read_bytes()), 16, rng).shape == (3, 16, 16)
    elif way == 2:
        assert max(load_whole(path, 20).shape) == 20
    else:
        assert load_clip(path.parent, path.name, 3, 8).shape == (3, 3, 8, 8)


def clip_array(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 6, 6, 3), np.uint8))
    return (flip if rng.random() < 0.5 else cut)(buffer.getvalue(), rng)


def attack_pictures(folder: Path, count: int) -> None:
    for name, make in PICTURE_ATTACKS.items():
        attack(name, count, make, read_picture, folder / "a.png")
    attack("clips in arrays", count // 5, clip_array,
           lambda path, _: load_clip(path.parent, path.name, 3, 8), folder / "a.npy")


# ---- lists, files of tasks, shards ---------------------------------------------------------------

DIGITS, DEEP = "@digits", "@deep"  # what json.dumps cannot write
NASTY = (None, True, 3, -1, 1e999, "", " ", ".", "x::y", "a.tar::5", "../a", "/a", "\0", "\ud800",
         "x" * 5000, [], [[]], [None], {}, {"a": 1}, DIGITS, DEEP)


def spoil(value, rng: random.Random):
    """The value with one part of it, at any depth, replaced by something nasty or left out."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        changed = value.copy()
        if rng.random() < 0.1:
            del changed[key]
        else:
            changed[key] = spoil(value[key], rng)
        return changed
    return rng.choice(NASTY)


def write(value, lines: bool = False) -> bytes:
    text = "\n".join(map(json.dumps, value)) if lines else json.dumps(value)
    text = text.replace(f'"{DIGITS}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 9999 + "]" * 9999)
    return text.encode()


def json_attack(value, rng: random.Random) -> bytes:
    """Another content, other bytes, cut, or twice in one file."""
    lines = isinstance(value, list) and rng.random() < 0.3
    way = rng.randrange(6)
    if way < 3:
        spoilt = spoil(value, rng)
        return write(spoilt, lines and isinstance(spoilt, list))
    content = write(value, lines)
    return content * 2 if way == 3 else (flip if way == 4 else cut)(content, rng)


PAIRS = [{"image": f"{i}.jpg", "caption": f"a dog {i}", "image_id": i} for i in range(9)]
KARPATHY = {"images": [{"filename": "a.jpg", "filepath": "x", "split": "train", "cocoid": 4,
                        "sentences": [{"raw": "a dog"}]}] * 3}
COCO = {"images": [{"id": 7, "file_name": "a.jpg", "domain": "in"}],
        "annotations": [{"image_id": 7, "caption": "a dog"}] * 2}
VQA = [{"image": "a.jpg", "question": "what?", "question_id": 1, "answer": ["x", "y"],
        "answer_type": "other", "dataset": "vqa"}] * 3
VQA2 = {"data_subtype": "val2014",
        "questions": [{"image_id": 4, "question": "what?", "question_id": 9}] * 2}
VQA2_ANSWERS = {"annotations": [{"question_id": 9, "answer_type": "x", "answers": [
    {"answer": "yes"}, {"answer": "no"}]}] * 2}
NLVR2 = [{"images": ["a.jpg", "b.jpg"], "sentence": "a dog", "label": "True"},
         {"identifier": "dev-1-2-0", "sentence": "a dog", "label": "False"}]
CLIPS = [{"clip_name": "a", "video_id": 3, "caption": ["a dog", "dogs"], "question": "what?",
          "answer": "dog"}] * 3
DIALOGS = {"split": "val2018", "data": {
    "questions": ["what"], "answers": ["yes", "no"], "dialogs": [{
        "image_id": 7, "caption": "a dog", "dialog": [{
            "question": 0, "answer": 1, "gt_index": 3, "answer_options": [0, 1] * 50}]}]}}
DENSE = [{"image_id": 7, "round_id": 1, "gt_relevance": [0.5] * 100}]


def official(path: Path, other, first: bool) -> str:
    """Two files with a comma between them, of which the other one is sound."""
    sound = path.with_name("sound.json")
    sound.write_text(json.dumps(other))
    return f"{path},{sound}" if first else f"{sound},{path}"


def of_index(path: Path) -> list:
    return list(PairIndex.open(str(path), None, path.parent / "index"))


FILES = {  # what is spoilt, and the reader
    "pairs, for training": (PAIRS, of_index),
    "pairs, for evaluation": (PAIRS, lambda p: read_pairs(p, None)),
    "pairs, Karpathy's": (KARPATHY, lambda p: read_pairs(p, None)),
    "pairs, COCO's": (COCO, lambda p: read_pairs(p, None)),
    "questions": (VQA, lambda p: vqa.read_questions(str(p))),
    "questions, VQAv2's": (VQA2, lambda p: vqa.read_questions(official(p, VQA2_ANSWERS, True))),
    "answers, VQAv2's": (VQA2_ANSWERS, lambda p: vqa.read_questions(official(p, VQA2, False))),
    "statements": (NLVR2, nlvr2.read_statements),
    "clips": (CLIPS, lambda p: video.read_clips(str(p))),
    "questions about clips": (CLIPS, lambda p: video.read_clip_questions(str(p))),
    "dialogs": (DIALOGS, lambda p: visdial.read_dialogs(str(p))),
    "dialogs, relevance": (DENSE, lambda p: visdial.read_dialogs(official(p, DIALOGS, False))),
    "captions to score": (PAIRS, lambda p: captioning.read_scored(p, p)),
    "captions to score, COCO's": (COCO, lambda p: captioning.read_scored(p, p))}


def use(examples) -> None:
    """What is read can be named, cut into tokens and looked for."""
    for example in examples if isinstance(examples, list) else ():
        TOKENIZER.encode([clean_caption(text) for text in example.texts] or [""], 30)
        assert all(isinstance(image, str) for image in example.images)
        json.dumps(example.image).encode()


def tar_attack(rng: random.Random, folder: Path) -> bytes:
    """Members with strange names and contents; then bytes, a hole, or an end that is missing."""
    texts = (b"a dog", write({"caption": rng.choice(NASTY)}), b"\xff\xfe", b"")
    members = {}
    for i in range(6):
        key = rng.choice((f"{i}", f"x/{i}", f"../{i}", f"/{i}", f"{i}\udcff", "n" * 300))
        members[f"{key}.png"] = png("red")
        members[f"{key}{rng.choice(('.txt', '.json', '.cls'))}"] = rng.choice(texts)
    content = shard(folder / "made.tar", members, {"link.png": "/etc/passwd"}).read_bytes()
    hole = 512 * rng.randrange(len(content) // 512)
    return rng.choice((content, flip(content, rng), cut(content, rng), content + content,
                       content[:hole] + bytes(1024) + content[hole + 1024:]))


def read_tar(path: Path, _: random.Random) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # what is left out
        use(of_index(path))


def attack_files(folder: Path, count: int) -> None:
    for name, (value, read) in FILES.items():
        attack(name, count, lambda rng, value=value: json_attack(value, rng),
               lambda path, _, read=read: use(read(path)), folder / "p.json")
    attack("tar shards", 4 * count, lambda rng: tar_attack(rng, folder), read_tar,
           folder / "s.tar")


# ---- tests ---------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about damaged files
        yield


def test_a_tenth_of_the_hostile_files(tmp_path):
    attack_pictures(tmp_path, 300 // QUICK)
    attack_files(tmp_path, 40 // QUICK)


@pytest.mark.slow
def test_two_thousand_hostile_files(tmp_path):
    attack_pictures(tmp_path, 300)
    attack_files(tmp_path, 40)
