"""9. Human texts stay; web and synthetic ones stay where ITM says matched."""

from torch import Tensor


def keep_texts(texts: list[dict], logits: Tensor, threshold: float = 0.5) -> list[str]:
    """texts and logits (T, 2) -> captions."""
    matched = logits.softmax(-1)[:, 1].tolist()
    kept = []
    for text, probability in zip(texts, matched):
        if text["source"] == "human" or probability >= threshold:
            kept.append(text["caption"])
    return kept
