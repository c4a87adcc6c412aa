"""Runs that are killed at random moments, and begun again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, equal_states, photographs

from training import checkpoints

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "12"))


def start(arguments: list) -> subprocess.Popen:
    """A program in a process group of its own."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
                            start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_a_signal_to_the_whole_group_writes_a_checkpoint(tmp_path):
    """`timeout 60 python train.py` sends it to the loader's workers as well."""
    folder, out = photographs(tmp_path, 40), tmp_path / "run"
    process = start(["train.py", *SMALL, "--data", folder / "train.json", "--epochs", 2000,
                     "--workers", 2, "--out", out, "--device", "cpu"])
    log, deadline = out / "log.jsonl", time.time() + 120
    while not (log.exists() and log.stat().st_size) and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "continue with: python train.py --resume" in output
    assert checkpoints.load(out / "checkpoint.pt")["step"] >= 2


def finish(arguments: list) -> tuple[int, str, float]:
    """-> exit status, output, seconds."""
    began, process = time.time(), start(arguments)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output, time.time() - began


def attack(arguments: list, seconds: float, rng: random.Random) -> str:
    """Start the program, send a signal at a random moment -> the signal's name."""
    kind = rng.choice([signal.SIGKILL, signal.SIGTERM])
    process = start(arguments)
    time.sleep(rng.uniform(0.3, 1.0) * seconds)
    if process.poll() is None:
        os.killpg(process.pid, kind)
    process.communicate(timeout=120)
    return kind.name


@pytest.mark.slow
def test_random_kills(tmp_path):
    """What was killed ends well when it is started again; a training with the same weights."""
    rng, out, held = random.Random(0), tmp_path / "out", ["--device", "cpu"]
    world = [*SMALL, *held, "--max-positions", 64, "--scenes", 160, "--save-every", 3]
    base = tmp_path / "base/checkpoint.pt"
    fine = ["train.py", "caption", "--init", base, "--scenes", 96, "--batch-size", 8, "--epochs", 2,
            "--eval-size", 12, "--min-steps", 0, "--log-every", 2, "--save-every", 3, *held]
    small = " ".join(map(str, [*SMALL, "--max-positions", 64]))
    sets = ["--world-web", 24, "--world-human", 16, "--held-out", 12, "--pairs", 40,
            "--shard-size", 6]
    programs = {
        "train.py": ["train.py", *world], "train.py caption": fine,
        "capfilt.py": ["capfilt.py", *sets, *held, f"--pretrain={small}",
                       "--finetune=--epochs 1 --batch-size 8 --eval-size 12 --eval-top-k 3 "
                       "--min-steps 0"],
        "eval.py": ["eval.py", "retrieval", "--checkpoint", base, "--size", 64, *held]}
    status, output, _ = finish(["train.py", *world, "--out", base.parent])
    assert status == 0, output
    table = ["attack             tried  survived  lost"]
    for name, program in programs.items():
        whole = tmp_path / f"whole {name}"
        status, output, seconds = finish([*program, "--out", whole])
        assert status == 0, output
        lost = []
        tried = KILLS // len(programs)
        for _ in range(tried):
            shutil.rmtree(out, ignore_errors=True)
            kind = attack([*program, "--out", out], seconds, rng)
            again = [*program, "--out", out]
            if program[0] == "train.py" and (out / "checkpoint.pt").exists():
                again = ["train.py", "--resume", "--out", out]
            status, output, _ = finish(again)
            if status != 0 or not same_outcome(name, whole, out):
                lost.append(f"{kind}: status {status}\n{output[-1500:]}")
        table.append(f"{name:18}{tried:6}{tried - len(lost):10}{len(lost):6}")
        print("\n".join([table[-1], *lost]), flush=True)
    print("\n".join(table))
    assert all(line.split()[-1] in ("lost", "0") for line in table)


def same_outcome(name: str, whole: Path, again: Path) -> bool:
    """Whether a run that was killed ended as the one that was not."""
    if name.startswith("train.py"):
        return equal_states(whole, again)
    if name == "eval.py":
        return (whole / "metrics.json").exists() and (again / "metrics.json").exists()
    models = [checkpoints.load(folder / "model/checkpoint.pt")["model"]
              for folder in (whole, again)]
    return all(torch.equal(models[0][key], models[1][key]) for key in models[0])
