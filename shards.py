"""A web set, judged shard by shard: what a crash costs is a shard, what is written is whole.

    judge_all(web, judge, ...)    run `judge` over all images; each shard's outcome is one file
    merge(paths, web, human, out) the outcomes -> bootstrapped.json, rejected.json, report, sheet

A shard is a range of rows. It is done when its file is there; its content is a function of the
settings alone, whoever computes it and whenever. Ranks share the shards out.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import distributed
from data import InputError, load_image, open_member
from pairs import Pair, Rows, merge_captions, number_of, read_json
from sheets import BLACK, GREEN, RED, Cell, draw_sheet

# (B images' pairs, {image size: (B, 3, S, S) uint8}, seed) -> each image's texts as {caption,
# source, kept, ...}
Judge = Callable[[list[Pair], dict[int, Tensor], int], list[list[dict]]]


class Pictures(Dataset):
    """The images of a shard as (number, {size: (3, S, S) uint8}), or (number, why it cannot be
    read)."""

    def __init__(self, pairs: list[Pair], root: str, sizes: set[int]):
        self.pairs, self.root, self.sizes = pairs, Path(root), sizes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[int, dict[int, Tensor] | str]:
        try:
            return i, {size: load_image(open_member(self.root / self.pairs[i].image), size)
                       for size in self.sizes}
        except OSError as error:
            return i, str(error)


def shard_bounds(rows: Rows, size: int) -> list[tuple[int, int]]:
    """[start, end) of each shard: about `size` rows, and an image's rows are never parted."""
    starts = []
    for start in range(0, len(rows), size):
        while 0 < start < len(rows) and rows[start].image == rows[start - 1].image:
            start += 1
        if start < len(rows) and start not in starts[-1:]:
            starts.append(start)
    return list(zip(starts, starts[1:] + [len(rows)]))


def judge_shard(pairs: list[Pair], root: str, judge: Judge, sizes: set[int], batch_size: int,
                seed: int, workers: int, bar) -> dict:
    """-> {"images": [{image, texts}], "broken": {reason: count}}: all that a shard's file holds."""
    images, broken = [], Counter()
    loader = DataLoader(Pictures(pairs, root, sizes), batch_size, num_workers=workers,
                        collate_fn=list, generator=torch.Generator())
    for number, batch in enumerate(loader):
        readable = [(pairs[i], found) for i, found in batch if not isinstance(found, str)]
        broken.update(found for _, found in batch if isinstance(found, str))
        if readable:
            known, loaded = zip(*readable)
            pictures = {size: torch.stack([picture[size] for picture in loaded]) for size in sizes}
            judged = judge(known, pictures, zlib.crc32(f"{seed} {number}".encode()))
            images += [{"image": pair.image, "texts": texts} for pair, texts in zip(known, judged)]
        bar.update(sum(len(pairs[i].captions) for i, _ in batch))
    return {"images": images, "broken": broken}


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write a file that is there whole or not at all. InputError where it cannot be written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} could not be written ({error.strerror}); what was done before is "
                         "whole: make room, and give the same command again")
    finally:
        temporary.unlink(missing_ok=True)


def claim(out: Path, settings: dict) -> None:
    """Note in settings.json what the shards in `out` are made with; InputError if there are some
    that were made otherwise."""
    try:
        (out / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made ({error}); give another --out")
    path, settings = out / "settings.json", json.loads(json.dumps(settings))
    if path.exists():
        before = read_json(path)
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise InputError(f"{out} holds shards made with another {', '.join(changed)} (see "
                             f"{path}); give another --out, or what they were made with")
    else:
        write_whole(path, [json.dumps(settings, indent=1) + "\n"])


def judge_all(web: Rows, judge: Judge, sizes: set[int], out: Path, settings: dict,
              shard_size: int, batch_size: int, seed: int, workers: int) -> list[Path]:
    """Run `judge` over all of `web` that is not done yet -> the shards' files, in order. `settings`
    is all that the outcome depends on. All ranks call it."""
    if distributed.rank() == 0:
        claim(out, settings)
    distributed.barrier()
    bounds = shard_bounds(web, shard_size)
    paths = [out / "shards" / f"{number:06d}.json" for number in range(len(bounds))]
    own = distributed.share(list(zip(paths, bounds)))
    done = sum(end - start for path, (start, end) in own if path.exists())
    with distributed.progress(about="CapFilt", total=sum(end - start for _, (start, end) in own),
                              initial=done, unit="text") as bar:
        for path, (start, end) in own:
            if path.exists():
                continue
            pairs = merge_captions([web[i] for i in range(start, end)])
            found = judge_shard(pairs, web.root, judge, sizes, batch_size,
                                zlib.crc32(f"{seed} {start}".encode()), workers, bar)
            if not found["images"]:
                raise InputError(f"none of the {len(pairs)} images of shard {path.stem} can be "
                                 f"read (the first: {pairs[0].image} in {web.root}, "
                                 f"{[*found['broken']][0]}); is --image-root right?")
            write_whole(path, [json.dumps(found)])
    distributed.barrier()
    return paths


def merge(paths: list[Path], web: Rows, human: Rows | None, out: Path) -> dict:
    """The shards -> bootstrapped.json, rejected.json, report.json and sheet.png. One shard at a
    time is in memory."""
    root = os.path.commonpath([web.root, human.root] if human else [web.root])
    counts, broken, images, chosen = Counter(), Counter(), 0, []
    for path in paths:
        shard = read_json(path)
        broken.update(shard["broken"])
        images += len(shard["images"])
        counts.update((text["source"], text["kept"]) for record in shard["images"]
                      for text in record["texts"])
        # For the sheet: the images that a hash puts first, the same ones every time.
        chosen = sorted(chosen + shard["images"], key=lambda r: number_of(r["image"]))[:24]

    def lines(kept: bool) -> Iterator[str]:
        """A json list, one record a line."""
        start = "[\n"
        for record in records(paths, kept, human if kept else None):
            folder = human.root if record["source"] == "human" else web.root
            image = os.path.relpath(os.path.join(folder, record["image"]), root)
            yield start + json.dumps({**record, "image": image})
            start = ",\n"
        yield "\n]\n" if start == ",\n" else "[]\n"

    write_whole(out / "bootstrapped.json", lines(True))
    write_whole(out / "rejected.json", lines(False))
    report = {"image_root": root, "images": images, "broken": dict(broken),
              "left_out": web.skipped, "human": len(human) if human else 0}
    for source in ("web", "synthetic"):
        kept, dropped = counts[source, True], counts[source, False]
        report |= {f"{source}_kept": kept, f"{source}_rejected": dropped,
                   f"{source}_kept_rate": round(kept / max(kept + dropped, 1), 4)}
    write_whole(out / "report.json", [json.dumps(report, indent=1) + "\n"])
    draw_examples(out / "sheet.png", chosen, Path(web.root))
    return report


def records(paths: list[Path], kept: bool, human: Rows | None) -> Iterator[dict]:
    """{image, caption, source, ...} of each text that was kept, or rejected; the human ones
    first."""
    for pair in human or ():
        yield {"image": pair.image, "caption": pair.captions[0], "source": "human"}
    for path in paths:
        for record in read_json(path)["images"]:
            for text in record["texts"]:
                if text["kept"] == kept:
                    yield {"image": record["image"], **text}


def draw_examples(path: Path, images: list[dict], root: Path) -> None:
    """The paper's Fig. 4: an image, its web text (W), its synthetic text (S), accepted in green or
    rejected in red."""
    cells = []
    for record in images:
        lines = [(f"{text['source'][0].upper()}: {text['caption'][:120]}"
                  + "".join(f" ({value:.2f})" for value in text.get("itm", [])),
                  GREEN if text["kept"] else RED) for text in record["texts"][:6]]
        cells.append(Cell(load_image(open_member(root / record["image"]), 128), lines))
    rows = [cells[i:i + 6] for i in range(0, len(cells), 6)]
    draw_sheet(path, [("W: web text, S: synthetic text; green: accepted, red: rejected by the "
                       "filter (ITM probability)", rows or [[Cell(None, [("none", BLACK)])]])])
