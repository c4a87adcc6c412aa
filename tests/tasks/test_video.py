"""Video without training: clips in every form, what the models of images read of them."""

import contextlib
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FINETUNE, toy_batch, toy_model
from PIL import Image

import eval as eval_
import train
from data import clips
from data.clips import frame_numbers, load_clip
from tasks.registry import make_model
from world.datasets import Clips, film
from world.language import is_true


def test_uniform_frames():
    """As the released code draws them: np.arange(0, total, total / count), rounded down."""
    assert frame_numbers(8, 8) == list(range(8)) and frame_numbers(8, 1) == [0]
    assert frame_numbers(80, 8) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert frame_numbers(10, 4) == [0, 2, 5, 7] and frame_numbers(1, 8) == [0] * 8
    assert frame_numbers(3, 6) == [0, 0, 1, 1, 2, 2]


def test_clips_in_every_form_are_the_same_frames(tmp_path):
    shades = [0, 60, 120, 180, 240]
    frames = [Image.new("RGB", (20, 10), (shade, 255 - shade, 30)) for shade in shades]
    (tmp_path / "folder").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "folder" / f"{i:03d}.png")
    (tmp_path / "folder" / "notes.txt").write_text("no frame")
    array = np.stack([np.asarray(frame) for frame in frames])
    np.save(tmp_path / "array.npy", array)
    np.save(tmp_path / "other.npy", array.transpose(0, 3, 1, 2))
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:],
                   lossless=True)
    frames[0].save(tmp_path / "gif.gif", save_all=True, append_images=frames[1:])
    expected = load_clip(tmp_path, "folder", 3, 8)
    assert expected.shape == (3, 3, 8, 8) and expected[:, 0, 0, 0].tolist() == [0, 60, 180]
    for name in ("array", "array.npy", "other.npy", "moving.webp", "moving", "gif.gif"):
        clip = load_clip(tmp_path, name, 3, 8)
        assert (clip.int() - expected.int()).abs().max() <= (8 if "gif" in name else 0), name


def test_clips_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gif").write_bytes(b"nothing")
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    np.save(tmp_path / "flat.npy", np.zeros((4, 8, 8), np.uint8))
    for name, reason in (("empty", "a folder without pictures"), ("nowhere", "missing"),
                         ("x.gif", "damaged or no clip"), ("flat.npy", "damaged or no clip"),
                         ("x.mp4", "the package av|damaged")):
        with pytest.raises(OSError, match=reason):
            load_clip(tmp_path, name, 2, 8)
    one = Image.new("RGB", (9, 9), (5, 6, 7))
    (tmp_path / "torn").mkdir()
    one.save(tmp_path / "torn" / "1.png")
    (tmp_path / "torn" / "2.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match="frame 2.png: damaged"):
        load_clip(tmp_path, "torn", 2, 8)
    one.save(tmp_path / "one.png")
    assert load_clip(tmp_path, "one", 4, 8).shape == (4, 3, 8, 8)  # a clip of one frame


def test_hostile_clips(tmp_path, monkeypatch):
    """Neither waited for, nor decoded when they are too large, nor read outside the root."""
    root = tmp_path / "root"
    (root / "frames").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    (root / "frames" / "1.png").symlink_to(tmp_path / "1.png")
    (root / "link.png").symlink_to(tmp_path / "1.png")
    os.mkfifo(root / "pipe.gif")
    with open(root / "huge.npy", "wb") as file:  # a file with a hole
        np.lib.format.write_array_header_1_0(file, {
            "descr": "|u1", "fortran_order": False, "shape": (9, 20000, 20000, 3)})
        file.truncate(file.tell() + 9 * 20000 * 20000 * 3)
    frames = [Image.new("RGB", (90, 90), (i, 0, 0)) for i in range(9)]
    frames[0].save(root / "long.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(clips, "MOST_PIXELS_OF_A_CLIP", 8 * 90 * 90)
    for name, reason in (("frames", "frame 1.png: outside"), ("link.png", "outside the image root"),
                         ("../1.png", "outside"), ("link", "outside"), ("pipe", "no regular file"),
                         ("huge.npy", "too large"), ("long.gif", "too large"), ("**", "missing"),
                         ("[", "missing"), ("x" * 5000, "missing"), ("a\0b", "missing")):
        with pytest.raises(OSError, match=reason):
            load_clip(root, name, 2, 8)


def test_frames_of_a_video_are_not_all_in_memory(tmp_path, monkeypatch):
    """With a decoder in the place of the package av, which counts the frames that are held."""
    class Frame:
        alive = most = 0
        width = height = 8
        def __init__(self, shade):
            self.shade = shade
            Frame.alive += 1
            Frame.most = max(Frame.most, Frame.alive)
        def __del__(self):
            Frame.alive -= 1
        def to_image(self):
            return Image.new("RGB", (8, 8), (self.shade, 0, 0))
    video = SimpleNamespace(decode=lambda video: (Frame(i) for i in range(50)))
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(
        open=lambda path: contextlib.nullcontext(video)))
    (tmp_path / "a.mp4").write_bytes(b"")
    assert load_clip(tmp_path, "a", 5, 8)[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]
    assert load_clip(tmp_path, "a.mp4", 100, 8)[:, 0, 0, 0].tolist() == [
        i // 2 for i in range(100)]
    assert Frame.most <= 2


def test_a_clips_features_are_the_mean_and_its_tokens_all():
    model = toy_model().eval()
    clip = torch.randn(2, 3, 3, 32, 32)
    tokens, feat = model.encode_image(clip)
    each = [model.encode_image(clip[:, f])[0] for f in range(3)]
    assert torch.allclose(tokens, torch.cat(each, 1), atol=1e-5)
    mean = torch.stack([model.vision_proj(t[:, 0]) for t in each]).mean(0)
    assert torch.allclose(feat, mean / mean.norm(dim=-1, keepdim=True), atol=1e-5)
    one, one_feat = model.encode_image(clip[:, :1])
    assert torch.allclose(one_feat, model.encode_image(clip[:, 0])[1], atol=1e-5)
    torch.manual_seed(1)
    vqa, batch = make_model("vqa", model.config).eval(), toy_batch(2, 5)
    def states(image):
        return vqa.encode_question(image, batch["ids"], batch["mask"]).dec[0][0]
    still = clip[:, :1].expand(-1, 4, -1, -1, -1)
    assert torch.allclose(states(still), states(clip[:, 0]), atol=1e-5)
    assert not torch.allclose(states(clip), states(clip[:, 1]), atol=1e-3)


def test_the_worlds_clips_need_several_frames():
    data = Clips("held-out", 30)
    several = data.subsets()["several"]
    assert 8 < len(several) < 26
    for i in several:
        shown = film(data.world.scene(i))
        assert not any(is_true(data[i]["example"].captions[0], frame) for frame in shown)
    assert data[0]["image"].shape == (8, 3, 64, 64)
    assert Clips("held-out", 30, frames=1)[0]["image"].shape == (1, 3, 64, 64)


def test_video_commands(pretrained, tmp_path, capsys):
    for i in range(6):
        np.save(tmp_path / f"video{i}.npy", np.random.default_rng(i).integers(
            0, 255, (5, 20, 20, 3), dtype=np.uint8))
    (tmp_path / "t.jsonl").write_text("\n".join(
        json.dumps({"clip_name": f"video{i}", "caption": f"a red circle {i}"}) for i in range(6)))
    assert eval_.main(["video-retrieval", "--checkpoint", str(pretrained), "--data",
                       f"{tmp_path}/t.jsonl", "--frames", "4", "--out", str(tmp_path / "e")]) == 0
    numbers = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert numbers["images"] == 6 and 1 <= numbers["t2i_median_rank"] <= 6
    assert eval_.main(["video-retrieval", "--checkpoint", str(pretrained), "--size", "8", "--out",
                       str(tmp_path / "w")]) == 0
    assert "t2i_several_r1" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text('{"caption": "a dog"}')
    assert eval_.main(["video-retrieval", "--checkpoint", str(pretrained), "--data",
                       f"{tmp_path}/bad.jsonl"]) == 2
    assert "record 0: it names no clip; give clip_name" in capsys.readouterr().err
    assert train.main(["vqa", "--init", str(pretrained), "--out", str(tmp_path / "r"), *FINETUNE,
                       "--scenes", "16"]) == 0
    (tmp_path / "q.json").write_text(json.dumps(
        [{"video_id": i, "question": "what is it?", "answer": "small"} for i in range(6)]))
    assert eval_.main(["video-qa", "--checkpoint", str(tmp_path / "r/best.pt"), "--data",
                       f"{tmp_path}/q.json", "--frames", "2", "--out", str(tmp_path / "q")]) == 0
    assert "accuracy" in json.loads((tmp_path / "q" / "metrics.json").read_text())
