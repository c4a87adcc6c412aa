"""Which device a process gets; generators of a device that this machine lacks; full memory;
no compiler."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, run

import train
from blip import BLIP
from data.files import InputError
from training import checkpoints, devices, distributed


@pytest.fixture
def gpus(monkeypatch):
    """A machine that says it has two GPUs -> the names of the devices that were made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(distributed, "init", lambda device: None)
    return current


def test_the_device_that_is_asked_for_becomes_the_current_one(gpus, monkeypatch):
    assert devices.start("auto") == devices.start("cuda") == torch.device("cuda:0")
    assert devices.start("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.start("auto") == torch.device("cuda:1")
    assert gpus == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert devices.start("cpu") == torch.device("cpu")


def test_the_machine_of_a_table_has_its_processor(tmp_path):
    about = tmp_path / "cpuinfo"
    about.write_text("processor\t: 0\nmodel name\t: A Fast One @ 2 GHz\nflags\t\t: a b\n")
    assert devices.processor(about) == "A Fast One @ 2 GHz"
    assert devices.processor(tmp_path / "absent")  # macOS, Windows
    assert devices.processor() in devices.machine("cpu")
    assert f"torch {torch.__version__}" in devices.machine("cpu")


@pytest.mark.parametrize("name, local_rank, sentence", [
    ("tpu", None, "choose auto, cuda, cuda:NUMBER, mps or cpu"),
    ("cpu:0", None, "choose auto, cuda, cuda:NUMBER, mps or cpu"),
    ("cuda:x", None, "choose auto, cuda, cuda:NUMBER, mps or cpu"),
    ("mps", None, "finds no such device"),
    ("cuda:2", None, "there are 2 GPUs"),
    ("cuda:0", "1", "all processes of torchrun on one GPU"),
    ("cuda", "2", "process 3 of 2; give --nproc_per_node=2")])
def test_a_device_that_does_not_exist_is_one_sentence(gpus, monkeypatch, name, local_rank,
                                                      sentence):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if local_rank:
        monkeypatch.setenv("RANK", "9")
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(InputError, match=sentence):
        devices.start(name)
    assert gpus == []


def test_cuda_that_is_absent_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path / "a", "--device", "cuda") == 2
    assert "--device cuda: torch" in capsys.readouterr().err


def test_the_generator_of_any_device_is_saved_and_restored(tmp_path, monkeypatch):
    """MPS has one as well. It is imitated: the run itself is on the CPU."""
    assert run(tmp_path / "a", "--scenes", 16, "--device", "cpu") == 0
    state = checkpoints.load(tmp_path / "a" / "checkpoint.pt")
    device = SimpleNamespace(state=torch.tensor([1, 2]))
    device.get_rng_state = lambda: device.state
    device.set_rng_state = lambda new: setattr(device, "state", new)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    resumed = train.start({"out": str(tmp_path / "a")}, resume=True)
    resumed.device = torch.device("mps")
    resumed.save()
    device.state = torch.tensor([0, 0])
    with devices.generators_kept(resumed.device):
        device.state = torch.tensor([7, 7])
    assert device.state.tolist() == [0, 0]
    state = checkpoints.load(tmp_path / "a" / "checkpoint.pt")
    resumed.set_generators(state)
    assert device.state.tolist() == [1, 2]
    resumed.device = torch.device("cuda")  # a checkpoint from another kind of device
    resumed.set_generators(state)
    assert device.state.tolist() == [1, 2]


@pytest.mark.parametrize("failure, remedies", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
     ("--accumulate", "--batch-size", "--grad-checkpoint")),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), ("g++", "--compile"))])
def test_what_a_device_lacks_is_one_sentence(tmp_path, monkeypatch, capsys, failure, remedies):
    def forward(self, **inputs):
        raise failure
    monkeypatch.setattr(BLIP, "forward", forward)
    assert run(tmp_path / "a", "--scenes", 16) == 2
    told = capsys.readouterr().err
    assert all(remedy in told for remedy in remedies)


@pytest.mark.slow
def test_without_a_compiler_compiling_is_refused_in_one_sentence(tmp_path):
    """In a program of its own: torch keeps the first compiler that it finds."""
    command = [sys.executable, "train.py", *SMALL, "--scenes", "16", "--compile", "true",
               "--out", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(train.__file__).parent,
                          env=os.environ | {"CXX": "no-such-compiler"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--compile needs a C++ compiler" in done.stderr
