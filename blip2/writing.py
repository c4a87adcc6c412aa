"""How a language model writes behind embeddings: soft tokens, a prompt, or both.

    decoder            the embeddings are a prefix, which is run once an image
    encoder-decoder    they are the encoder's input, which is encoded once an image
"""

import torch
from torch import Tensor, nn

from decoding import Hypothesis, write


def contexts_needed(context_of: Tensor, share: bool = True) -> tuple[Tensor, int]:
    """Which contexts must be held for these rows, and how many rows read each.

    context_of (R,): the context of each row; rows of a context are neighbours. All rows of a
    context share it where each has as many (always so in beam search). Where they have not, as when
    samples end one by one, or with share=False, each row gets a copy of its own.
    """
    distinct, counts = context_of.unique_consecutive(return_counts=True)
    if share and (counts == counts[0]).all():
        return distinct, int(counts[0])
    return context_of, 1


class PrefixStep:
    """A decoder behind a prefix of embeddings as `step(tokens, rows) -> logits`.

    The first call's tokens are a placeholder: the prefix is fed in their place, once an image.

    The beams of an image share one cache: the prefix, and every token that any of them has written.
    `sees` says which tokens of the cache a beam continues. A beam that splits repeats its row of
    `sees`; keys and values are never copied or put in another order. Two beams, after two words:

                 prefix   1st words   2nd words
        beam 0   x x x      x -         x -
        beam 1   x x x      x -         - x       both continue beam 0's first word
    """

    def __init__(self, language: nn.Module, embeds: Tensor, mask: Tensor, images: Tensor):
        """embeds (B, P, D), mask (B, P); images (R,): which prefix each row continues."""
        self.language, self.embeds, self.mask = language, embeds, mask
        self.past, self.caches = None, len(embeds)
        self.cache_of = images  # (R,): in which cache the tokens of a row are
        self.sees = mask[images].bool()  # (R, tokens of a cache)

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens (R, 1), rows (R,) of the previous call -> logits (R, V) for the next token."""
        if self.past is None:
            states, self.past = self.language(self.embeds, self.mask)
            return self.language.logits(states[:, -1])[self.cache_of]
        needed, beams = contexts_needed(self.cache_of[rows], self.language.beams_share)
        if not torch.equal(needed, torch.arange(self.caches, device=rows.device)):
            self.past = self.language.select(self.past, needed)
        self.caches = len(needed)
        self.cache_of = torch.arange(self.caches, device=rows.device).repeat_interleave(beams)
        itself = torch.eye(beams, dtype=torch.bool, device=rows.device).repeat(self.caches, 1)
        self.sees = torch.cat([self.sees[rows], itself], 1)
        # The new words of an image's beams stand side by side, as tokens of one sequence.
        words = self.language.embed(tokens).view(self.caches, beams, -1)
        mask = self.sees if beams == 1 else self.sees.view(self.caches, beams, -1)
        states, self.past = self.language(words, mask, self.past)
        return self.language.logits(states.flatten(0, 1))


class ContextStep:
    """An encoder-decoder as `step(tokens, rows) -> logits`; the input is encoded once."""

    def __init__(self, language: nn.Module, embeds: Tensor, mask: Tensor, images: Tensor):
        """embeds (B, P, D), mask (B, P): the input; images (R,): which one each row reads."""
        self.language, self.past, self.images = language, None, images
        self.states, self.mask = language.encode(embeds, mask), mask
        self.context = self.context_of = None  # the decoder's context, and which images it is of

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens (R, 1), rows (R,) of the previous call -> logits (R, V) for the next token."""
        self.images = self.images[rows]
        images, _ = contexts_needed(self.images)
        if self.context_of is None or not torch.equal(images, self.context_of):
            self.context = self.language.project(self.states[images], self.mask[images])
            self.context_of = images
        if self.past is not None:
            self.past = self.language.select(self.past, rows)
        states, self.past = self.language.decode(tokens, self.context, self.past)
        return self.language.logits(states[:, -1])


def logits_of_targets(language: nn.Module, embeds: Tensor, mask: Tensor,
                      targets: Tensor) -> Tensor:
    """Next-token logits (B, T, V) of an encoder-decoder that writes the targets.

    embeds (B, P, D), mask (B, P): the encoder's input; targets (B, T), negative where there are
    none. The decoder reads them shifted by one, pad in front.
    """
    pad = language.config.pad_id
    context = language.project(language.encode(embeds, mask), mask)
    written = torch.cat([torch.full_like(targets[:, :1], pad), targets[:, :-1]], 1)
    states, _ = language.decode(written.masked_fill(written < 0, pad), context)
    return language.logits(states)


@torch.no_grad()
def write_behind(language: nn.Module, embeds: Tensor, mask: Tensor, method: str = "beam",
                 num_return: int = 1, **options) -> list[list[Hypothesis]]:
    """For each row of embeddings `num_return` texts behind it: pairs (ids, score).

    embeds (B, P, D), mask (B, P). Options are those of decoding.write; lengths count one token more
    than what is written.
    """
    if method == "beam" and options.get("beams") != 1:  # one beam is greedy: it ends with eos
        options.setdefault("ahead", 1)
    decoder = language.config.kind == "decoder"
    step = PrefixStep if decoder else ContextStep
    start = language.config.bos_id if decoder else language.config.pad_id
    return write(lambda images: step(language, embeds, mask, images), len(embeds), [start],
                 language.config.eos_id, embeds.device, method, num_return, **options)
