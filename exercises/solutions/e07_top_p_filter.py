"""7. Keep a rank while the mass before it has not passed p."""

from torch import Tensor


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """(R, V) -> (R, V)."""
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    mass_before = probability.cumsum(-1) - probability
    dropped = mass_before > top_p
    dropped[:, 0] = False
    dropped = dropped.scatter(-1, order, dropped)
    return logits.masked_fill(dropped, float("-inf"))
