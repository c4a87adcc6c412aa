"""4. Padding is seen by nobody; in the decoder the future is not either."""

import torch
from torch import Tensor


def med_mask(mask: Tensor, causal: bool) -> Tensor:
    """(B, L) -> (B, 1, L, L)."""
    batch, length = mask.shape
    allowed = mask[:, None, None, :].bool().expand(batch, 1, length, length)
    if causal:
        positions = torch.arange(length)
        allowed = allowed & (positions[:, None] >= positions[None, :])
    return allowed
