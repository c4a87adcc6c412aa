"""A web set, worked through shard by shard: a crash costs a shard, and what is written is whole.

    for shard in pending(web, out, ...):     # those of this process that are not done yet
        write(shard, texts of its images)    # one file each
    merge(web, human, out)                   # -> bootstrapped.json, rejected.json, report.json

A shard is a range of rows. It is done when its file is there; its content is a function of the
settings alone, whoever computes it and whenever. Processes share the shards out.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.datasets import Pair, name_hash
from data.files import InputError, make_folder, read_json, whole_file, write_json
from data.images import load_image, open_member
from data.pairs import merge_captions
from data.sources import PairIndex
from training import distributed

ENOUGH = 20  # images of a shard: if none of this many can be read, the folder is the wrong one


class ShardImages(Dataset):
    """The images of a shard at one or several sizes.

    Items (number, {size: (3, S, S) uint8}), or (number, why it cannot be read).
    """

    def __init__(self, pairs: list[Pair], root: str, sizes: set[int]):
        self.pairs, self.root, self.sizes = pairs, root, sizes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[int, dict[int, Tensor] | str]:
        name = self.pairs[i].image
        try:
            return i, {size: load_image(open_member(self.root, name), size) for size in self.sizes}
        except OSError as error:
            return i, str(error)


@dataclass
class Shard:
    """One shard: where its outcome goes, and its images with their web texts."""

    path: Path
    pairs: list[Pair]  # one for each image
    root: str  # that the images are relative to
    seed: int
    bar: tqdm  # counts texts
    broken: Counter = field(default_factory=Counter)  # why images could not be read

    def batches(self, sizes: set[int], batch_size: int,
                workers: int) -> Iterator[tuple[list[Pair], dict[int, Tensor], int]]:
        """(B pairs, {image size: (B, 3, S, S) uint8}, seed) of the images that can be read."""
        loader = DataLoader(ShardImages(self.pairs, self.root, sizes), batch_size,
                            num_workers=workers, collate_fn=list, generator=torch.Generator())
        for number, items in enumerate(loader):
            pairs, pictures = [], []
            for i, loaded in items:
                if isinstance(loaded, str):
                    self.broken[loaded] += 1
                else:
                    pairs.append(self.pairs[i])
                    pictures.append(loaded)
            if pairs:
                images = {size: torch.stack([picture[size] for picture in pictures])
                          for size in sizes}
                yield pairs, images, zlib.crc32(f"{self.seed} {number}".encode())
            self.bar.update(sum(len(self.pairs[i].captions) for i, _ in items))


def shard_bounds(web: PairIndex, size: int) -> list[tuple[int, int]]:
    """[start, end) of each shard: about `size` rows; neighbours with one image stay together."""
    starts = []
    for start in range(0, len(web), size):
        while 0 < start < len(web) and web[start].image == web[start - 1].image:
            start += 1
        if start < len(web) and (not starts or start != starts[-1]):
            starts.append(start)
    return list(zip(starts, starts[1:] + [len(web)]))


def shard_path(out: Path, number: int) -> Path:
    """The file of a shard's outcome."""
    return out / "shards" / f"{number:06d}.json"


def claim(out: Path, settings: dict) -> None:
    """Note in settings.json what the shards in `out` are made with.

    InputError if there are some that were made otherwise.
    """
    make_folder(out / "shards")
    path, settings = out / "settings.json", json.loads(json.dumps(settings))
    if not path.exists() or not any((out / "shards").glob("*.json")):
        write_json(path, settings)
        return
    before = read_json(path)
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        raise InputError(f"{out} holds shards made with another {', '.join(changed)} (see {path}); "
                         "give another --out, or what they were made with")


def pending(web: PairIndex, out: Path, settings: dict, shard_size: int,
            seed: int) -> Iterator[Shard]:
    """This process's shards that are not done yet. All processes call it.

    `settings` is all that the outcome depends on. Raises InputError where `out` holds shards that
    were made with others.
    """
    if distributed.rank() == 0:
        claim(out, settings | {"shard_size": shard_size, "seed": seed})
    distributed.barrier()
    shards = [(shard_path(out, number), start, end)
              for number, (start, end) in enumerate(shard_bounds(web, shard_size))]
    own = distributed.own_part(shards)
    total = sum(end - start for _, start, end in own)
    done = sum(end - start for path, start, end in own if path.exists())
    with distributed.progress(about="CapFilt", total=total, initial=done, unit="text") as bar:
        for path, start, end in own:
            if not path.exists():
                pairs = merge_captions([web[i] for i in range(start, end)])
                yield Shard(path, pairs, web.root, zlib.crc32(f"{seed} {start}".encode()), bar)
    distributed.barrier()


def write(shard: Shard, images: list[dict]) -> None:
    """Write a shard's outcome: for each image {image, texts: [{caption, source, kept, ...}]}.

    Raises InputError where none of ENOUGH images can be read.
    """
    if not images and len(shard.pairs) >= ENOUGH:
        reason = next(iter(shard.broken))
        raise InputError(f"none of the {len(shard.pairs)} images of shard {shard.path.stem} can be "
                         f"read (the first: {shard.pairs[0].image} in {shard.root}, {reason}); is "
                         "--image-root right?")
    write_json(shard.path, {"images": images, "broken": shard.broken}, indent=None)


def common_root(web: PairIndex, human: PairIndex | None) -> str:
    """The folder that the images of a set are relative to. Raises InputError if there is none."""
    try:
        return os.path.commonpath([web.root, human.root] if human else [web.root])
    except ValueError:
        raise InputError(f"{web.root} and {human.root} are on two drives; put the images on one")


def merge(web: PairIndex, human: PairIndex | None, out: Path, shard_size: int) -> dict:
    """The shards -> bootstrapped.json, rejected.json and report.json; returns the report.

    "examples" in the returned report are some images with their texts, for a sheet. One shard at a
    time is in memory. Raises InputError where no image of any shard could be read.
    """
    paths = [shard_path(out, number) for number in range(len(shard_bounds(web, shard_size)))]
    root = common_root(web, human)
    counts, broken, images, examples = Counter(), Counter(), 0, []
    for path in paths:
        shard = read_json(path)
        broken.update(shard["broken"])
        images += len(shard["images"])
        counts.update((text["source"], text["kept"]) for record in shard["images"]
                      for text in record["texts"])
        # The images that a hash puts first, the same ones every time.
        examples = sorted(examples + shard["images"], key=lambda r: name_hash(r["image"]))[:24]
    if not images:
        for path in paths:
            path.unlink()
        raise InputError(f"none of the images of the web texts can be read (the first: "
                         f"{web[0].image} in {web.root}, {next(iter(broken))}); is --image-root "
                         "right?")
    for name, kept in (("bootstrapped", True), ("rejected", False)):
        write_records(out / f"{name}.json", records(paths, kept, human if kept else None),
                      web.root, human.root if human else "", root)
    report = {"image_root": root, "images": images, "broken": dict(broken),
              "left_out": web.skipped, "human": len(human) if human else 0}
    for source in ("web", "synthetic"):
        kept, dropped = counts[source, True], counts[source, False]
        report |= {f"{source}_kept": kept, f"{source}_rejected": dropped,
                   f"{source}_kept_rate": round(kept / max(kept + dropped, 1), 4)}
    write_json(out / "report.json", report)
    return report | {"examples": examples}


def records(paths: list[Path], kept: bool, human: PairIndex | None) -> Iterator[dict]:
    """{image, caption, source, ...} of each text that was kept, or rejected; human ones first."""
    for pair in human or ():
        yield {"image": pair.image, "caption": pair.captions[0], "source": "human"}
    for path in paths:
        for record in read_json(path)["images"]:
            for text in record["texts"]:
                if text["kept"] == kept:
                    yield {"image": record["image"], **text}


def write_records(path: Path, texts: Iterator[dict], web_root: str, human_root: str,
                  root: str) -> None:
    """Write a json list, one record a line; images become relative to `root`."""
    with whole_file(path) as file:
        start = "[\n"
        for record in texts:
            folder = human_root if record["source"] == "human" else web_root
            image = os.path.relpath(os.path.join(folder, record["image"]), root)
            file.write(start + json.dumps({**record, "image": image}))
            start = ",\n"
        file.write("[]\n" if start == "[\n" else "\n]\n")
