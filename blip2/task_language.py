"""The task `language-model`: a language model that is trained on the world's texts alone.

It is what BLIP-2's second stage freezes when there is no download: as OPT and FlanT5 in the paper,
it has read captions, questions and answers, and has never seen a picture.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from blip2.language import EncoderDecoderLM, LanguageConfig, make_language, near_slopes
from blip2.texts import (
    CAPTION_PROMPT,
    NO_LOSS,
    WordPieces,
    encode_prompts,
    encode_texts,
    language_fields,
    mask_of,
    open_tokenizer,
    pad_rows,
    question_prompt,
    split_text,
)
from blip2.writing import logits_of_targets, write_behind
from config import SettingError, TrainConfig
from data.datasets import Dialog
from data.files import InputError
from data.text import Tokenizer, clean_caption
from losses import lm_loss, next_token_targets
from reports.metrics import mean, vqa_accuracy
from tasks.task import (
    TINY,
    EvalSettings,
    Evaluation,
    Source,
    Task,
    TrainedModel,
    shared_batches,
)
from tasks.vqa import by_kind
from training import distributed
from training.trainable import Trainable
from world.datasets import Questions
from world.documents import Documents

CAPTION_WEIGHT = 0.3  # of the loss on captions; that on what follows has 1


def initialise_language(language: nn.Module) -> None:
    """Initial weights for narrow models.

    Embeddings of order 1, matrices by width: with BERT's 0.02 a narrow model does not learn to look
    things up. A decoder's positions start as sinusoids (Vaswani et al. 2017, sec. 3.5).
    """
    for name, weight in language.named_parameters():
        if name.endswith("word.weight"):
            nn.init.normal_(weight, std=1.0)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if name.endswith(("out.weight", "fc2.weight")):  # what is added to the residual stream
            weight.data.mul_(0.35)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    if language.config.kind == "decoder":
        positions, width = language.position.weight.shape
        rates = torch.exp(torch.arange(0, width, 2) * (-math.log(1000.0) / width))
        angles = torch.arange(positions)[:, None] * rates
        language.position.weight.data = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
    else:
        initialise_lookup(language)


def initialise_lookup(language: EncoderDecoderLM) -> None:
    """An encoder-decoder's heads start by looking at neighbours or for equal tokens.

    For equal tokens: keys are made as queries are. At neighbours, in the first `near_heads` heads
    of self-attention: queries are 0, so relative positions alone decide where such a head looks.
    """
    c = language.config
    for stack in (language.encoder, language.decoder):
        for layer in stack.layers:
            for attention in (layer.attn, layer.cross_attn):
                if attention is not None:
                    attention.k.weight.data.copy_(attention.q.weight)
                    attention.q.weight.data.mul_(c.head_width ** -0.5)  # T5 scales no scores
            layer.attn.q.weight.data[:c.near_heads * c.head_width] = 0
        stack.relative.weight.data = neighbour_bias(c, both_ways=not stack.decoder)


def neighbour_bias(config: LanguageConfig, both_ways: bool) -> Tensor:
    """T5's table of relative positions at the start: (buckets, H), 0 for the other heads.

    A head that looks at neighbours weighs a token down by its distance, as near_slopes has it but
    twice as steep. It hardly looks at its own token. In an encoder one head looks to the left, the
    next one to the right.
    """
    c = config
    one_way = c.buckets // 2 if both_ways else c.buckets  # first those of tokens on the left
    distance = torch.arange(c.buckets) % one_way  # far ones by their bucket's number
    bias = -2 * distance[:, None] * near_slopes(c)
    bias[0, :c.near_heads] = -4.0  # the token itself
    if both_ways:
        bias[one_way:, :c.near_heads:2] = -8.0
        bias[:one_way, 1:c.near_heads:2] = -8.0
    return bias


class TextModel(Trainable):
    """A language model and its training on documents."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.language = make_language(config)
        initialise_language(self.language)

    def forward(self, ids: Tensor, mask: Tensor, targets: Tensor,
                caption_ids: Tensor | None = None, caption_mask: Tensor | None = None,
                other_ids: Tensor | None = None,
                other_mask: Tensor | None = None) -> tuple[dict[str, Tensor], dict]:
        """{"lm": loss on what follows a caption}, of a decoder also {"caption": that on captions}.

        Encoder-decoder: ids, mask (B, L) are read (a caption and a prompt), targets written.
        Decoder: caption_ids (B, P) and the same in other words, other_ids (B, M); ids, mask,
        targets (n*B, L): n dialogs about each caption, which see the caption and not one another.
        The captions are run once.
        """
        language = self.language
        if caption_ids is None:
            logits = logits_of_targets(language, language.embed(ids), mask, targets)
            return {"lm": lm_loss(logits, targets, 0.0)}, {}
        length = caption_ids.shape[1]
        said = torch.cat([caption_ids, other_ids], 1)
        said_mask = torch.cat([caption_mask, other_mask], 1)
        states, cache = language(language.embed(said), said_mask)
        said_logits = language.logits(states[:, :-1])
        said_targets = next_token_targets(said, said_mask)
        captions = lm_loss(said_logits[:, :length - 1], said_targets[:, :length - 1], 0.0)
        cache = [(k[:, :, :length], v[:, :, :length]) for k, v in cache]  # of the captions alone
        rows = torch.arange(len(ids), device=ids.device) // (len(ids) // len(caption_ids))
        states, _ = language(language.embed(ids), torch.cat([caption_mask[rows], mask], 1),
                             language.select(cache, rows))
        logits = torch.cat([said_logits[:, length:].flatten(0, 1),
                            language.logits(states[:, :-1]).flatten(0, 1)])
        answers = torch.cat([said_targets[:, length:].flatten(), targets[:, 1:].flatten()])
        return {"lm": lm_loss(logits[None], answers[None], 0.0),
                "caption": CAPTION_WEIGHT * captions}, {}


def open_data(source: Source) -> Dataset:
    """Documents of the world to train on, questions to judge by. Raises InputError for files."""
    if source.data:
        raise InputError("language-model learns from the picture world's texts; for own pictures "
                         "take a trained one: blip2-stage2 --language-model with a folder "
                         "of the transformers library")
    if source.split == "train":
        return Documents("train", source.size, source.seed)
    return Questions(source.split, source.size, source.image_size or 64, source.seed)


def collate(tokenizer: Tokenizer, config: TrainConfig, model_config: LanguageConfig):
    """Batches for TextModel.forward."""
    pieces, kind = WordPieces(tokenizer.vocab), model_config.kind

    def encode(items: list[dict]) -> dict:
        documents = [item["example"] for item in items]
        captions = [clean_caption(document.caption) for document in documents]
        others = [clean_caption(document.other_words) for document in documents]
        batch = {"examples": documents, "index": [item["index"] for item in items], "broken": []}
        if kind == "decoder":
            rows = [encode_caption(pieces, caption) for caption in captions]
            other_rows = [encode_caption(pieces, f"{CAPTION_PROMPT} {other}") for other in others]
            batch |= {"caption_ids": pad_rows(rows, pieces.pad), "caption_mask": mask_of(rows),
                      "other_ids": pad_rows(other_rows, pieces.pad),
                      "other_mask": mask_of(other_rows)}
            return batch | encode_dialogs(pieces, [dialog for document in documents
                                                   for dialog in document.dialogs])
        prompts, texts = [], []
        for document, caption, other, item in zip(documents, captions, others, items):
            # Each question is a row of its own that holds all before it, eight times the work of a
            # decoder: so every second one, and the others in another epoch.
            for dialog in document.dialogs:
                for number in range(int(2 * item["share"]), len(dialog), 2):
                    question, answer = dialog[number]
                    asked = question_prompt(kind, question, dialog[:number])
                    prompts.append(f"{caption} {asked}")
                    texts.append(answer)
            prefix, suffix = split_text(CAPTION_PROMPT, other, item["share"])
            prompts.append(f"{caption} {prefix}")
            texts.append(suffix)
        return batch | encode_texts(pieces, kind, prompts, texts, config.max_tokens)
    return encode


def encode_dialogs(pieces: WordPieces, dialogs: list[Dialog]) -> dict[str, Tensor]:
    """Dialogs for a decoder -> ids, mask, targets (B, L).

    [bos] Question: ... Answer: red Question: ... Answer: two [eos]. The answers give a loss. Behind
    each of them [eos] is the target, though the next question is what is read on: an answer has to
    end.
    """
    rows, targets = [], []
    for dialog in dialogs:
        row, row_targets = [pieces.bos], [NO_LOSS]
        for number, (question, answer) in enumerate(dialog):
            asked, said = pieces.ids(question_prompt("decoder", question)), pieces.ids(answer)
            row += asked + said
            ends = pieces.eos if number > 0 else NO_LOSS  # of the answer before
            row_targets += [ends] + [NO_LOSS] * (len(asked) - 1) + said
        rows.append(row + [pieces.eos])
        targets.append(row_targets + [pieces.eos])
    return {"ids": pad_rows(rows, pieces.pad), "mask": mask_of(rows),
            "targets": pad_rows(targets, NO_LOSS)}


def encode_caption(pieces: WordPieces, caption: str) -> list[int]:
    """The ids of a caption, with bos and eos; where there is none, nothing."""
    return [pieces.bos, *pieces.ids(caption), pieces.eos] if caption else []


def complete(config: LanguageConfig, tokenizer: Tokenizer) -> LanguageConfig:
    """The configuration with the tokenizer's vocabulary."""
    if config.kind == "decoder" and config.width % 2:
        raise SettingError(f"--width {config.width} is odd; give an even one: a decoder's "
                           "positions start as sines and cosines")
    return replace(config, **language_fields(tokenizer))


@torch.no_grad()
def answer(trained: TrainedModel, captions: list[str], questions: list[str],
           dialogs: list[Dialog]) -> list[str]:
    """An answer to each question, by what its caption says ("": there is none).

    It is asked behind the questions and answers of its dialog.
    """
    language, kind = trained.model.language, trained.model.config.kind
    pieces = open_tokenizer(vars(trained.model.config))
    prompts = [question_prompt(kind, question, dialog)
               for question, dialog in zip(questions, dialogs)]
    if kind == "decoder":
        ids, mask = encode_prompts(pieces, kind, prompts)
        rows = [encode_caption(pieces, caption) for caption in captions]
        ids = torch.cat([pad_rows(rows, pieces.pad, True), ids], 1)
        mask = torch.cat([mask_of(rows, True), mask], 1)
    else:
        ids, mask = encode_prompts(pieces, kind, [f"{caption} {prompt}" for caption, prompt
                                                  in zip(captions, prompts)])
    embeds = language.embed(ids.to(trained.device))
    written = write_behind(language, embeds, mask.to(trained.device), beams=1, min_length=1,
                           max_length=10)
    return [pieces.decode(hypotheses[0][0]) for hypotheses in written]


def answer_all(trained: TrainedModel, dataset: Questions, given: str,
               in_dialog: bool = False) -> list[float]:
    """VQA accuracy of each answer, given the "true" caption, "no" one or "another" scene's.

    in_dialog: each question stands behind three others and their true answers.
    """
    world, scores = dataset.world, []
    about = f"answers, {given} caption{', in dialogs' if in_dialog else ''}"
    for rows in distributed.progress(shared_batches(len(dataset)), about):
        shift = 1 if given == "another" else 0
        captions = ["" if given == "no" else
                    clean_caption(world.references((i + shift) % len(world), 1)[0]) for i in rows]
        examples = [dataset.example(i) for i in rows]
        dialogs = [dataset.dialog_before(i) if in_dialog else [] for i in rows]
        answers = answer(trained, captions, [example.question for example in examples], dialogs)
        scores += [(i, vqa_accuracy(text, example.answers))
                   for i, text, example in zip(rows, answers, examples)]
    return [score for _, score in sorted(distributed.gather(scores))]


def evaluate(trained: TrainedModel, dataset: Questions, settings: EvalSettings) -> Evaluation:
    """accuracy of answers when the true caption is given, accuracy_by kind of question.

    With baselines dialog_accuracy behind three other questions and their answers, blind_accuracy
    without any caption, other_accuracy with another scene's.
    """
    trained.model.eval()
    examples = [dataset.example(i) for i in range(len(dataset))]
    numbers = by_kind("accuracy", answer_all(trained, dataset, "true"), examples)
    if settings.baselines:
        numbers["dialog_accuracy"] = mean(answer_all(trained, dataset, "true", in_dialog=True))
        numbers |= by_kind("blind_accuracy", answer_all(trained, dataset, "no"), examples)
        numbers["other_accuracy"] = mean(answer_all(trained, dataset, "another"))
    return Evaluation(numbers | {"questions": len(dataset)}, [])


TASK = Task(
    "language-model", "a language model of the world's texts, for blip2-stage2", TextModel,
    open_data, collate, evaluate, reads=(), config=LanguageConfig, complete=complete,
    sizes={"base": {}, "large": dict(width=2048, depth=24, heads=32, ffn=8192),
           "tiny": dict(width=128, depth=4, heads=8, head_width=16, ffn=512, near_heads=4,
                        max_positions=256, tied=False, dropout=0.0)},
    starts_from=(), start_is_needed=False, settings=dict(out="runs/language", max_tokens=40),
    tiny=dict(TINY, batch_size=12, epochs=9, scenes=4000, lr=2e-3, vocab_pieces=4000),
    highlights=(
        (("accuracy", "% of questions are answered when the true caption is given", ""),),
        (("dialog_accuracy", "% of them behind three other questions and their answers", ""),),
        (("blind_accuracy", "% without a caption", ""),),
        (("other_accuracy", "% with the caption of another scene", ""),)))
