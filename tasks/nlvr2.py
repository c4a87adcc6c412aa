"""NLVR2: is a statement about two images true? (BLIP sec. 5.4, Fig. 5b)

Two cross-attentions a layer, one for each image, and a head on [ENC]. Here: the model, the files of
statements, the evaluation.
"""

import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from attention import CrossAttention, KeysValues
from blip import init_weights, make_med
from config import BLIPConfig, TrainConfig
from data.datasets import Collate, ImageDataset, NLVR2Example
from data.files import InputError, is_list, require_object, stream_list
from data.text import Tokenizer, clean_caption
from reports.metrics import consistency, mean
from reports.sheets import GREEN, RED, Cell, pictures_of
from tasks.task import (
    FINETUNE,
    OWN_WORDS,
    TINY,
    EvalSettings,
    Evaluation,
    Source,
    Task,
    TaskModel,
    TrainedModel,
    broken_images,
    evaluation_batches,
    require_readable,
)
from training import distributed
from world.datasets import Statements

NEEDS = "images, sentence and label (or identifier, sentence, label)"  # of a record
OTHER_SIDE = {"left": "right", "right": "left"}


class PairCrossAttention(nn.Module):
    """Two cross-attentions, one for each of two images (BLIP sec. 5.4, Fig. 5b).

    Their outputs are averaged or, with `merge`, concatenated and brought back to the width by a
    linear layer.
    """

    def __init__(self, width: int, context_width: int, heads: int, dropout: float, merge: bool):
        super().__init__()
        self.first = CrossAttention(width, context_width, heads, dropout)
        self.second = CrossAttention(width, context_width, heads, dropout)
        self.merge = nn.Linear(2 * width, width) if merge else None

    def project(self, context: Tensor) -> tuple[KeysValues, KeysValues]:
        """context (B, 2, N, context width) -> keys and values of the first, of the second image."""
        return self.first.project(context[:, 0]), self.second.project(context[:, 1])

    def forward(self, x: Tensor, kv: tuple[KeysValues, KeysValues], mask: Tensor | None = None,
                attn_maps: list[Tensor] | None = None) -> Tensor:
        """x (n*B, L, D), kv of B pairs of images -> (n*B, L, D)."""
        first = self.first(x, kv[0], mask, attn_maps)
        second = self.second(x, kv[1], mask, attn_maps)
        if self.merge is None:
            return (first + second) / 2
        return self.merge(torch.cat([first, second], -1))


class NLVR2(TaskModel):
    """vit, med (its cross-attention is two: one for each image), head.

    In the lower half of the layers what is seen in the two images is averaged, in the upper half
    merged.
    NOTE(differs from salesforce/BLIP): there, layers 6 and above merge, whatever the depth
    (`merge_from`).
    """

    def __init__(self, config: BLIPConfig):
        super().__init__(config)
        merge_from = config.merge_from if config.merge_from >= 0 else config.text_depth // 2
        width = config.text_width

        def cross_attention(layer: int) -> PairCrossAttention:
            return PairCrossAttention(width, config.vit_width, config.text_heads, config.dropout,
                                      merge=layer >= merge_from)
        self.med = make_med(config, ("grounded",), cross_attention=cross_attention)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        init_weights(self, config.init_std)

    def pretrained_name(self, name: str) -> str:
        """Both cross-attentions come from the one."""
        return name.replace("attn.first.", "attn.").replace("attn.second.", "attn.")

    def logits(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """image (B, 2, 3, S, S), statements ids and mask (B, L) -> (B, 2); class 1 = true."""
        tokens = self.vit(image.flatten(0, 1)).unflatten(0, image.shape[:2])
        kv = self.med.project(tokens)
        return self.head(self.med.encode_grounded(ids, mask, kv, cls_only=True)[:, 0])

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor,
                label: Tensor) -> tuple[dict, dict]:
        """label (B,) 0 or 1 -> cross-entropy."""
        return {"nlvr2": F.cross_entropy(self.logits(image, ids, mask), label)}, {}


# ---- files of statements -------------------------------------------------------------------------

def read_statements(path: str | Path) -> list[NLVR2Example]:
    """BLIP's list of {images: [2], sentence, label}, or NLVR2's {sentence, identifier, label}.

    The official images are identifier-img0.png and -img1.png. Raises InputError.
    """
    if not is_list(path):
        raise InputError(f"{path} is neither a list of {{images, sentence, label}} nor lines of "
                         "{identifier, sentence, label}")
    examples = []
    for number, record in enumerate(stream_list(path)):
        where = f"{path}, record {number}"
        require_object(where, record, NEEDS)
        try:
            images, label = record.get("images"), str(record["label"]).lower()
            if images is None:
                stem = record["identifier"].rpartition("-")[0]
                images = [f"{stem}-img0.png", f"{stem}-img1.png"]
            if not isinstance(images, list) or len(images) != 2 or not all(
                    isinstance(image, str) for image in images):
                raise InputError(f"{where}: images must name two images, not {str(images)[:60]}")
            if label not in ("true", "false"):
                raise InputError(f"{where}: label is {str(record['label'])[:40]!r}; it must be "
                                 "True or False")
            if not isinstance(record["sentence"], str) or not record["sentence"].strip():
                raise InputError(f"{where}: the sentence is empty")
            examples.append(NLVR2Example(tuple(images), record["sentence"], label == "true",
                                         str(record.get("identifier", number))))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: {error} is missing; it needs {NEEDS}")
    if not examples:
        raise InputError(f"{path} holds no statement")
    return examples


class StatementDataset(ImageDataset):
    """Items with two images (2, 3, S, S); in training they are swapped half of the time.

    NOTE(differs from salesforce/BLIP): evaluation never swaps them.
    """

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        rng = random.Random(f"swap {item['seed']}")
        swap = self.augment and item["image"] is not None and rng.random() < 0.5
        return swap_images(item) if swap else item


def swap_images(item: dict) -> dict:
    """The same statement with the images in the other order, and left and right in its words."""
    example = item["example"]
    sentence = re.sub(r"\b(left|right)\b", lambda m: OTHER_SIDE[m[0].lower()], example.sentence,
                      flags=re.I)
    swapped = NLVR2Example(example.images[::-1], sentence, example.label, example.identifier)
    return {**item, "image": item["image"].flip(0), "example": swapped}


def open_data(source: Source) -> Dataset:
    """Statements of a file, or of the world."""
    if not source.data:
        return Statements(source.split, source.size, source.image_size, source.seed)
    return source.images(read_statements(source.data), StatementDataset)


def collate(tokenizer: Tokenizer, config: TrainConfig, model_config: BLIPConfig) -> Collate:
    """Batches for NLVR2.forward."""
    return statement_collate(tokenizer, config.max_words, config.max_tokens)


def statement_collate(tokenizer: Tokenizer, max_words: int, max_tokens: int) -> Collate:
    """ids and mask (B, L) of the statements, label (B,)."""
    def encode(items):
        examples = [item["example"] for item in items]
        sentences = [clean_caption(example.sentence, max_words) for example in examples]
        ids, mask = tokenizer.encode(sentences, max_tokens)
        label = torch.tensor([int(example.label) for example in examples])
        return {"ids": ids, "mask": mask, "label": label}
    return Collate(encode)


# ---- evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def judge_statements(trained: TrainedModel, dataset: Dataset, grey: bool = False) -> list[dict]:
    """{identifier, sentence, label, answer, index} of each statement."""
    model = trained.model.eval()
    records = []
    collate = statement_collate(trained.tokenizer, trained.max_words, trained.max_tokens)
    for batch in evaluation_batches(dataset, collate, trained, "statements", grey=grey):
        answers = model.logits(batch["image"], batch["ids"], batch["mask"]).argmax(1).tolist()
        for example, answer, index in zip(batch["examples"], answers, batch["index"]):
            records.append({"identifier": example.identifier, "sentence": example.sentence,
                            "label": example.label, "answer": bool(answer), "index": index})
    return sorted(distributed.gather(records), key=lambda record: record["index"])


def evaluate(trained: TrainedModel, dataset: Dataset, settings: EvalSettings) -> Evaluation:
    """accuracy; consistency: sentences of which all pairs of images are judged right.

    "chance": the commoner label. With baselines blank_accuracy, the same model on grey images.
    """
    records = judge_statements(trained, dataset)
    require_readable(records, dataset)
    right = [record["answer"] == record["label"] for record in records]
    true_share = mean(record["label"] for record in records)
    numbers = {"accuracy": mean(right),
               "consistency": consistency(right, [sentence_of(record) for record in records]),
               "chance": {"accuracy": max(true_share, 1 - true_share)}}
    if settings.baselines:
        blind = judge_statements(trained, dataset, grey=True)
        numbers["blank_accuracy"] = mean(r["answer"] == r["label"] for r in blind)
    numbers |= {"statements": len(records), "broken": broken_images(dataset, records)}
    rows = []
    for record, ok in list(zip(records, right))[:12]:
        first, second = pictures_of(dataset, record["index"])
        text = f"{record['sentence']}: {'true' if record['answer'] else 'false'}"
        rows.append([Cell(None, [(text, GREEN if ok else RED)]), Cell(first, []),
                     Cell(second, [])])
    files = {"answers.json": [{"identifier": record["identifier"],
                               "answer": str(record["answer"])} for record in records]}
    return Evaluation(numbers, [("statements about two images (green: judged right)", rows)], files)


def sentence_of(record: dict) -> str:
    """What the records of one sentence have in common.

    NLVR2's identifiers are split-set-pair-sentence: one sentence with several pairs of images.
    """
    parts = record["identifier"].split("-")
    return "-".join(parts[:2] + parts[3:]) if len(parts) == 4 else record["sentence"]


TASK = Task(
    "nlvr2", "judge statements about two images", NLVR2, open_data, collate, evaluate,
    lambda numbers: numbers["accuracy"], reads=("merge_from",),
    # 512 is BERT's limit: the released code limits the words alone.
    settings=dict(FINETUNE, out="runs/nlvr2", lr=3e-5, epochs=15, max_words=40, max_tokens=512),
    tiny=dict(TINY, epochs=1, scenes=64000, lr=3e-4, max_tokens=64),
    tiny_own=dict(min_steps=2000, new_pieces=OWN_WORDS),
    model_settings=dict(image_size=384, drop_path=0.1))
BENCHMARKS = (TASK.benchmark("nlvr2", "accuracy and consistency of judging statements"),)
