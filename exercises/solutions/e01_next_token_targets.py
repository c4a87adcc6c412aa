"""1. The next token of each position; -100 for padding and prompt."""

from torch import Tensor


def next_token_targets(ids: Tensor, mask: Tensor, prompt_length: int = 0) -> Tensor:
    """ids, mask (B, L) -> targets (B, L - 1)."""
    targets = ids[:, 1:].clone()
    is_padding = mask[:, 1:] == 0
    targets[is_padding] = -100
    if prompt_length > 1:
        targets[:, :prompt_length - 1] = -100
    return targets
