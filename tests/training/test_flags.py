"""Bad values of flags: each is refused with one sentence before anything is trained.

A table of every flag with every bad value; the quick suite draws one in 25.
"""

import random
from dataclasses import fields

import pytest
import torch
from conftest import SMALL

import ablate
import capfilt
import eval as evaluation
import train
from config import CapFiltConfig, TrainConfig
from tasks.captioning import Decoding
from tasks.registry import TASKS
from training.program import exit_status
from training.settings import flag_name, parse
from world.web import WorldSets

HUGE = str(10 ** 30)
NO_NUMBER = ["", "text", "nan", "inf", "-inf", "1e99", HUGE]
PATHS = ("data", "init", "init_vit", "init_text", "vocab", "answers", "image_root", "val", "out",
         "prompt")  # any text may be right
FINETUNINGS = ("retrieval", "caption", "vqa", "nlvr2", "visdial")


def bad_values(f) -> list[str]:
    """What a field cannot be."""
    rules = f.metadata
    if f.type is bool:
        return ["", "text", "0", "nan"]
    if f.name == "device":
        return ["", "text", "cuda:", "cuda:99", "cpu:x", "0"]
    if f.type is str:
        return ["", "text", "0"] if rules.get("choices") else []
    bad = list(NO_NUMBER)
    if f.type is int:
        bad.append("0.5")
    for bound, below in ((rules.get("least"), -1), (rules.get("most"), 1)):
        if bound is not None:
            bad.append(str(f.type(bound + below)))
    if rules.get("above") is not None:
        bad += ["0", "-1"]
    return bad


def own_flags(*classes) -> list[tuple[str, str]]:
    """(flag, bad value) of each field that is a flag."""
    return [(flag_name(f.name), bad) for cls in classes for f in fields(cls)
            if f.metadata.get("flag", True) and f.name not in PATHS for bad in bad_values(f)]


def table() -> list[tuple[str, list[str]]]:
    """(program, arguments)."""
    rows = []
    for task in ("pretrain", *FINETUNINGS, "blip2-stage1"):
        if task in TASKS:
            rows += [("train", [task, f"{flag}={bad}"])
                     for flag, bad in own_flags(TrainConfig, TASKS[task].config)]
    rows += [("train", ["pretrain", *more]) for more in (
        ["--max-tokens=65"], ["--max-length=65"], ["--max-tokens=65", "--max-positions=64"],
        ["--max-length=4", "--prompt=a picture of a red thing"])]
    rows += [("capfilt", [f"{flag}={bad}"])
             for flag, bad in own_flags(CapFiltConfig, Decoding, WorldSets)]
    inner = ["--lr=nan", "--epochs 0", "'--lr 1", '"', "--nonsense 1", "nothing", "--device gpu:1",
             "--batch-size 0.5", "--alpha 2", "--vit-width 0"]
    for flag in ("--pretrain", "--finetune"):
        rows += [(program, [*start, f"{flag}={bad}"]) for bad in inner
                 for program, start in (("capfilt", []), ("ablate", ["table1"]))
                 if bad != "--device gpu:1"]
    for flag in ("--rounds", "--pairs", "--workers"):
        rows += [("capfilt", [f"{flag}={bad}"]) for bad in (*NO_NUMBER, "-1", "0.5")]
    for flag in ("--seeds", "--jobs", "--pairs"):
        rows += [("ablate", ["table1", f"{flag}={bad}"]) for bad in (*NO_NUMBER, "-1", "0")]
    rows += [(program, [*start, f"--device={bad}"]) for bad in ("text", "cuda:99", "cpu:x")
             for program, start in (("capfilt", []), ("ablate", ["table1"]),
                                    ("eval", ["retrieval"]))]
    for command, flags in {"retrieval": ("--top-k", "--size"), "vqa": ("--top-k", "--size"),
                           "video-retrieval": ("--frames", "--size"),
                           "caption": ("--vit-heads", "--text-heads")}.items():
        rows += [("eval", [command, f"{flag}={bad}"]) for flag in flags
                 for bad in (*NO_NUMBER, "-1", "0.5")]
    rows += [("eval", ["caption", f"{flag}={bad}"]) for flag, bad in own_flags(Decoding)]
    return rows


ROWS = table()
QUICK = sorted(random.Random(0).sample(range(len(ROWS)), len(ROWS) // 25))


def status_of(program: str, arguments: list[str], checkpoint: str, out: str) -> int:
    """The exit status, or what argparse ends with. Training stops before the loop."""
    common = ["--out", out] if "--device" in arguments[-1] else ["--out", out, "--device", "cpu"]
    try:
        if program == "train":
            task, *bad = arguments
            start = [] if task == "pretrain" else [task, "--init", checkpoint]
            sizes = [*SMALL[:18], "--max-positions", "64"] if task == "pretrain" else []
            given, _ = parse([*start, *sizes, "--scenes", "64", "--batch-size", "8", *common,
                              *bad], "")
            return exit_status(lambda: train.start(given) and 0)
        if program == "capfilt":
            return capfilt.main([*common, *arguments])
        if program == "ablate":
            return ablate.main([*arguments, *common])
        return evaluation.main([*arguments, "--checkpoint", checkpoint, *common])
    except SystemExit as stopped:
        return stopped.code


def check(rows, pretrained, tmp_path, capsys, monkeypatch) -> None:
    """Each row ends with status 2, one sentence, and nothing is trained."""
    def no_training(*args, **kwargs):
        raise AssertionError("a training began")
    monkeypatch.setattr(train, "train", no_training)
    monkeypatch.setattr(ablate, "run_all", no_training)
    monkeypatch.setattr(torch.optim.AdamW, "step", no_training)
    wrong = []
    for program, arguments in rows:
        capsys.readouterr()
        try:
            status = status_of(program, arguments, str(pretrained), str(tmp_path / "out"))
        except Exception as error:
            status = repr(error)
        last = [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1:]
        if status != 2 or "error: " not in "".join(last):
            wrong.append((program, arguments, status, last))
    assert wrong == []


def test_bad_values_are_refused(pretrained, tmp_path, capsys, monkeypatch):
    assert len(ROWS) >= 600
    check([ROWS[i] for i in QUICK], pretrained, tmp_path, capsys, monkeypatch)


@pytest.mark.slow
def test_all_bad_values_are_refused(pretrained, tmp_path, capsys, monkeypatch):
    check(ROWS, pretrained, tmp_path, capsys, monkeypatch)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError, match="--lr is 0.0; it must be above 0, and --alpha is 2.0; it"):
        TrainConfig(lr=0.0, alpha=2.0)
