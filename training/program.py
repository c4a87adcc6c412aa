"""How a program begins and ends: signals, exit status, one sentence for a user's mistake."""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from config import SettingError
from data.files import InputError, unlock_folders
from training import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Full and read-only disks, a full quota, folders of somebody else.
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)

# What gloo says in the ranks that are left.
LOST_RANK = re.compile("Connection (closed|reset) by peer|Broken pipe")


@contextlib.contextmanager
def signals_noted() -> Iterator[list]:
    """Within it, SIGINT and SIGTERM put something into the list instead of ending the program."""
    noted = []
    before = {number: signal.signal(number, lambda *_: noted.append(True))
              for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Within it SIGINT and SIGTERM wait.

    For a process that is made in it they wait from its first moment.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows: there, no process is made
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def leave_signals_to_the_run(worker: int) -> None:
    """Called in a new worker of a loader, which was made within `signals_held_back`.

    Signals to the whole group are for the run alone, so the worker leaves the group, and forgets
    what reached it before. It does not ignore SIGTERM: with that the run ends the workers that are
    left when it exits, and it would wait for them for ever.
    """
    os.setpgid(0, 0)
    for number in signal.sigpending():
        signal.sigwait({number})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Screen:
    """A stream that ends no program: what cannot be written is lost, and the work goes on.

    So it is after `| head` has read enough, and on a full disk. A letter that the screen does not
    have is written as its number. `failure` says why something was lost, unless a reader left.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.failure = stream, ""
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """As the stream's."""
        with self.may_be_lost():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        with self.may_be_lost():
            self.stream.flush()

    @contextlib.contextmanager
    def may_be_lost(self) -> Iterator[None]:
        """Within it, after a failure all that is written goes to /dev/null from then on."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EINVAL):  # (Windows: EINVAL)
                self.failure = error.strerror or str(error)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def screens_that_last() -> Iterator[list[Screen]]:
    """Within it, what is printed cannot end the program -> its screens; [] where it has none."""
    before = sys.stdout, sys.stderr
    screens = [] if None in before else [Screen(stream) for stream in before]
    if screens:
        sys.stdout, sys.stderr = screens
    try:
        yield screens
    finally:
        for screen in screens:
            screen.flush()
        sys.stdout, sys.stderr = before


def exit_status(program: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a program's main part -> its exit status.

    What the part returns, or 0; 2 after a user's mistake, of which one sentence is printed, and
    where not all could be printed; 130 after an interrupt, with the sentence `interrupted` or that
    of the KeyboardInterrupt.
    """
    with screens_that_last() as screens:
        status = status_of(program, interrupted)
    failures = [screen.failure for screen in screens if screen.failure]
    if failures:
        print(f"error: the work is done, but not all that it prints could be written "
              f"({failures[0]}); make room", file=sys.stderr)
    return status or (2 if failures else 0)


def status_of(program: Callable[[], int | None], interrupted: str) -> int:
    """What `exit_status` returns."""
    try:
        status = program() or 0
        distributed.barrier()  # a rank that leaves while another still talks may be aborted
        return status
    except (InputError, SettingError) as error:
        new_line = "\n" if distributed.rank() else ""  # the cursor stands behind rank 0's bar
        print(f"{new_line}error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if distributed.world_size() == 1 or not LOST_RANK.search(str(error)):
            raise
        print(f"rank {distributed.rank()}: another process has ended; its message says why",
              file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(f"error: {error.filename or 'a file'} cannot be used ({error.strerror}); make room, "
              "or give a folder that you may read and write", file=sys.stderr)
        return 2
    except KeyboardInterrupt as pressed:
        print(str(pressed) or interrupted, file=sys.stderr)
        return 130
    finally:
        unlock_folders()
        distributed.finish()
