"""9. CapFilt's decision (BLIP sec. 3.3, Fig. 3).

The captioner has written a synthetic text for each web image. The filter is an ITM head: two
logits for a text and its image, class 1 = matched. It judges the web texts AND the synthetic ones
by the same rule. Human texts are not judged. The bootstrapped set is the human texts, the web
texts that were kept and the synthetic texts that were kept.
"""

from torch import Tensor


def keep_texts(texts: list[dict], logits: Tensor, threshold: float = 0.5) -> list[str]:
    """The captions of the bootstrapped set, in the order in which they came.

    texts: {"caption": str, "source": "human", "web" or "synthetic"}; logits (T, 2): those of text
    t in row t (a human text has a row too; it means nothing). A text is kept where its probability
    of being matched is at least the threshold.
    """
    # TODO: the probability of class 1; then decide text by text.
    raise NotImplementedError


HINT = """logits.softmax(-1)[:, 1] are the probabilities. One rule for web and synthetic; human
texts stay whatever their row says."""
