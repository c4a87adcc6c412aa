"""Files of questions about images, statements about two images and dialogs, as users bring them.

    read_questions(data)     BLIP's VQA lists, VQAv2's questions and annotations -> list of Asked
    read_statements(path)    BLIP's NLVR2 lists, the official jsonl -> list of Stated
    read_dialogs(data)       VisDial 1.0, with its dense relevance -> list of Dialog
    QuestionDataset, StatementDataset, DialogDataset, and a Collate for each, which makes the
                             model's inputs
    open_task(task, data)    the data set of a task, from files or from the world

A mistake in a file is an InputError that names the file, the record and the remedy.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data import InputError, PairDataset, Tokenizer, clean_question
from pairs import is_list, read_json, stream_list
from world_tasks import Dialogs, Questions, Round, Statements

GENOME_WEIGHT = 0.2  # of a Visual Genome answer, which one person gave (released code)
MOST_ANSWERS = 3128  # as many as the list that the paper ranks has


class TaskCollate:
    """Items -> a batch: what the model's forward wants (`inputs`) beside lists of index and broken.
    Items without an image are left out; a text longer than max_tokens is cut."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int = 35):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, items: list[dict]) -> dict:
        broken = [name for item in items for name in item["broken"]]
        items = [item for item in items if item["image"] is not None]
        batch = {"broken": broken, "index": [item["index"] for item in items], "image": None}
        if items:
            batch |= {"image": torch.stack([item["image"] for item in items]), **self.inputs(items)}
        return batch

    def inputs(self, items: list[dict]) -> dict:
        """The task's own part."""
        raise NotImplementedError


# ---- questions -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Asked:
    """A question about an image; its people's answers, none in a test set."""

    image: str
    question: str
    question_id: int | str
    answers: tuple[str, ...] = ()
    weight: float = 1.0  # of all answers together
    kind: str = ""  # VQAv2's answer type: yes/no, number, other


def read_questions(data: str, need_answers: bool = True) -> list[Asked]:
    """data: files with commas between them; BLIP's lists, or VQAv2's questions, each with its
    annotations in another file -> all questions. Raises InputError."""
    asked, annotations, official = [], {}, []
    for path in data.split(","):
        if is_list(path):
            asked += [question_of(f"{path}, record {number}", record, need_answers)
                      for number, record in enumerate(stream_list(path))]
            continue
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("questions"), list):
            official.append((path, content))
        elif isinstance(content, dict) and isinstance(content.get("annotations"), list):
            annotations |= {note.get("question_id"): note for note in content["annotations"]}
        else:
            raise InputError(f"{path} is neither a list of {{image, question, answer}} records nor "
                             "VQAv2's questions or annotations")
    for path, content in official:
        subset = content.get("data_subtype", "")
        for number, record in enumerate(content["questions"]):
            where = f"{path}, question {number}"
            try:
                note = annotations.get(record["question_id"], {})
                name = f"{subset}/COCO_{subset}_{record['image_id']:012d}.jpg"
                record = {"image": name, "question": record["question"],
                          "question_id": record["question_id"],
                          "answer": [a["answer"] for a in note.get("answers", [])],
                          "answer_type": note.get("answer_type", "")}
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{where}: {error} is missing or malformed; it needs image_id, "
                                 "question and question_id")
            asked.append(question_of(where, record, need_answers))
    if not asked:
        raise InputError(f"{data} holds no question")
    return asked


def question_of(where: str, record: dict, need_answers: bool) -> Asked:
    """A BLIP record, checked. Raises InputError."""
    try:
        image, question = record["image"], record["question"]
        answers = record.get("answer", [])
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(image, str) or not isinstance(question, str) or not isinstance(
                answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
            raise TypeError("image and question must be texts, answer a text or a list of texts")
        if need_answers and not answers:
            raise TypeError("it has no answer to learn from or to compare with; VQAv2's answers "
                            "are in its annotations file: give both, with a comma between them")
        weight = GENOME_WEIGHT if record.get("dataset") == "vg" else 1.0
        return Asked(image, question, record.get("question_id", where),
                     tuple(a.strip().lower() for a in answers), weight,
                     record.get("answer_type", ""))
    except KeyError as error:
        raise InputError(f"{where}: {error} is missing; a record needs image, question and answer")
    except (TypeError, AttributeError) as error:
        raise InputError(f"{where}: {error}")


def spelt(asked: list[Asked], tokenizer: Tokenizer) -> tuple[list[Asked], str]:
    """Questions without the answers that the vocabulary cannot spell, and without those that have
    no other answer: [UNK] is nothing to learn -> what is left, a sentence about the rest or ""."""
    answers = {answer for one in asked for answer in one.answers}
    unknown = {answer for answer in answers if not tokenizer.spells(answer)}
    if not unknown:
        return asked, ""
    left = [replace(one, answers=tuple(a for a in one.answers if a not in unknown))
            for one in asked]
    left = [one for one in left if one.answers]
    return left, (f"{len(unknown)} of {len(answers)} answers cannot be spelt with the pieces of "
                  f"the vocabulary ({min(unknown)!r}) and are left out, with "
                  f"{len(asked) - len(left)} of {len(asked)} questions that have no other; "
                  "pretrain with a --vocab that has them")


def common_answers(asked, count: int = MOST_ANSWERS) -> list[str]:
    """The commonest answers of questions {answers}: the list that is ranked."""
    found = Counter(answer for answers in asked for answer in dict.fromkeys(answers))
    return [answer for answer, _ in found.most_common(count)]


class QuestionDataset(PairDataset):
    """Items {image, question, answers, question_id, kind, weight, index, broken}."""

    def item(self, asked: Asked, rng: random.Random | None) -> dict:
        """What goes with the image."""
        return {"text": asked.question, "question": asked.question, "answers": asked.answers,
                "question_id": asked.question_id, "kind": asked.kind, "weight": asked.weight}


class QuestionCollate(TaskCollate):
    """ids, mask, answer_ids, answer_mask, counts, weights for VQA.forward, beside lists of
    question_id, questions, answers, kind."""

    def inputs(self, items: list[dict]) -> dict:
        """The questions, and each distinct answer once, weighted by the share of people who gave it
        (BLIP sec. 5.3); no answers if some question has none."""
        questions = [clean_question(item["question"]) for item in items]
        ids, mask = self.tokenizer.encode(questions, self.max_tokens)
        found = {"ids": ids, "mask": mask, "questions": questions}
        found |= {name: [item[name] for item in items]
                  for name in ("question_id", "answers", "kind")}
        given = [Counter(item["answers"]) for item in items]
        if all(given):
            answer_ids, answer_mask = self.tokenizer.encode(
                [answer for count in given for answer in count], self.max_tokens)
            weights = [item["weight"] * n / len(item["answers"])
                       for item, count in zip(items, given) for n in count.values()]
            found |= {"answer_ids": answer_ids, "answer_mask": answer_mask,
                      "weights": torch.tensor(weights),
                      "counts": torch.tensor([len(count) for count in given])}
        return found


# ---- statements about two images -----------------------------------------------------------------

@dataclass(frozen=True)
class Stated:
    """A sentence, the two images that it is about, whether it is true."""

    images: tuple[str, str]
    sentence: str
    label: bool
    identifier: str  # split-set-pair-sentence, as NLVR2 has it; pairs share a sentence

    @property
    def image(self) -> str:
        """Both names, for messages."""
        return " and ".join(self.images)


def read_statements(path: str | Path) -> list[Stated]:
    """BLIP's list of {images: [2], sentence, label} or NLVR2's jsonl of {sentence, identifier,
    label}, whose images are identifier-img0.png and -img1.png. Raises InputError."""
    if not is_list(path):
        raise InputError(f"{path} is neither a list of {{images, sentence, label}} nor a jsonl of "
                         "{identifier, sentence, label}")
    found = []
    for number, record in enumerate(stream_list(path)):
        where = f"{path}, record {number}"
        try:
            images, label = record.get("images"), str(record["label"]).lower()
            if images is None:
                stem = record["identifier"].rpartition("-")[0]
                images = [f"{stem}-img0.png", f"{stem}-img1.png"]
            if not isinstance(images, list) or len(images) != 2 or not all(
                    isinstance(image, str) for image in images):
                raise InputError(f"{where}: images must name two images, not {str(images)[:60]}")
            if label not in ("true", "false"):
                raise InputError(f"{where}: label is {record['label']!r}; it must be True or False")
            if not isinstance(record["sentence"], str) or not record["sentence"].strip():
                raise InputError(f"{where}: the sentence is empty")
            found.append(Stated(tuple(images), record["sentence"], label == "true",
                                str(record.get("identifier", number))))
        except (KeyError, AttributeError) as error:
            raise InputError(f"{where}: {error} is missing; a record needs images, sentence and "
                             "label (or identifier, sentence, label)")
    if not found:
        raise InputError(f"{path} holds no statement")
    return found


class StatementDataset(PairDataset):
    """Items {image (2, 3, S, S), sentence, label, identifier, index, broken}. Images of different
    sizes are no matter: each becomes a square. In training (`augment`) they are swapped half of the
    time.

    NOTE(differs from salesforce/BLIP): evaluation never swaps them.
    """

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        rng = random.Random(f"swap {self.seed} {self.epoch} {index}")
        swap = self.augment and item["image"] is not None and rng.random() < 0.5
        return swap_images(item) if swap else item

    def item(self, stated: Stated, rng: random.Random | None) -> dict:
        """What goes with the images."""
        return {"text": stated.sentence, "sentence": stated.sentence, "label": stated.label,
                "identifier": stated.identifier}

    def load(self, stated: Stated, text: str, rng: random.Random | None) -> Tensor:
        """-> (2, 3, S, S) uint8. Raises OSError."""
        return torch.stack([self.load_one(image, text, rng) for image in stated.images])


OTHER_SIDE = {"left": "right", "right": "left"}


def swap_images(item: dict) -> dict:
    """The same statement with the images in the other order, and left and right in its words."""
    words = re.sub(r"\b(left|right)\b", lambda m: OTHER_SIDE[m[0].lower()], item["sentence"],
                   flags=re.I)
    return {**item, "image": item["image"].flip(0), "sentence": words}


class StatementCollate(TaskCollate):
    """ids, mask, label for NLVR2.forward, beside lists of sentences and identifier."""

    def inputs(self, items: list[dict]) -> dict:
        """The statements."""
        sentences = [clean_question(item["sentence"], 40) for item in items]
        ids, mask = self.tokenizer.encode(sentences, self.max_tokens)
        return {"ids": ids, "mask": mask, "sentences": sentences,
                "label": torch.tensor([int(item["label"]) for item in items]),
                "identifier": [item["identifier"] for item in items]}


# ---- dialogs -------------------------------------------------------------------------------------

CANDIDATES = 100  # of a round, in VisDial


@dataclass(frozen=True)
class Dialog:
    """A captioned image and its rounds."""

    image: str
    caption: str
    rounds: tuple[Round, ...]
    dialog: int | str  # the image's id
    relevance: tuple[int, tuple[float, ...]] | None = None  # of a round's candidates, dense


def read_dialogs(data: str) -> list[Dialog]:
    """data: VisDial 1.0's file, and perhaps behind a comma its dense annotations. Images are
    VisualDialog_SPLIT_ID.jpg, or COCO's for the training split. Raises InputError."""
    path, _, dense = data.partition(",")
    content, marked = read_json(path), {}
    try:
        questions, answers = content["data"]["questions"], content["data"]["answers"]
        dialogs, split = content["data"]["dialogs"], content.get("split", "val2018")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no VisDial 1.0 file: {error} is missing; it needs data with "
                         "questions, answers and dialogs")
    for note in read_json(dense) if dense else []:
        marked[note["image_id"]] = (note["round_id"] - 1,
                                    tuple(note.get("gt_relevance", note.get("relevance"))))
    found = []
    for number, record in enumerate(dialogs):
        where = f"{path}, dialog {number}"
        try:
            rounds = []
            for turn, r in enumerate(record["dialog"]):
                options = r.get("answer_options", [])
                if len(options) != CANDIDATES:
                    raise InputError(f"{where}, round {turn + 1}: it has {len(options)} candidate "
                                     f"answers and must have {CANDIDATES}")
                rounds.append(Round(questions[r["question"]], answers[r["answer"]],
                                    tuple(answers[i] for i in options), r["gt_index"]))
            image = record.get("image") or (f"VisualDialog_{split}_{record['image_id']:012d}.jpg")
            found.append(Dialog(image, record["caption"], tuple(rounds), record["image_id"],
                                marked.get(record["image_id"])))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"{where}: {error!r}; a dialog needs image_id, caption and rounds of "
                             "question, answer, answer_options and gt_index")
    if not found:
        raise InputError(f"{path} holds no dialog")
    return found


class DialogDataset(PairDataset):
    """Items {image, caption, rounds, relevance, dialog, seed, index, broken}, one for each
    dialog."""

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "seed": f"dialog {self.seed} {self.epoch} {index}"}

    def item(self, dialog: Dialog, rng: random.Random | None) -> dict:
        """What goes with the image."""
        return {"text": dialog.caption, "caption": dialog.caption, "rounds": dialog.rounds,
                "relevance": dialog.relevance, "dialog": dialog.dialog}


def dialog_ids(tokenizer: Tokenizer, rounds, turn: int, candidates, limit: int) -> list[list[int]]:
    """For each candidate the ids of [CLS] question [SEP] candidate [SEP] the rounds before, the
    latest first, [SEP] behind each. What is judged stands in front, at the same positions in every
    dialog (with the history in front the picture world's R@1 was 5 points lower, one run each),
    and what `limit` cuts off is the oldest."""
    def ids(text, room=limit):
        return [*tokenizer.pieces_of(clean_question(text))[:room], tokenizer.sep]
    history = [i for r in reversed(rounds[:turn]) for i in ids(r.question)[:-1] + ids(r.answer)]
    question = [tokenizer.cls, *ids(rounds[turn].question, limit // 2)]
    return [(question + ids(candidate, limit // 3) + history)[:limit] for candidate in candidates]


def pad(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids and mask (B, longest)."""
    longest = max(map(len, rows))
    return (torch.tensor([row + [padding] * (longest - len(row)) for row in rows]),
            torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]))


class DialogCollate(TaskCollate):
    """caption_ids, caption_mask, ids, mask, label for VisDial.forward: of TURNS rounds of each
    dialog (its image and caption are read once for all of them) the answer and WRONG other
    candidates, drawn by the dialog's `seed`."""

    TURNS, WRONG = 2, 3

    def inputs(self, items: list[dict]) -> dict:
        """Captions, and the candidates with their history and question."""
        caption_ids, caption_mask = self.captions(items)
        rows, labels = [], []
        # The same turns for the whole batch: its texts are about as long, little is padding.
        known = range(min(len(item["rounds"]) for item in items))
        turns = random.Random(items[0]["seed"]).sample(known, min(self.TURNS, len(known)))
        for item in items:
            rng = random.Random(item["seed"])
            for turn in turns:
                asked = item["rounds"][turn]
                wrong = rng.sample([text for i, text in enumerate(asked.candidates)
                                    if i != asked.target], self.WRONG)
                rows += dialog_ids(self.tokenizer, item["rounds"], turn, [asked.answer, *wrong],
                                   self.max_tokens)
                labels += [1] + [0] * self.WRONG
        ids, mask = pad(rows, self.tokenizer.pad)
        return {"caption_ids": caption_ids, "caption_mask": caption_mask, "ids": ids,
                "mask": mask, "label": torch.tensor(labels)}

    def captions(self, items: list[dict]) -> tuple[Tensor, Tensor]:
        """ids and mask (B, Lc)."""
        return self.tokenizer.encode([clean_question(item["caption"], 40) for item in items],
                                     self.max_tokens)


# ---- data sets by the task's name ----------------------------------------------------------------

IN_FILES = {"vqa": QuestionDataset, "nlvr2": StatementDataset, "visdial": DialogDataset}
IN_WORLD = {"vqa": Questions, "nlvr2": Statements, "visdial": Dialogs}
COLLATE = {"vqa": QuestionCollate, "nlvr2": StatementCollate, "visdial": DialogCollate}


def open_task(task: str, data: str, image_root: str, image_size: int, size: int = 0,
              split: str = "held-out", need_answers: bool = True, **training):
    """The data set of a task: what the files `data` hold, or without them `size` items of the
    world's split. need_answers: an error where a question has none; `training`: augment, crop,
    seed of a PairDataset. Raises InputError."""
    if not data:
        return IN_WORLD[task](split, size, image_size, training.get("seed", 0))
    read = {"vqa": read_questions, "nlvr2": read_statements, "visdial": read_dialogs}[task]
    records = read(data, need_answers) if task == "vqa" else read(data)
    root = image_root or Path(data.split(",")[0]).parent
    return IN_FILES[task](records[:size or None], root, image_size, **training)
