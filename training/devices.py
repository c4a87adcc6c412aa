"""The device that a process works on: which one, its random generator, its memory, its compiler."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from data.files import InputError
from med import CrossAttentionLayer, FeedForward, SelfAttentionLayer
from training import distributed
from vit import Block

TEXT_LAYERS = (SelfAttentionLayer, CrossAttentionLayer, FeedForward)


def start(name: str = "auto") -> torch.device:
    """Join torchrun's process group if there is one -> this process's device.

    name: what --device says. "auto": CUDA, then MPS, then CPU. Raises InputError for a device that
    does not exist, or that several processes cannot use.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    kind, colon, number = name.partition(":")
    if kind not in there or (colon and (kind != "cuda" or not number.isdecimal())):
        raise InputError(f"--device is {name!r}; choose auto, cuda, cuda:NUMBER, mps or cpu")
    if not there[kind]:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device on this "
                         "machine; leave --device out, or install a torch that is built for it")
    if "RANK" in os.environ and kind == "mps":
        raise InputError("--device mps works for one process alone; give --device cpu under "
                         "torchrun")
    if kind == "cuda":
        name = f"cuda:{number_of_gpu(number)}"
        torch.cuda.set_device(name)
    device = torch.device(name)
    distributed.init(device)
    return device


def machine(device: str) -> str:
    """The hardware that `device` names, in words: "2 CPU cores (AMD EPYC), torch 2.13.0+cpu"."""
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{os.cpu_count()} CPU cores ({processor()})"
    return f"{hardware}, torch {torch.__version__}"


def processor(about: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name: another one rounds differently, so numbers differ a little.

    about: where Linux tells it.
    """
    for line in about.read_text().splitlines() if about.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def number_of_gpu(asked: str) -> int:
    """The GPU that this process uses: `asked`, or under torchrun the one of its local rank.

    Raises InputError where there is no such GPU.
    """
    count = torch.cuda.device_count()
    if "RANK" not in os.environ:
        if int(asked or 0) >= count:
            raise InputError(f"--device cuda:{asked}: there are {count} GPUs, and the first is "
                             "cuda:0")
        return int(asked or 0)
    if asked:
        raise InputError(f"--device cuda:{asked} would put all processes of torchrun on one GPU; "
                         "give --device cuda, which gives each its own")
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= count:
        raise InputError(f"torchrun has started more processes than there are GPUs: process "
                         f"{local_rank + 1} of {count}; give --nproc_per_node={count}")
    return local_rank


# ---- random numbers: dropout and mining draw on the device ---------------------------------------

def generator_state(device: torch.device) -> dict[str, torch.Tensor]:
    """{kind of device: the state of its own generator}; nothing on a CPU, which has torch's."""
    if device.type == "cpu":
        return {}
    return {device.type: torch.get_device_module(device).get_rng_state()}


def set_generator_state(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Set the device's generator, if `state` (of generator_state) is of this kind of device."""
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Within it random numbers may be drawn; behind it all generators stand as before."""
    state = generator_state(device)
    with torch.random.fork_rng([]):
        yield
    set_generator_state(device, state)


# ---- failures ------------------------------------------------------------------------------------

@contextlib.contextmanager
def failures_explained() -> Iterator[None]:
    """Within it a device out of memory, or without a compiler, is one sentence: an InputError."""
    try:
        yield
    except RuntimeError as error:  # CUDA's is torch.OutOfMemoryError; MPS has none of its own
        if "InvalidCxxCompiler" in str(error):
            raise InputError("--compile needs a C++ compiler, and there is none; install g++ or "
                             "clang (its name may stand in CXX), or leave --compile out")
        if "out of memory" not in str(error):
            raise
        raise InputError("the device is out of memory; give a larger --accumulate (this also with "
                         "--resume), a smaller --batch-size, or --grad-checkpoint true")


# ---- compiler ------------------------------------------------------------------------------------

def compile_forward(model: nn.Module, device: torch.device) -> None:
    """torch.compile the layers, for texts of any length; on a CPU those of the ViT alone.

    What is compiled for one layer serves all of its kind. (The whole forward pass as one graph took
    more than 3 minutes to compile on an H100, and was given up.) On a CPU the text's layers do not
    pay for the time that they take to compile.
    """
    for layer in model.modules():
        if isinstance(layer, Block):
            layer.compile()
        elif isinstance(layer, TEXT_LAYERS) and device.type != "cpu":
            layer.compile(dynamic=True)
