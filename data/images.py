"""Pictures: read, augmented, normalised."""

import contextlib
import functools
import os
import random
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.files import regular_file

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no other is opened
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MOST_PIXELS = 1 << 26  # of a picture; a larger one is not decoded
MOST_BYTES = 1 << 28  # of a picture in a tar file
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
    """RandAugment: two random operations, each applied with probability 0.5 (ALBEF sec. 3.5).

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


# ---- files ---------------------------------------------------------------------------------------

class PictureError(OSError):
    """A picture that cannot be read; the message is the reason, in few words."""


def path_inside(root: str | Path, name: str | Path) -> str:
    """The real path of a file under `root`, which neither a name nor a link may leave.

    Raises PictureError.
    """
    try:
        folder, path = os.path.realpath(root), os.path.realpath(os.path.join(root, name))
    except ValueError:  # the name has a zero byte or half a character
        raise PictureError("missing")
    if not path.startswith(os.path.join(folder, "")):
        raise PictureError("outside the image root")
    return path


def open_member(root: str | Path, name: str) -> str | BytesIO:
    """The path of a picture, or for "shard.tar::offset:size" the bytes that lie there.

    Raises PictureError.
    """
    place = re.fullmatch(r"(.+)::(\d{1,18}):(\d{1,18})", name, re.S)
    if not place:
        return path_inside(root, name)
    archive, offset, size = require_file(path_inside(root, place[1])), int(place[2]), int(place[3])
    if size > MOST_BYTES:
        raise PictureError("too large")
    if offset + size > os.path.getsize(archive):
        raise PictureError("cut off")
    with open(archive, "rb") as file:
        file.seek(offset)
        return BytesIO(file.read(size))


CLOSED = "may not be read: no permission"


def require_file(path: str | Path) -> str | Path:
    """The path of a regular file. Raises PictureError."""
    try:
        return regular_file(path)
    except FileNotFoundError:
        raise PictureError("missing")
    except PermissionError:
        raise PictureError(CLOSED)
    except OSError:
        raise PictureError("no regular file")


def open_image(source: str | Path | BytesIO) -> Image.Image:
    """A picture of which only the header is read; within `decoding`. Raises PictureError."""
    file = source if isinstance(source, BytesIO) else require_file(source)
    image = Image.open(file, formats=FORMATS)
    check_size(*image.size)
    return image


@contextlib.contextmanager
def decoding(what: str = "image") -> Iterator[None]:
    """Within it, whatever a damaged picture makes a decoder raise becomes a PictureError."""
    try:
        yield
    except PictureError:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise PictureError("too large")
    except PermissionError:
        raise PictureError(CLOSED)
    except Exception:  # a damaged file makes the decoders raise nearly anything
        raise PictureError(f"damaged or no {what}")


def check_size(width: int, height: int) -> None:
    """Raises PictureError where a picture is too large to be decoded."""
    if width * height > MOST_PIXELS:
        raise PictureError("too large")


def resize_rgb(image: Image.Image, size: tuple[int, int], box: tuple | None = None) -> Image.Image:
    """An image of any mode, or a box of it, resized to RGB. What is transparent shows white."""
    if image.mode.startswith(("I", "F")):  # 16 bits: PIL would clip instead of scale
        levels = np.nan_to_num(np.array(image, np.float32))
        levels *= 255 if image.mode == "F" and levels.max() <= 1 else 1 / 257
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    image = image.resize(size, Image.Resampling.BICUBIC, box)
    if mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    return image


def load_image(source: str | Path | BytesIO, size: int, rng: random.Random | None = None,
               crop: tuple[float, float] = (0.2, 1.0), flip: bool = True,
               with_rand_augment: bool = True) -> Tensor:
    """Image file -> (3, size, size) uint8, upright.

    Without `rng`: the whole picture, resized to a square (evaluation). With it: random crop of a
    share `crop` of the area, horizontal flip where allowed, RandAugment where `with_rand_augment`
    (training). Raises PictureError: missing, too large, no regular file, damaged or no image.
    NOTE(differs from salesforce/BLIP): EXIF's rotation is applied; what is transparent shows white;
    a file that breaks off is damaged, not filled up with grey; in training a large JPEG is decoded
    at a fraction of its size.
    """
    with decoding(), open_image(source) as image:
        sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF: the camera was turned
        width, height = image.size[::-1] if sideways else image.size
        box = random_crop(width, height, crop, rng) if rng else (0, 0, width, height)
        if rng:
            # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time: as
            # small as the crop still has `size` pixels. It changes pixels a little: not in
            # evaluation.
            enough = [int(size * width / (box[2] - box[0])) + 1,
                      int(size * height / (box[3] - box[1])) + 1]
            image.draft("RGB", enough[::-1] if sideways else enough)
        image = ImageOps.exif_transpose(image)
        x, y = image.size[0] / width, image.size[1] / height
        image = resize_rgb(image, (size, size), (box[0] * x, box[1] * y, box[2] * x, box[3] * y))
    if rng:
        if flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if with_rand_augment:
            image = rand_augment(image, rng)
    return to_tensor(image)


def load_whole(source: str | Path | BytesIO, side: int) -> Tensor:
    """Image file -> (3, H, W) uint8 in its own proportions, to be shown.

    The longer side has `side` pixels. Raises PictureError as `load_image` does.
    """
    with decoding(), open_image(source) as image:
        image = ImageOps.exif_transpose(image)
        scale = side / max(image.size)
        return to_tensor(resize_rgb(image, tuple(max(1, round(scale * n)) for n in image.size)))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
