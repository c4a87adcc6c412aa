"""The folder that a program writes into: one process at a time, and nothing of the user's is lost.

    begin(out, ...)                 lock a run's folder -> the id of the run
    prepare_folder(out, resume)     make it; an earlier run in it is moved aside
    refuse_a_run(out)               an evaluation may not write over a run's numbers
"""

import re
import uuid
from pathlib import Path

from data.files import InputError, lock_folder, make_folder, note_in_lock


def begin(out: Path, state: dict | None, restarted: bool) -> str:
    """Lock the run's folder -> the id of the run that it belongs to from now on.

    The id stands in the lock's file before anything slow begins. So a run that is restarted knows
    which checkpoint is its own. Raises InputError where another process trains into the folder.
    """
    earlier = lock_folder(out)
    if state:
        run_id = state.get("run_id") or uuid.uuid4().hex
    else:
        run_id = earlier if restarted and earlier else uuid.uuid4().hex
    note_in_lock(out, run_id)
    return run_id


def prepare_folder(out: Path, resume: bool) -> None:
    """Make the run's folder. An earlier run in it is moved aside, not overwritten."""
    try:
        if not resume and any(out.glob("*.pt")):
            number = 1
            while Path(f"{out}.old{number}").exists():
                number += 1
            aside = Path(f"{out}.old{number}")
            out.rename(aside)
            print(f"{out} holds an earlier run: moved to {aside} (--resume would have continued "
                  "it)")
        make_folder(out)
        for leftover in out.glob("*.tmp"):  # of a process that was killed while it wrote
            if re.search(r"\.\d+\.tmp$", leftover.name):  # data.files.whole_file
                leftover.unlink()
    except OSError as error:
        raise InputError(f"the run's folder {out} cannot be made ({error}); give another --out")


def refuse_a_run(out: str | Path) -> None:
    """InputError where the folder is a run's, whose metrics.json would be lost."""
    if any((Path(out) / name).exists() for name in ("log.jsonl", "checkpoint.pt")):
        raise InputError(f"{out} is the folder of a run of train.py, whose metrics.json would be "
                         "lost; give another --out")
