"""What ends a program and what does not: a reader that leaves, a letter too many, a signal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, run

import train
from data.files import HELD, InputError, lock_folder
from training import distributed
from training.program import exit_status

ROOT = Path(__file__).parents[2]


def start(code: str, stdout=subprocess.PIPE, **options) -> subprocess.Popen:
    """A program whose main part is `code`."""
    text = f"import sys\nfrom training.program import exit_status\ndef main():\n    {code}\n"
    return subprocess.Popen([sys.executable, "-c", text + "sys.exit(exit_status(main))"], cwd=ROOT,
                            text=True, stdout=stdout, stderr=subprocess.PIPE, **options)


def test_a_training_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    """`python train.py | head -1` ends with the model judged."""
    command = [sys.executable, "train.py", *SMALL, "--scenes", "16", "--out", str(tmp_path / "a")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before the first line
    error = process.stderr.read().decode()
    assert process.wait() == 0 and "Broken" not in error
    assert (tmp_path / "a/metrics.json").exists()


def test_a_letter_that_the_screen_does_not_have_is_its_number():
    process = start("print('Z\\u00fcrich \\u2603')", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, error = process.communicate()
    assert out == "Z\\xfcrich \\u2603\n" and not error and process.returncode == 0


def test_the_screens_are_put_back():
    before = sys.stdout, sys.stderr
    assert exit_status(lambda: 3) == 3
    with pytest.raises(MemoryError):
        exit_status(raises(MemoryError))
    assert (sys.stdout, sys.stderr) == before


def test_a_rank_that_is_left_alone_says_so(monkeypatch, capsys):
    """The rank that failed says why; the others only lose their connection."""
    def alone():
        raise RuntimeError("[enforce fail] Read error [127.0.0.1]:1: Connection reset by peer")
    with pytest.raises(RuntimeError):
        exit_status(alone)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    assert exit_status(alone) == 2
    assert "another process has ended; its message says why" in capsys.readouterr().err


def raises(error: type):
    def program():
        raise error
    return program


def test_a_program_without_a_screen_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_status(lambda: print("nothing")) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_what_is_printed_to_a_full_disk_is_lost_and_the_work_is_not():
    code = "print('x', flush=True)\n    print('y')\n    print('done', file=sys.stderr)"
    with open("/dev/full", "w") as full:
        process = start(code, stdout=full)
        _, error = process.communicate()
    assert process.returncode == 2 and error.startswith("done\nerror: the work is done, but not")
    assert "No space left on device" in error and error.count("\n") == 2


def test_an_interrupt_of_the_last_judgement_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def press(*arguments):
        raise KeyboardInterrupt
    with monkeypatch.context() as pressed:
        pressed.setattr(train, "evaluate", press)
        assert run(tmp_path / "a", "--scenes", 16) == 130
    assert f"python train.py --resume --out {tmp_path}/a\n" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a/metrics.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_one_sentence_also_when_the_lock_is_closed(tmp_path, capsys):
    def main():
        lock = HELD[tmp_path] = open("/dev/full", "w", encoding="utf-8")
        lock.write("a note")
        lock.flush()
    assert exit_status(main) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not HELD


def test_a_file_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match="a is a file and cannot be the folder of a run"):
        lock_folder(tmp_path / "a")
