"""Files of image-text pairs: BLIP's lists, Karpathy's and COCO's files."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.datasets import Pair, check_inside, name_hash
from data.files import InputError, is_list, read_json, stream_list
from data.text import clean_caption


def iterate_records(path: str | Path, split: str) -> Iterator[tuple[str, dict]]:
    """Each record of a BLIP list, a Karpathy file (of its `split`) or COCO annotations.

    As (where it stands, {image, caption, image_id?, domain?}). Raises InputError.
    """
    captions_by_image, form, annotations = {}, "BLIP", []
    if str(path).endswith(".tar"):
        raise InputError(f"{path}: tar shards are for train.py --data and capfilt.py --web; here "
                         "give a json file")
    if is_list(path):
        records = stream_list(path)
    else:
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise InputError(f"{path} is neither a list of {{image, caption}} records (or one "
                             "a line) nor a Karpathy or COCO file with \"images\", nor tar shards")
        form = "COCO" if is_coco(content) else "Karpathy"
        records, annotations = content["images"], content.get("annotations", [])
    needs = {"BLIP": "image and caption", "Karpathy": "filename, split and sentences[].raw",
             "COCO": "image_id and caption (annotations), id and file_name (images)"}[form]
    where, record = str(path), None
    try:
        for number, record in enumerate(annotations):
            where = f"{path}, annotation {number}"
            captions_by_image.setdefault(record["image_id"], []).append(record["caption"])
        for number, record in enumerate(records):
            where = f"{path}, record {number}"
            if form == "COCO":
                record = {**record, "image": record["file_name"], "image_id": record["id"],
                          "caption": captions_by_image.get(record["id"], [])}
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


def is_coco(content: dict) -> bool:
    """Whether it is COCO's form: annotations, or images alone (NoCaps' test set)."""
    images = content["images"]
    named = bool(images) and isinstance(images[0], dict) and "file_name" in images[0]
    return isinstance(content.get("annotations"), list) or named


def is_karpathy(path: str | Path) -> bool:
    """Whether it is a Karpathy file, which holds all splits."""
    if not str(path).endswith(".json") or is_list(path):
        return False
    content = read_json(path)
    return isinstance(content, dict) and bool(content.get("images")) and not is_coco(content)


def make_pair(where: str, record: dict, root: str, need_captions: bool = True) -> Pair:
    """A record, checked; empty captions are left out, perhaps all. Raises InputError."""
    image, captions = record["image"], record.get("caption", None if need_captions else [])
    captions = [captions] if isinstance(captions, str) else captions
    if captions is None:
        raise InputError(f"{where}: 'caption' is missing; a record needs image and caption")
    if not isinstance(image, str) or not isinstance(captions, list) or not all(
            isinstance(c, str) for c in captions):
        raise InputError(f"{where}: image must be a path and caption a text or a list of texts")
    check_inside(where, image, root)
    name = record.get("image_id")
    if name is None or name != name:  # null, NaN: its path names it
        name = image
    return Pair(image, tuple(text.strip() for text in captions if clean_caption(text)),
                name_hash(name), name, str(record.get("domain", "")))


def read_pairs(path: str | Path, image_root: str | Path | None = None, split: str = "train",
               need_captions: bool = True) -> list[Pair]:
    """Read BLIP's, Karpathy's or COCO's json.

    BLIP: a list of {image, caption: text or texts, image_id?}. Karpathy: {images: [...]}, of which
    the given split is taken ("restval" belongs to train). COCO: its annotations. Rows of one image
    are recognised by image_id, or by the path. Records without a caption are left out and counted
    on the screen. Raises InputError.
    """
    root, pairs, empty = os.path.abspath(image_root or Path(path).parent), [], []
    for where, record in iterate_records(path, split):
        pair = make_pair(where, record, root, need_captions)
        if pair.captions or not need_captions:
            pairs.append(pair)
        else:
            empty.append(where)
    if empty:
        print(f"{len(empty)} records have an empty caption (the first: {empty[0]}) and are left "
              "out", file=sys.stderr)
    if not pairs:
        if is_karpathy(path):
            raise InputError(f"{path} holds no image with a caption in split {split!r}; set "
                             f"\"split\" to {split!r} in some images, or give another file")
        raise InputError(f"{path} holds no image with a caption; give a file with some")
    return pairs


def merge_captions(pairs: list[Pair]) -> list[Pair]:
    """One Pair for each image, with the captions of all its rows, as evaluation needs it."""
    by_image: dict[tuple, list[Pair]] = {}
    for pair in pairs:  # an id that a file gives to two pictures does not make them one
        by_image.setdefault((pair.image_id, pair.image), []).append(pair)
    return [replace(rows[0], captions=tuple(text for row in rows for text in row.captions))
            for rows in by_image.values()]
