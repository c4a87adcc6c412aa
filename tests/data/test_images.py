"""Pictures: resized, augmented, normalised; what cannot be read."""

import io
import os
import random
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from data import images
from data.images import (
    load_image,
    mean_and_std,
    open_member,
    prepare_images,
    rand_augment,
    random_crop,
)


def picture(path, size=(40, 30), colour=(200, 30, 30)):
    Image.new("RGB", size, colour).save(path)
    return path


def test_evaluation_resizes_the_whole_picture(tmp_path):
    half = Image.new("RGB", (40, 20), (255, 0, 0))
    half.paste((0, 0, 255), (20, 0, 40, 20))
    half.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 16)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    assert image[:, 8, 2].tolist() == [255, 0, 0] and image[:, 8, 13].tolist() == [0, 0, 255]


def test_jpeg_draft_decoding_changes_little_and_evaluation_nothing(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(
        (800, 600), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    smooth.save(tmp_path / "a.png")
    def whole(name, augment):  # the whole picture, in the way of training or of evaluation
        rng = random.Random(2) if augment else None
        return load_image(tmp_path / name, 64, rng, crop=(1.0, 1.0), flip=False).float()
    assert (whole("a.jpg", True) - whole("a.png", True)).abs().mean() < 3
    with Image.open(tmp_path / "a.jpg") as image:
        plain = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(whole("a.jpg", False).permute(1, 2, 0).numpy(), plain)


def test_augmentation_repeats_with_its_generator(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    images = [load_image(tmp_path / "a.png", 32, random.Random(seed)) for seed in (1, 1, 2)]
    assert images[0].equal(images[1]) and not images[0].equal(images[2])
    plain = load_image(tmp_path / "a.png", 32)
    def mild(seed: int):  # all of the picture, not mirrored
        return load_image(tmp_path / "a.png", 32, random.Random(seed), (1.0, 1.0), False, False)
    assert all(mild(seed).equal(plain) for seed in range(9))


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


def test_normalise_uses_clips_statistics():
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = [(1 - m) / s for m, s in zip((0.48145466, 0.4578275, 0.40821073),
                                            (0.26862954, 0.26130258, 0.27577711))]
    assert torch.allclose(prepare_images(image, "cpu")[0, :, 0, 0], torch.tensor(expected),
                          atol=1e-5)


def test_the_statistics_go_to_the_device_once():
    """Copying them in each micro-batch would make the host wait for the device each time."""
    assert mean_and_std(torch.device("cpu"))[0] is mean_and_std(torch.device("cpu"))[0]


# ---- unusual and broken pictures ----

def save_bytes(image, form, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_unusual_pictures_are_read(tmp_path):
    """CMYK, palette, grey with alpha, animated, 1 x 1."""
    red = Image.new("RGB", (40, 30), (250, 10, 10))
    grey16 = Image.fromarray(np.full((30, 40), 257 * 100, np.uint16))
    light = Image.fromarray(np.full((30, 40), 100 / 255, np.float32))  # from 0 to 1
    frames = [red, Image.new("RGB", (40, 30), "blue")]
    for name, content, colour in (
            ("a.jpg", save_bytes(red.convert("CMYK"), "JPEG"), (250, 10, 10)),
            ("b.png", save_bytes(red.convert("P"), "PNG"), (250, 10, 10)),
            ("c.png", save_bytes(Image.new("LA", (9, 9), (100, 255)), "PNG"), (100, 100, 100)),
            ("d.gif", save_bytes(red, "GIF", save_all=True, append_images=frames), (250, 10, 10)),
            ("e.png", save_bytes(grey16, "PNG"), (100, 100, 100)),
            ("g.tif", save_bytes(light, "TIFF"), (100, 100, 100)),
            ("f.png", save_bytes(Image.new("RGB", (1, 1), (250, 10, 10)), "PNG"), (250, 10, 10))):
        (tmp_path / name).write_bytes(content)
        for rng in (None, random.Random(1)):
            image = load_image(tmp_path / name, 16, rng)
            assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
        plain = load_image(tmp_path / name, 16).float().mean((1, 2))
        assert torch.allclose(plain, torch.tensor(colour).float(), atol=12), name


def test_a_turned_camera_is_turned_back(tmp_path):
    """EXIF orientation 6: the first row is the right side. Upright, the left half is red."""
    upright = Image.new("RGB", (64, 32), "blue")
    upright.paste("red", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "a.jpg", 16)
    assert image[0, :, :7].min() > 200 and image[2, :, 9:].min() > 200
    # A crop is made in the upright picture as well.
    wide = load_image(tmp_path / "a.jpg", 16, random.Random(0), crop=(1.0, 1.0), flip=False)
    assert wide.shape == (3, 16, 16)


def test_why_a_picture_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    whole = save_bytes(Image.effect_noise((64, 64), 50), "JPEG")
    (tmp_path / "b.jpg").write_bytes(whole[:len(whole) // 2])
    picture(tmp_path / "c.png", (200, 200))
    monkeypatch.setattr(images, "MOST_PIXELS", 5000)
    for name, reason in (("a.jpg", "damaged or no image"), ("b.jpg", "damaged or no image"),
                         ("c.png", "too large"), ("d.png", "missing")):
        with pytest.raises(OSError, match=reason):
            load_image(tmp_path / name, 16)


@pytest.mark.parametrize("closed", ["os.stat", "PIL.Image.open"])  # its folder, or itself
def test_a_picture_without_permission_is_not_called_damaged(tmp_path, monkeypatch, closed):
    picture(tmp_path / "a.png")
    def refuse(*arguments, **options):
        raise PermissionError("denied")
    monkeypatch.setattr(closed, refuse)
    with pytest.raises(OSError, match="may not be read: no permission"):
        load_image(tmp_path / "a.png", 16)


def test_no_format_but_the_named_ones_is_opened(tmp_path, monkeypatch):
    """An EPS file under another name would start Ghostscript."""
    picture(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("started"))
    for rng in (None, random.Random(0)):
        with pytest.raises(OSError, match="damaged or no image"):
            load_image(tmp_path / "a.jpg", 16, rng)


def test_a_tiny_file_that_says_it_is_huge_is_not_decoded(tmp_path, monkeypatch):
    """74 bytes that say 13,000 x 13,000: refused by the header."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check
    header = (13_000).to_bytes(4, "big") * 2 + bytes([16, 6, 0, 0, 0])
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b""))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(OSError, match="too large"):
        load_image(tmp_path / "a.png", 16)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="no regular file"):
            load_image(path, 16)


def test_what_is_transparent_shows_white(tmp_path):
    """Not the colour that is hidden there, in each of the ways that a file can say so."""
    half = Image.new("RGBA", (40, 20), (0, 200, 0, 255))
    half.paste((255, 0, 0, 0), (20, 0, 40, 20))
    half.save(tmp_path / "rgba.png")
    half.save(tmp_path / "a.webp", lossless=True, exact=True)
    half.getchannel("A").convert("L").save(tmp_path / "key.png", transparency=0)
    palette = half.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((30, 5)))
    for name in ("rgba.png", "a.webp", "p.png", "key.png"):
        for rng in (None, random.Random(0)):
            image = load_image(tmp_path / name, 16, rng, crop=(1.0, 1.0), flip=False)
            if rng is None:
                assert image[:, 8, 13].tolist() == [255, 255, 255], name
            assert (image[0].int() - image[1].int()).max() <= 0 or name == "key.png", name
    with Image.open(tmp_path / "rgba.png") as image:
        image.putalpha(255)
        image.save(tmp_path / "opaque.png")
        image.convert("RGB").save(tmp_path / "plain.png")
    assert load_image(tmp_path / "opaque.png", 16).equal(load_image(tmp_path / "plain.png", 16))


@pytest.mark.parametrize("name, reason", [
    ("x::y", "missing"), ("a.tar::5", "missing"), ("b.tar::0:10", "missing"),
    ("a.tar::0:999999999999", "too large"), ("a.tar::90:20", "cut off"),
    ("a.tar::" + "9" * 5000 + ":3", "no regular file"), ("../a.png", "outside the image root"),
    ("/etc/hostname", "outside the image root"), ("../a.tar::0:10", "outside the image root"),
    ("link.png", "outside the image root"), ("out/a.png", "outside the image root"),
    ("zero\0byte", "missing"), ("half\ud800", "missing"), ("", "outside the image root")])
def test_names_of_pictures(tmp_path, name, reason):
    """Strange ones are missing; none leads out of the root, nor does a symbolic link."""
    root = tmp_path / "root"
    root.mkdir()
    picture(tmp_path / "a.png")
    picture(root / "x::y.png")
    (root / "a.tar").write_bytes(bytes(100))
    (tmp_path / "a.tar").write_bytes(bytes(100))
    (root / "link.png").symlink_to(tmp_path / "a.png")
    (root / "out").symlink_to(tmp_path)
    (root / "same.png").symlink_to(root / "x::y.png")
    with pytest.raises(OSError, match=reason):
        load_image(open_member(root, name), 16)
    for sound in ("x::y.png", "same.png"):
        assert load_image(open_member(root, sound), 16).shape == (3, 16, 16)


def test_five_hundred_mutated_pictures(tmp_path):
    """Each is read or skipped with a reason: no crash, none lost."""
    rng, read, reasons = random.Random(0), 0, Counter()
    noise = Image.effect_noise((48, 40), 80).convert("RGB")
    sound = [save_bytes(noise, form) for form in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")]
    for number in range(500):
        content = bytearray(rng.choice(sound))
        for _ in range(rng.choice((1, 5, 50))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)):]
        try:
            image = load_image(io.BytesIO(bytes(content)), 16,
                               random.Random(number) if number % 2 else None)
            assert image.shape == (3, 16, 16)
            read += 1
        except OSError as error:
            reasons[str(error)] += 1
    assert read + reasons.total() == 500 and read > 50 and reasons.total() > 50
    assert set(reasons) <= {"damaged or no image", "too large"}
