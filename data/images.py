"""Pictures: read, augmented, normalised."""

import functools
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # released code
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)  # released code


@functools.cache  # to the device once: each copy would make the host wait for it
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """CLIP's mean and standard deviation of the bytes 0 to 255, each (3, 1, 1)."""
    return tuple(torch.tensor(value, device=device).view(3, 1, 1) * 255
                 for value in (CLIP_MEAN, CLIP_STD))


def prepare_images(images: Tensor, device: torch.device | str) -> Tensor:
    """What the ViT reads: images (..., 3, S, S) uint8 -> the same on the device, normalised.

    Minus CLIP's mean, over CLIP's standard deviation, as the released code does. Done on the
    device: bytes travel, not floats.
    """
    images = images.to(device, non_blocking=True)
    mean, std = mean_and_std(images.device)
    return (images.float() - mean) / std


def batch_to(batch: dict, device: torch.device) -> dict:
    """A batch of a data loader with its tensors on the device and its images normalised."""
    moved = {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
             for name, value in batch.items() if name != "image"}
    if "image" in batch:
        moved["image"] = prepare_images(batch["image"], device)
    return moved


def random_crop(width: int, height: int, scale: tuple[float, float],
                rng: random.Random) -> tuple[float, ...]:
    """Box (left, top, right, bottom) of a random share of the area (Szegedy et al. 2015).

    scale bounds the share; the aspect ratio is 3/4 to 4/3. After ten boxes that do not fit, the
    whole picture.
    NOTE(differs from salesforce/BLIP): there, a central box of the nearest allowed ratio.
    """
    for _ in range(10):
        area, ratio = (width * height * rng.uniform(*scale),
                       np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
        w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def rand_augment(image: Image.Image, rng: random.Random, operations: int = 2,
                 magnitude: int = 5) -> Image.Image:
    """RandAugment: two random operations, each applied with probability 0.5 (BLIP sec. 4.1).

    They are drawn with replacement, and none changes colours, since captions name colours (released
    code). At magnitude 5 of 10, brightness and sharpness come out as 1.0, the identity: they are
    drawn, and do nothing.
    """
    level = magnitude / 10
    def affine(a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
        return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f),
                               Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    for _ in range(operations):
        name = rng.choice(("identity", "autocontrast", "brightness", "sharpness", "equalize",
                           "shear_x", "shear_y", "translate_x", "translate_y", "rotate"))
        sign = rng.choice((-1, 1))
        if rng.random() > 0.5:
            continue
        if name == "autocontrast":
            image = ImageOps.autocontrast(image)
        elif name == "equalize":
            image = ImageOps.equalize(image)
        elif name == "shear_x":
            image = affine(b=sign * 0.3 * level)
        elif name == "shear_y":
            image = affine(d=sign * 0.3 * level)
        elif name == "translate_x":
            image = affine(c=sign * 10 * level)  # pixels
        elif name == "translate_y":
            image = affine(f=sign * 10 * level)
        elif name == "rotate":
            image = image.rotate(sign * 30 * level, Image.Resampling.BILINEAR,
                                 fillcolor=(128, 128, 128))
    return image


def load_image(source: str | Path | BytesIO, size: int, rng: random.Random | None = None,
               crop: tuple[float, float] = (0.2, 1.0), flip: bool = True) -> Tensor:
    """Image file -> (3, size, size) uint8, upright.

    Without `rng`: the whole picture, resized to a square (evaluation). With it: random crop of a
    share `crop` of the area, horizontal flip where allowed, RandAugment (training). Raises OSError
    with one of three reasons: missing, too large, damaged or no image.
    NOTE(differs from salesforce/BLIP): EXIF's rotation is applied; a file that breaks off is
    damaged, not filled up with grey; in training a large JPEG is decoded at a fraction of its size.
    """
    try:
        with Image.open(source) as image:
            sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF: the camera was turned
            width, height = image.size[::-1] if sideways else image.size
            box = random_crop(width, height, crop, rng) if rng else (0, 0, width, height)
            if rng:
                # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time:
                # as small as the crop still has `size` pixels. It changes pixels a little: not in
                # evaluation.
                enough = [int(size * width / (box[2] - box[0])) + 1,
                          int(size * height / (box[3] - box[1])) + 1]
                image.draft("RGB", enough[::-1] if sideways else enough)
            image = ImageOps.exif_transpose(image)
            x, y = image.size[0] / width, image.size[1] / height
            if image.mode.startswith(("I", "F")):  # 16 bits: PIL would clip instead of scale
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255)
                                        .astype(np.uint8))
            image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC,
                                                (box[0] * x, box[1] * y, box[2] * x, box[3] * y))
    except FileNotFoundError:
        raise OSError("missing")
    except (Image.DecompressionBombError, MemoryError):
        raise OSError("too large")
    except Exception:  # a damaged file makes the decoders raise nearly anything
        raise OSError("damaged or no image")
    if rng:
        if flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        image = rand_augment(image, rng)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_member(path: Path) -> Path | BytesIO:
    """A path, or for "shard.tar::offset:size" the bytes that lie there. Raises OSError."""
    archive, separator, place = str(path).rpartition("::")
    if not separator:
        return path
    offset, size = map(int, place.split(":"))
    try:
        with open(archive, "rb") as file:
            file.seek(offset)
            return BytesIO(file.read(size))
    except OSError:
        raise OSError("missing")
