"""Visual dialog: choose the answer to a question in a dialog (BLIP sec. 5.5, Fig. 5c).

Question, candidate answer and history are judged against image and caption. The paper names the
parts and not their order, and no code was released: the order here is our choice (`dialog_ids`).
Here: the model, the files of dialogs, the evaluation. Letters: K candidates.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from blip import init_weights, make_med
from config import BLIPConfig, TrainConfig
from data.datasets import Collate, DialogExample, DialogRound
from data.files import InputError, named_files, read_json, require_object
from data.images import prepare_images
from data.text import Tokenizer, clean_caption, clean_question
from med import ContextKV
from reports.metrics import dialog_scores, mean, ndcg
from reports.sheets import BLACK, GREEN, GREY, RED, Cell, Sections, in_rows, pictures_of
from tasks.task import (
    FINETUNE,
    GREY_LEVEL,
    OWN_WORDS,
    TINY,
    EvalSettings,
    Evaluation,
    Source,
    Task,
    TaskModel,
    TrainedModel,
    broken_images,
    require_readable,
)
from training import distributed
from world.datasets import Dialogs

CANDIDATES = 100  # of a round, in VisDial
CAPTION_WORDS = 40  # a longer caption is cut
TURNS, WRONG = 2, 3  # in training: rounds of each dialog in a step, wrong candidates of a round


class VisDial(TaskModel):
    """vit, med (unimodal for the caption, grounded for the dialog), head.

    What the dialog encoder looks at is the image's tokens and behind them the caption's states.
    Raises ValueError where their widths differ.
    """

    def __init__(self, config: BLIPConfig):
        super().__init__(config)
        if config.vit_width != config.text_width:
            raise ValueError("visual dialog puts image tokens and caption states side by side: "
                             f"vit_width {config.vit_width} and text_width {config.text_width} "
                             "must be equal")
        self.med = make_med(config, ("text", "grounded"))
        self.head = nn.Linear(config.text_width, 2)
        init_weights(self, config.init_std)

    def pretrained_name(self, name: str) -> str:
        """The head comes from ITM's."""
        return name.replace("head.", "itm_head.") if name.startswith("head.") else name

    def encode_context(self, image: Tensor, caption_ids: Tensor, caption_mask: Tensor) -> ContextKV:
        """Keys and values of images and captions, projected once for all rounds and candidates.

        image (B, 3, S, S), captions ids and mask (B, Lc); a caption's padding is masked.
        """
        tokens = self.vit(image)
        states = self.med.encode_text(caption_ids, caption_mask)
        mask = torch.cat([caption_mask.new_ones(tokens.shape[:2]), caption_mask], 1)
        return self.med.project(torch.cat([tokens, states], 1), mask)

    def logits(self, kv: ContextKV, ids: Tensor, mask: Tensor) -> Tensor:
        """Text i belongs to dialog i // n; class 1 = the answer.

        kv of B dialogs, ids and mask (n*B, L) of question, candidate, history -> (n*B, 2).
        """
        return self.head(self.med.encode_grounded(ids, mask, kv, cls_only=True)[:, 0])

    def forward(self, image: Tensor, caption_ids: Tensor, caption_mask: Tensor, ids: Tensor,
                mask: Tensor, label: Tensor) -> tuple[dict, dict]:
        """n candidates for each of B dialogs: ids, mask (n*B, L), label (n*B,) -> cross-entropy."""
        kv = self.encode_context(image, caption_ids, caption_mask)
        return {"visdial": F.cross_entropy(self.logits(kv, ids, mask), label)}, {}


# ---- files of dialogs ----------------------------------------------------------------------------

def read_dialogs(data: str) -> list[DialogExample]:
    """VisDial 1.0's file, and perhaps behind a comma its dense annotations.

    Images are VisualDialog_SPLIT_ID.jpg, or COCO's for the training split. Raises InputError.
    """
    path, *others = named_files(data)
    dense = ",".join(others)
    content, relevance = read_json(path), read_relevance(dense) if dense else {}
    try:
        questions, answers = content["data"]["questions"], content["data"]["answers"]
        dialogs, split = content["data"]["dialogs"], content.get("split", "val2018")
        if not isinstance(dialogs, list) or not all(isinstance(text, str)
                                                    for text in [*questions, *answers]):
            raise TypeError("a list of dialogs, or of texts,")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no VisDial 1.0 file: {error} is missing; it needs data with "
                         "questions, answers and dialogs")
    examples = []
    for number, record in enumerate(dialogs):
        where = f"{path}, dialog {number}"
        require_object(where, record, "image_id, caption and dialog")
        try:
            rounds = [read_round(f"{where}, round {turn}", turn_record, questions, answers)
                      for turn, turn_record in enumerate(record["dialog"], 1)]
            image = record.get("image") or f"VisualDialog_{split}_{record['image_id']:012d}.jpg"
            if not rounds or not isinstance(image, str) or not isinstance(record["caption"], str):
                raise TypeError("no round, or an image or caption that is no text")
            examples.append(DialogExample(image, record["caption"], tuple(rounds),
                                          record["image_id"], relevance.get(record["image_id"])))
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: {error!r:.200}; it needs image_id, caption and rounds of "
                             "question, answer, answer_options and gt_index")
    if not examples:
        raise InputError(f"{path} holds no dialog")
    check_relevance(dense, relevance, examples)
    return examples


def read_round(where: str, record: dict, questions: list[str], answers: list[str]) -> DialogRound:
    """A round whose texts are given as numbers of questions and answers. Raises InputError."""
    require_object(where, record, "question, answer, answer_options and gt_index")
    choices, target = record.get("answer_options", []), record["gt_index"]
    if len(choices) != CANDIDATES:
        raise InputError(f"{where}: it has {len(choices)} candidate answers and must have "
                         f"{CANDIDATES}")
    if target not in range(CANDIDATES):
        raise InputError(f"{where}: gt_index is {target!r:.40}; it must be a number from 0 "
                         f"to {CANDIDATES - 1}")
    return DialogRound(questions[record["question"]], answers[record["answer"]],
                       tuple(answers[i] for i in choices), int(target))


def read_relevance(path: str) -> dict[int, tuple[int, tuple[float, ...]]]:
    """Dense annotations: image id -> (round, relevance of its candidates). Raises InputError."""
    relevance, notes = {}, read_json(path)
    for number, note in enumerate(notes if isinstance(notes, list) else [notes]):
        require_object(f"{path}, record {number}", note, "image_id, round_id and gt_relevance")
        try:
            of_candidates = tuple(map(float, note.get("gt_relevance", note.get("relevance"))))
            if len(of_candidates) != CANDIDATES:
                raise ValueError(f"{len(of_candidates)} candidates")
            if not all(0 <= value < math.inf for value in of_candidates):
                raise ValueError("a relevance that is no number from 0 on")
            relevance[note["image_id"]] = (note["round_id"] - 1, of_candidates)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}, record {number}: {error!r:.200}; it needs image_id, "
                             f"round_id and gt_relevance of {CANDIDATES} candidates")
    return relevance


def check_relevance(path: str, relevance: dict, examples: list[DialogExample]) -> None:
    """InputError where dense annotations are of no dialog that there is."""
    if relevance and not any(example.relevance for example in examples):
        raise InputError(f"{path}: none of its {len(relevance)} images is that of a dialog; give "
                         "the dense annotations of the same split")


def open_data(source: Source) -> Dataset:
    """Dialogs of a file, or of the world."""
    if not source.data:
        return Dialogs(source.split, source.size, source.image_size, source.seed)
    return source.images(read_dialogs(source.data))


def dialog_ids(tokenizer: Tokenizer, rounds, turn: int, candidates,
               max_tokens: int) -> list[list[int]]:
    """For each candidate the ids of the text that is judged.

    [CLS] question [SEP] candidate [SEP] the rounds before, the latest first, [SEP] behind each.
    What is judged stands in front, at the same positions in every dialog (with the history in front
    the picture world's R@1 was 5 points lower, one run each), and what `max_tokens` cuts off is the
    oldest.
    """
    def ids(text, most=max_tokens):
        return [*tokenizer.piece_ids(clean_question(text))[:most], tokenizer.sep]
    history = []
    for earlier in reversed(rounds[:turn]):
        history += ids(earlier.question)[:-1] + ids(earlier.answer)
    question = [tokenizer.cls, *ids(rounds[turn].question, max_tokens // 2)]
    return [(question + ids(candidate, max_tokens // 3) + history)[:max_tokens]
            for candidate in candidates]


def encode_captions(examples: list[DialogExample], tokenizer: Tokenizer,
                    max_tokens: int) -> tuple[Tensor, Tensor]:
    """ids and mask (B, Lc)."""
    captions = [clean_caption(example.caption, CAPTION_WORDS) for example in examples]
    return tokenizer.encode(captions, max_tokens)


def collate(tokenizer: Tokenizer, config: TrainConfig, model_config: BLIPConfig) -> Collate:
    """Batches for VisDial.forward: caption_ids, caption_mask, ids, mask, label.

    Of TURNS rounds of each dialog (its image and caption are read once for all of them) the answer
    and WRONG other candidates, drawn by the item's seed. The turns are the same for the whole
    batch: its texts are about as long, so little is padding.
    """
    def encode(items):
        examples = [item["example"] for item in items]
        caption_ids, caption_mask = encode_captions(examples, tokenizer, config.max_tokens)
        shortest = min(len(example.rounds) for example in examples)
        turns = random.Random(items[0]["seed"]).sample(range(shortest), min(TURNS, shortest))
        rows, labels = [], []
        for item in items:
            rng, rounds = random.Random(item["seed"]), item["example"].rounds
            for turn in turns:
                others = [text for i, text in enumerate(rounds[turn].candidates)
                          if i != rounds[turn].target]
                candidates = [rounds[turn].answer, *rng.sample(others, WRONG)]
                rows += dialog_ids(tokenizer, rounds, turn, candidates, config.max_tokens)
                labels += [1] + [0] * WRONG
        ids, mask = tokenizer.pad_rows(rows)
        return {"caption_ids": caption_ids, "caption_mask": caption_mask, "ids": ids, "mask": mask,
                "label": torch.tensor(labels)}
    return Collate(encode)


# ---- evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def rank_candidates(trained: TrainedModel, dataset: Dataset, grey: bool = False) -> list[dict]:
    """{dialog, round, scores, target, relevance, index} of each round.

    Image and caption are projected once for a dialog; all candidates of a round look at them in one
    pass.
    """
    model, tokenizer, device = trained.model.eval(), trained.tokenizer, trained.device
    records = []
    own = distributed.own_part(list(range(len(dataset))))
    for index in distributed.progress(own, "dialogs", unit="dialog"):
        item = dataset[index]
        if item["image"] is None:
            continue
        example, image = item["example"], item["image"][None]
        image = prepare_images(torch.full_like(image, GREY_LEVEL) if grey else image, device)
        caption_ids, caption_mask = encode_captions([example], tokenizer, trained.max_tokens)
        kv = model.encode_context(image, caption_ids.to(device), caption_mask.to(device))
        for turn, asked in enumerate(example.rounds):
            rows = dialog_ids(tokenizer, example.rounds, turn, asked.candidates,
                              trained.max_tokens)
            ids, mask = tokenizer.pad_rows(rows)
            logits = model.logits(kv, ids.to(device), mask.to(device)).float()
            relevance = None
            if example.relevance and example.relevance[0] == turn:
                relevance = example.relevance[1]
            records.append({"dialog": example.dialog_id, "round": turn, "index": index,
                            "scores": (logits[:, 1] - logits[:, 0]).tolist(),
                            "target": asked.target, "relevance": relevance})
    records = distributed.gather(records)
    return sorted(records, key=lambda record: (record["index"], record["round"]))


def evaluate(trained: TrainedModel, dataset: Dataset, settings: EvalSettings) -> Evaluation:
    """mrr, r1, r5, r10, mean_rank; ndcg where there is dense relevance.

    "chance": a random order. With baselines blank_...: the same model on grey images. Raises
    InputError where no image can be read.
    """
    records = rank_candidates(trained, dataset)
    require_readable(records, dataset)
    numbers = dialog_scores(answer_ranks(records))
    dense = [ndcg(r["scores"], r["relevance"]) for r in records if r["relevance"]]
    if dense:
        numbers["ndcg"] = mean(dense)
    n = len(records[0]["scores"])
    numbers["chance"] = {"mrr": mean(1 / rank for rank in range(1, n + 1)),
                         "mean_rank": (n + 1) / 2,
                         **{f"r{k}": min(1.0, k / n) for k in (1, 5, 10)}}
    if settings.baselines:
        blind = dialog_scores(answer_ranks(rank_candidates(trained, dataset, grey=True)))
        numbers |= {f"blank_{name}": value for name, value in blind.items()}
    numbers |= {"rounds": len(records), "broken": broken_images(dataset, records)}
    files = {"answers.json": [{"image_id": record["dialog"], "round_id": record["round"] + 1,
                               "ranks": ranks_of(record["scores"])} for record in records]}
    return Evaluation(numbers, sections(dataset, records), files)


def answer_ranks(records: list[dict]) -> list[int]:
    """Of each round's answer among its candidates, 0 = first; a tie or nan counts against it."""
    return [sum(not value < record["scores"][record["target"]] for value in record["scores"]) - 1
            for record in records]


def ranks_of(scores: list[float]) -> list[int]:
    """Scores -> the rank of each, 1 = highest, as VisDial's server reads them."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranks = [0] * len(scores)
    for rank, i in enumerate(order, 1):
        ranks[i] = rank
    return ranks


def sections(dataset: Dataset, records: list[dict]) -> Sections:
    """Some dialogs: caption, questions, best candidates (green: right)."""
    rounds_of: dict[int, list[dict]] = {}
    for record in records[:50]:
        rounds_of.setdefault(record["index"], []).append(record)
    cells = []
    for index, rounds in rounds_of.items():
        example = dataset.example(index)
        lines = [(example.caption, GREY)]
        for record in rounds:
            asked, scores = example.rounds[record["round"]], record["scores"]
            best = max(range(len(scores)), key=scores.__getitem__)
            lines += [(asked.question, BLACK),
                      (asked.candidates[best], GREEN if best == asked.target else RED)]
        cells.append(Cell(pictures_of(dataset, index), lines))
    return [("dialogs: caption, questions, best candidates (green: right)", in_rows(cells, 6))]


TASK = Task(
    "visdial", "rank the answers in a dialog about an image", VisDial, open_data, collate, evaluate,
    lambda numbers: numbers["mrr"], reads=(),
    settings=dict(FINETUNE, out="runs/visdial", lr=2e-5, epochs=20, max_tokens=160,
                  # The paper's batch of 240, read as rounds: TURNS of each of 120 dialogs.
                  batch_size=120),
    tiny=dict(TINY, epochs=1, batch_size=16, scenes=40000, lr=5e-4, max_tokens=60, eval_size=200),
    tiny_own=dict(min_steps=2500, new_pieces=OWN_WORDS),
    model_settings=dict(image_size=384))
BENCHMARKS = (TASK.benchmark("visdial", "MRR, recall and mean rank of 100 candidate answers"),)
