"""Texts as a language model reads them: prompts, special tokens, padding, what gives a loss.

    decoder            [bos] prompt text [eos]          padded behind; a prompt alone: in front
    encoder-decoder    prompt [eos]  ->  text [eos]     two rows

The prompts are the paper's (BLIP-2 sec. 4.1, Tables 7 and 8). NOTE(differs from salesforce/LAVIS):
a text is cut by itself and keeps its end; there prompt, text and end are cut together.
"""

import functools
from typing import Protocol

import torch
from torch import Tensor

from blip2.language import LanguageConfig
from data.datasets import Dialog
from data.files import InputError
from data.text import Tokenizer

CAPTION_PROMPT = "a photo of"
QUESTION_PROMPT = "Question: {} Answer:"  # of a decoder, and of what is finetuned
SHORT_PROMPT = "Question: {} Short answer:"  # of an encoder-decoder, zero-shot
NO_LOSS = -100  # a target that is none


class LanguageTokenizer(Protocol):
    """What a language model's tokenizer must offer."""

    pad: int
    bos: int
    eos: int

    def ids(self, text: str) -> list[int]:
        """Text -> ids, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, without special tokens."""


class WordPieces:
    """data.text.Tokenizer as a language model's: [CLS] is bos, [SEP] eos."""

    def __init__(self, vocab: tuple[str, ...]):
        self.tokenizer = Tokenizer(list(vocab), "the language model's vocabulary")
        self.pad, self.bos, self.eos = (self.tokenizer.pad, self.tokenizer.cls, self.tokenizer.sep)

    def ids(self, text: str) -> list[int]:
        """Text -> ids, without special tokens."""
        return self.tokenizer.piece_ids(text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, without special tokens."""
        return self.tokenizer.decode(ids)


def language_fields(tokenizer: Tokenizer) -> dict:
    """The fields of LanguageConfig that a tokenizer decides."""
    return dict(vocab=tuple(tokenizer.vocab), vocab_size=len(tokenizer.vocab),
                pad_id=tokenizer.pad, bos_id=tokenizer.cls, eos_id=tokenizer.sep)


def open_tokenizer(language: dict) -> LanguageTokenizer:
    """The tokenizer of Stage2Config.language. Raises InputError where it has none."""
    if "name" in language:
        from blip2.transformers_language import open_library_tokenizer
        return open_library_tokenizer(language["name"], language["kind"])
    if not language.get("vocab"):
        raise InputError("the language model has no tokenizer; train one with `python train.py "
                         "language-model`, or name a folder of the transformers library that "
                         "holds the tokenizer too")
    return word_pieces(tuple(language["vocab"]))


@functools.cache
def word_pieces(vocab: tuple[str, ...]) -> WordPieces:
    """The tokenizer of a vocabulary, made once: an evaluation asks for it with every batch."""
    return WordPieces(vocab)


def pad_rows(rows: list[list[int]], value: int, in_front: bool = False) -> Tensor:
    """Rows of ids -> (B, L), padded to the longest."""
    length = max(len(row) for row in rows)
    filled = []
    for row in rows:
        padding = [value] * (length - len(row))
        filled.append(padding + row if in_front else row + padding)
    return torch.tensor(filled, dtype=torch.long)


def mask_of(rows: list[list[int]], in_front: bool = False) -> Tensor:
    """Rows of ids -> (B, L): 1 where a row has a token."""
    return pad_rows([[1] * len(row) for row in rows], 0, in_front)


def encode_prompts(tokenizer: LanguageTokenizer, kind: str,
                   prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts that a text is to be written behind -> ids, mask (B, L)."""
    decoder = kind == "decoder"
    rows = [[tokenizer.bos] + tokenizer.ids(prompt) if decoder
            else tokenizer.ids(prompt) + [tokenizer.eos] for prompt in prompts]
    return pad_rows(rows, tokenizer.pad, decoder), mask_of(rows, decoder)


def encode_texts(tokenizer: LanguageTokenizer, kind: str, prompts: list[str], texts: list[str],
                 max_tokens: int) -> dict[str, Tensor]:
    """Texts with the prompts before them -> ids, mask, targets for Stage2.forward.

    A text is cut to max_tokens, its end token included. The prompt gives no loss; [bos] does where
    there is no prompt (released code). A decoder's prompt and text are one text for the tokenizer:
    OPT's writes the space between them into the text's first token.
    """
    rows, targets = [], []
    for prompt, text in zip(prompts, texts):
        before, after = tokenizer.ids(prompt), tokenizer.ids(text)
        if kind == "decoder" and before:
            after = tokenizer.ids(f"{prompt} {text}")[len(before):]
        after = after[:max_tokens - 1] + [tokenizer.eos]
        if kind == "decoder":
            rows.append([tokenizer.bos] + before + after)
            first = [NO_LOSS] * (1 + len(before)) if before else [tokenizer.bos]
            targets.append(first + after)
        else:
            rows.append(before + [tokenizer.eos])
            targets.append(after)
    return {"ids": pad_rows(rows, tokenizer.pad), "mask": mask_of(rows),
            "targets": pad_rows(targets, NO_LOSS)}


def split_text(prompt: str, text: str, share: float) -> tuple[str, str]:
    """For an encoder-decoder: the prefix that it reads, the suffix that it has to write.

    (BLIP-2 sec. 3.2, Fig. 3.) share in [0, 1) says where: uniform between the first word and the
    middle; with a prompt also in front of the first word.
    NOTE(differs from salesforce/LAVIS): the split is not in the released code.
    """
    words = text.split()
    least = 0 if prompt else min(1, len(words) - 1)
    most = max(least, len(words) // 2)
    where = least + int(share * (most - least + 1))
    return " ".join([*prompt.split(), *words[:where]]), " ".join(words[where:])


def question_prompt(kind: str, question: str, dialog: Dialog = (), finetuned: bool = False) -> str:
    """The paper's prompt for a question, behind the questions and answers before it."""
    form = QUESTION_PROMPT if kind == "decoder" or finetuned else SHORT_PROMPT
    said = [f"{form.format(asked)} {answer}" for asked, answer in dialog]
    return " ".join([*said, form.format(question)])


def kind_of_language(language: dict) -> str:
    """decoder or encoder-decoder."""
    return language.get("kind", LanguageConfig.kind)
