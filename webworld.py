"""The built-in world as a web to be cleaned: its noisy web set and its human set as files, and what
only the world can say of a bootstrapped set and of the model that learnt from it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import checkpoints
import distributed
from captioning import Decoding
from data import InputError, Tokenizer
from eval import evaluate_pretraining
from pairs import read_json
from report import mean
from shards import write_whole
from world import World, all_captions, is_true

MEASURES = {"t2i_r1": "text-to-image R@1", "i2t_r1": "image-to-text R@1",
            "itm_swap": "ITM prefers the true text", "caption_true": "captions wholly true"}


@dataclass(frozen=True)
class WorldSets:
    """The world's web and human sets, which stand in for missing --web and --human."""

    world_web: int = 6000  # web images, with one text each
    world_human: int = 1000  # human pairs, all true
    world_noise: float = 0.5  # share of web texts that are bad: another's, one word wrong, or junk
    held_out: int = 1000  # scenes that the models are judged on

    def web(self, seed: int) -> World:
        """The web set; item i is web/i.png."""
        return World("train", self.world_web, seed=seed, noise=self.world_noise)

    def save(self, folder: Path, seed: int) -> None:
        """Write web.json, human.json, their pictures and vocab.txt, unless they are there.
        InputError where the folder holds another world's."""
        path, made_of = folder / "world.json", json.dumps(asdict(self) | {"seed": seed})
        if path.exists():  # written last
            if path.read_text() != made_of:
                raise InputError(f"{folder} holds the sets of another seed or world "
                                 f"({path.read_text()}); give another --out")
            return
        self.web(seed).save(folder, "web")
        World("train", self.world_human, seed=seed + 1_000_000).save(folder, "human")
        write_whole(folder / "vocab.txt", [token + "\n" for token in
                                           Tokenizer.train(all_captions(), 4000).state()])
        write_whole(path, [made_of])


def truth(folder: Path, web: World) -> dict[str, float]:
    """What the world says of a bootstrapped set: of each source the share of true texts among all
    (_true) and among the kept (_kept_true), and how many of the true ones were kept
    (_true_kept)."""
    verdicts: dict[str, list[tuple[bool, bool]]] = {"web": [], "synthetic": []}
    for name, kept in (("bootstrapped", True), ("rejected", False)):
        for record in read_json(folder / f"{name}.json"):
            if record["source"] in verdicts:
                scene = web.scene(int(Path(record["image"]).stem))
                verdicts[record["source"]].append((kept, is_true(record["caption"], scene)))
    found = {}
    for source, pairs in verdicts.items():
        found |= {f"{source}_true": mean(true for _, true in pairs),
                  f"{source}_kept_true": mean(true for kept, true in pairs if kept),
                  f"{source}_true_kept": mean(kept for kept, true in pairs if true)}
    return found


def print_truth(found: dict[str, float]) -> None:
    """What `truth` found."""
    for source in ("web", "synthetic"):
        before, after, recall = (100 * found[f"{source}_{name}"]
                                 for name in ("true", "kept_true", "true_kept"))
        print(f"{source + ' texts':16}{before:6.1f} % true before, {after:.1f} % of the kept; "
              f"{recall:.1f} % of the true ones were kept", flush=True)


def judge_in_world(checkpoint: str, device: torch.device, size: int = 1000) -> dict[str, float]:
    """A pretrained model on held-out scenes with clean texts -> MEASURES and more, which are kept
    in world.json beside the checkpoint. All ranks call it."""
    path = Path(checkpoint).with_name("world.json")
    if not path.exists():
        model, tokenizer, trained = checkpoints.open_model(checkpoint, device=device)
        numbers, _ = evaluate_pretraining(
            model, tokenizer, World("held-out", size, model.config.image_size), device, 0,
            trained["max_tokens"], Decoding.of({}, trained, {}))
        if distributed.rank() == 0:
            write_whole(path, [json.dumps(numbers, indent=1) + "\n"])
        distributed.barrier()
    return read_json(path)
