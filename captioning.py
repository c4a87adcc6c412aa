"""Captions for images: the settings, one batch, a whole data set, and the files of captions.

    Decoding         how captions are generated, checked against the model
    captions_of      images -> captions with scores
    caption_all      a data set -> one record for each image
    write_results    records -> captions.json and references.json
    read_scored      predictions and references from anywhere
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import distributed
from blip import BLIP
from data import Collate, InputError, Tokenizer, normalise
from med import ImageKV
from metrics import tokenise
from pairs import Pair, read_json
from retrieval import shared_batches


@dataclass(frozen=True)
class Decoding:
    """How captions are generated. The defaults are the paper's for COCO; lengths count [DEC] and
    the prompt."""

    prompt: str = ""  # words that captions start with; eval.py: the checkpoint's unless given
    method: str = "beam"  # beam or nucleus
    beams: int = 3  # of beam search
    min_length: int = 5  # tokens; eval.py: the checkpoint's unless given
    max_length: int = 20  # tokens; eval.py: the checkpoint's unless given
    repetition_penalty: float = 1.0  # 1 is none; NoCaps 1.1
    top_p: float = 0.9  # of nucleus sampling
    temperature: float = 1.0  # of nucleus sampling
    top_k: int = 0  # of nucleus sampling; 0 keeps all
    seed: int = 0  # of nucleus sampling

    def __post_init__(self):
        if self.method not in ("beam", "nucleus"):
            raise ValueError(f"method is {self.method!r}; choose beam or nucleus")
        if self.beams < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("beams must be at least 1, temperature above 0, and top_p above 0 and "
                             "at most 1")

    @classmethod
    def of(cls, given: dict, trained: dict, otherwise: dict) -> "Decoding":
        """As asked, else as `otherwise` says, else as the checkpoint was finetuned (its settings
        `trained`), else as the paper. InputError where they make no sense."""
        own = {f.name for f in fields(cls)}
        learned = {name: trained[name] for name in ("prompt", "min_length", "max_length")
                   if name in trained}
        try:
            return cls(**(learned | otherwise | {k: v for k, v in given.items() if k in own}))
        except ValueError as error:
            raise InputError(str(error))

    def options(self, device: torch.device) -> dict:
        """The keyword arguments of BLIP.generate."""
        shared = dict(method=self.method, min_length=self.min_length, max_length=self.max_length,
                      repetition_penalty=self.repetition_penalty)
        if self.method == "beam":
            return shared | dict(beams=self.beams)
        return shared | dict(top_p=self.top_p, temperature=self.temperature, top_k=self.top_k,
                             generator=torch.Generator(device).manual_seed(self.seed))

    def check(self, model: BLIP, tokenizer: Tokenizer) -> list[int]:
        """-> the prompt's ids; InputError where a setting does not fit the model."""
        prompt, room = tokenizer.pieces_of(self.prompt), model.config.max_positions
        if self.max_length > room:
            raise InputError(f"--max-length {self.max_length} is more than the model's {room} "
                             "positions; give a smaller one")
        if len(prompt) + 1 >= self.max_length:
            raise InputError(f"the prompt {self.prompt!r} has {len(prompt)} tokens, which leaves "
                             f"no room in --max-length {self.max_length}; shorten it, or allow "
                             "more")
        return prompt


@torch.no_grad()
def captions_of(model: BLIP, tokenizer: Tokenizer, images: Tensor | ImageKV, device: torch.device,
                how: Decoding, count: int = 1) -> list[list[tuple[str, float]]]:
    """images (B, 3, S, S) uint8, or their keys and values -> for each `count` pairs (caption
    without the prompt, score as in BLIP.generate), best first."""
    if isinstance(images, Tensor):
        images = normalise(images.to(device))
    found = model.generate(images, how.check(model, tokenizer), num_return=count,
                           **how.options(device))
    return [[(tokenizer.decode(ids), score) for ids, score in hypotheses] for hypotheses in found]


@torch.no_grad()
def caption_all(model: BLIP, tokenizer: Tokenizer, dataset: Dataset, device: torch.device,
                how: Decoding) -> tuple[list[dict], list[str]]:
    """-> a record {index, caption, references} for each readable image, and the names of the
    others."""
    model.eval()
    records, broken = [], []
    loader = DataLoader(dataset, collate_fn=Collate(tokenizer),
                        batch_sampler=shared_batches(len(dataset)))
    for batch in distributed.progress(loader, "captions", unit="batch"):
        broken += batch["broken"]
        if batch["image"] is not None:
            found = captions_of(model, tokenizer, batch["image"], device, how)
            records += [{"index": index, "caption": captions[0][0], "references": texts}
                        for index, captions, texts in zip(batch["index"], found, batch["texts"])]
    records, broken = distributed.gather(records), distributed.gather(broken)
    if not records:
        raise InputError(f"none of the {len(dataset)} images could be read; the first: {broken[0]}")
    return sorted(records, key=lambda record: record["index"]), broken


# ---- files of captions ---------------------------------------------------------------------------

def write_results(out: Path, records: list[dict], pairs: list[Pair] | None) -> None:
    """Write into the folder `out` captions.json, [{image_id, image, caption, ...}], the result file
    that the COCO and NoCaps tools and servers read, and where there are references, references.json
    in COCO's format: together what the Java tools for SPICE and METEOR need.

    `pairs` are the data set's; None for the world, where an image's id is its index.
    """
    results, images, notes = [], [], []
    for record in records:
        index = record["index"]
        about = ({"image_id": pairs[index].name, "image": pairs[index].image} if pairs
                 else {"image_id": index})
        rest = {k: v for k, v in record.items() if k not in ("index", "references")}
        results.append(about | rest)
        images.append({"id": about["image_id"]})
        notes += [{"image_id": about["image_id"], "id": len(notes) + k, "caption": text}
                  for k, text in enumerate(record["references"])]
    (out / "captions.json").write_text(json.dumps(results, indent=0) + "\n")
    if notes:
        (out / "references.json").write_text(json.dumps(
            {"info": {}, "licenses": [], "type": "captions", "images": images,
             "annotations": notes}) + "\n")


def read_scored(predictions: str | Path, references: str | Path,
                subset: bool = False) -> tuple[list[str], list[list[str]]]:
    """[{image or image_id, caption}] and [{image or image_id, caption: [...]}] -> captions and
    their references in the same order.

    Images are told by image_id where both files have it throughout, else by image. Raises
    InputError for a prediction without a reference, a reference without a prediction (unless
    `subset`), an image that occurs twice, an empty reference.
    """
    files = {path: read_json(path) for path in (predictions, references)}
    for path, records in files.items():
        if not isinstance(records, list) or not records or not all(
                isinstance(record, dict) and "caption" in record for record in records):
            raise InputError(f"{path} must be a list of {{image or image_id, caption}}, and not "
                             "empty")
    field = next((name for name in ("image_id", "image")
                  if all(name in record for records in files.values() for record in records)), None)
    if field is None:
        raise InputError(f"{predictions} and {references} must name the images of all records in "
                         "the same way: image_id, or image")
    found: dict = {predictions: {}, references: {}}
    for path, records in files.items():
        for number, record in enumerate(records):
            key, caption = str(record[field]), record["caption"]
            if key in found[path]:
                raise InputError(f"{path}, record {number}: {field} {key} occurs a second time; "
                                 "keep one record for each image")
            texts = [caption] if isinstance(caption, str) else caption
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or (
                    path == predictions and len(texts) != 1):
                raise InputError(f"{path}, record {number}: caption must be a text"
                                 + ("" if path == predictions else " or a list of texts"))
            if path == references and (not texts or not all(map(tokenise, texts))):
                raise InputError(f"{path}, record {number}: the reference of {field} {key} is "
                                 "empty; give at least one word, or remove the record")
            found[path][key] = texts
    told, true = found[predictions], found[references]
    unknown, untold = told.keys() - true.keys(), true.keys() - told.keys()
    if unknown:
        raise InputError(f"{predictions}: {len(unknown)} predictions have no reference in "
                         f"{references} (the first: {field} {min(unknown)}); remove them, or add "
                         "references")
    if untold and not subset:
        raise InputError(f"{references}: {len(untold)} references have no prediction in "
                         f"{predictions} (the first: {field} {min(untold)}); predict them too, or "
                         "leave them out with --subset")
    return [texts[0] for texts in told.values()], [true[key] for key in told]
