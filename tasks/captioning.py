"""Image captioning: how captions are generated, evaluated and scored (BLIP sec. 5.2).

    Decoding       the settings of the generation, checked against the model
    write_captions images -> captions with scores
    evaluate       BLEU, ROUGE-L, CIDEr; in the world also the share of wholly true captions
    read_scored    predictions and references from anywhere
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blip import BLIP
from config import TrainConfig, check_lengths, check_settings, setting
from data.datasets import caption_collate, some_examples
from data.files import InputError, is_list, read_json, stream_list
from data.text import Tokenizer
from med import ContextKV
from reports.metrics import caption_scores, mean, tokenise
from reports.sheets import BLACK, GREEN, GREY, RED, Cell, Sections, pick_examples, pictures_of
from tasks.task import (
    FINETUNE,
    OF_BLIP,
    OWN_WORDS,
    TINY,
    EvalSettings,
    Evaluation,
    Task,
    TrainedModel,
    collate_pairs,
    evaluation_batches,
    open_pairs,
    require_readable,
    subsets_of,
)
from training import distributed
from world.datasets import World
from world.language import all_captions, is_complete, is_true, wrong_facts


@dataclass(frozen=True)
class Decoding:
    """How captions are generated; the paper's for COCO. Lengths count [DEC] and the prompt."""

    prompt: str = setting("", "words that captions start with; a checkpoint's own setting comes "
                              "first")
    method: str = setting("beam", "beam or nucleus", choices=("beam", "nucleus"))
    beams: int = setting(3, "of beam search", least=1, most=100)
    min_length: int = setting(5, "tokens; a checkpoint's own setting comes first", least=1)
    max_length: int = setting(20, "tokens; a checkpoint's own setting comes first", least=2)
    repetition_penalty: float = setting(1.0, "1 is none; NoCaps 1.1", above=0)
    length_penalty: float = setting(1.0, "of beam search: a score is divided by length to this",
                                    least=-10, most=10)
    top_p: float = setting(0.9, "of nucleus sampling", above=0, most=1)
    temperature: float = setting(1.0, "of nucleus sampling", above=0)
    top_k: int = setting(0, "of nucleus sampling; 0 keeps all", least=0)
    seed: int = setting(0, "of all that is drawn by chance", least=0)

    def __post_init__(self):
        check_settings(self)

    @classmethod
    def choose(cls, given: dict, trained: dict) -> "Decoding":
        """As asked, else as the checkpoint was finetuned, else the paper's.

        trained: the checkpoint's settings. Raises SettingError where one is out of range.
        """
        names = {f.name for f in fields(cls)}
        finetuned = {name: trained[name] for name in ("prompt", "min_length", "max_length")
                     if name in trained}
        decoding = cls(**(finetuned | {k: v for k, v in given.items() if k in names}))
        check_lengths(decoding)
        return decoding

    def options(self, device: torch.device) -> dict:
        """The keyword arguments of BLIP.generate."""
        shared = dict(method=self.method, min_length=self.min_length, max_length=self.max_length,
                      repetition_penalty=self.repetition_penalty)
        if self.method == "beam":
            return shared | dict(beams=self.beams, length_penalty=self.length_penalty)
        return shared | dict(top_p=self.top_p, temperature=self.temperature, top_k=self.top_k,
                             generator=torch.Generator(device).manual_seed(self.seed))

    def prompt_ids(self, model: BLIP, tokenizer: Tokenizer) -> list[int]:
        """The prompt's ids; InputError where a setting does not fit the model."""
        prompt, positions = tokenizer.piece_ids(self.prompt), model.config.max_positions
        if self.max_length > positions:
            raise InputError(f"--max-length {self.max_length} is more than the model's {positions} "
                             "positions; give a smaller one")
        if len(prompt) + 1 >= self.max_length:
            raise InputError(f"the prompt {self.prompt!r} has {len(prompt)} tokens, which leaves "
                             f"no room in --max-length {self.max_length}; shorten it, or allow "
                             "more")
        return prompt


@torch.no_grad()
def write_captions(model: BLIP, tokenizer: Tokenizer, images: Tensor | ContextKV,
                   decoding: Decoding, count: int = 1) -> list[list[tuple[str, float]]]:
    """For each image `count` pairs (caption without the prompt, score), best first.

    images (B, 3, S, S), normalised, or their keys and values; scores as in BLIP.generate.
    """
    hypotheses = model.generate(images, decoding.prompt_ids(model, tokenizer), num_return=count,
                                **decoding.options(images.device))
    return [[(tokenizer.decode(ids), score) for ids, score in of_image] for of_image in hypotheses]


@torch.no_grad()
def caption_all(trained: TrainedModel, dataset: Dataset, decoding: Decoding,
                write: Callable | None = None) -> tuple[list[dict], list[str]]:
    """A record {index, caption, example} for each readable image, and the names of the others.

    write(images, decoding): another model's way to write captions, as `write_captions` returns
    them.
    """
    model, tokenizer = trained.model.eval(), trained.tokenizer
    if write is None:
        decoding.prompt_ids(model, tokenizer)  # says what is wrong before anything is read
        write = functools.partial(write_captions, model, tokenizer)
    records, broken = [], []
    for batch in evaluation_batches(dataset, caption_collate(tokenizer, trained.max_words,
                                                             trained.max_tokens),
                                    trained, "captions", broken):
        # Each batch draws its own samples.
        captions = write(batch["image"], replace(decoding, seed=decoding.seed + batch["index"][0]))
        for index, example, hypotheses in zip(batch["index"], batch["examples"], captions):
            records.append({"index": index, "caption": hypotheses[0][0], "example": example})
    records, broken = distributed.gather(records), distributed.gather(broken)
    require_readable(records, dataset, broken)
    return sorted(records, key=lambda record: record["index"]), broken


# ---- evaluation ----------------------------------------------------------------------------------

def evaluate(trained: TrainedModel, dataset: Dataset, settings: EvalSettings,
             write: Callable | None = None) -> Evaluation:
    """bleu1-4, rouge_l, cider; in the world also caption_true.

    caption_true: every fact is right, and none left out. "constant" holds what one and the same
    caption for every image would score: the commonest of the world, of `settings.training`, or else
    of the references. Of a data set with subsets (NoCaps) also the measures of each subset by
    itself: its own images make the document frequencies. Images without references count in no
    measure; where none has any (a test set) there are no numbers.
    """
    decoding = Decoding.choose(settings.decoding, trained.settings)
    records, broken = caption_all(trained, dataset, decoding, write)
    world = dataset if isinstance(dataset, World) else None
    for record in records:
        index, captions = record["index"], record.pop("example").captions
        record["references"] = world.references(index) if world else captions
    counts = {"images": len(records), "broken": len(broken)}
    scored = [record for record in records if record["references"]]
    if not scored:
        shown = [records[i] for i in pick_examples([0.0] * len(records), 8)["random"]]
        return Evaluation(counts, [("captions, random", [caption_cells(dataset, shown)])],
                          result_files(dataset, records))
    for record in records if world else []:
        scene = world.scene(record["index"])
        record["facts_hold"] = is_true(record["caption"], scene)
        record["true"] = record["facts_hold"] and is_complete(record["caption"], scene)
        record["wrong"] = wrong_facts(record["caption"], scene)
    numbers, each = score_records(scored)
    for record, value in zip(scored, each):
        record["cider"] = round(value, 4)
    for name, indices in subsets_of(dataset).items():
        inside = set(indices)
        of_subset = [record for record in scored if record["index"] in inside]
        if of_subset:
            numbers |= {f"{name}_{measure}": value
                        for measure, value in score_records(of_subset)[0].items()}
    if world:
        numbers["caption_true"] = mean(record["true"] for record in records)
        numbers["caption_facts_hold"] = mean(record["facts_hold"] for record in records)
    numbers |= {"constant": score_constant(scored, world, settings.training)} | counts
    sections = overview(dataset, records) if world else []
    sections += [(f"captions, {title} (by CIDEr; grey: a reference)",
                  [caption_cells(dataset, [scored[i] for i in chosen])])
                 for title, chosen in pick_examples(each, 8).items()]
    return Evaluation(numbers, sections, result_files(dataset, records))


def score_records(records: list[dict]) -> tuple[dict[str, float], list[float]]:
    """The measures of {caption, references}, and each caption's CIDEr."""
    return caption_scores([record["caption"] for record in records],
                          [record["references"] for record in records])


def score_constant(records: list[dict], world: World | None, training: Dataset | None) -> dict:
    """What the commonest caption would score if it stood under every image."""
    if world:
        texts = all_captions()
    elif training is not None:
        texts = [text for example in some_examples(training, 200_000) for text in example.texts]
    else:
        texts = [text for record in records for text in record["references"]]
    constant = Counter(text.lower() for text in texts).most_common(1)[0][0]
    numbers, _ = caption_scores([constant] * len(records),
                                [record["references"] for record in records])
    if world:
        scenes = [world.scene(record["index"]) for record in records]
        numbers["caption_true"] = mean(is_true(constant, scene) and is_complete(constant, scene)
                                       for scene in scenes)
    return numbers | {"caption": constant}


def overview(dataset: Dataset, records: list[dict]) -> Sections:
    """Three captions that are right and three that are wrong, if there are as many."""
    right = [record for record in records if record["true"]][:3]
    wrong = [record for record in records if not record["true"]][:3]
    share = 100 * mean(record["true"] for record in records)
    return [(f"captions: {share:.0f} % are wholly true; three right, three wrong",
             [caption_cells(dataset, right + wrong, references=False)])]


def caption_cells(dataset: Dataset, records: list[dict], references: bool = True) -> list[Cell]:
    """Images with their captions, over a reference.

    Where the world knows, in green or red, and what is wrong in words.
    """
    cells = []
    for record in records:
        colour = BLACK
        if "true" in record:
            colour = GREEN if record["true"] else RED
        lines = [(record["caption"], colour)]
        lines += [(fact, RED) for fact in record.get("wrong", [])]
        if references and record["references"]:
            lines.append((f"CIDEr {record['cider']:.2f}: {record['references'][0]}", GREY))
        cells.append(Cell(pictures_of(dataset, record["index"]), lines,
                          colour if colour != BLACK else None))
    return cells


# ---- files of captions ---------------------------------------------------------------------------

def result_files(dataset: Dataset, records: list[dict]) -> dict[str, list | dict]:
    """captions.json and, where there are references, references.json, by name.

    captions.json: [{image_id, image, caption, ...}], which the COCO and NoCaps tools and servers
    read. references.json is in COCO's format. Together they are what the Java tools for SPICE and
    METEOR need. In the world an image's id is its index.
    """
    results, images, annotations = [], [], []
    for record in records:
        if isinstance(dataset, World):
            about = {"image_id": record["index"]}
        else:
            pair = dataset.example(record["index"])
            about = {"image_id": pair.name, "image": pair.image}
        rest = {k: v for k, v in record.items() if k not in ("index", "references", "wrong")}
        results.append(about | rest)
        images.append({"id": about["image_id"]})
        for text in record["references"]:
            annotations.append({"image_id": about["image_id"], "id": len(annotations),
                                "caption": text})
    files = {"captions.json": results}
    if annotations:
        files["references.json"] = {"info": {}, "licenses": [], "type": "captions",
                                    "images": images, "annotations": annotations}
    return files


def read_scored(predictions: str | Path, references: str | Path,
                subset: bool = False) -> tuple[list[str], list[list[str]]]:
    """Captions and their references in the same order.

    [{image or image_id, caption}] and [{image or image_id, caption: [...]}], or both in COCO's
    form (`scored_records`). Images are recognised by image_id where both files have it throughout,
    else by image. Raises InputError for a prediction without a reference, a reference without a
    prediction (unless `subset`), an image that occurs twice, an empty reference.
    """
    files = {path: scored_records(path) for path in (predictions, references)}
    key = next((name for name in ("image_id", "image")
                if all(name in record for records in files.values() for record in records)), None)
    if key is None:
        raise InputError(f"{predictions} and {references} must name the images of all records in "
                         "the same way: image_id, or image")
    predicted = captions_by_image(predictions, files[predictions], key, one_each=True)
    true = captions_by_image(references, files[references], key, one_each=False)
    without_reference = predicted.keys() - true.keys()
    without_prediction = true.keys() - predicted.keys()
    if without_reference:
        raise InputError(f"{predictions}: {len(without_reference)} predictions have no reference "
                         f"in {references} (the first: {key} {min(without_reference)}); remove "
                         "them, or add references")
    if without_prediction and not subset:
        raise InputError(f"{references}: {len(without_prediction)} references have no prediction "
                         f"in {predictions} (the first: {key} {min(without_prediction)}); predict "
                         "them too, or leave them out with --subset")
    return [texts[0] for texts in predicted.values()], [true[name] for name in predicted]


def scored_records(path: str | Path) -> list[dict]:
    """A list of {image or image_id, caption}, one a line, or COCO's {annotations: [...]}.

    Of COCO's annotations, one record for each image. Raises InputError.
    """
    records = list(stream_list(path)) if is_list(path) else read_json(path)
    try:
        if isinstance(records, dict):
            by_image: dict[str, list[str]] = {}
            for note in records["annotations"]:
                by_image.setdefault(note["image_id"], []).append(note["caption"])
            records = [{"image_id": name, "caption": texts} for name, texts in by_image.items()]
        if not records or not all(isinstance(record, dict) and "caption" in record
                                  for record in records):
            raise KeyError("caption")
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} must be a list of {{image or image_id, caption}} or COCO's "
                         "annotations of image_id and caption, and not empty")
    return records


def captions_by_image(path: str | Path, records: list[dict], key: str,
                      one_each: bool) -> dict[str, list[str]]:
    """Name of an image -> its texts, checked. one_each: a single caption. Raises InputError."""
    by_image = {}
    for number, record in enumerate(records):
        where, name, texts = f"{path}, record {number}", str(record[key]), record["caption"]
        if name in by_image:
            raise InputError(f"{where}: {key} {name} occurs a second time; keep one record for "
                             "each image")
        if isinstance(texts, str):
            texts = [texts]
        is_texts = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        if not is_texts or (one_each and len(texts) != 1):
            raise InputError(f"{where}: caption must be a text"
                             + ("" if one_each else " or a list of texts"))
        if not one_each and not (texts and all(tokenise(text) for text in texts)):
            raise InputError(f"{where}: the reference of {key} {name} is empty; give at least one "
                             "word, or remove the record")
        by_image[name] = texts
    return by_image


# ---- the task ------------------------------------------------------------------------------------

def inputs(config: TrainConfig, tokenizer: Tokenizer, alpha: float) -> dict:
    """Arguments of BLIP.forward, without the batch's tensors: the prompt gives no loss."""
    return {"alpha": alpha, "prompt_length": 1 + len(tokenizer.piece_ids(config.prompt))}


# The best epoch is the one with the highest CIDEr.
# NOTE(differs from salesforce/BLIP): there, the sum of BLEU-4 and CIDEr.
TASK = Task(
    "caption", "describe images", BLIP, open_pairs, collate_pairs, evaluate,
    lambda numbers: numbers["cider"], inputs, needs=("lm",),
    reads=(*OF_BLIP, "equal_texts", "prompt"), holds_splits=True,
    settings=dict(FINETUNE, out="runs/caption", lr=1e-5, epochs=5, max_tokens=40, itc_weight=0.0,
                  itm_weight=0.0, prompt="a picture of"),
    large=dict(lr=2e-6), tiny=dict(TINY, epochs=2, scenes=12800, lr=5e-4, prompt=""),
    tiny_own=dict(min_steps=800, new_pieces=OWN_WORDS),
    model_settings=dict(image_size=384))
BENCHMARKS = (
    TASK.benchmark("caption", "BLEU, ROUGE-L and CIDEr of generated captions", needs=("lm",),
                   flags=("decoding", "constant_from")),
    TASK.benchmark("nocaps", "the same in, near and out of domain; repetition penalty 1.1 unless "
                   "given", needs=("lm",), flags=("decoding",), needs_data=True,
                   need_labels=False, defaults=dict(repetition_penalty=1.1)))
