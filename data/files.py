"""Files: read json, lists of any length and tensors; write a file whole or not at all.

A mistake in a user's data is an InputError: one sentence that names the file, the record and the
remedy.
"""

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

try:
    import fcntl
except ImportError:  # Windows: there, nothing is locked
    fcntl = None


class InputError(ValueError):
    """A mistake that a user can make.

    The message is one sentence; programs print it without a traceback.
    """


def read_json(path: str | Path):
    """The parsed file; InputError where it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})")
    except json.JSONDecodeError as error:
        near = error.doc[max(error.pos - 20, 0):error.pos + 20]
        raise InputError(f"{path} is not valid json: {error.msg} in line {error.lineno}, "
                         f"column {error.colno} (near {near!r}); repair it there")


def is_list(path: str | Path) -> bool:
    """Whether the file is a json list or has one json value a line."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip(b" \n\r\t\xef\xbb\xbf")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})")
    return str(path).endswith(".jsonl") or start[:1] == b"["


BLOCK = 1 << 20  # bytes that stream_list reads at a time
LONGEST = 1 << 26  # of a record


def stream_list(path: str | Path) -> Iterator:
    """The elements of a json list, or of a file with one json value a line, one by one.

    The whole is never in memory. Raises InputError for a record that is no json.
    """
    decoder, number = json.JSONDecoder(), 0
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(BLOCK)
            position = len(text) - len(text.lstrip(" \n\r\t[\ufeff"))
            while True:
                while position < len(text) and text[position] in " \n\r\t,":
                    position += 1
                try:
                    if position == len(text):
                        raise json.JSONDecodeError("more is needed", text, position)
                    if text[position] == "]":
                        return
                    record, position = decoder.raw_decode(text, position)
                    yield record
                    number += 1
                except json.JSONDecodeError:
                    more = file.read(BLOCK)
                    if more and len(text) - position < LONGEST:
                        text, position = text[position:] + more, 0
                    elif position < len(text) or str(path).endswith(".json"):
                        if os.path.getsize(path) < 1 << 28:
                            read_json(path)  # says where
                        raise InputError(f"{path}, record {number}: no valid json; repair it there")
                    else:
                        return
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})")


def read_tensors(path: str | Path) -> dict:
    """What a file of weights holds, without running any code in it.

    A file that holds anything but tensors and plain values is refused, and so is one whose
    checksums do not fit. A .safetensors file needs the package of that name. Raises InputError.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        check_checksums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors, or give "
                         "the .bin or .pth file")
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist; check the path")
    except pickle.UnpicklingError:
        raise InputError(f"checkpoint {path} holds pickled code or is no checkpoint: refused, "
                         "because loading it could run that code; save a plain state dict of "
                         "tensors instead")
    except Exception as error:  # whatever a cut or damaged file makes the readers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"checkpoint {path} cannot be read ({reason}); it is damaged or cut "
                         "short: copy it again, or give an older one")


def check_checksums(path: str | Path) -> None:
    """Raise BadZipFile where the content of torch's zip archive is not what was written.

    torch.save stores a checksum for each tensor, which torch.load does not look at. A second for
    each gigabyte. Files of old versions of torch are no zip archives and have none.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator:
    """Open a file for writing that is there whole or not at all.

    What is written goes to a temporary file, which is flushed to the disk and then takes the name:
    the old file is whole until the new one is. InputError where it cannot be written.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path} could not be written ({reason}); what was there before is as it "
                         "was: make room or give another folder, and give the same command again")
    finally:
        temporary.unlink(missing_ok=True)


# ---- one process in a folder at a time -----------------------------------------------------------

HELD: dict[Path, TextIO] = {}  # the lock files of this process: folder -> open file


def lock_folder(folder: str | Path) -> str:
    """Keep other processes out of a folder until this one ends -> what is noted in the lock.

    The lock lies beside the folder (.NAME.lock), so that the folder can be moved; in it where the
    place beside it cannot be written. It ends with its process, whatever ends that; a note in it
    stays for the next process. Raises InputError where another process works in the folder.
    """
    folder = Path(folder).resolve()
    if folder in HELD:
        HELD[folder].seek(0)
        return HELD[folder].read()
    path = make_folder(folder.parent) / f".{folder.name}.lock"
    if not os.access(folder.parent, os.W_OK):
        path = make_folder(folder) / ".lock"
    try:
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); give another --out")
    try:
        if fcntl:
            # lockf, not flock: a loader's workers do not inherit it, so none of them outlives it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise InputError(f"another process works in {folder}; wait until it ends, or give another "
                         "--out")
    except OSError:  # a file system without locks
        pass
    HELD[folder] = file
    return lock_folder(folder)


def note_in_lock(folder: str | Path, note: str) -> None:
    """What the next process that locks this folder is told."""
    file = HELD[Path(folder).resolve()]
    file.truncate(0)
    file.write(note)
    file.flush()


def unlock_folders() -> None:
    """Let other processes into the folders that this one locked."""
    while HELD:
        HELD.popitem()[1].close()


def write_json(path: str | Path, content, indent: int | None = 1) -> None:
    """Write json, whole or not at all. Raises InputError."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=indent) + "\n")


def make_folder(path: str | Path, flag: str = "--out") -> Path:
    """The folder, made if need be; InputError, naming the flag to change, if it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {path} cannot be made ({error.strerror}); give another "
                         f"{flag}")
    return Path(path)
