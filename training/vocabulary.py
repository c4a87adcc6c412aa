"""The tokenizer of a new run, and how well it fits the texts of own data."""

from collections import Counter
from collections.abc import Callable

from torch.utils.data import Dataset

from config import TrainConfig
from data.datasets import some_examples
from data.text import Tokenizer, clean_caption
from training import distributed
from world.datasets import all_texts

SPELT = 1.5  # pieces a word from which on a text counts as spelt by letters
FEW_UNKNOWN = 0.02  # of the words: as many are no reason for a warning

Pieces = Callable[[str], list[int]]  # a text -> its ids, without special tokens


def choose_tokenizer(config: TrainConfig, train: Dataset, start: Tokenizer | None) -> Tokenizer:
    """The start's, with words of own data, or a new one: read with --vocab, or trained.

    Says where own texts do not fit it.
    """
    if not config.data:
        return start or read_or_train(config, all_texts())
    texts = texts_of(train, 200_000 if start is None else 20_000)
    tokenizer = fit_start(start, config, texts) if start else read_or_train(config, texts)
    warn_of_unknown_words(tokenizer, config, texts[::max(1, len(texts) // 20_000)])
    return tokenizer


def texts_of(train: Dataset, most: int) -> list[str]:
    """The texts of about `most` examples, as a model reads them."""
    return [clean_caption(text) for example in some_examples(train, most)
            for text in example.texts]


def read_or_train(config: TrainConfig, texts: list[str]) -> Tokenizer:
    """Read with --vocab, else trained on texts."""
    if config.vocab:
        return Tokenizer.from_file(config.vocab)
    return Tokenizer.train(texts, config.vocab_pieces)


def fit_start(tokenizer: Tokenizer, config: TrainConfig, texts: list[str]) -> Tokenizer:
    """A start's tokenizer, with pieces for the words of own texts that it spells.

    Says how many pieces a word has.
    """
    before = tokenizer.pieces_a_word(texts)
    if before < SPELT:
        return tokenizer
    if not config.new_pieces:
        distributed.print0(f"WARNING --init's vocabulary needs {before:.1f} pieces for a word of "
                           f"{config.data}: the words are spelt. --new-pieces 4000 adds whole ones")
        return tokenizer
    wider = tokenizer.with_pieces_of(texts, config.new_pieces)
    added = len(wider.vocab) - len(tokenizer.vocab)
    distributed.print0(f"words    {added} pieces added to --init's vocabulary: "
                       f"{wider.pieces_a_word(texts):.1f} for a word of {config.data} instead of "
                       f"{before:.1f}")
    return wider


def warn_of_unknown_words(tokenizer: Tokenizer, config: TrainConfig, texts: list[str]) -> None:
    """Say how many words of own data are read as [UNK], where they are more than a few."""
    unknown = [word for text in texts for word in tokenizer.unknown(text)]
    share = len(unknown) / max(1, sum(len(text.split()) for text in texts))
    if share > FEW_UNKNOWN:
        common = ", ".join(repr(word) for word, _ in Counter(unknown).most_common(3))
        distributed.print0(f"WARNING the vocabulary cannot spell {share:.0%} of the words of "
                           f"{config.data} ({common}, ...): the model reads and writes [UNK] in "
                           "their place. A run without --init and --vocab trains a vocabulary")


def caption_lengths(train: Dataset, pieces: Pieces, prompt: str) -> list[int]:
    """How many pieces the prompt and a caption have, for some thousand captions."""
    captions = [caption for example in some_examples(train, 5000)
                for caption in getattr(example, "captions", ())[:1]]
    return [len(pieces(f"{prompt} {clean_caption(caption)}")) for caption in captions]


def warn_of_spelt_words(train: Dataset, pieces: Pieces, config: TrainConfig) -> None:
    """Say that another model, which is to write own texts, has read other words than theirs."""
    texts = texts_of(train, 5000)
    words = sum(len(text.split()) for text in texts)
    a_word = sum(len(pieces(text)) for text in texts) / max(1, words)
    if a_word >= SPELT:
        distributed.print0(f"WARNING the language model needs {a_word:.1f} pieces for a word of "
                           f"{config.data}: it has not read such texts. Take one that has, with "
                           "--language-model")
