"""Training and evaluation of each task on an imitated GPU: is everything on the right device?"""

import pytest
import torch
from conftest import FINETUNE, run
from imitated_device import GPU, imitated_gpu

import train
from training import devices


def test_the_imitation_finds_what_is_on_the_wrong_device(monkeypatch):
    with imitated_gpu(monkeypatch):
        x = torch.ones(3, 3, device="cuda", requires_grad=True)
        y = (x.to("cpu") * torch.ones(3)).to(GPU) + x
        y.sum().backward()
        assert y.device == x.grad.device == GPU and x.grad.sum() == 18
        assert x.cpu().device.type == "cpu" and (x + 1).tolist()[0] == [2, 2, 2]
        with pytest.raises(RuntimeError, match="are on the CPU"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="are on the CPU"):
            x[torch.arange(2)]
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            x.detach().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pretrain", "retrieval", "caption", "vqa", "nlvr2", "visdial"])
def test_a_task_trains_and_is_evaluated_on_an_imitated_gpu(task, tmp_path, pretrained, monkeypatch):
    monkeypatch.setattr(devices, "start", lambda name: GPU)
    monkeypatch.setattr(devices, "generator_state", lambda device: {})
    flags = ["--scenes", "16", "--precision", "fp32", "--out", str(tmp_path / "r"),
             "--grad-clip", "1"]
    with imitated_gpu(monkeypatch):
        if task == "pretrain":
            assert run(tmp_path / "r", *flags, "--lm-only-steps", 0) == 0
        else:
            assert train.main([task, "--init", str(pretrained), *FINETUNE, *flags]) == 0
    assert (tmp_path / "r" / "metrics.json").exists()
