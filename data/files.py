"""Files: read json, lists of any length and tensors; write a file whole or not at all.

A mistake in a user's data is an InputError: one sentence that names the file, the record and the
remedy.
"""

import contextlib
import json
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator
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


def regular_file(path: str | Path) -> str | Path:
    """The path, if a regular file is there.

    A pipe would be waited for, and a device has no end. Raises OSError.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # the name has a zero byte or half a character
        raise FileNotFoundError("missing")
    if not stat.S_ISREG(mode):
        raise OSError("no regular file")
    return path


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Within it, a file that cannot be read raises an InputError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error}); save it as UTF-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); give another file")


HALF_CHARACTER = re.compile(r"\\u[dD]")  # what json writes for half of a character above U+FFFF


def parse_json(text: str):
    """The value of a json text; in its texts, half a character alone becomes "?".

    Raises ValueError or RecursionError; `unreadable` says in words why.
    """
    value = json.loads(text)
    return whole_texts(value) if HALF_CHARACTER.search(text) else value


def whole_texts(value):
    """A json value whose texts can all be written: half a character alone becomes "?"."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def unreadable(error: Exception) -> str:
    """Why json cannot be parsed, in words."""
    if isinstance(error, RecursionError):
        return "its lists and objects are nested too deeply"
    return "no valid json" if isinstance(error, json.JSONDecodeError) else "a number is too long"


def check_start(path: str | Path, text: str) -> None:
    """Raises InputError where a file cannot be json, as its first characters show."""
    text = text.lstrip()
    if not text:
        raise InputError(f"{path} is empty; give a file with records")
    if text.startswith("\ufffd\ufffd") and "\0" in text[:4]:  # UTF-16, as Windows' shell writes
        raise InputError(f"{path} is no UTF-8 text; save it as UTF-8")
    if not text.startswith(("[", "{")):
        raise InputError(f"{path} is no json (it begins with {text[:20]!r}); give a json list, "
                         "json with one record a line, a data set's own json file, or for "
                         "image-text pairs also tar shards (.tar, not compressed)")


def read_json(path: str | Path):
    """The parsed file; InputError where it is missing or malformed."""
    with reading(path):
        text = Path(regular_file(path)).read_text(encoding="utf-8-sig")
    check_start(path, text)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        near = error.doc[max(error.pos - 20, 0):error.pos + 20]
        raise InputError(f"{path} is not valid json: {error.msg} in line {error.lineno}, "
                         f"column {error.colno} (near {near!r}); repair it there")
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {unreadable(error)}; repair it")


def named_files(text: str) -> list[str]:
    """The files that a flag names, with commas between them; one that is there may have one."""
    return [text] if os.path.exists(text) else text.split(",")


def require_object(where: str, record, needs: str) -> None:
    """InputError where a record of a file is no json object. needs: what it must have."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: it is {record!r:.60} and must be an object; it needs {needs}")


BLOCK = 1 << 20  # characters that are read at a time
LONGEST = 1 << 26  # of a record


def is_list(path: str | Path) -> bool:
    """Whether the file is a json list or has one record a line, whatever its name ends with.

    Raises InputError for a file that is no json.
    """
    with reading(path), open(regular_file(path), encoding="utf-8-sig", errors="replace") as file:
        start = file.read(BLOCK).lstrip()
    check_start(path, start)
    if start[0] == "[" or str(path).endswith(".jsonl"):
        return True
    line, _, rest = start.partition("\n")
    if not rest.strip():
        return False
    try:
        parse_json(line)
    except (RecursionError, ValueError):  # one object over several lines
        return False
    return True


def stream_list(path: str | Path) -> Iterator:
    """The elements of a json list, or of a file with one json value a line, one by one.

    The whole is never in memory. Raises InputError for a record that is no json.
    """
    decoder, number = json.JSONDecoder(), 0
    with reading(path), open(regular_file(path), encoding="utf-8-sig") as file:
        text = file.read(BLOCK).lstrip()
        in_brackets = text.startswith("[")
        position = 1 if in_brackets else 0
        while True:
            while position < len(text) and text[position] in " \n\r\t,":
                position += 1
            if in_brackets and text[position:position + 1] == "]":
                if (text[position + 1:] + file.read(BLOCK)).strip():
                    raise InputError(f"{path} goes on after the end of its list; a file holds one "
                                     "list: put all records into it")
                return
            try:
                record, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError:
                more = file.read(BLOCK)
                if more and len(text) - position < LONGEST:
                    text, position = text[position:] + more, 0
                    continue
                if position == len(text) and not in_brackets:
                    return
                if in_brackets and os.path.getsize(path) < 1 << 28:
                    read_json(path)  # says where
                raise InputError(f"{path}, record {number}: no valid json; repair it there")
            except (RecursionError, ValueError) as error:
                raise InputError(f"{path}, record {number}: {unreadable(error)}; repair it there")
            yield whole_texts(record) if HALF_CHARACTER.search(text, position, end) else record
            position, number = end, number + 1


def read_tensors(path: str | Path) -> dict:
    """What a file of weights holds, without running any code in it.

    A file that holds anything but tensors and plain values is refused, and so is one whose
    checksums do not fit. A .safetensors file needs the package of that name. Raises InputError.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give the file of weights in it (a run's: "
                         "checkpoint.pt or best.pt)")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(regular_file(path))
        check_checksums(regular_file(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors, or give "
                         "the .bin or .pth file")
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist; check the path")
    except PermissionError:
        raise InputError(f"checkpoint {path} may not be read; give yourself the permission")
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
                         "was: make room or give another folder; then give the same command again, "
                         "train.py's with --resume if its folder holds a checkpoint")
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
    if folder.is_file():
        raise InputError(f"{folder} is a file and cannot be the folder of a run; give another "
                         "--out")
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
        with contextlib.suppress(OSError):  # a full disk: what is not written yet is lost
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


def refuse_own_files(files: Iterable[str | Path], out: str | Path) -> None:
    """InputError where a file lies in the folder, which may be moved or written over."""
    folder = os.path.join(os.path.realpath(out), "")
    for file in files:
        if os.path.join(os.path.realpath(file), "").startswith(folder):
            raise InputError(f"{file} lies in the folder {out}, into which this command writes: "
                             "what is there may be moved aside or written over; give another --out")
