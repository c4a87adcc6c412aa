"""7. The nucleus (BLIP sec. 4.3 and Table 2; Holtzman et al. 2020).

CapFilt's captioner does not take the likeliest word: it draws one. But the long tail of unlikely
words must not be drawn. The nucleus is the shortest list of likeliest tokens whose probabilities
together exceed p (0.9 in BLIP). The token that crosses p belongs to it. The draw happens later, by
probability, among those that are left.
"""

from torch import Tensor


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Put -inf outside the nucleus; the others stay as they are.

    logits (R, V) -> (R, V). Sort by probability; rank r stays when r = 0 or when the sum of the
    probabilities before r is <= top_p. Do not change `logits`.
    """
    # TODO: sort, sum what comes before each rank, and take the answer back to the tokens' places.
    raise NotImplementedError


HINT = """ordered, order = logits.sort(-1, descending=True). The mass before a rank is the cumsum
minus the rank's own probability. dropped.scatter(-1, order, dropped) brings a mask over ranks back
to the tokens' places."""
