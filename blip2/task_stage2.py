"""The tasks of BLIP-2's second stage: `blip2-stage2`, `blip2-caption`, `blip2-vqa`.

A frozen language model writes captions, and answers questions that it was never trained to answer
about pictures (zero-shot VQA, BLIP-2 sec. 4.1). Finetuned for VQA, the queries read the question
too.
"""

import math
import os
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from blip2.stage2 import Stage2, Stage2Config
from blip2.task_stage1 import (
    FINETUNED,
    RECIPE,
    SIZES,
    tokenizer_fields,
    trained_vision,
    vision_of,
)
from blip2.texts import (
    CAPTION_PROMPT,
    encode_prompts,
    encode_texts,
    kind_of_language,
    open_tokenizer,
    question_prompt,
    split_text,
)
from config import TrainConfig
from data.datasets import Collate, Dialog
from data.files import InputError, read_tensors
from data.text import Tokenizer, clean_caption, clean_question
from reports.metrics import mean
from tasks import captioning, vqa
from tasks.captioning import Decoding
from tasks.task import (
    TINY,
    EvalSettings,
    Evaluation,
    Task,
    TrainedModel,
    evaluation_batches,
    open_pairs,
)
from training import distributed
from world.datasets import Questions, World

# How texts are generated: captions (BLIP-2 sec. 4.2), answers (sec. 4.1): short ones are favoured.
# LENGTHS are settings of the training, which its checkpoint keeps.
LENGTHS = dict(min_length=8, max_length=30)
BEAMS = dict(beams=5)
ANSWERS = dict(beams=5, min_length=1, max_length=11, length_penalty=-1.0)


# ---- the language model --------------------------------------------------------------------------

def read_checkpoint_of(path: str, task: str) -> dict:
    """A checkpoint of the task. Raises InputError for what is none."""
    flag = "--text-from" if task == "blip2-stage1" else "--language-model"
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; train it with `python train.py {task}`, or give "
                         f"{flag} with another checkpoint of it")
    state = read_tensors(path)
    if not isinstance(state, dict) or state.get("train_config", {}).get("task") != task:
        raise InputError(f"{path} is not a checkpoint of `python train.py {task}`; give {flag} "
                         "with one")
    return state


def complete(config: Stage2Config, tokenizer: Tokenizer) -> Stage2Config:
    """The configuration of a new run, with what the tokenizer and the language model decide."""
    config = replace(config, **tokenizer_fields(tokenizer))
    if config.language:  # of --init
        return config
    path = config.language_model
    if not path:
        raise InputError("blip2-stage2 needs a language model: give --language-model with a "
                         "checkpoint of `python train.py language-model`, or a name or folder of "
                         "the transformers library such as facebook/opt-2.7b")
    if os.path.exists(os.path.join(path, "checkpoint.pt")):  # a folder of the library has none
        raise InputError(f"--language-model {path} is the folder of a run; give "
                         f"{os.path.join(path, 'checkpoint.pt')}")
    if path.endswith(".pt"):
        state = read_checkpoint_of(path, "language-model")
        return replace(config, language=dict(state["model_config"]))
    from blip2.transformers_language import describe_library_model
    return replace(config, language=describe_library_model(path))


def pieces_of_language(config: Stage2Config, tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """How the language model cuts a text into pieces."""
    return open_tokenizer(complete(config, tokenizer).language).ids


def initialise(model: Stage2, config: Stage2Config, source: nn.Module) -> None:
    """Copy the language model's weights; where questions are read also the text stream's.

    source: the model of --init. What it has is there already. Raises InputError.
    """
    before = source.config if isinstance(source, Stage2) else None
    if before is None:
        if config.language_model.endswith(".pt"):
            weights = read_checkpoint_of(config.language_model, "language-model")["model"]
            model.language.load_state_dict({name.removeprefix("language."): value
                                            for name, value in weights.items()})
    elif config.language_model != before.language_model:
        raise InputError(f"--init holds its language model ({before.language_model}), and "
                         f"--language-model is {config.language_model}; leave it out")
    if before and before.question_to_queries and config.question_to_queries:
        if config.text_from != before.text_from:
            raise InputError("--init has a text stream that reads questions; leave --text-from out")
    elif config.question_to_queries:
        copy_text_stream(model, config.text_from)


def copy_text_stream(model: Stage2, path: str) -> None:
    """The text stream of a stage 1, which stage 2 dropped. Raises InputError."""
    if not path:
        raise InputError("blip2-vqa reads the question with stage 1's text stream, which stage "
                         "2 dropped: give --text-from with the checkpoint of blip2-stage1")
    weights = read_checkpoint_of(path, "blip2-stage1")["model"]
    distributed.print0(f"the text stream comes from {path}")
    for name, value in model.state_dict().items():  # aliases the parameters
        if name.startswith("qformer.") and is_text(name):
            if name not in weights or weights[name].shape != value.shape:
                raise InputError(f"the text stream of {path} has other sizes or another "
                                 f"vocabulary than --init's ({name}); give the blip2-stage1 "
                                 "checkpoint that --init started from")
            value.copy_(weights[name])


def is_text(name: str) -> bool:
    """Whether a parameter of the Q-Former belongs to its text stream."""
    return any(part in name for part in (".ffn_text.", ".word.", ".position."))


# ---- batches -------------------------------------------------------------------------------------

def caption_batches(tokenizer: Tokenizer, config: TrainConfig,
                    model_config: Stage2Config) -> Collate:
    """Captions behind the prompt; for an encoder-decoder in two parts, the first is read.

    (If config.split_captions says so.)
    """
    language, kind = open_tokenizer(model_config.language), kind_of_language(model_config.language)
    split = kind == "encoder-decoder" and model_config.split_captions

    def encode(items):
        prompts, texts = [], []
        for item in items:
            prompt = config.prompt
            text = clean_caption(item["example"].captions[0], config.max_words)
            if split:
                prompt, text = split_text(prompt, text, random.Random(item["seed"]).random())
            prompts.append(prompt)
            texts.append(text)
        return encode_texts(language, kind, prompts, texts, config.max_tokens)
    return Collate(encode)


def question_batches(tokenizer: Tokenizer, config: TrainConfig,
                     model_config: Stage2Config) -> Collate:
    """Questions with the answer that most people give; also for the queries to read."""
    language, kind = open_tokenizer(model_config.language), kind_of_language(model_config.language)

    def encode(items):
        examples = [item["example"] for item in items]
        questions = [clean_question(example.question, config.max_words) for example in examples]
        answers = [max(example.answers, key=example.answers.count) for example in examples]
        prompts = [question_prompt(kind, question, finetuned=True) for question in questions]
        ids, mask = tokenizer.encode(questions, config.max_tokens)
        return encode_texts(language, kind, prompts, answers, config.max_tokens) | {
            "question_ids": ids, "question_mask": mask}
    return Collate(encode)


# ---- evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def write_captions(trained: TrainedModel, images: Tensor, decoding: Decoding,
                   count: int = 1) -> list[list[tuple[str, float]]]:
    """For each image `count` pairs (caption without the prompt, score), best first."""
    model = trained.model
    tokenizer, kind = open_tokenizer(model.config.language), model.language.config.kind
    ids, mask = encode_prompts(tokenizer, kind, [decoding.prompt] * len(images))
    written = model.generate(images, ids.to(images.device), mask.to(images.device),
                             num_return=count, **decoding.options(images.device))
    return [[(tokenizer.decode(tokens), score) for tokens, score in hypotheses]
            for hypotheses in written]


@torch.no_grad()
def answer(trained: TrainedModel, images: Tensor, questions: list[str],
           dialogs: list[Dialog] | None = None, **options) -> list[str]:
    """An answer to each image's question, behind the questions and answers of its dialog.

    images (B, 3, S, S), normalised. options of decoding.beam_search, else ANSWERS.
    """
    model, language = trained.model, trained.model.language
    tokenizer, kind = open_tokenizer(model.config.language), language.config.kind
    prompts = [question_prompt(kind, question, dialogs[i] if dialogs else (),
                               finetuned=model.config.question_to_queries)
               for i, question in enumerate(questions)]
    ids, mask = encode_prompts(tokenizer, kind, prompts)
    if not prompt_fits(model, ids.shape[1]):
        raise InputError(f"a prompt of {ids.shape[1]} tokens does not fit the language model's "
                         f"{language.config.max_positions} positions; ask less at a time")
    read_by_queries = {}
    if model.config.question_to_queries:
        q_ids, q_mask = trained.tokenizer.encode(questions, trained.max_tokens)
        read_by_queries = dict(question_ids=q_ids.to(images.device),
                               question_mask=q_mask.to(images.device))
    written = model.generate(images, ids.to(images.device), mask.to(images.device),
                             **(ANSWERS | options), **read_by_queries)
    return [tokenizer.decode(hypotheses[0][0]) if hypotheses else "" for hypotheses in written]


def prompt_fits(model: Stage2, length: int) -> bool:
    """Whether a prompt of so many tokens and an answer fit the positions behind the queries."""
    language = model.language.config
    most = getattr(language, "max_positions", math.inf) - ANSWERS["max_length"]
    return language.kind != "decoder" or length + model.config.queries <= most


def dialogs_before(trained: TrainedModel, dataset: Questions) -> list[Dialog]:
    """Three questions and their answers before each question; [] where they do not fit."""
    model = trained.model
    dialogs = [dataset.dialog_before(i) for i in range(len(dataset))]
    tokenizer, kind = open_tokenizer(model.config.language), model.language.config.kind
    longest = max(len(tokenizer.ids(question_prompt(kind, dataset.example(i).question, dialog)))
                  for i, dialog in enumerate(dialogs))
    if prompt_fits(model, longest + 1):  # bos
        return dialogs
    distributed.print0(f"WARNING dialogs of {longest} tokens do not fit the language model's "
                       f"{model.language.config.max_positions} positions: they are not judged")
    return []


def answer_questions(trained: TrainedModel, dataset: Dataset, settings: EvalSettings,
                     grey: bool = False, shift: int = 0,
                     dialogs: list[Dialog] | None = None) -> list[dict]:
    """{question_id, answer, index} of each question. shift: another item's picture is seen.

    dialogs: for each item, the questions and answers before its question.
    """
    trained.model.eval()
    if shift:
        dataset = Shifted(dataset, shift)
    collate, records = Collate(lambda items: {}), []
    for batch in evaluation_batches(dataset, collate, trained, "answers", grey=grey):
        questions = [clean_question(example.question, trained.max_words)
                     for example in batch["examples"]]
        said = [dialogs[index] for index in batch["index"]] if dialogs else None
        answers = answer(trained, batch["image"], questions, said)
        for example, text, index in zip(batch["examples"], answers, batch["index"]):
            records.append({"question_id": example.question_id, "answer": text, "index": index})
    return sorted(distributed.gather(records), key=lambda record: record["index"])


class Shifted(Dataset):
    """A data set in which each item has another one's picture."""

    def __init__(self, dataset: Dataset, shift: int):
        self.dataset, self.shift = dataset, shift

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        other = self.dataset[(index + self.shift) % len(self)]
        return self.dataset[index] | {"image": other["image"]}


def evaluate_captions(trained: TrainedModel, dataset: Dataset,
                      settings: EvalSettings) -> Evaluation:
    """As captioning.evaluate."""
    settings = replace(settings, decoding=BEAMS | settings.decoding)
    return captioning.evaluate(trained, dataset, settings,
                               lambda *arguments: write_captions(trained, *arguments))


def evaluate_questions(trained: TrainedModel, dataset: Dataset,
                       settings: EvalSettings) -> Evaluation:
    """As vqa.evaluate; in the world also two numbers more.

    dialog_accuracy: behind three other questions and their true answers. other_accuracy: another
    scene's picture was seen.
    """
    evaluation = vqa.evaluate(trained, dataset, settings, answer_questions)
    if settings.baselines and isinstance(dataset, Questions):
        dialogs = dialogs_before(trained, dataset)
        ways = {"dialog_accuracy": dict(dialogs=dialogs)} if dialogs else {}
        ways["other_accuracy"] = dict(shift=1)
        for name, how in ways.items():
            records = answer_questions(trained, dataset, settings, **how)
            examples = [dataset.example(record["index"]) for record in records]
            scores = vqa.score_answers([record["answer"] for record in records], examples)
            evaluation.numbers[name] = mean(scores)
    return evaluation


def evaluate(trained: TrainedModel, dataset: Dataset, settings: EvalSettings) -> Evaluation:
    """Captions; in the world also questions, which nobody trained the model to answer."""
    captioned = evaluate_captions(trained, dataset, settings)
    if not isinstance(dataset, World):
        return captioned
    questions = Questions(dataset.split, len(dataset), dataset.image_size, dataset.seed)
    asked = evaluate_questions(trained, questions, replace(settings, training=None))
    return Evaluation(captioned.numbers | asked.numbers, captioned.sections + asked.sections)


# ---- the tasks -----------------------------------------------------------------------------------

def question_reader(start: dict, recipe: dict) -> dict:
    """Of a stage 2: its queries are to read the question, its image encoder to be trained.

    The text stream that reads it is that of the stage 1 from which stage 2 started. What reads
    questions already has its own.
    """
    stage1 = recipe.get("init", "")
    text_from = start["text_from"] if start.get("question_to_queries") else stage1
    return trained_vision(start, recipe) | dict(question_to_queries=True, text_from=text_from)


def image_reader(start: dict, recipe: dict) -> dict:
    """Of any start: the Q-Former reads no question."""
    return vision_of(start, recipe) | dict(question_to_queries=False)


def caption_writer(start: dict, recipe: dict) -> dict:
    """Of a stage 2: it writes whole captions (BLIP-2 sec. 4.2), its image encoder is trained."""
    return trained_vision(start, recipe) | dict(split_captions=False, question_to_queries=False)


def of_stage2(name: str, about: str, *functions, **changes) -> Task:
    """A task whose model is a Stage2."""
    return Task(name, about, Stage2, *functions, config=Stage2Config, complete=complete,
                pieces=pieces_of_language, initialise=initialise, **changes)


TINY_SIZES = SIZES["tiny"] | dict(new_layers=2, split_captions=False, soft_scale=16.0,
                                  language_model="runs/language/checkpoint.pt")
STAGE2_SIZES = SIZES | {"tiny": TINY_SIZES}
TASKS = (
    of_stage2("blip2-stage2", "BLIP-2: a frozen language model reads what the queries extracted",
              open_pairs, caption_batches, evaluate, sizes=STAGE2_SIZES,
              starts_from=("blip2-stage1", "pretrain"), from_start=image_reader,
              reads=("prompt", "new_layers"),
              holds_splits=True, lengths_count_prompt=False,
              settings=dict(RECIPE | LENGTHS, out="runs/blip2-stage2", epochs=10, min_lr=5e-5,
                            batch_size=1920),
              tiny=dict(TINY | LENGTHS, epochs=1, scenes=32000, batch_size=16, lr=1.5e-3,
                        weight_decay=0.5, prompt=CAPTION_PROMPT),
              tiny_own=dict(min_steps=1000, crop_min=0.5),
              highlights=(
                  (("caption_true", "% of captions have every fact right and none left out", ""),
                   ("cider", "CIDEr of captions", "paper, finetuned on COCO: 145.8")),
                  (("accuracy", "% of questions are answered, without any training on questions "
                    "about pictures", "paper, VQAv2 zero-shot: 65.0"),),
                  (("dialog_accuracy", "% of them behind three other questions and their answers",
                    ""),),
                  (("blank_accuracy", "% of them when the picture is grey", ""),),
                  (("other_accuracy", "% of them when it is another scene's", ""),))),
    of_stage2("blip2-caption", "BLIP-2: describe images, finetuned", open_pairs, caption_batches,
              evaluate_captions, lambda numbers: numbers["cider"], sizes=STAGE2_SIZES,
              starts_from=("blip2-stage2",), from_start=caption_writer, reads=("prompt",),
              holds_splits=True, lengths_count_prompt=False,
              settings=dict(FINETUNED | LENGTHS, out="runs/blip2-caption", max_tokens=32,
                            prompt=CAPTION_PROMPT),
              tiny=dict(TINY | LENGTHS, epochs=2, scenes=6400, lr=3e-4),
              tiny_own=dict(min_steps=400),
              model_settings=dict(image_size=364)),  # BLIP-2 Table 7
    of_stage2("blip2-vqa", "BLIP-2: answer questions, the queries read them too",
              vqa.open_data, question_batches, evaluate_questions,
              lambda numbers: numbers["accuracy"], sizes=STAGE2_SIZES,
              starts_from=("blip2-stage2",), from_start=question_reader, reads=("text_from",),
              settings=dict(FINETUNED, out="runs/blip2-vqa", batch_size=128, max_words=50,
                            max_tokens=35),
              tiny=dict(TINY, epochs=2, scenes=32000, lr=5e-4), tiny_own=dict(min_steps=1000),
              model_settings=dict(image_size=490)),  # BLIP-2 Table 8
)
BENCHMARKS = (
    TASKS[1].benchmark("blip2-caption", "BLIP-2: BLEU, ROUGE-L and CIDEr of generated captions",
                       flags=("decoding", "constant_from"), defaults=BEAMS),
    TASKS[2].benchmark("blip2-vqa", "BLIP-2: VQA accuracy, zero-shot or finetuned",
                       need_labels=False),
)
