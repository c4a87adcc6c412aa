"""How a decoder writes behind a prefix: the beams of an image share one cache."""

import pytest
import torch

from blip2.language import LanguageConfig, make_language
from blip2.writing import PrefixStep, logits_of_targets, write_behind
from config import SettingError
from decoding import penalise_repetition

VOCABULARY = 30


def decoder(max_positions: int = 40):
    """A small random decoder, one of its heads with a bias for near tokens."""
    torch.manual_seed(0)
    return make_language(LanguageConfig(
        width=16, depth=2, heads=2, ffn=32, max_positions=max_positions, near_heads=1, dropout=0.0,
        vocab_size=VOCABULARY, pad_id=0, bos_id=1, eos_id=2)).eval()


# The rows of the previous call that each call continues. Beams split, change places and end;
# an image ends; samples end one by one, so that images have different numbers of rows.
BEAMS = ([0, 1, 2], [0, 0, 1, 1, 2, 2], [1, 1, 3, 2, 4, 5], [1, 0, 5, 5], [2, 3], [1, 1, 0])
SAMPLES = ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5], [1, 2, 3], [0, 2], [1])


@torch.no_grad()
@pytest.mark.parametrize("calls, images", [(BEAMS, [0, 1, 2]), (SAMPLES, [0, 0, 1, 1, 2, 2])])
@pytest.mark.parametrize("share", [True, False])
def test_each_row_is_continued_as_if_it_stood_alone(calls, images, share):
    """Logits of every row are those of its prefix and its own words, run from the start."""
    language = decoder()
    language.beams_share = share
    embeds = torch.randn(3, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])  # padded in front
    step = PrefixStep(language, embeds, mask, torch.tensor(images))
    words = torch.zeros(len(images), 0, dtype=torch.long)  # of each row so far
    prefixes = torch.tensor(images)
    for number, rows in enumerate(map(torch.tensor, calls)):
        words, prefixes = words[rows], prefixes[rows]
        tokens = torch.randint(VOCABULARY, (len(rows), 1))
        logits = step(tokens, rows)
        if number > 0:  # the first call's tokens are placeholders
            words = torch.cat([words, tokens], 1)
        for row, prefix in enumerate(prefixes):
            alone = torch.cat([embeds[prefix, mask[prefix] > 0], language.embed(words[row])])[None]
            states, _ = language(alone, torch.ones(alone.shape[:2]))
            assert torch.allclose(logits[row], language.logits(states[0, -1]), atol=1e-5)


def continued_greedily(language, embeds, length: int, penalty: float) -> list[int]:
    """The likeliest token again and again, the whole text run anew for each."""
    c = language.config
    written = [c.bos_id if c.kind == "decoder" else c.pad_id]
    while len(written) < length:
        ids = torch.tensor([written[1:]], dtype=torch.long)
        if c.kind == "decoder":
            states, _ = language(torch.cat([embeds, language.embed(ids)], 1),
                                 torch.ones(1, embeds.shape[1] + ids.shape[1]))
            logits = language.logits(states[:, -1])
        else:
            targets = torch.cat([ids, torch.tensor([[c.eos_id]])], 1)
            logits = logits_of_targets(language, embeds, torch.ones(embeds.shape[:2]),
                                       targets)[:, -1]
        logits = penalise_repetition(logits, torch.tensor([written]), penalty)
        written.append(int(logits.argmax()))
        if written[-1] == c.eos_id:
            return written[1:-1]
    return written[1:]


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_one_beam_is_greedy(kind, penalty):
    """It ends with the first closing token, though a longer text might have a better mean."""
    torch.manual_seed(0)
    language = make_language(LanguageConfig(
        kind=kind, width=16, depth=1, heads=2, head_width=8, ffn=32, max_positions=40, dropout=0.0,
        tied=False, vocab_size=12, pad_id=0, bos_id=1, eos_id=2)).eval()
    language.head.weight.mul_(8.0)
    embeds, lengths = torch.randn(40, 4, 16), set()
    found = write_behind(language, embeds, torch.ones(40, 4), beams=1, min_length=1, max_length=12,
                         repetition_penalty=penalty)
    for row, hypotheses in enumerate(found):
        expected = continued_greedily(language, embeds[row:row + 1], 12, penalty)
        assert hypotheses[0][0] == expected
        lengths.add(len(expected))
    assert len(lengths) >= 3


@torch.no_grad()
def test_beams_share_their_prefix():
    """Six beams of two images: two caches, of the prefix and all that was written."""
    language = decoder()
    step = PrefixStep(language, torch.randn(2, 5, 16), torch.ones(2, 5), torch.tensor([0, 1]))
    step(torch.zeros(2, 1), torch.tensor([0, 1]))
    words = torch.zeros(6, 1, dtype=torch.long)
    step(words, torch.tensor([0, 0, 0, 1, 1, 1]))
    step(words, torch.tensor([0, 2, 2, 3, 4, 3]))
    keys, _ = step.past[0]
    assert keys.shape == (2, 2, 5 + 3 + 3, 8)


@torch.no_grad()
def test_more_words_than_positions_are_one_sentence():
    """It counts the words of one beam, not those of all beams in the cache."""
    language = decoder(max_positions=8)
    step = PrefixStep(language, torch.randn(1, 5, 16), torch.ones(1, 5), torch.tensor([0]))
    step(torch.zeros(1, 1), torch.tensor([0]))
    words = torch.zeros(3, 1, dtype=torch.long)
    step(words, torch.tensor([0, 0, 0]))
    for _ in range(2):
        step(words, torch.tensor([0, 1, 2]))
    with pytest.raises(SettingError, match="9 tokens do not fit the language model's 8 positions"):
        step(words, torch.tensor([0, 1, 2]))


def test_a_near_head_weighs_far_tokens_down():
    """By half of its distance, which is ALiBi's first slope; what is not seen is not counted."""
    sees = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)[None]
    bias = decoder().near_bias(sees)
    assert bias[0, 0, 0, :3].tolist() == [-1.0, -0.5, 0.0]
    assert bias[0, 0, 1, [0, 1, 4]].tolist() == [-1.0, -0.5, 0.0]
    assert (bias[0, 1] == 0).all()  # the other head has no bias
