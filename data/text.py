"""Text: cleaning as the released code does it, and the WordPiece tokenizer."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from data.files import InputError, regular_file

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are the parallelism
PAD, UNK, CLS, SEP, MASK, DEC, ENC = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"
LONGEST_WORD = 100  # characters; WordPiece reads a longer word as [UNK]
SIGNS = r"[.!\"()*#:;~]"  # that are no words (released code)


def clean_caption(text: str, max_words: int | None = None) -> str:
    """A caption or statement as the model reads it (released code).

    Lower case, at most max_words. The signs . ! " ( ) * # : ; ~ become spaces; spaces are
    collapsed.
    """
    return " ".join(re.sub(SIGNS, " ", text.lower()).split()[:max_words])


def clean_question(text: str, max_words: int | None = None) -> str:
    """As a caption, but the signs vanish: "10:30" becomes "1030" (released code)."""
    return " ".join(re.sub(SIGNS, "", text.lower()).split()[:max_words])


def is_chinese(sign: str) -> bool:
    """Whether it is a CJK ideograph: BERT's normalizer puts spaces around it."""
    blocks = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))
    return any(first <= ord(sign) <= last for first, last in blocks)


class Tokenizer:
    """BERT's uncased WordPiece, and two more tokens at the end.

    [DEC] starts the decoder's text, [ENC] the grounded encoder's.
    """

    def __init__(self, vocab: list[str], name: str = "the vocabulary"):
        """vocab: token of each id, as `state` returns it."""
        missing = [token for token in (PAD, UNK, CLS, SEP) if token not in vocab]
        if missing:
            raise InputError(f"{name} lacks {', '.join(missing)}, which BERT's WordPiece needs; "
                             "take the vocab.txt of bert-base-uncased, or leave --vocab out to "
                             "train one")
        self.vocab = vocab + [token for token in (DEC, ENC) if token not in vocab]
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        self.pad, self.cls, self.sep = self.ids[PAD], self.ids[CLS], self.ids[SEP]
        self.dec, self.enc = self.ids[DEC], self.ids[ENC]
        self.pieces = HFTokenizer(models.WordPiece(self.ids, unk_token=UNK))
        self.pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.pieces.decoder = decoders.WordPiece(cleanup=True)  # "a , b" -> "a, b"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8000) -> "Tokenizer":
        """Train a vocabulary of at most `vocab_size` pieces, [DEC] and [ENC] included."""
        learner = HFTokenizer(models.WordPiece(unk_token=UNK))
        learner.normalizer = normalizers.BertNormalizer(lowercase=True)
        learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # Cut, because the time that the trainer takes grows with the square of a word's length.
        texts = [re.sub(rf"(\S{{{LONGEST_WORD}}})\S+", r"\1",
                        learner.normalizer.normalize_str(text)) for text in texts]
        # The trainer numbers inner letters in the order of a hash table, and breaks ties by number:
        # naming them first makes the vocabulary the same in every run. (A Chinese sign is a word.)
        letters = sorted(c for c in set("".join(texts)) - {" "} if not is_chinese(c))
        learner.train_from_iterator(texts, trainers.WordPieceTrainer(
            vocab_size=vocab_size - 2,
            special_tokens=[PAD, UNK, CLS, SEP, MASK] + ["##" + c for c in letters],
            min_frequency=2, show_progress=False))
        ids = learner.get_vocab()
        return cls(sorted(ids, key=ids.get))

    def with_pieces_of(self, texts: Iterable[str], most: int) -> "Tokenizer":
        """This one and at most `most` more pieces, trained on texts, behind those that it has."""
        texts = list(texts)
        learned = Tokenizer.train(texts, most + len(set("".join(texts))) + 20).vocab
        new = [piece for piece in learned if piece not in self.ids]
        return Tokenizer(self.vocab + new[:most])

    def pieces_a_word(self, texts: Iterable[str]) -> float:
        """How many pieces a word of the texts has on average: 1 whole words, 5 letters.

        A word that the vocabulary cannot spell counts as its letters.
        """
        texts, pieces = list(texts), 0
        for encoding in self.pieces.encode_batch(texts, add_special_tokens=False):
            for piece, (start, end) in zip(encoding.tokens, encoding.offsets):
                pieces += end - start if piece == UNK else 1
        return pieces / max(1, sum(len(text.split()) for text in texts))

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read BERT's vocab.txt: one token a line."""
        try:
            text = Path(regular_file(path)).read_text(encoding="utf-8-sig").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"vocabulary {path} cannot be read ({error}); give a vocab.txt with "
                             "one token a line")
        lines = text.splitlines()
        repeated = [token for token, n in Counter(lines).items() if n > 1]
        if repeated:
            raise InputError(f"vocabulary {path} lists {repeated[0]!r} twice; each token may "
                             "stand only once")
        return cls(lines, f"vocabulary {path}")

    def state(self) -> list[str]:
        """What a checkpoint stores; Tokenizer(state) is the same tokenizer."""
        return self.vocab

    def config(self) -> dict[str, int]:
        """The fields of BLIPConfig that the tokenizer decides."""
        return dict(vocab_size=len(self.vocab), pad_id=self.pad, cls_id=self.cls, sep_id=self.sep,
                    dec_id=self.dec, enc_id=self.enc)

    def piece_ids(self, text: str) -> list[int]:
        """text -> ids without [CLS] and [SEP]."""
        return self.pieces.encode(text, add_special_tokens=False).ids

    def can_spell(self, text: str) -> bool:
        """Whether the vocabulary has pieces for all of the text, and the text has any."""
        pieces = self.piece_ids(text)
        return bool(pieces) and self.ids[UNK] not in pieces

    def unknown(self, text: str) -> list[str]:
        """The words and signs that are read as [UNK]: the vocabulary has no pieces for them."""
        pieces = self.pieces.encode(text, add_special_tokens=False)
        return [text[start:end] for piece, (start, end) in zip(pieces.tokens, pieces.offsets)
                if piece == UNK]

    def encode(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """texts -> ids and mask (B, L): [CLS] pieces [SEP], padded to the longest text.

        A text longer than max_tokens is cut; its [SEP] stays.
        """
        encodings = self.pieces.encode_batch(list(texts), add_special_tokens=False)
        return self.pad_rows([[self.cls, *e.ids[:max_tokens - 2], self.sep] for e in encodings])

    def pad_rows(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids and mask (B, L), padded to the longest row."""
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return ids, mask

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text without special tokens."""
        special = {self.pad, self.cls, self.sep, self.dec, self.enc}
        return self.pieces.decode([int(i) for i in ids if int(i) not in special])
