"""6. A ring: the newest features over the oldest ones."""

import torch
from torch import Tensor


def enqueue(queue: Tensor, pointer: int, features: Tensor) -> int:
    """queue (Q, E), features (B, E) -> the new pointer."""
    size = len(queue)
    newest = features[-size:]
    slots = (pointer + torch.arange(len(newest))) % size
    queue[slots] = newest
    return (pointer + len(newest)) % size
