"""3. Hard negatives for ITM (BLIP sec. 3.2; ALBEF sec. 3.2).

ITM learns little from a text that is obviously wrong. So the wrong text for an image is drawn with
a probability that grows with the similarity of ITC: the pairs that ITC confuses come most often.
It is a draw, not the maximum: the most similar "wrong" text may in fact be true of the image.

    weight = softmax(similarity) + floor,   0 where the pair is a true one
"""

from collections.abc import Callable

from torch import Tensor


def mine_hard_negatives(sim: Tensor, positives: Tensor, floor: float,
                        draw: Callable[[Tensor], Tensor]) -> Tensor:
    """One column for each row, never a positive one.

    sim (B, C), divided by the temperature already; positives (B, C), True where the pair is a true
    one; floor: a small number, so that every weight is positive. draw(weights (B, C)) -> (B,)
    chooses a column of each row in proportion to its weight. -> index (B,).
    """
    # TODO: the weights; then return draw(weights).
    raise NotImplementedError


HINT = """Set the positives' WEIGHTS to 0, after the softmax. A similarity of 0 is no small one: it
still has a weight. masked_fill(positives, 0) does it."""
