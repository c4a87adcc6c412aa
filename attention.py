"""Multi-head attention: one implementation for the ViT and for all three modes of the text
transformer.

`attend` is the arithmetic, softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1); the two modules
only differ in where keys and values come from:

    SelfAttention   q, k, v from the same sequence; may append to a cache of past keys and values
    CrossAttention  q from the text, k and v from the image, projected ONCE per image by `project`

Letters: B batch, L query tokens, N context tokens, D width, H heads, d = D / H. Masks:
True = attend.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # two tensors (B, H, N, d)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
           probabilities: list | None = None) -> Tensor:
    """q (B, H, L, d), k and v (B, H, N, d), mask broadcastable to (B, H, L, N) -> (B, H, L, d).

    A list given as `probabilities` receives the attention map (B, H, L, N), still attached to the
    graph, so that gradient-weighted attention pictures can be drawn; that branch spells out the
    softmax, the other one is fused.
    """
    if probabilities is not None:
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        probabilities.append(scores.softmax(-1))
        return F.dropout(probabilities[-1], dropout) @ v
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The CPU kernel's bfloat16 backward is several times slower than its float32 one.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask,
                                                  dropout).bfloat16()
    return F.scaled_dot_product_attention(q, k, v, mask, dropout)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but a few rows on a CPU go through oneDNN: a step of generation reads all weights
    for a handful of tokens, and MKL, which F.linear calls, reads them at 10 GB/s where oneDNN does
    at 25 (4 to 24 rows, 2 cores; captioning at base size costs 1.4 instead of 1.65 times the
    ViT with it)."""
    if (not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32
            and x.numel() <= 32 * x.shape[-1] and torch.backends.mkldnn.is_available()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return linear(x, self.weight, self.bias)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, H, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, D)."""
    return x.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Queries, keys and values from one sequence. The output projection is included, dropout after
    it is not."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: KeysValues | None = None,
                probabilities: list | None = None) -> tuple[Tensor, KeysValues]:
        """x (B, L, D), mask to (B, H, L, N) -> (B, L, D) and the keys and values of
        past + present."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        dropout = self.dropout if self.training else 0.0
        return self.out(merge_heads(attend(q, k, v, mask, dropout, probabilities))), (k, v)


class CrossAttention(nn.Module):
    """Text queries look at a context (an image) whose keys and values were projected beforehand."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = Linear(width, width)
        self.kv = Linear(context_width, 2 * width)
        self.out = Linear(width, width)

    def project(self, context: Tensor) -> KeysValues:
        """context (B, N, context width) -> keys and values (B, H, N, d)."""
        k, v = self.kv(context).chunk(2, dim=-1)
        # In one piece each, because every step of a generation reads all of them again.
        return split_heads(k, self.heads).contiguous(), split_heads(v, self.heads).contiguous()

    def forward(self, x: Tensor, kv: KeysValues, mask: Tensor | None = None,
                probabilities: list | None = None) -> Tensor:
        """x (n*B, L, D), kv of B images, mask to (B, H, n*L, N) -> (n*B, L, D); text i looks at
        image i // n.

        No query influences another one here, so the n texts of an image are laid end to end as one
        long row of queries: the image is neither projected nor copied n times.
        """
        k, v = kv
        if len(x) % len(k):
            raise ValueError(f"{len(x)} texts cannot be divided evenly among {len(k)} contexts")
        q = split_heads(self.q(x).reshape(len(k), -1, x.shape[-1]), self.heads)  # (B, H, n*L, d)
        dropout = self.dropout if self.training else 0.0
        return self.out(merge_heads(attend(q, k, v, mask, dropout, probabilities)).reshape(x.shape))
