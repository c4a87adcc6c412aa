"""13. Bug hunt: three parts of the losses (BLIP sec. 3.2).

Each function below has ONE bug. None raises an error, and each loss goes down as a loss should. But
the model learns the wrong thing. Find the bugs by reading, mend them here, then run
`python -m exercises.check 13`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(image_feat_m: Tensor, text_keys: Tensor, temp: float, alpha: float) -> Tensor:
    """ITC's targets, image to text: the twins' prediction mixed with the truth.

    image_feat_m (B, E), text_keys (C, E) -> (B, C); row i's true column is i.
    """
    truth = torch.eye(len(image_feat_m), len(text_keys))
    predicted = (image_feat_m @ text_keys.T).softmax(1)
    return alpha * predicted + (1 - alpha) * truth


def negative_weights(sim: Tensor, positives: Tensor, floor: float) -> Tensor:
    """How likely each column is drawn as a hard negative; sim, positives (B, C) -> (B, C).

    weight = softmax(sim) + floor, 0 where the pair is a true one.
    """
    sim = sim.masked_fill(positives, 0)
    return sim.softmax(1) + floor


def caption_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The next-token loss, not smoothed: logits (B, L, V), ids, mask (B, L) -> scalar."""
    predictions, targets = logits[:, :-1], ids[:, 1:]
    targets = targets.masked_fill(mask[:, :-1] == 0, -100)
    return F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), ignore_index=-100)


HINT = """soft_targets: compare with the formula of exercise 2, letter by letter. negative_weights:
what is exp(0)? caption_loss: which token's mask tells whether the TARGET is padding?"""
