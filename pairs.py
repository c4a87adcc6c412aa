"""Files of image-text pairs, as users bring them.

    read_pairs(path)      BLIP list, Karpathy or COCO json -> a list of Pair
    tar_records(path)     img2dataset's shards: key.jpg, key.txt or key.json
    Rows                  a json list or tar shards of any size, row by row from the disk
    Mixture               what an epoch reads: several sources, a share of each

A mistake in a file is an InputError: one sentence that names the file, the record and the remedy.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import InputError, clean_caption


@dataclass(frozen=True)
class Pair:
    """An image and its captions as they were written. `image` is relative to the image root."""

    image: str
    captions: tuple[str, ...]
    image_id: int  # equal for the rows of one image
    name: str | int = ""  # the file's own id of the image, or its path: for result files
    domain: str = ""  # NoCaps: in-domain, near-domain or out-domain


def read_json(path: str | Path):
    """The parsed file; InputError where it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})")
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid json: {error.msg} in line {error.lineno}, "
                         f"column {error.colno} (near "
                         f"{error.doc[max(error.pos - 20, 0):error.pos + 20]!r}); repair it there")


def number_of(name: str | int) -> int:
    """A 63-bit number that stands for an image's name, the same in every run."""
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "big") >> 1


def stream_list(path: str | Path) -> Iterator:
    """The elements of a json list, or of a file with one json value a line, without holding the
    whole."""
    decoder, text, position, number = json.JSONDecoder(), "", 0, 0
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(1 << 20)
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
                    more = file.read(1 << 20)
                    if more and len(text) - position < 1 << 26:
                        text, position = text[position:] + more, 0
                    elif more or position < len(text) or str(path).endswith(".json"):
                        if os.path.getsize(path) < 1 << 28:
                            read_json(path)  # says where
                        raise InputError(f"{path}, record {number}: no valid json; repair it there")
                    else:
                        return
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})")


def records_of(path: str | Path, split: str) -> Iterator[tuple[str, dict]]:
    """Each record of a BLIP list, a Karpathy file (of its `split`) or COCO annotations as (where it
    stands, {image, caption, image_id?, domain?}). Raises InputError."""
    by_image, form, notes = {}, "BLIP", []
    if is_list(path):
        records = stream_list(path)
    else:
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise InputError(f"{path} is neither a list of {{image, caption}} records nor a "
                             "Karpathy or COCO file with \"images\"")
        form = "COCO" if isinstance(content.get("annotations"), list) else "Karpathy"
        records, notes = content["images"], content.get("annotations", [])
    needs = {"BLIP": "image and caption", "Karpathy": "filename, split and sentences[].raw",
             "COCO": "image_id and caption (annotations), id and file_name (images)"}[form]
    where, record = str(path), None
    try:
        for number, record in enumerate(notes):
            where = f"{path}, annotation {number}"
            by_image.setdefault(record["image_id"], []).append(record["caption"])
        for number, record in enumerate(records):
            where = f"{path}, record {number}"
            if form == "COCO":
                record = {**record, "image": record["file_name"], "image_id": record["id"],
                          "caption": by_image.get(record["id"], [])}
            elif form == "Karpathy":
                if split != ("train" if record["split"] == "restval" else record["split"]):
                    continue
                image = str(Path(record.get("filepath", "")) / record["filename"])
                record = {"image": image, "caption": [s["raw"] for s in record["sentences"]],
                          "image_id": record.get("cocoid", record.get("imgid", image))}
            elif "img_id" in record:
                record = {**record, "image_id": record["img_id"]}
            yield where, {**record, "image": record["image"]}
    except (KeyError, TypeError, AttributeError) as error:
        missing = (f"{error} is missing" if isinstance(error, KeyError)
                   else f"it is {str(record)[:60]!r}")
        if isinstance(record, dict) and "url" in record:
            missing += " (a url alone is no image: download them first, with img2dataset for one)"
        raise InputError(f"{where}: {missing}; a record needs {needs}")


def is_list(path: str | Path) -> bool:
    """Whether the file is a json list or has one json value a line."""
    try:
        with open(path, "rb") as file:
            return str(path).endswith(".jsonl") or file.read(64).lstrip(b" \n\r\t\xef\xbb\xbf")[
                :1] == b"["
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})")


def pair_of(where: str, record: dict, root: str, need_captions: bool = True) -> Pair:
    """A record, checked; its captions are those that are not empty, perhaps none. Raises
    InputError."""
    image, captions = record["image"], record.get("caption", None if need_captions else [])
    captions = [captions] if isinstance(captions, str) else captions
    if captions is None:
        raise InputError(f"{where}: 'caption' is missing; a record needs image and caption")
    if not isinstance(image, str) or not isinstance(captions, list) or not all(
            isinstance(c, str) for c in captions):
        raise InputError(f"{where}: image must be a path and caption a text or a list of texts")
    if not os.path.normpath(os.path.join(root, image)).startswith(os.path.join(root, "")):
        raise InputError(f"{where}: image {image!r} lies outside the image root {root}; correct "
                         "the path or give another --image-root")
    name = record.get("image_id", image)
    return Pair(image, tuple(text.strip() for text in captions if clean_caption(text)),
                number_of(name), name, record.get("domain", ""))


def read_pairs(path: str | Path, image_root: str | Path | None = None, split: str = "train",
               need_captions: bool = True) -> list[Pair]:
    """Read BLIP json (a list of {image, caption: text or texts, image_id?}), Karpathy json
    ({images: [...]}, of which the given split is taken; "restval" belongs to train) or COCO
    annotations. Rows of one image are told by image_id, or by the path.

    Records without a caption are left out and counted on the screen. Raises InputError.
    """
    root, pairs, empty = os.path.abspath(image_root or Path(path).parent), [], []
    for where, record in records_of(path, split):
        pair = pair_of(where, record, root, need_captions)
        if pair.captions or not need_captions:
            pairs.append(pair)
        else:
            empty.append(where)
    if empty:
        print(f"{len(empty)} records have an empty caption (the first: {empty[0]}) and are left "
              "out", file=sys.stderr)
    if not pairs:
        raise InputError(f"{path} holds no image with a caption in split {split!r}")
    return pairs


def merge_captions(pairs: list[Pair]) -> list[Pair]:
    """One Pair for each image, with the captions of all its rows: what evaluation wants."""
    by_image: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_image.setdefault(pair.image_id, []).append(pair)
    return [replace(rows[0], captions=tuple(text for row in rows for text in row.captions))
            for rows in by_image.values()]


# ---- millions of pairs ---------------------------------------------------------------------------

def tar_records(path: str | Path, skipped: Counter) -> Iterator[tuple[str, dict]]:
    """The image-text pairs of an img2dataset shard as (where, {image: "shard.tar::offset:size",
    caption, image_id: key}); what is no pair or not safe is counted in `skipped`. A shard that
    breaks off gives what stands before the break."""
    known, images, texts = set(Image.registered_extensions()), {}, {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, extension = os.path.splitext(member.name)
                if not member.isfile() or key.startswith("/") or ".." in Path(key).parts:
                    skipped["unsafe or no file"] += not member.isdir()
                elif extension.lower() in known:
                    images[key] = (member.offset_data, member.size)
                elif extension in (".txt", ".json") and member.size < 1 << 20:
                    content = archive.extractfile(member).read().decode("utf-8", "replace")
                    if extension == ".txt":
                        texts[key] = content
                    elif key not in texts:
                        try:
                            texts[key] = json.loads(content)["caption"]
                        except (ValueError, KeyError, TypeError):
                            skipped["json without a caption"] += 1
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if not os.path.exists(path):
            raise InputError(f"{path} does not exist; check the path")
        skipped[f"{path} is broken: {error}"] += 1
    size = os.path.getsize(path)
    for key, (offset, length) in images.items():
        if not isinstance(texts.get(key), str) or not clean_caption(texts[key]):
            skipped["no caption"] += 1
        elif offset + length > size:
            skipped["cut off"] += 1
        else:
            yield f"{path}, {key}", {"image": f"{Path(path).name}::{offset}:{length}",
                                     "caption": texts[key], "image_id": f"{Path(path).name} {key}"}


INDEX_FORMAT = 2  # an index of another format is built anew


class Rows(Sequence):
    """The pairs of a source, one for each caption, read from two files when they are asked for:
    rows (json, one after the other) and offsets (int64). `skipped` counts what was left out.

    A loader's worker holds two file handles, however many rows there are. (Plain reads, because the
    pages of a memory map would count as its memory once they are touched.)
    """

    def __init__(self, folder: Path, root: str):
        """root: the folder that the images are relative to."""
        self.folder, self.root, self.files = folder, root, None
        self.count = os.path.getsize(folder / "offsets") // 8 - 1
        self.skipped: dict[str, int] = read_json(folder / "skipped")  # why, and how many

    @classmethod
    def of(cls, source: str, image_root: str | Path | None, folder: Path) -> "Rows":
        """Open the index of a json file or of tar shards (a .tar, a folder or a pattern), or build
        it, once, in a folder of its own under `folder`. Raises InputError."""
        shards = shards_of(source)
        root = os.path.abspath(image_root or Path(shards[0] if shards else source).parent)
        files = [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in shards or [source]
                 if os.path.exists(p)]
        stamp = hashlib.sha256(repr([INDEX_FORMAT, root] + files).encode()).hexdigest()[:16]
        index = folder / f"{Path((shards or [source])[0]).stem}-{stamp}"
        if not index.exists():
            cls.build(source, shards, root, index)
        return cls(index, root)

    @staticmethod
    def build(source: str, shards: list[str], root: str, index: Path) -> None:
        """Write the index; it takes its name when it is whole, and nothing stays if it fails."""
        temporary, skipped, position = Path(f"{index}.{os.getpid()}"), Counter(), 0
        temporary.mkdir(parents=True, exist_ok=True)
        records = (r for shard in shards for r in tar_records(shard, skipped)) if shards else (
            records_of(source, "train"))
        offsets = array("q", [0])
        try:
            with open(temporary / "rows", "wb") as rows, open(temporary / "offsets", "wb") as ends:
                for where, record in tqdm(records, f"indexing {source}", unit="row", leave=False,
                                          delay=1):
                    pair = pair_of(where, record, root)
                    skipped["no caption"] += not pair.captions
                    for text in pair.captions:
                        row = json.dumps([pair.image, text, pair.image_id]).encode()
                        rows.write(row)
                        position += len(row)
                        offsets.append(position)
                    if len(offsets) > 1 << 16:
                        offsets.tofile(ends)
                        del offsets[:]
                offsets.tofile(ends)
            if position == 0:
                raise InputError(f"{source} holds no image with a caption")
            skipped = Counter({reason: count for reason, count in skipped.items() if count})
            (temporary / "skipped").write_text(json.dumps(skipped))
            if not index.exists():  # else another process was as quick
                temporary.rename(index)
        except OSError as error:
            raise InputError(f"the index of {source} could not be written to {index.parent} "
                             f"({error}); make room, or give another --out")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if skipped.total():
            reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
            print(f"{source}: left out: {reasons}", file=sys.stderr)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Pair:
        if not 0 <= i < self.count:
            raise IndexError(i)
        if self.files is None:
            self.files = [os.open(self.folder / name, os.O_RDONLY) for name in ("offsets", "rows")]
        start, end = array("q", os.pread(self.files[0], 16, 8 * i))
        image, text, image_id = json.loads(os.pread(self.files[1], end - start, start))
        return Pair(image, (text,), image_id, image)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "files": None}  # each process opens its own


def shards_of(source: str) -> list[str]:
    """The tar files that a source names; none if it is a json file."""
    if os.path.isdir(source):
        source = os.path.join(glob.escape(source), "*.tar")
    found = sorted(glob.glob(source)) if source.endswith(".tar") else []
    if source.endswith(".tar") and not found:
        raise InputError(f"{source} names no tar file; check the path")
    return found


def open_mixture(data: str, image_root: str | None, folder: Path) -> "Mixture":
    """data: sources with commas between them, each a json file or tar shards, perhaps with ":share"
    behind -> what an epoch reads. Indices are kept in `folder`. Raises InputError."""
    rows, shares = [], []
    for text in data.split(","):
        source, colon, share = text.rpartition(":")
        if not colon or not re.fullmatch(r"\d*\.?\d+", share):
            source, share = text, "1"
        if float(share) <= 0:
            raise InputError(f"the share of {source} is {share}; give one above 0")
        rows.append(Rows.of(source, image_root, folder))
        shares.append(float(share))
    return Mixture(rows, shares, [source.root for source in rows])


class Mixture(Sequence):
    """What an epoch reads: of each source the given share of its rows (0.2: a fifth, as the paper
    does with LAION; 2: each twice), the next epoch going on where this one stopped."""

    def __init__(self, sources: list[Sequence], shares: list[float], roots: list[str]):
        """roots: the folder that each source's images are relative to."""
        self.sources, self.roots, self.epoch = sources, roots, 0
        self.counts = [max(1, round(share * len(rows))) for rows, share in zip(sources, shares)]

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, i: int) -> Pair:
        for rows, count, root in zip(self.sources, self.counts, self.roots):
            if i < count:
                pair = rows[(self.epoch * count + i) % len(rows)]
                return replace(pair, image=os.path.join(root, pair.image))
            i -= count
        raise IndexError(i)
