"""10. Four blocks, then the padding."""

import torch
from torch import Tensor


def attention_mask(kind: str, text_mask: Tensor, queries: int) -> Tensor:
    """text_mask (B, L) -> (B, 1, Q + L, Q + L)."""
    batch, length = text_mask.shape
    allowed = torch.zeros(queries + length, queries + length, dtype=torch.bool)
    allowed[:queries, :queries] = True  # queries see queries, always
    allowed[queries:, queries:] = True  # text sees text
    if kind == "itg":
        allowed[queries:, queries:] = torch.ones(length, length).tril().bool()
    if kind in ("itg", "itm"):
        allowed[queries:, :queries] = True  # text sees queries
    if kind == "itm":
        allowed[:queries, queries:] = True  # queries see text
    real = torch.cat([torch.ones(batch, queries, dtype=torch.bool), text_mask.bool()], 1)
    return allowed & real[:, None, None, :]
