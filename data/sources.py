"""Pairs by the million: tar shards, an index on the disk, mixtures of sources.

    tar_records(path)   img2dataset's shards: key.jpg, key.txt or key.json
    PairIndex           a json list or tar shards of any size, row by row from the disk
    Mixture             what an epoch reads: several sources, a share of each
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data.datasets import Pair, name_hash
from data.files import InputError, make_folder, named_files, parse_json, read_json, regular_file
from data.images import ENDINGS
from data.pairs import iterate_records, make_pair
from data.text import clean_caption
from training import distributed


def tar_records(path: str | Path, root: str, skipped: Counter) -> Iterator[tuple[str, dict]]:
    """The image-text pairs of an img2dataset shard.

    As (where, {image: "shard.tar::offset:size", caption, image_id}); the shard is named by its real
    path, relative to `root`. What is no pair or not safe is counted in `skipped`. A shard that
    breaks off gives what stands before the break; one with a damaged place, what stands before and
    after it.
    """
    images, texts = {}, {}
    try:
        with tarfile.open(regular_file(path), "r:") as archive:
            end = read_members(archive, images, texts, skipped)
        if os.path.getsize(path) < end + tarfile.BLOCKSIZE:  # a whole one ends with empty blocks
            skipped[f"{path} breaks off: pairs may be lost"] += 1
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path")
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        skipped[f"{path} is broken, or no tar file, or compressed: {error}"] += 1
    size, shard = os.path.getsize(path), os.path.relpath(os.path.realpath(path), root)
    skipped["no picture"] += len(texts.keys() - images.keys())
    for key, (offset, length) in images.items():
        if not isinstance(texts.get(key), str) or not clean_caption(texts[key]):
            skipped["no caption"] += 1
        elif offset + length > size:
            skipped["cut off"] += 1
        else:
            yield f"{path}, {key}", {"image": f"{shard}::{offset}:{length}", "caption": texts[key],
                                     "image_id": f"{shard} {key}"}


def read_members(archive: tarfile.TarFile, images: dict[str, tuple[int, int]],
                 texts: dict[str, str], skipped: Counter) -> int:
    """Put offsets and sizes of a tar file's pictures, and its texts, under their keys.

    Returns where the last member ends.
    """
    archive.ignore_zeros = True  # and damaged headers: go on behind them
    end = 0  # of the member before
    for member in archive:
        if member.offset != end:
            skipped[f"damaged place in {archive.name}: pairs may be lost there"] += 1
        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        key, extension = os.path.splitext(member.name)
        if member.isdir():
            continue
        unsafe = key.startswith("/") or ".." in Path(key).parts
        if unsafe or not member.isfile() or member.issparse():
            skipped["unsafe or no file"] += 1
        elif extension.lower() in ENDINGS:
            images[key] = (member.offset_data, member.size)
        elif extension in (".txt", ".json") and member.size < 1 << 20:
            content = archive.extractfile(member).read().decode("utf-8", "replace")
            if extension == ".txt":
                texts[key] = content
            elif key not in texts:
                try:
                    texts[key] = parse_json(content)["caption"]
                except (ValueError, RecursionError, KeyError, TypeError):
                    skipped["json without a caption"] += 1
    return end


INDEX_FORMAT = 4  # an index of another format is built anew


class PairIndex(Sequence):
    """The pairs of a source, one for each caption, read from the disk when they are asked for.

    Two files: rows (json, one after the other) and offsets (int64). A loader's worker holds two
    file handles, however many rows there are. (Plain reads, because the pages of a memory map would
    count as its memory once they are touched.) `skipped` counts what was left out.
    """

    def __init__(self, folder: Path, root: str):
        """root: the folder that the images are relative to."""
        self.folder, self.root = folder, root
        self.files, self.process = (), None  # open files, and the process that opened them
        self.count = os.path.getsize(folder / "offsets") // 8 - 1
        self.skipped: dict[str, int] = read_json(folder / "skipped")  # why, and how many

    @classmethod
    def open(cls, source: str, image_root: str | Path | None, folder: Path) -> "PairIndex":
        """Open the index of a source, or build it, once, in a folder of its own under `folder`.

        source: a json file or tar shards (a .tar, a folder or a pattern). Raises InputError.
        """
        shards = shards_of(source)
        files = [os.path.realpath(path) for path in shards or [source] if os.path.exists(path)]
        # Tar shards hold their images: they are found where the shards are.
        root = (os.path.commonpath([os.path.dirname(path) for path in files]) if shards
                else os.path.abspath(image_root or Path(source).parent))
        states = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
        stamp = hashlib.sha256(repr([INDEX_FORMAT, root] + states).encode()).hexdigest()[:16]
        index = folder / f"{Path((shards or [source])[0]).stem}-{stamp}"
        if not is_whole(index):
            cls.build(source, shards, root, index)
        return cls(index, root)

    @staticmethod
    def build(source: str, shards: list[str], root: str, index: Path) -> None:
        """Write the index; it takes its name when it is whole, and nothing stays if it fails."""
        temporary, skipped, position = Path(f"{index}.{os.getpid()}.tmp"), Counter(), 0
        remove_leftovers(index)
        make_folder(temporary)
        if shards:
            records = (record for shard in shards for record in tar_records(shard, root, skipped))
        else:
            records = iterate_records(source, "train")
        offsets = array("q", [0])
        try:
            with open(temporary / "rows", "wb") as rows, open(temporary / "offsets", "wb") as ends:
                for where, record in tqdm(records, f"indexing {source}", unit="row", leave=False,
                                          delay=1):
                    pair = make_pair(where, record, root)
                    if not pair.captions:
                        skipped["no caption"] += 1
                    for text in pair.captions:
                        row = json.dumps([pair.image, text, pair.image_id]).encode()
                        rows.write(row)
                        position += len(row)
                        offsets.append(position)
                    if len(offsets) > 1 << 16:
                        offsets.tofile(ends)
                        del offsets[:]
                offsets.tofile(ends)
            skipped = Counter({reason: count for reason, count in skipped.items() if count})
            left_out = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
            if position == 0:
                raise InputError(f"{source} holds no image with a caption"
                                 + (left_out and f"; left out: {left_out}"))
            (temporary / "skipped").write_text(json.dumps(skipped))
            if not index.exists():  # else another process was as quick
                temporary.rename(index)
        except OSError as error:
            raise InputError(f"the index of {source} could not be written to {index.parent} "
                             f"({error}); make room, or give another --out")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if left_out:
            print(f"{source}: left out: {left_out}", file=sys.stderr)

    def digest(self) -> str:
        """Of the rows, and of how large some pictures' files are (those that are there).

        It stays when the source is moved, and when a file's date changes.
        """
        content = hashlib.sha256()
        with open(self.folder / "rows", "rb") as rows:
            while block := rows.read(1 << 20):
                content.update(block)
        for i in range(0, len(self), max(1, len(self) // 100)):
            picture = Path(self.root, self[i].image.split("::")[0])  # or the shard that holds it
            size = None
            with contextlib.suppress(OSError):  # not there, or no file's name
                size = picture.stat().st_size
            content.update(f" {size}".encode())
        return content.hexdigest()[:16]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Pair:
        if not 0 <= i < self.count:
            raise IndexError(i)
        if self.process != os.getpid():  # each process opens its own: a shared one has one place
            self.files = [open(self.folder / name, "rb") for name in ("offsets", "rows")]
            self.process = os.getpid()
        offsets, rows = self.files
        offsets.seek(8 * i)
        try:
            start, end = array("q", offsets.read(16))
            rows.seek(start)
            image, text, image_id = json.loads(rows.read(end - start))
        except (ValueError, TypeError, OSError):
            raise InputError(f"the index {self.folder} is damaged; remove this folder, and it is "
                             "built again")
        return Pair(image, (text,), image_id, image)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "files": (), "process": None}


def is_whole(index: Path) -> bool:
    """Whether the files of an index are there and as long as they must be."""
    try:
        read_json(index / "skipped")
        with open(index / "offsets", "rb") as file:
            file.seek(-8, os.SEEK_END)
            end, = array("q", file.read())
        return os.path.getsize(index / "rows") == end > 0
    except (OSError, ValueError):
        return False


def remove_leftovers(index: Path) -> None:
    """Remove a damaged index, and what processes that died a day ago or more left beside it."""
    shutil.rmtree(index, ignore_errors=True)
    for folder in index.parent.glob("*.tmp"):
        rows = folder / "rows"
        if rows.exists() and time.time() - rows.stat().st_mtime > 86400:
            shutil.rmtree(folder, ignore_errors=True)


def open_index(source: str, image_root: str, folder: Path) -> PairIndex:
    """The index of a source. All ranks call it: rank 0 builds it if there is none yet."""
    if distributed.rank() == 0:
        PairIndex.open(source, image_root or None, folder)
    distributed.barrier()
    return PairIndex.open(source, image_root or None, folder)


def shards_of(source: str) -> list[str]:
    """The tar files that a source names; none if it is a json file."""
    if os.path.isdir(source):
        source = os.path.join(glob.escape(source), "*.tar")
    if not source.endswith(".tar"):
        return []
    shards = [source] if os.path.exists(source) else sorted(glob.glob(source))
    if not shards:
        raise InputError(f"{source} names no tar file; check the path")
    return shards


def open_mixture(data: str, image_root: str, folder: Path) -> "Mixture":
    """What an epoch reads: sources with commas between them, perhaps with ":share" behind.

    A source is a json file or tar shards; its index is kept in `folder`. Raises InputError.
    """
    rows, shares = [], []
    for text in named_files(data):
        if not text:
            raise InputError(f"--data {data} has nothing on one side of a comma; take it away")
        source, colon, share = text.rpartition(":")
        if not colon or not re.fullmatch(r"\d*\.?\d+", share):
            source, share = text, "1"
        if float(share) <= 0:
            raise InputError(f"the share of {source} is {share}; give one above 0")
        rows.append(open_index(source, image_root, folder))
        shares.append(float(share))
    return Mixture(rows, shares, [source.root for source in rows])


def with_shares(sources: list[str], image_root: str, folder: Path, pairs: int) -> str:
    """Sources as `open_mixture` takes them, with a share of each so that an epoch has `pairs`.

    0: all of them. Raises InputError for a name with a comma among several, or with a share.
    """
    alone = len(sources) == 1 and not pairs
    for source in sources:
        if "," in source and not alone:
            raise InputError(f"{source} has a comma in its name, which stands between files; "
                             "rename the folder")
    if not pairs:
        return ",".join(sources)
    total = sum(len(open_index(source, image_root, folder)) for source in sources)
    return ",".join(f"{source}:{pairs / total:.6f}" for source in sources)


class Mixture(Sequence):
    """What an epoch reads: of each source the given share of its rows.

    0.2: a fifth, as the paper does with LAION; 2: each twice. The next epoch goes on where this one
    stopped.
    """

    def __init__(self, sources: list[Sequence], shares: list[float], roots: list[str]):
        """roots: the folder that each source's images are relative to."""
        self.sources, self.roots, self.epoch = sources, roots, 0
        self.counts = [max(1, round(share * len(rows))) for rows, share in zip(sources, shares)]

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def whole(self) -> "Mixture":
        """All rows of all sources once, which several epochs may read."""
        return Mixture(self.sources, [1.0] * len(self.sources), self.roots)

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, i: int) -> Pair:
        for rows, count, root in zip(self.sources, self.counts, self.roots):
            if i < count:
                pair = rows[(self.epoch * count + i) % len(rows)]
                path = os.path.join(root, pair.image)
                alone = len(self.sources) == 1  # of several each may number its images from 0
                return replace(pair, image=path, root=root,
                               image_id=pair.image_id if alone else name_hash(path))
            i -= count
        raise IndexError(i)
