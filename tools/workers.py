"""Worker processes of `ablate.py`: how they end."""

import os
import threading
import time
from collections.abc import Callable

stopped: list[bool] = []  # in a worker: not empty once its work was interrupted


def end_with(parent: int) -> None:
    """Called in a new worker: it ends when its parent has been killed.

    Else it would go on alone with what nobody waits for.
    """
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def unless_stopped(work: Callable, *arguments) -> object:
    """work(*arguments); KeyboardInterrupt in a worker that was interrupted before.

    A pool has given each worker its next work already, and cannot take it back.
    """
    if stopped:
        raise KeyboardInterrupt
    try:
        return work(*arguments)
    except KeyboardInterrupt:
        stopped.append(True)
        raise
