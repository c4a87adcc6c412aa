"""All tasks and benchmarks. A new task is one file, and its name in MODULES."""

from importlib import import_module

from torch import nn

from tasks.task import Benchmark, Task

MODULES = ("tasks.pretraining", "tasks.retrieval", "tasks.captioning", "tasks.vqa", "tasks.nlvr2",
           "tasks.visdial", "tasks.video", "blip2.task_language", "blip2.task_stage1",
           "blip2.task_stage2", "objectives.models")

TASKS: dict[str, Task] = {}  # what `train.py NAME` trains
BENCHMARKS: dict[str, Benchmark] = {}  # what `eval.py NAME` measures


def register(module_name: str) -> None:
    """Take up a file's TASK, TASKS (video has none: it is not trained) and BENCHMARKS.

    Raises ValueError where another file has a task of that name.
    """
    module = import_module(module_name)
    tasks = [*getattr(module, "TASKS", ())]
    if hasattr(module, "TASK"):
        tasks.append(module.TASK)
    for task in tasks:
        if TASKS.get(task.name, task) is not task:  # (the same one, imported, is no other)
            raise ValueError(f"{module_name}: there is a task {task.name!r} already; give yours "
                             "another name")
        TASKS[task.name] = task
    for benchmark in getattr(module, "BENCHMARKS", ()):
        BENCHMARKS[benchmark.name] = benchmark


for module_name in MODULES:
    register(module_name)


def make_model(task: str, config) -> nn.Module:
    """The model of a task, with new weights; config: a TASKS[task].config."""
    return TASKS[task].model(config)


def preset_settings(task: str, preset: str, own_data: bool = False) -> dict:
    """What a task sets with a preset, in the world or on own data."""
    record = TASKS[task]
    settings = record.settings | {"tiny": record.tiny, "large": record.large}.get(preset, {})
    return settings | (record.tiny_own if preset == "tiny" and own_data else {})
