"""The world as a web to be cleaned: a noisy web set and a small clean human set, as files.

And what only the world can say of a bootstrapped set: which of its texts are true.
"""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from config import check_settings, setting
from data.files import InputError, make_folder, read_json, refuse_own_files, whole_file
from data.text import Tokenizer
from training import distributed
from world.datasets import World
from world.language import all_captions, is_true

# The recipe of `python train.py`; every set is seen for the same number of steps. More steps of LM
# alone at the start: noisy texts hurt LM less than they hurt ITC and ITM.
WORLD_RECIPE = {"augment": False, "workers": 0, "min_steps": 0}
WORLD_PRETRAIN, WORLD_PAIRS = WORLD_RECIPE | {"lm_only_steps": 800}, 44800
WORLD_FINETUNE = WORLD_RECIPE | {"epochs": 16}


@dataclass(frozen=True)
class WorldSets:
    """The world's web and human sets, which stand in for missing --web and --human."""

    world_web: int = setting(6000, "web images, with one text each", least=1)
    world_human: int = setting(1000, "human pairs, all true", least=1)
    world_noise: float = setting(0.5, "share of web texts that are bad: another's, one word wrong, "
                                      "or junk", least=0, most=1)
    held_out: int = setting(1000, "scenes that the models are judged on", least=1)

    def __post_init__(self):
        check_settings(self)

    def web(self, seed: int) -> World:
        """The web set; item i is web/i.png."""
        return World("train", self.world_web, seed=seed, noise=self.world_noise)

    def save(self, folder: Path, seed: int) -> None:
        """Write web.json, human.json, their pictures and vocab.txt, unless they are there.

        InputError where the folder holds another world's.
        """
        path, made_of = folder / "world.json", json.dumps(asdict(self) | {"seed": seed})
        if path.exists():  # written last
            there = path.read_text(encoding="utf-8")
            if there != made_of:
                raise InputError(f"{folder} holds the sets of another seed or world ({there}); "
                                 "give another --out")
            return
        self.web(seed).save(folder, "web")
        World("train", self.world_human, seed=seed + 1_000_000).save(folder, "human")
        tokenizer = Tokenizer.train(all_captions(), 4000)
        with whole_file(folder / "vocab.txt") as file:
            file.writelines(token + "\n" for token in tokenizer.state())
        with whole_file(path) as file:
            file.write(made_of)


WRITTEN = ("bootstrapped.json", "rejected.json")  # by capfilt.py, into --out


def stand_in(options: Namespace, world: WorldSets, out: Path) -> WorldSets | None:
    """Without --web: the world's sets, written into out/data, become options, and its recipe.

    Returns what stands in: the world, or None where there is --web. Raises InputError for a file
    that would be written over, and for --human alone.
    """
    o = options
    if o.web:
        refuse_own_files([file for file in (o.web, o.human) if Path(file).name in WRITTEN], out)
        return None
    if o.human or o.image_root:
        flag = "--human" if o.human else "--image-root"
        raise InputError(f"{flag} is of own data: give --web too, or leave it out")
    folder = make_folder(out / "data")
    distributed.print0(f"== the world's web and human pairs, as files in {folder}")
    if distributed.rank() == 0:
        world.save(folder, o.seed)
    distributed.barrier()
    o.web, o.human = str(folder / "web.json"), str(folder / "human.json")
    o.pairs = o.pairs or WORLD_PAIRS
    # For what is pretrained; what starts from --init has its own vocabulary.
    vocab = {"vocab": o.vocab or str(folder / "vocab.txt")}
    o.pretrain = WORLD_PRETRAIN | vocab | (o.pretrain or {})
    if o.finetune is not None or not (o.captioner or o.filter):
        o.finetune = WORLD_FINETUNE | (o.finetune or {})
    return world


def truth_of_set(folder: Path, web: World) -> dict[str, float]:
    """What the world says of a bootstrapped set, for each source of texts.

    SOURCE_true: share of true texts among all, SOURCE_kept_true: among the kept, SOURCE_true_kept:
    share of the true ones that were kept.
    """
    verdicts: dict[str, list[tuple[bool, bool]]] = {"web": [], "synthetic": []}
    for name, kept in (("bootstrapped", True), ("rejected", False)):
        for record in read_json(folder / f"{name}.json"):
            if record["source"] in verdicts:
                scene = web.scene(int(Path(record["image"]).stem))
                verdicts[record["source"]].append((kept, is_true(record["caption"], scene)))
    shares = {}
    for source, rows in verdicts.items():
        shares[f"{source}_true"] = fraction(true for _, true in rows)
        shares[f"{source}_kept_true"] = fraction(true for kept, true in rows if kept)
        shares[f"{source}_true_kept"] = fraction(kept for kept, true in rows if true)
    return shares


def fraction(flags) -> float:
    """How many of the flags are true, as a fraction; 0 for none."""
    flags = list(flags)
    return sum(flags) / max(len(flags), 1)
