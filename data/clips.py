"""Clips: uniformly drawn frames of a folder, an animated picture, a numpy array or a video."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import (
    ENDINGS,
    PictureError,
    check_size,
    decoding,
    load_image,
    open_image,
    path_inside,
    require_file,
    resize_rgb,
    to_tensor,
)

MOST_PIXELS_OF_A_CLIP = 1 << 33  # of all frames of an animated picture: a minute or so to decode
ANIMATED = (".gif", ".webp", ".png")
VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov")


def frame_numbers(total: int, count: int) -> list[int]:
    """The starts of `count` equal parts of a clip of `total` frames; of 80 in 8: 0, 10, ...

    With fewer frames than parts some are repeated, evenly.
    NOTE(differs from salesforce/BLIP): there a clip that is too short becomes its first frame.
    """
    return [i * total // count for i in range(count)]


def load_clip(root: Path, name: str, count: int, size: int) -> Tensor:
    """Uniform frames, each resized to a square: (count, 3, size, size) uint8.

    A name without a suffix may stand for a file with one. Raises PictureError.
    """
    path = Path(path_inside(root, name))
    if not os.path.exists(path):
        candidates = [p for p in path.parent.glob(f"{glob.escape(path.name)}.*")
                      if p.suffix.lower() in (".npy", *ANIMATED, *VIDEOS)]
        if not candidates:
            raise PictureError("missing")
        path = Path(path_inside(root, candidates[0]))
    if path.is_dir():
        return load_frames(root, path, count, size)
    with decoding("clip"):
        frames = [resize_rgb(frame, (size, size))
                  for frame in read_frames(require_file(path), count)]
    return torch.stack([to_tensor(frame) for frame in frames])


def load_frames(root: Path, folder: Path, count: int, size: int) -> Tensor:
    """Uniform frames of a folder of pictures. Raises PictureError, which names the frame."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not files:
        raise PictureError("a folder without pictures")
    frames = []
    for number in frame_numbers(len(files), count):
        try:
            frames.append(load_image(path_inside(root, files[number]), size))
        except PictureError as error:
            raise PictureError(f"frame {files[number].name}: {error}")
    return torch.stack(frames)


def read_frames(path: Path, count: int) -> Iterator[Image.Image]:
    """Uniform frames of a file, of which one at a time is in memory.

    .npy (T, H, W, 3) or (T, 3, H, W) uint8, an animated picture, or a video.
    """
    if path.suffix.lower() == ".npy":
        clip = np.load(path, mmap_mode="r")
        if clip.ndim != 4 or clip.dtype != np.uint8 or 3 not in (clip.shape[1], clip.shape[3]):
            raise ValueError(f"shape {clip.shape}, type {clip.dtype}")
        if clip.shape[3] != 3:
            clip = clip.transpose(0, 2, 3, 1)
        check_size(*clip.shape[1:3])
        for number in frame_numbers(len(clip), count):
            yield Image.fromarray(np.ascontiguousarray(clip[number]))
    elif path.suffix.lower() in VIDEOS:
        yield from video_frames(path, count)
    else:
        with open_image(path) as picture:
            total = getattr(picture, "n_frames", 1)
            if total * picture.width * picture.height > MOST_PIXELS_OF_A_CLIP:
                raise PictureError("too large")
            for number in frame_numbers(total, count):
                picture.seek(number)
                check_size(*picture.size)  # a frame may be larger than the first one
                yield picture


def video_frames(path: Path, count: int) -> Iterator[Image.Image]:
    """Uniform frames of a video. It is decoded twice: first its frames are counted."""
    try:
        import av
    except ImportError:
        raise PictureError("a video, which needs the package av: pip install av")
    with av.open(str(path)) as video:
        total = sum(1 for _ in video.decode(video=0))
    numbers = frame_numbers(total, count)
    with av.open(str(path)) as video:
        for number, frame in enumerate(video.decode(video=0)):
            if number in numbers:
                check_size(frame.width, frame.height)
                yield from [frame.to_image()] * numbers.count(number)
