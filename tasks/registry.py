"""All tasks and benchmarks. A new task is one file beside this one, and its name in NAMES."""

from importlib import import_module

from torch import nn

from config import BLIPConfig
from tasks.task import Benchmark, Task

NAMES = ("pretraining", "retrieval", "captioning", "vqa", "nlvr2", "visdial", "video")

TASKS: dict[str, Task] = {}  # what `train.py NAME` trains
BENCHMARKS: dict[str, Benchmark] = {}  # what `eval.py NAME` measures


def register(module_name: str) -> None:
    """Take up a file's TASK (video has none: it is measured without training) and BENCHMARKS."""
    module = import_module(f"tasks.{module_name}")
    if hasattr(module, "TASK"):
        TASKS[module.TASK.name] = module.TASK
    for benchmark in getattr(module, "BENCHMARKS", ()):
        BENCHMARKS[benchmark.name] = benchmark


for module_name in NAMES:
    register(module_name)


def make_model(task: str, config: BLIPConfig) -> nn.Module:
    """The model of a task, with new weights."""
    return TASKS[task].model(config)


def preset_settings(task: str, preset: str, own_data: bool = False) -> dict:
    """What a task sets with a preset, in the world or on own data."""
    record = TASKS[task]
    settings = record.settings | {"tiny": record.tiny, "large": record.large}.get(preset, {})
    return settings | (record.tiny_own if preset == "tiny" and own_data else {})
