"""Visual question answering (BLIP sec. 5.3, Fig. 5a).

A question encoder, grounded in the image, and an answer decoder that reads its states. Answers are
ranked by their likelihood, or generated. Here: the model, the files of questions, the evaluation.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from blip import init_weights, make_med
from config import BLIPConfig, TrainConfig
from data.datasets import Collate, VQAExample, some_examples
from data.files import InputError, is_list, named_files, read_json, require_object, stream_list
from data.text import Tokenizer, clean_question
from decoding import Hypothesis, beam_search
from losses import next_token_targets
from med import ContextKV, DecoderStep
from reports.metrics import mean, vqa_accuracy
from reports.sheets import BLACK, GREEN, GREY, RED, Cell, Sections, pick_examples, pictures_of
from tasks.task import (
    FINETUNE,
    OWN_WORDS,
    TINY,
    Datasets,
    EvalSettings,
    Evaluation,
    Source,
    Task,
    TaskModel,
    TrainedModel,
    broken_images,
    evaluation_batches,
    require_readable,
    subsets_of,
)
from training import distributed
from world.datasets import Questions

GENOME_WEIGHT = 0.2  # of a Visual Genome answer, which one person gave (released code)
MOST_ANSWERS = 3128  # as many as the list that the paper ranks has


class VQA(TaskModel):
    """A question encoder that reads the image, an answer decoder that reads its states.

    vit, question, answer. The two MEDs share nothing: each starts from the pretrained one. Letters:
    A answers, K candidates.
    """

    def __init__(self, config: BLIPConfig):
        super().__init__(config)
        self.question = make_med(config, ("grounded",))
        self.answer = make_med(config, ("decode",), context_width=config.text_width)
        init_weights(self, config.init_std)

    def pretrained_name(self, name: str) -> str:
        """question.* and answer.* both come from med.*"""
        return name.replace("question.", "med.", 1).replace("answer.", "med.", 1)

    def encode_question(self, image: Tensor, ids: Tensor, mask: Tensor,
                        attend_padding: bool = False) -> ContextKV:
        """Keys and values of the questions' states, projected once for all answers.

        image (B, 3, S, S), or frames (B, F, 3, S, S); questions ids and mask (B, L).
        NOTE(differs from salesforce/BLIP): answers do not look at the padding behind a question, as
        they do there in generation; `attend_padding` reproduces that.
        """
        frames = image.flatten(0, 1) if image.ndim == 5 else image
        tokens = self.vit(frames).reshape(len(image), -1, self.config.vit_width)
        states = self.question.encode_grounded(ids, mask, self.question.project(tokens))
        return self.answer.project(states, None if attend_padding else mask)

    def answer_nll(self, kv: ContextKV, ids: Tensor, mask: Tensor,
                   label_smoothing: float = 0.0) -> Tensor:
        """Negative log-likelihood of answers, summed over their tokens.

        kv of B questions, answers ids and mask (n*B, L) -> (n*B,). The LM head runs only where
        there is a target.
        """
        states, _ = self.answer.decode(ids[:, :-1], mask[:, :-1], kv)
        targets = next_token_targets(ids, mask)
        rows, columns = (targets >= 0).nonzero(as_tuple=True)
        logits = self.answer.logits(states[rows, columns])
        return text_nll(logits, targets[rows, columns], rows, len(ids), label_smoothing)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, answer_ids: Tensor,
                answer_mask: Tensor, counts: Tensor, weights: Tensor) -> tuple[dict, dict]:
        """The weighted LM loss, a question.

        Questions ids and mask (B, L); answers (A, La), counts (B,) of them for each question in
        turn, weights (A,): the share of people who gave it.
        """
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
        kv = self.encode_question(image, ids, mask).select(rows)
        nll = self.answer_nll(kv, answer_ids, answer_mask, self.config.label_smoothing)
        return {"vqa": (weights * nll).sum() / len(ids)}, {}

    @torch.no_grad()
    def rank(self, kv: ContextKV, ids: Tensor, mask: Tensor, top_k: int = 128,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The answers whose first token is likeliest, and their negative log-likelihoods.

        kv of B questions, the answer list ids and mask (A, L) -> candidates (B, K), (B, K).
        NOTE(differs from salesforce/BLIP): likelihoods are not label-smoothed; `label_smoothing`
        0.1 reproduces that.
        """
        start = torch.full((len(kv), 1), self.config.dec_id, device=ids.device)
        states, _ = self.answer.decode(start, None, kv)
        first = self.answer.logits(states[:, 0]).float().softmax(-1)[:, ids[:, 1]]  # (B, A)
        candidates = first.topk(min(top_k, len(ids)), dim=1).indices
        flat = candidates.flatten()
        longest = int(mask[flat].sum(1).max())
        nll = self.answer_nll(kv, ids[flat, :longest], mask[flat, :longest], label_smoothing)
        return candidates, nll.view(candidates.shape)

    @torch.no_grad()
    def generate(self, kv: ContextKV, beams: int = 3, max_length: int = 10,
                 min_length: int = 1) -> list[Hypothesis]:
        """The likeliest answer to each of B questions: (token ids, mean log-probability).

        Lengths count [DEC].
        """
        questions = torch.arange(len(kv), device=kv.device)
        start = torch.full((len(kv), 1), self.config.dec_id, device=kv.device)
        hypotheses = beam_search(DecoderStep(self.answer, kv, questions), start,
                                 self.config.sep_id, beams, max_length, min_length)
        best = [of_question[0] for of_question in hypotheses]
        return [(ids[1:], score) for ids, score in best]


def text_nll(logits: Tensor, targets: Tensor, rows: Tensor, texts: int,
             label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of each text, in nats, summed over its tokens (BLIP sec. 5.3).

    logits (T, V) at the T positions that have a target, targets (T,), rows (T,): the text that each
    belongs to -> (texts,). Answers are trained and ranked by it.
    """
    loss = F.cross_entropy(logits.float(), targets, reduction="none",
                           label_smoothing=label_smoothing)
    return loss.new_zeros(texts).index_add(0, rows, loss)


# ---- files of questions --------------------------------------------------------------------------

def read_questions(data: str, need_answers: bool = True) -> list[VQAExample]:
    """Files with commas between them: BLIP's lists, VQAv2's questions and their annotations.

    need_answers: a question without answers is an error. Raises InputError.
    """
    examples, annotations, official = [], {}, []
    for path in named_files(data):
        if is_list(path):
            examples += [make_example(f"{path}, record {number}", record, need_answers)
                         for number, record in enumerate(stream_list(path))]
            continue
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("questions"), list):
            official.append((path, content))
        elif isinstance(content, dict) and isinstance(content.get("annotations"), list):
            annotations |= read_annotations(path, content["annotations"])
        else:
            raise InputError(f"{path} is neither a list of {{image, question, answer}} records (or "
                             "one a line) nor VQAv2's questions or annotations")
    for path, content in official:
        subset = content.get("data_subtype", "")
        for number, record in enumerate(content["questions"]):
            where = f"{path}, question {number}"
            require_object(where, record, "image_id, question and question_id")
            try:
                about = annotations.get(record["question_id"], {})
                name = f"{subset}/COCO_{subset}_{record['image_id']:012d}.jpg"
                record = {"image": name, "question": record["question"],
                          "question_id": record["question_id"], **about}
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{where}: {error} is missing or malformed; it needs image_id, "
                                 "question and question_id")
            examples.append(make_example(where, record, need_answers))
    if not examples:
        raise InputError(f"{data} holds no question")
    return examples


def read_annotations(path: str, notes: list) -> dict[int | str, dict]:
    """VQAv2's annotations: question_id -> {answer: texts, answer_type}. Raises InputError."""
    annotations = {}
    for number, note in enumerate(notes):
        require_object(f"{path}, annotation {number}", note, "question_id and answers")
        try:
            answers = as_texts([given["answer"] for given in note.get("answers", [])])
            if not all(isinstance(answer, str) and answer.strip() for answer in answers):
                raise TypeError("an answer that is no text")
            annotations[note["question_id"]] = {"answer": answers,
                                                "answer_type": note.get("answer_type", "")}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, annotation {number}: {error} is missing or malformed; it "
                             "needs question_id and answers with an answer each")
    return annotations


def make_example(where: str, record: dict, need_answers: bool) -> VQAExample:
    """A BLIP record, checked. Raises InputError."""
    require_object(where, record, "image, question and answer")
    try:
        image, question = record["image"], record["question"]
        answers = as_texts(record.get("answer", []))
        if not isinstance(image, str) or not isinstance(question, str) or not all(
                isinstance(a, str) and a.strip() for a in answers):
            raise TypeError("image and question must be texts, answer a text or a list of texts")
        if need_answers and not answers:
            raise TypeError("it has no answer to learn from or to compare with; VQAv2's answers "
                            "are in its annotations file: give both, with a comma between them")
        weight = GENOME_WEIGHT if record.get("dataset") == "vg" else 1.0
        return VQAExample(image, question, record.get("question_id", where),
                          tuple(a.strip().lower() for a in answers), weight,
                          str(record.get("answer_type", "")))
    except KeyError as error:
        raise InputError(f"{where}: {error} is missing; a record needs image, question and answer")
    except (TypeError, AttributeError) as error:
        raise InputError(f"{where}: {error}")


def as_texts(answers):
    """One answer or a list of them -> a list; an answer that is a number becomes its text."""
    answers = answers if isinstance(answers, list) else [answers]
    return [str(answer) if type(answer) in (int, float) else answer for answer in answers]


def open_data(source: Source) -> Dataset:
    """Questions of files, or of the world."""
    if not source.data:
        return Questions(source.split, source.size, source.image_size, source.seed)
    return source.images(read_questions(source.data, source.need_labels))


def collate(tokenizer: Tokenizer, config: TrainConfig, model_config: BLIPConfig) -> Collate:
    """Batches for VQA.forward."""
    return question_collate(tokenizer, config.max_words, config.max_tokens)


def question_collate(tokenizer: Tokenizer, max_words: int, max_tokens: int) -> Collate:
    """ids, mask, and answer_ids, answer_mask, counts, weights unless an answer is missing.

    Each distinct answer stands once, weighted by the share of people who gave it (released code).
    """
    def encode(items):
        examples = [item["example"] for item in items]
        questions = [clean_question(example.question, max_words) for example in examples]
        ids, mask = tokenizer.encode(questions, max_tokens)
        tensors = {"ids": ids, "mask": mask}
        if all(example.answers for example in examples):
            answers, weights, counts = [], [], []
            for example in examples:
                people = Counter(example.answers)
                counts.append(len(people))
                for answer, count in people.items():
                    answers.append(answer)
                    weights.append(example.weight * count / len(example.answers))
            tensors["answer_ids"], tensors["answer_mask"] = tokenizer.encode(answers, max_tokens)
            tensors["counts"], tensors["weights"] = torch.tensor(counts), torch.tensor(weights)
        return tensors
    return Collate(encode)


# ---- the list of answers -------------------------------------------------------------------------

def prepare(datasets: Datasets, tokenizer: Tokenizer, config: TrainConfig) -> Datasets:
    """The training set without what the vocabulary cannot spell, and the answers to rank."""
    train = datasets.train
    if hasattr(train, "examples"):  # files
        train.examples, sentence = leave_out_unknown(train.examples, tokenizer)
        if sentence:
            distributed.print0(sentence)
        answers = common_answers(example.answers for example in train.examples)
    else:
        answers = common_answers(train.example(i).answers for i in range(min(5000, len(train))))
    return replace(datasets, answers=read_answers(config.answers) if config.answers else answers)


def read_answers(path: str | Path) -> list[str]:
    """A json list of answers, as the released answer_list.json. Raises InputError."""
    answers = as_texts(read_json(path))
    if not answers or not all(isinstance(answer, str) and answer for answer in answers):
        raise InputError(f"{path} must be a json list of answers")
    return answers


def leave_out_unknown(examples: list[VQAExample],
                      tokenizer: Tokenizer) -> tuple[list[VQAExample], str]:
    """Questions without the answers that the vocabulary cannot spell.

    [UNK] is nothing to learn. Questions that have no other answer are left out -> what is left, and
    a sentence about the rest, "" where there is none.
    """
    answers = {answer for example in examples for answer in example.answers}
    unknown = {answer for answer in answers if not tokenizer.can_spell(answer)}
    if not unknown:
        return examples, ""
    kept = []
    for example in examples:
        spelled = tuple(answer for answer in example.answers if answer not in unknown)
        if spelled:
            kept.append(replace(example, answers=spelled))
    return kept, (f"{len(unknown)} of {len(answers)} answers cannot be spelt with the pieces of "
                  f"the vocabulary ({min(unknown)!r}) and are left out, with "
                  f"{len(examples) - len(kept)} of {len(examples)} questions that have no other; "
                  "pretrain with a --vocab that has them")


def common_answers(answer_lists, count: int = MOST_ANSWERS) -> list[str]:
    """The commonest answers: the list that is ranked.

    Of all training answers, so with Visual Genome in the data also of its.
    NOTE(differs from salesforce/BLIP): there, a list of 3,128 answers of VQAv2 comes with the code
    (`--answers answer_list.json`).
    """
    counts = Counter(answer for answers in answer_lists for answer in dict.fromkeys(answers))
    return [answer for answer, _ in counts.most_common(count)]


# ---- evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def answer_questions(trained: TrainedModel, dataset: Dataset, settings: EvalSettings,
                     grey: bool = False) -> list[dict]:
    """{question_id, answer, index} of each question: one of the list, or a generated one."""
    model, tokenizer, device = trained.model.eval(), trained.tokenizer, trained.device
    answers = [] if settings.generate else list(settings.answers or trained.answers)
    if not answers and not settings.generate:
        distributed.print0("the checkpoint has no list of answers: generating")
    if answers:
        ids, mask = (x.to(device) for x in tokenizer.encode(answers, trained.max_tokens))
    records = []
    collate = question_collate(tokenizer, trained.max_words, trained.max_tokens)
    for batch in evaluation_batches(dataset, collate, trained, "answers", grey=grey):
        kv = model.encode_question(batch["image"], batch["ids"], batch["mask"])
        if answers:
            candidates, nll = model.rank(kv, ids, mask, settings.top_k or 128)
            best = candidates.gather(1, nll.argmin(1, keepdim=True)).flatten().tolist()
            texts = [answers[i] for i in best]
        else:
            texts = [tokenizer.decode(tokens) for tokens, _ in model.generate(kv)]
        for example, answer, index in zip(batch["examples"], texts, batch["index"]):
            records.append({"question_id": example.question_id, "answer": answer, "index": index})
    return sorted(distributed.gather(records), key=lambda record: record["index"])


def evaluate(trained: TrainedModel, dataset: Dataset, settings: EvalSettings,
             answer: Callable = answer_questions) -> Evaluation:
    """accuracy, and accuracy_by kind of question. answer: another model's `answer_questions`.

    "chance": the commonest answer of `settings.training` for each kind of question. With baselines
    blank_accuracy, the same model on grey images. Of a data set with subsets also accuracy_NAME.
    """
    records = answer(trained, dataset, settings)
    require_readable(records, dataset)
    counts = {"questions": len(records), "broken": broken_images(dataset, records)}
    examples = [dataset.example(record["index"]) for record in records]
    files = {"answers.json": [{"question_id": record["question_id"], "answer": record["answer"]}
                              for record in records]}
    unknown = sum(not example.answers for example in examples)
    if unknown:  # a test set, or annotations that do not fit
        distributed.print0(f"{unknown} of {len(examples)} questions have no answers: no accuracy")
        return Evaluation(counts, sections(dataset, records, examples), files)
    scores = score_answers([record["answer"] for record in records], examples)
    for record, value in zip(records, scores):
        record["accuracy"] = value
    numbers = by_kind("accuracy", scores, examples)
    for name, indices in subsets_of(dataset).items():
        inside = set(indices)
        numbers[f"accuracy_{name}"] = mean(record["accuracy"] for record in records
                                           if record["index"] in inside)
    if settings.baselines and settings.training is not None:
        prior = commonest_answers(settings.training)
        guesses = [prior.get(kind_of(example), prior[""]) for example in examples]
        numbers["chance"] = by_kind("accuracy", score_answers(guesses, examples), examples)
    if settings.baselines:
        blind = answer(trained, dataset, settings, grey=True)
        blind_scores = score_answers([record["answer"] for record in blind], examples)
        numbers |= by_kind("blank_accuracy", blind_scores, examples)
    lengths = [2 + len(trained.tokenizer.piece_ids(clean_question(example.question)))
               for example in examples]
    cut = sum(length > trained.max_tokens for length in lengths)
    numbers |= counts | {"cut": cut}
    if cut:
        distributed.print0(f"{cut} questions were cut to {trained.max_tokens} tokens")
    return Evaluation(numbers, sections(dataset, records, examples), files)


def score_answers(answers: list[str], examples: list[VQAExample]) -> list[float]:
    """VQA accuracy of each answer."""
    return [vqa_accuracy(answer, example.answers) for answer, example in zip(answers, examples)]


def by_kind(name: str, scores: list[float], examples: list[VQAExample]) -> dict:
    """{NAME: mean, NAME_by: mean of each kind of question}."""
    kinds: dict[str, list[float]] = {}
    for value, example in zip(scores, examples):
        kinds.setdefault(example.kind, []).append(value)
    return {name: mean(scores),
            f"{name}_by": {kind: mean(values) for kind, values in sorted(kinds.items())}}


def kind_of(example: VQAExample) -> str:
    """What a question asks for, as the prior knows it: its kind, or its first two words."""
    return example.kind or " ".join(example.question.lower().split()[:2])


def commonest_answers(dataset: Dataset, count: int = 5000) -> dict[str, str]:
    """Kind of question -> its commonest answer in a data set; "" -> the commonest of all."""
    counts: dict[str, Counter] = {"": Counter()}
    for example in some_examples(dataset, count):
        for kind in ("", kind_of(example)):
            counts.setdefault(kind, Counter()).update(example.answers)
    return {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}


def sections(dataset: Dataset, records: list[dict], examples: list[VQAExample]) -> Sections:
    """Some questions with their answers, green or red, and what most people say."""
    def cell(record: dict, example: VQAExample) -> Cell:
        colour = BLACK
        if "accuracy" in record:
            colour = GREEN if record["accuracy"] > 0.5 else RED
        lines = [(example.question, BLACK), (record["answer"], colour)]
        lines += [(answer, GREY) for answer, _ in Counter(example.answers).most_common(1)]
        return Cell(pictures_of(dataset, record["index"]), lines)
    chosen = pick_examples([record.get("accuracy", 0.0) for record in records], 8)
    if not any("accuracy" in record for record in records):  # a test set: none is best or worst
        chosen = {"random": chosen["random"]}
    return [(f"questions, answers (green: right), what most people say: {title}",
             [[cell(records[i], examples[i]) for i in indices]])
            for title, indices in chosen.items()]


TASK = Task(
    "vqa", "answer questions about an image", VQA, open_data, collate, evaluate,
    lambda numbers: numbers["accuracy"], prepare=prepare, reads=("answers", "label_smoothing"),
    settings=dict(FINETUNE, out="runs/vqa", lr=2e-5, epochs=10, max_words=50,
                  max_tokens=35),
    tiny=dict(TINY, epochs=1, scenes=128000, lr=3e-4),
    tiny_own=dict(min_steps=4000, new_pieces=OWN_WORDS),
    model_settings=dict(image_size=480, drop_path=0.1))
BENCHMARKS = (TASK.benchmark("vqa", "VQA accuracy; answers.json is for the evaluation server",
                             flags=("generate", "answers", "top_k"), need_labels=False),)
