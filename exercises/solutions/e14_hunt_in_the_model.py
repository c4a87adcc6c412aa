"""14. The four functions, mended; a comment says what was wrong."""

import torch
from torch import Tensor


def momentum_step(online: Tensor, twin: Tensor, momentum: float) -> Tensor:
    """-> the twin's new value."""
    # The weights were swapped: the twin was nearly the model, and the queue's features too old.
    return momentum * twin + (1 - momentum) * online


def image_of_text(texts: int, images: int) -> Tensor:
    """-> (texts,)."""
    # `%` deals the images out in turn: right for one text an image, wrong for two.
    return torch.arange(texts) // (texts // images)


def positions_of_new_tokens(new: int, in_cache: int) -> Tensor:
    """-> (new,)."""
    # Each new word stood at position 0; training, which has no cache, cannot show it.
    return torch.arange(in_cache, in_cache + new)


def probability_of_match(logits: Tensor) -> Tensor:
    """-> (T,)."""
    # A sigmoid of one logit ignores the other: cross-entropy trained their difference.
    return logits.softmax(1)[:, 1]
