"""Clips without training: a model of images reads uniformly drawn frames (BLIP sec. 5.6).

    frame_numbers, load_clip     a folder of frames, an animated GIF or WebP, a numpy array, or,
                                 where PyAV is installed, a video -> frames
    read_clips, read_clip_questions    MSRVTT's and MSVD's files
    ClipDataset, ClipQuestionDataset   items as those of images, with (F, 3, S, S) for an image

Retrieval takes the mean of the frames' projected features for ITC and all their tokens, side by
side, for ITM (BLIP.encode_image); question answering reads the tokens of all frames (VQA.read).
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from data import InputError, PairDataset, load_image
from pairs import Pair, is_list, number_of, read_json, stream_list
from task_data import Asked, QuestionDataset

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
ANIMATED = (".gif", ".webp", ".png")
VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov")


def frame_numbers(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of a clip of `total` frames; with fewer frames than parts
    some are repeated, evenly.

    NOTE(differs from salesforce/BLIP): there a clip that is too short becomes its first frame.
    """
    return [int((i + 0.5) * total / count) for i in range(count)]


def load_clip(path: Path, count: int, size: int) -> Tensor:
    """-> (count, 3, size, size) uint8: uniform frames, each resized to a square. A path without a
    suffix may stand for a file with one. Raises OSError with a reason."""
    if not path.exists():
        found = [p for p in path.parent.glob(f"{path.name}.*")
                 if p.suffix.lower() in (".npy", *ANIMATED, *VIDEOS)]
        if not found:
            raise OSError("missing")
        path = found[0]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not files:
            raise OSError("a folder without pictures")
        frames = []
        for file in (files[i] for i in frame_numbers(len(files), count)):
            try:
                frames.append(load_image(file, size))
            except OSError as error:
                raise OSError(f"frame {file.name}: {error}")
        return torch.stack(frames)
    try:
        frames = read_frames(path, count)
    except ImportError:
        raise OSError("a video, which needs the package av: pip install av")
    except Exception:  # a damaged file makes the decoders raise nearly anything
        raise OSError("damaged or no clip")
    return torch.stack([torch.from_numpy(np.array(
        frame.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        for frame in frames])


def read_frames(path: Path, count: int) -> list[Image.Image]:
    """Uniform frames of a file: .npy (T, H, W, 3) or (T, 3, H, W) uint8, an animated picture, or a
    video."""
    if path.suffix.lower() == ".npy":
        clip = np.load(path, mmap_mode="r")
        if clip.ndim != 4 or clip.dtype != np.uint8 or 3 not in (clip.shape[1], clip.shape[3]):
            raise ValueError(f"shape {clip.shape}, type {clip.dtype}")
        chosen = clip[frame_numbers(len(clip), count)]
        return [Image.fromarray(np.ascontiguousarray(
            frame if frame.shape[-1] == 3 else frame.transpose(1, 2, 0))) for frame in chosen]
    if path.suffix.lower() in VIDEOS:
        import av
        with av.open(str(path)) as video:
            frames = [frame.to_image() for frame in video.decode(video=0)]
    else:
        with Image.open(path) as picture:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    return [frames[i] for i in frame_numbers(len(frames), count)]


# ---- files ---------------------------------------------------------------------------------------

def records_of(path: str):
    """(where, record, the clip's name) of each record of a json list or jsonl; MSRVTT and MSVD call
    it clip_name, video or video_id."""
    if not is_list(path):
        read_json(path)  # says what is wrong, if it is no json
        raise InputError(f"{path} is neither a json list nor a jsonl file of records")
    for number, record in enumerate(stream_list(path)):
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: it is {str(record)[:40]!r} and must be a record")
        name = next((record[key] for key in ("clip_name", "video", "video_id") if key in record),
                    None)
        if name is None:
            raise InputError(f"{where}: it names no clip; give clip_name, video or video_id")
        yield where, record, f"video{name}" if isinstance(name, int) else str(name)


def read_clips(path: str) -> list[Pair]:
    """[{clip_name, caption}] -> clips with all their captions. Raises InputError."""
    by_clip: dict[str, list[str]] = {}
    for where, record, name in records_of(path):
        captions = record.get("caption")
        captions = [captions] if isinstance(captions, str) else captions
        if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise InputError(f"{where}: caption must be a text, or a list of texts")
        by_clip.setdefault(name, []).extend(captions)
    if not by_clip:
        raise InputError(f"{path} holds no clip")
    return [Pair(name, tuple(texts), number_of(name), name) for name, texts in by_clip.items()]


def read_clip_questions(path: str) -> list[Asked]:
    """[{video, question, answer}] -> questions. Raises InputError."""
    found = []
    for number, (where, record, name) in enumerate(records_of(path)):
        question, answer = record.get("question"), record.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
            raise InputError(f"{where}: it needs a question and an answer, both texts")
        found.append(Asked(name, question, record.get("id", number), (answer.strip().lower(),)))
    if not found:
        raise InputError(f"{path} holds no question")
    return found


class ClipDataset(PairDataset):
    """Clips with captions; an item's image is (frames, 3, S, S), of which a folder or file is drawn
    uniformly."""

    def __init__(self, records: list, root: str | Path, image_size: int, frames: int = 8):
        super().__init__(records, root, image_size)
        self.frames = frames

    def load(self, record, text: str, rng: random.Random | None) -> Tensor:
        """-> (frames, 3, S, S) uint8. Raises OSError."""
        return load_clip(self.root / record.image, self.frames, self.image_size)


class ClipQuestionDataset(ClipDataset, QuestionDataset):
    """Questions about clips."""
