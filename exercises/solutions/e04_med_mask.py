"""4. No token sees padding; in the decoder no token sees a later one."""

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
