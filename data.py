"""Words and pictures: the WordPiece tokenizer, image transforms, batches.

    Tokenizer        text <-> ids, trained on captions in a second or read from BERT's vocab.txt
    load_image       file -> (3, S, S) uint8: augmented for training, plainly resized for evaluation
    PairDataset      Pairs as a torch Dataset; Collate makes batches padded to their longest text

A mistake in a user's data is an InputError: one sentence that names the file, the record
and the remedy.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are the parallelism
PAD, UNK, CLS, SEP, MASK, DEC, ENC = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # released code
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)  # released code
MAX_WORDS = 30  # of a caption (released code)


class InputError(ValueError):
    """A mistake that a user can make. The message is one sentence; scripts print it without a
    traceback."""


# ---- text ----------------------------------------------------------------------------------------

SIGNS = r"[.!\"()*#:;~]"  # which are no words (released code)


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """Lower case, the signs . ! " ( ) * # : ; ~ become spaces, spaces collapsed, cut after
    max_words (released code)."""
    return " ".join(re.sub(SIGNS, " ", text.lower()).split()[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """As a caption, but the signs vanish, and "?" stays (released code)."""
    return " ".join(re.sub(SIGNS, "", text.lower()).split()[:max_words])


class Tokenizer:
    """BERT's uncased WordPiece with two more tokens at the end: [DEC] starts the decoder's text,
    [ENC] the encoder's."""

    def __init__(self, vocab: list[str], name: str = "the vocabulary"):
        """vocab: token of each id, as `state` returns it."""
        missing = [token for token in (PAD, UNK, CLS, SEP) if token not in vocab]
        if missing:
            raise InputError(f"{name} lacks {', '.join(missing)}, which BERT's WordPiece needs; "
                             "take the vocab.txt of bert-base-uncased, or leave --vocab out to "
                             "train one")
        self.vocab = vocab + [token for token in (DEC, ENC) if token not in vocab]
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        self.pad, self.cls, self.sep, self.dec, self.enc = (self.ids[t]
                                                            for t in (PAD, CLS, SEP, DEC, ENC))
        self.pieces = HFTokenizer(models.WordPiece(self.ids, unk_token=UNK))
        self.pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.pieces.decoder = decoders.WordPiece(cleanup=False)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8000) -> "Tokenizer":
        """A vocabulary of at most `vocab_size` pieces (with [DEC] and [ENC]) from texts; seconds
        for a million words."""
        learner = HFTokenizer(models.WordPiece(unk_token=UNK))
        learner.normalizer = normalizers.BertNormalizer(lowercase=True)
        learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        texts = [learner.normalizer.normalize_str(clean_caption(text)) for text in texts]
        # The trainer numbers inner letters in the order of a hash table, and breaks ties by number:
        # naming them first makes the vocabulary the same in every run.
        letters = sorted(set("".join(texts)) - {" "})
        learner.train_from_iterator(texts, trainers.WordPieceTrainer(
            vocab_size=vocab_size - 2,
            special_tokens=[PAD, UNK, CLS, SEP, MASK] + ["##" + c for c in letters],
            min_frequency=2, show_progress=False))
        ids = learner.get_vocab()
        return cls(sorted(ids, key=ids.get))

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read BERT's vocab.txt: one token a line."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"vocabulary {path} cannot be read ({error}); give a vocab.txt with "
                             "one token a line")
        repeated = [token for token, n in Counter(lines).items() if n > 1]
        if repeated:
            raise InputError(f"vocabulary {path} lists {repeated[0]!r} twice; every line must be "
                             "another token")
        return cls(lines, f"vocabulary {path}")

    def state(self) -> list[str]:
        """What a checkpoint stores; Tokenizer(state) is the same tokenizer."""
        return self.vocab

    def config(self) -> dict[str, int]:
        """The fields of BLIPConfig that the tokenizer decides."""
        return dict(vocab_size=len(self.vocab), pad_id=self.pad, cls_id=self.cls, sep_id=self.sep,
                    dec_id=self.dec, enc_id=self.enc)

    def pieces_of(self, text: str) -> list[int]:
        """text -> ids without [CLS] and [SEP]; for a prompt."""
        return self.pieces.encode(text, add_special_tokens=False).ids

    def spells(self, text: str) -> bool:
        """Whether the vocabulary has pieces for all of the text, and the text any."""
        pieces = self.pieces_of(text)
        return bool(pieces) and self.ids[UNK] not in pieces

    def encode(self, texts: list[str], max_tokens: int = 30) -> tuple[Tensor, Tensor]:
        """texts -> ids and mask (B, L): [CLS] pieces [SEP], padded to the longest, cut to
        max_tokens with [SEP] kept."""
        rows = [[self.cls] + e.ids[:max_tokens - 2] + [self.sep]
                for e in self.pieces.encode_batch(list(texts), add_special_tokens=False)]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return ids, mask

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text without special tokens."""
        special = {self.pad, self.cls, self.sep, self.dec, self.enc}
        return self.pieces.decode([int(i) for i in ids if int(i) not in special])


# ---- pictures ------------------------------------------------------------------------------------

def normalise(image: Tensor) -> Tensor:
    """image (B, 3, S, S) uint8 -> float, minus CLIP's mean, over CLIP's std. Done on the device:
    bytes travel, not floats."""
    mean = torch.tensor(CLIP_MEAN, device=image.device).view(3, 1, 1) * 255
    std = torch.tensor(CLIP_STD, device=image.device).view(3, 1, 1) * 255
    return (image.float() - mean) / std


def random_crop(width: int, height: int, scale: tuple[float, float],
                rng: random.Random) -> tuple[float, ...]:
    """-> box (left, top, right, bottom) of a random share of the area, aspect ratio 3/4 to 4/3
    (Szegedy et al. 2015)."""
    for _ in range(10):
        area, ratio = (width * height * rng.uniform(*scale),
                       np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
        w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def rand_augment(image: Image.Image, rng: random.Random, operations: int = 2,
                 magnitude: int = 5) -> Image.Image:
    """Two random operations, each applied with probability 0.5, drawn with replacement; no colour
    operation, since captions name colours (BLIP sec. 4.1; released code). At magnitude 5 of 10,
    brightness and sharpness come out as 1.0, the identity: they are drawn, and do nothing."""
    level = magnitude / 10
    def affine(a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
        return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f),
                               Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    for _ in range(operations):
        name = rng.choice(("identity", "autocontrast", "brightness", "sharpness", "equalize",
                           "shear_x", "shear_y", "translate_x", "translate_y", "rotate"))
        sign = rng.choice((-1, 1))
        if rng.random() > 0.5:
            continue
        if name == "autocontrast":
            image = ImageOps.autocontrast(image)
        elif name == "equalize":
            image = ImageOps.equalize(image)
        elif name == "shear_x":
            image = affine(b=sign * 0.3 * level)
        elif name == "shear_y":
            image = affine(d=sign * 0.3 * level)
        elif name == "translate_x":
            image = affine(c=sign * 10 * level)  # pixels
        elif name == "translate_y":
            image = affine(f=sign * 10 * level)
        elif name == "rotate":
            image = image.rotate(sign * 30 * level, Image.Resampling.BILINEAR,
                                 fillcolor=(128, 128, 128))
    return image


def load_image(source: str | Path | BytesIO, size: int, rng: random.Random | None = None,
               crop: tuple[float, float] = (0.2, 1.0), flip: bool = True) -> Tensor:
    """Image file -> (3, size, size) uint8, upright. Without `rng`: the whole picture, resized to a
    square (evaluation). With it: random crop of a share `crop` of the area, horizontal flip where
    allowed, RandAugment (training). Raises OSError with one of three reasons: missing, too large,
    damaged or no image.
    """
    try:
        with Image.open(source) as image:
            sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF: the camera was turned
            width, height = image.size[::-1] if sideways else image.size
            box = random_crop(width, height, crop, rng) if rng else (0, 0, width, height)
            # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time: as
            # small as the crop still has `size` pixels.
            enough = [int(size * width / (box[2] - box[0])) + 1,
                      int(size * height / (box[3] - box[1])) + 1]
            image.draft("RGB", enough[::-1] if sideways else enough)
            image = ImageOps.exif_transpose(image)
            x, y = image.size[0] / width, image.size[1] / height
            if image.mode.startswith(("I", "F")):  # 16 bits: PIL would clip instead of scale
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255)
                                        .astype(np.uint8))
            image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC,
                                                (box[0] * x, box[1] * y, box[2] * x, box[3] * y))
    except FileNotFoundError:
        raise OSError("missing")
    except (Image.DecompressionBombError, MemoryError):
        raise OSError("too large")
    except Exception:  # a damaged file makes the decoders raise nearly anything
        raise OSError("damaged or no image")
    if rng:
        if flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        image = rand_augment(image, rng)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- a data set ----------------------------------------------------------------------------------

def open_member(path: Path) -> Path | BytesIO:
    """A path, or for "shard.tar::offset:size" the bytes that lie there. Raises OSError."""
    archive, separator, place = str(path).rpartition("::")
    if not separator:
        return path
    offset, size = map(int, place.split(":"))
    try:
        with open(archive, "rb") as file:
            file.seek(offset)
            return BytesIO(file.read(size))
    except OSError:
        raise OSError("missing")


class PairDataset(Dataset):
    """Pairs as items {image (3, S, S) uint8, text (the first caption, cleaned), texts (all, as
    written), image_id, index, broken}.

    Training (`augment=True`): augmented anew each epoch as a function of
    (seed, epoch, index); an image that cannot be read is replaced by the next one that can, so that
    batches keep their size. Evaluation: one item per image with all its captions; an unreadable
    image has `image` None. `broken` names what could not be read.
    """

    def __init__(self, pairs: Sequence, image_root: str | Path, image_size: int,
                 augment: bool = False, crop: tuple[float, float] = (0.2, 1.0), seed: int = 0):
        """pairs: of type pairs.Pair; for training with one caption each."""
        self.root, self.image_size, self.augment, self.crop, self.seed = (
            Path(image_root), image_size, augment, crop, seed)
        self.pairs, self.epoch = pairs, 0

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch
        if hasattr(self.pairs, "set_epoch"):
            self.pairs.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict:
        broken, image = [], None
        for i in range(index, index + (100 if self.augment else 1)):
            pair = self.pairs[i % len(self)]
            rng = random.Random(f"{self.seed} {self.epoch} {index}") if self.augment else None
            item = self.item(pair, rng)
            try:
                image = self.load(pair, item["text"], rng)
                break
            except OSError as error:
                broken.append(f"{pair.image} ({error})")
        return {**item, "image": image, "index": index, "broken": broken}

    def item(self, pair, rng: random.Random | None) -> dict:
        """What goes with the image."""
        text = clean_caption(pair.captions[0]) if pair.captions else ""
        return {"text": text, "texts": pair.captions, "image_id": pair.image_id}

    def load(self, pair, text: str, rng: random.Random | None) -> Tensor:
        """-> (3, S, S) uint8; never flipped where the text says left or right. Raises OSError."""
        return self.load_one(pair.image, text, rng)

    def load_one(self, image: str, text: str, rng: random.Random | None) -> Tensor:
        """One picture of a record."""
        flip = not re.search(r"\b(left|right)\b", text)
        return load_image(open_member(self.root / image), self.image_size, rng, self.crop, flip)


class Collate:
    """Items -> batch {image (B, 3, S, S) uint8, ids and mask (B, L), image_id (B,), texts, index,
    broken}, padded to the longest text in it; each text after `prompt`. Items whose image is None
    are left out."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int = 30, prompt: str = ""):
        self.tokenizer, self.max_tokens, self.prompt = tokenizer, max_tokens, prompt

    def __call__(self, items: list[dict]) -> dict:
        broken = [name for item in items for name in item.get("broken", [])]
        items = [item for item in items if item["image"] is not None]
        if not items:
            return {"image": None, "broken": broken}
        ids, mask = self.tokenizer.encode([f"{self.prompt} {item['text']}" for item in items],
                                          self.max_tokens)
        return {"image": torch.stack([item["image"] for item in items]), "ids": ids, "mask": mask,
                "image_id": torch.tensor([item["image_id"] for item in items]),
                "texts": [list(item["texts"]) for item in items],
                "index": [item["index"] for item in items], "broken": broken}
