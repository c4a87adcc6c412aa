"""Lists of emoji: small real pictures with names, drawn by several hands.

    for set in google twitter facebook apple; do       # npm's packages, about 80 MB each
        name=emoji-datasource-$set
        curl -L https://registry.npmjs.org/$name/-/$name-16.0.0.tgz |
            tar xz --one-top-level=emoji/$set --strip-components=1
    done
    python -m tools.emoji emoji                        # writes emoji/train.json and others
    python train.py --data emoji/train.json --val emoji/held.json --image-root emoji

The pictures belong to others and are not part of this project.

train.json has three sets of drawings. held.json has pictures of the fourth: drawings that nobody
saw, of names that are known. web.json and human.json are for CapFilt: of the training pictures nine
in ten with half of the names shuffled, and one in ten with true names.
"""

import argparse
import random
import sys
from pathlib import Path

from data.files import InputError, read_json, require_object, write_json

TRAIN, HELD_OUT = ("google", "twitter", "facebook"), "apple"
GALLERY = 720  # pictures of the held-out set that are searched


def pictures(folder: Path, name: str) -> list[dict]:
    """{image, caption} of each emoji of a set. Raises InputError where the set is not there."""
    listing = folder / name / "emoji.json"
    if not listing.exists():
        raise InputError(f"{listing} does not exist; unpack emoji-datasource-{name} into "
                         f"{folder / name} (python -m tools.emoji --help shows how)")
    records, emojis = [], read_json(listing)
    for number, emoji in enumerate(emojis if isinstance(emojis, list) else [emojis]):
        where = f"{listing}, record {number}"
        require_object(where, emoji, "image, name and short_name")
        missing = [key for key in ("image", "name", "short_name") if key not in emoji]
        if missing:
            raise InputError(f"{where}: {missing[0]!r} is missing; unpack emoji-datasource-{name} "
                             "anew")
        image = f"{name}/img/{name}/64/{emoji['image']}"
        if (folder / image).exists():
            caption = (emoji["name"] or emoji["short_name"].replace("_", " ")).lower()
            records.append({"image": image, "caption": caption})
    return records


def shuffled(records: list[dict], share: float, rng: random.Random) -> list[dict]:
    """The records, of which a share has another one's caption."""
    chosen = rng.sample(range(len(records)), int(share * len(records)))
    wrong = [dict(record) for record in records]
    for place, index in enumerate(chosen):
        wrong[index]["caption"] = records[chosen[place - 1]]["caption"]
    return wrong


def write_lists(folder: Path, seed: int) -> dict[str, int]:
    """Write the four lists -> how many pairs each has."""
    rng = random.Random(seed)
    train = [record for name in TRAIN for record in pictures(folder, name)]
    held = pictures(folder, HELD_OUT)
    rng.shuffle(held)
    mixed = rng.sample(train, len(train))
    human, web = mixed[:len(mixed) // 10], mixed[len(mixed) // 10:]
    lists = {"train": train, "held": held[:GALLERY], "human": human,
             "web": shuffled(web, 0.5, rng)}
    for name, records in lists.items():
        write_json(folder / f"{name}.json", records)
    return {name: len(records) for name, records in lists.items()}


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with one folder for each set")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    o = parser.parse_args(arguments)
    try:
        for name, count in write_lists(o.folder, o.seed).items():
            print(f"wrote {o.folder}/{name}.json: {count} pairs")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
