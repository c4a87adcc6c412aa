"""14. Bug hunt: around the losses (BLIP sec. 3.2 and 3.3).

Each function below has ONE bug. None raises an error, and training looks normal. Find the bugs by
reading, mend them here, then run `python -m exercises.check 14`.
"""

import torch
from torch import Tensor


def momentum_step(online: Tensor, twin: Tensor, momentum: float) -> Tensor:
    """The twin's new value; momentum is near 1."""
    return (1 - momentum) * twin + momentum * online


def image_of_text(texts: int, images: int) -> Tensor:
    """Which image each text looks at: (texts,) numbers from 0 to images - 1.

    The texts of an image stand next to each other: with 6 texts and 3 images, texts 0 and 1 belong
    to image 0, texts 2 and 3 to image 1.
    """
    return torch.arange(texts) % images


def positions_of_new_tokens(new: int, in_cache: int) -> Tensor:
    """The positions of `new` tokens behind `in_cache` tokens that were read before: (new,)."""
    return torch.arange(new)


def probability_of_match(logits: Tensor) -> Tensor:
    """The filter's probability that a text matches its image: ITM logits (T, 2) -> (T,)."""
    return logits.sigmoid()[:, 1]


HINT = """momentum_step: with m = 0.995, how much of the old twin is left? image_of_text: write down
6 texts and 3 images. positions_of_new_tokens: the second word of a caption is not at position 0.
probability_of_match: two classes were trained with cross_entropy; what turns that into
probabilities?"""
