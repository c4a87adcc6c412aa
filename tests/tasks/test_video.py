"""Video without training: clips in every form, what the models of images read of them."""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL, toy_batch, toy_model
from PIL import Image

import eval as eval_
import train
from data.clips import frame_numbers, load_clip
from tasks.registry import make_model
from world.datasets import Clips, film
from world.language import is_true

FINETUNE = SMALL[SMALL.index("--batch-size"):]  # it takes the sizes from the checkpoint


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
