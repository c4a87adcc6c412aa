"""Multi-head attention: one implementation for the ViT and for all modes of the text transformer.

`attend` is the arithmetic, softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1). The two modules
differ only in where keys and values come from:

    SelfAttention   q, k, v from the same sequence; may append to a cache of past keys and values
    CrossAttention  q from the text, k and v from the image, projected ONCE per image by `project`

Letters: B batch (of images, n texts of each), L query tokens, N context tokens, D width, H heads,
d = D / H. Masks: True = attend.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # two tensors (B, H, N, d)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
           attn_maps: list[Tensor] | None = None) -> Tensor:
    """Scaled dot-product attention.

    q (B, H, L, d), k and v (B, H, N, d), mask broadcastable to (B, H, L, N) -> (B, H, L, d).
    The map (B, H, L, N) is appended to the list `attn_maps` where one is given, still attached to
    the graph, so that its gradient can be asked for. That branch spells the softmax out; the other
    one is the same arithmetic in one fused kernel, which does not materialise the map.
    """
    if attn_maps is None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    attn_map = scores.softmax(-1)
    attn_maps.append(attn_map)
    return F.dropout(attn_map, dropout) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, H, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, D)."""
    return x.transpose(1, 2).flatten(-2)


def select_rows(layers: list[KeysValues | None], rows: Tensor) -> list[KeysValues | None]:
    """Each layer's keys and values of rows[0], rows[1] ..., repeats allowed; None stays None."""
    # Not k[rows]: on a CPU its gradient is 8 times slower, and not the same in every run.
    return [None if kv is None else tuple(x.index_select(0, rows) for x in kv) for kv in layers]


class SelfAttention(nn.Module):
    """Queries, keys and values come from one sequence. The dropout behind it is the caller's."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None,
                past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """Attend; also return the keys and values of past and present tokens, for the cache.

        x (B, L, D), mask broadcastable to (B, H, L, past + L) -> (B, L, D), keys and values.
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        dropout = self.dropout if self.training else 0.0
        return self.out(merge_heads(attend(q, k, v, mask, dropout))), (k, v)


class CrossAttention(nn.Module):
    """Queries from the text look at a context (an image) that was projected beforehand."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, context: Tensor) -> KeysValues:
        """context (B, N, context width) -> keys and values (B, H, N, d)."""
        k, v = self.kv(context).chunk(2, dim=-1)
        # In one piece each, because every step of a generation reads all of them again.
        return split_heads(k, self.heads).contiguous(), split_heads(v, self.heads).contiguous()

    def forward(self, x: Tensor, kv: KeysValues, mask: Tensor | None = None,
                attn_maps: list[Tensor] | None = None) -> Tensor:
        """Text i looks at image i // n.

        x (n*B, L, D), kv of B images, mask broadcastable to (B, H, n*L, N) -> (n*B, L, D).
        No query influences another one here, so the n texts of an image are laid end to end as one
        long row of queries: the image is neither projected nor copied n times.
        """
        k, v = kv
        if len(x) % len(k):
            raise ValueError(f"{len(x)} texts cannot be divided evenly among {len(k)} contexts")
        q = self.q(x).reshape(len(k), -1, x.shape[-1])  # (B, n*L, D)
        dropout = self.dropout if self.training else 0.0
        out = merge_heads(attend(split_heads(q, self.heads), k, v, mask, dropout, attn_maps))
        return self.out(out.reshape(x.shape))
