"""A run's folder belongs to one run and to one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run

import capfilt
import train
from data.files import InputError
from training import checkpoints

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from data.files import lock_folder
lock_folder(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process():
    """Starts a process that works in a folder."""
    started = []
    def start(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process
    yield start
    for process in started:
        process.kill()
        process.wait()


def test_two_processes_do_not_share_a_folder(tmp_path, other_process, capsys):
    assert run(tmp_path / "a", "--scenes", 16) == 0
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    process = other_process(tmp_path / "a")
    capsys.readouterr()
    for flags in (["--scenes", "16"], ["--resume"]):
        assert train.main([*flags, "--out", str(tmp_path / "a")]) == 2
        error = capsys.readouterr().err
        assert "another process works in " in error and error.count("\n") == 1
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "a.old1").exists()
    process.kill()  # a lock dies with its process, however that ends
    process.wait()
    assert train.main(["--resume", "--out", str(tmp_path / "a")]) == 0


def test_two_capfilts_do_not_share_a_folder(tmp_path, other_process, capsys):
    other_process(tmp_path / "c")
    assert capfilt.main(["--out", str(tmp_path / "c"), "--device", "cpu"]) == 2
    assert "another process works in " in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def restart(monkeypatch, number: int) -> None:
    """As torchrun --max-restarts starts the same command again."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))


def crash(*args, **kwargs):
    raise MemoryError


def test_a_restart_before_the_first_checkpoint_does_not_take_the_earlier_run(tmp_path, monkeypatch):
    assert run(tmp_path / "a", "--scenes", 16, "--seed", 1) == 0
    with monkeypatch.context() as m:  # the new run dies while it reads its data
        m.setattr("training.run.open_datasets", crash)
        with pytest.raises(MemoryError):
            run(tmp_path / "a", "--scenes", 16, "--seed", 2)
    restart(monkeypatch, 1)
    assert run(tmp_path / "a", "--scenes", 16, "--seed", 2) == 0
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text())
               for name in ("a.old1", "a")]
    assert [numbers["settings"]["seed"] for numbers in metrics] == [1, 2]


def test_a_restart_goes_on_from_the_runs_own_checkpoint(tmp_path, monkeypatch, capsys):
    flags = (tmp_path / "a", "--scenes", 48, "--save-every", 2)
    assert run(*flags) == 0
    add = train.Log.add
    def dies_at_step_4(self, losses, bar, step, *rest, **values):
        if step == 4:
            raise MemoryError
        add(self, losses, bar, step, *rest, **values)
    with monkeypatch.context() as m:
        m.setattr(train.Log, "add", dies_at_step_4)
        with pytest.raises(MemoryError):
            run(*flags)
    restart(monkeypatch, 1)
    assert run(*flags) == 0
    assert not (tmp_path / "a.old2").exists()  # it was resumed, not begun again
    states = [checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("a.old1", "a")]
    assert all(map(torch.equal, states[0]["model"].values(), states[1]["model"].values()))


def test_the_best_model_of_another_run_is_not_taken(tmp_path):
    """Left behind where a run ended between its best.pt and its checkpoint, or moved here."""
    assert run(tmp_path / "old", "--scenes", 16) == 0
    best = checkpoints.load(tmp_path / "old/checkpoint.pt") | {"step": 77}
    (tmp_path / "a").mkdir()
    checkpoints.save(tmp_path / "a/best.pt", best)
    assert run(tmp_path / "a", "--scenes", 16) == 0
    assert (tmp_path / "a.old1/best.pt").exists() and not (tmp_path / "a/best.pt").exists()
    checkpoints.save(tmp_path / "a/best.pt", best)
    assert train.main(["--resume", "--out", str(tmp_path / "a")]) == 0
    assert "best_step" not in json.loads((tmp_path / "a/metrics.json").read_text())


def test_a_program_that_trains_goes_on_with_the_same_settings_alone(tmp_path):
    """capfilt.py with other --finetune flags does not take the old model for the new one."""
    given = {"scenes": 16, "batch_size": 8, "vit_width": 16, "vit_depth": 1, "vit_heads": 2,
             "text_width": 16, "text_depth": 1, "text_heads": 2, "text_ffn": 32, "queue_size": 8,
             "device": "cpu", "workers": 0, "eval_size": 4, "eval_top_k": 4, "lm_only_steps": 0}
    path = train.train_into(tmp_path / "a", given)
    assert train.train_into(tmp_path / "a", given | {"workers": 1}) == path
    with pytest.raises(InputError, match="--lr cannot change .* the run in .*/a has another"):
        train.train_into(tmp_path / "a", given | {"lr": 0.5})
