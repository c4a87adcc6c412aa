"""Video without training: a model of images reads uniformly drawn frames (BLIP sec. 5.6).

Retrieval takes the mean of the frames' projected features for ITC and all their tokens, side by
side, for ITM (BLIP.encode_image). Question answering reads the tokens of all frames. Here: the
files of MSRVTT and MSVD; the models and the evaluation are those of retrieval and VQA.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from data.clips import load_clip
from data.datasets import ImageDataset, Pair, VQAExample, name_hash
from data.files import InputError, is_list, read_json, require_object, stream_list
from tasks import retrieval, vqa
from tasks.task import Benchmark, Source
from world.datasets import ClipQuestions, Clips


class ClipDataset(ImageDataset):
    """Items whose image is a clip (frames, 3, S, S), uniformly drawn from a folder or file."""

    def __init__(self, examples: list, root: str | Path, image_size: int, frames: int):
        super().__init__(examples, root, image_size)
        self.frames = frames

    def load(self, example, rng: random.Random | None) -> Tensor:
        """-> (frames, 3, S, S) uint8. Raises OSError."""
        return load_clip(self.root, example.image, self.frames, self.image_size)

    def show(self, index: int, side: int) -> Tensor:
        """The clip as the model sees it, for a sheet."""
        return self[index]["image"]


def iterate_clips(path: str) -> Iterator[tuple[str, dict, str]]:
    """(where, record, the clip's name) of each record of a json list or jsonl.

    MSRVTT and MSVD name a clip in clip_name, video or video_id. Raises InputError.
    """
    if not is_list(path):
        read_json(path)  # says what is wrong, if it is no json
        raise InputError(f"{path} is neither a json list nor a file with one record a line")
    for number, record in enumerate(stream_list(path)):
        where = f"{path}, record {number}"
        require_object(where, record, "the name of a clip")
        keys = [key for key in ("clip_name", "video", "video_id") if key in record]
        if not keys:
            raise InputError(f"{where}: it names no clip; give clip_name, video or video_id")
        name = record[keys[0]]
        if not isinstance(name, str | int):
            raise InputError(f"{where}: {keys[0]} must be a text or a number")
        yield where, record, f"video{name}" if isinstance(name, int) else name


def read_clips(path: str) -> list[Pair]:
    """[{clip_name, caption}] -> clips with all their captions. Raises InputError."""
    by_clip: dict[str, list[str]] = {}
    for where, record, name in iterate_clips(path):
        captions = record.get("caption")
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not captions or not all(
                isinstance(text, str) and text.strip() for text in captions):
            raise InputError(f"{where}: caption must be a text, or a list of texts")
        by_clip.setdefault(name, []).extend(captions)
    if not by_clip:
        raise InputError(f"{path} holds no clip")
    return [Pair(name, tuple(texts), name_hash(name), name) for name, texts in by_clip.items()]


def read_clip_questions(path: str) -> list[VQAExample]:
    """[{video, question, answer}] -> questions. Raises InputError."""
    examples = []
    for number, (where, record, name) in enumerate(iterate_clips(path)):
        about = {"image": name, "question_id": record.get("id", number)}
        examples.append(vqa.make_example(where, {**record, **about}, need_answers=True))
    if not examples:
        raise InputError(f"{path} holds no question")
    return examples


def open_clips(source: Source) -> Dataset:
    """Captioned clips of a file, or of the world."""
    if not source.data:
        return Clips(source.split, source.size, source.image_size, frames=source.frames)
    return ClipDataset(source.first(read_clips(source.data)), source.folder(), source.image_size,
                       source.frames)


def open_clip_questions(source: Source) -> Dataset:
    """Questions about the clips of a file, or of the world."""
    if not source.data:
        return ClipQuestions(source.split, source.size, source.image_size, frames=source.frames)
    return ClipDataset(source.first(read_clip_questions(source.data)), source.folder(),
                       source.image_size, source.frames)


BENCHMARKS = (
    Benchmark("video-retrieval", "clips found by text, with a model of images",
              retrieval.TASK.model, retrieval.evaluate, open_clips, needs=("itc", "itm"),
              flags=("frames", "top_k", "rerank_score"), defaults=dict(frames=8, top_k=128),
              settings=dict(max_words=40, max_tokens=35), size=500),
    Benchmark("video-qa", "questions about clips, with a VQA model of images", vqa.VQA,
              vqa.evaluate, open_clip_questions, flags=("frames", "generate", "answers", "top_k"),
              defaults=dict(frames=16), size=500))
