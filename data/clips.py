"""Clips: uniformly drawn frames of a folder, an animated picture, a numpy array or a video."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from data.images import load_image

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
ANIMATED = (".gif", ".webp", ".png")
VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov")


def frame_numbers(total: int, count: int) -> list[int]:
    """The starts of `count` equal parts of a clip of `total` frames; of 80 in 8: 0, 10, ...

    With fewer frames than parts some are repeated, evenly.
    NOTE(differs from salesforce/BLIP): there a clip that is too short becomes its first frame.
    """
    return [i * total // count for i in range(count)]


def load_clip(path: Path, count: int, size: int) -> Tensor:
    """Uniform frames, each resized to a square: (count, 3, size, size) uint8.

    A path without a suffix may stand for a file with one. Raises OSError with a reason.
    """
    if not path.exists():
        candidates = [p for p in path.parent.glob(f"{path.name}.*")
                      if p.suffix.lower() in (".npy", *ANIMATED, *VIDEOS)]
        if not candidates:
            raise OSError("missing")
        path = candidates[0]
    if path.is_dir():
        return load_frames(path, count, size)
    try:
        frames = read_frames(path, count)
    except ImportError:
        raise OSError("a video, which needs the package av: pip install av")
    except Exception:  # a damaged file makes the decoders raise nearly anything
        raise OSError("damaged or no clip")
    resized = [frame.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
               for frame in frames]
    return torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in resized])


def load_frames(folder: Path, count: int, size: int) -> Tensor:
    """Uniform frames of a folder of pictures. Raises OSError, which names the frame."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not files:
        raise OSError("a folder without pictures")
    frames = []
    for number in frame_numbers(len(files), count):
        try:
            frames.append(load_image(files[number], size))
        except OSError as error:
            raise OSError(f"frame {files[number].name}: {error}")
    return torch.stack(frames)


def read_frames(path: Path, count: int) -> list[Image.Image]:
    """Uniform frames of a file.

    .npy (T, H, W, 3) or (T, 3, H, W) uint8, an animated picture, or a video.
    """
    if path.suffix.lower() == ".npy":
        clip = np.load(path, mmap_mode="r")
        if clip.ndim != 4 or clip.dtype != np.uint8 or 3 not in (clip.shape[1], clip.shape[3]):
            raise ValueError(f"shape {clip.shape}, type {clip.dtype}")
        chosen = clip[frame_numbers(len(clip), count)]
        if chosen.shape[-1] != 3:
            chosen = chosen.transpose(0, 2, 3, 1)
        return [Image.fromarray(np.ascontiguousarray(frame)) for frame in chosen]
    if path.suffix.lower() in VIDEOS:
        import av
        with av.open(str(path)) as video:
            frames = [frame.to_image() for frame in video.decode(video=0)]
    else:
        with Image.open(path) as picture:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    return [frames[number] for number in frame_numbers(len(frames), count)]
