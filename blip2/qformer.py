"""The Q-Former: learned queries and a text in one transformer (BLIP-2 sec. 3.1, Fig. 2).

Only the Q queries look at the image. A text of stage 1 sees it through the queries' keys and values
in each layer, and the language model of stage 2 through their Q last states: the bottleneck of
BLIP-2.

    pass                          a layer's path
    encode_queries(kv)            queries: attn -> cross_attn (every second layer) -> ffn_query
    encode_text(ids, mask)        text:    attn -> ffn_text
    encode_both(ids, mask, kv)    both at once; attn sees the two side by side, then each its path
    decode(ids, mask, cache)      text behind queries that were run before: their keys and values

Shared by queries and text: attn, with its output projection and LayerNorm. Apart: the two ffn. In
BLIP the text has the cross-attention; here the queries have it, and the text has none. Compare
med.py: MED shares ffn and cross_attn between its modes, and has two self-attentions.

Read bottom-up: the masks, QFormerLayer, QFormer. Letters: B batch, Q queries, L text tokens, N
image tokens, D width. Masks: True = attend.
"""

import torch
from torch import Tensor, nn

from attention import CrossAttention, KeysValues
from config import SettingError
from med import NORM_EPS, CrossAttentionLayer, FeedForward, LMHead, SelfAttentionLayer, with_first

Cache = list[KeysValues]  # self-attention's keys and values of each layer


def attention_mask(kind: str, text_mask: Tensor, queries: int) -> Tensor:
    """Who may look at whom in self-attention (BLIP-2 Fig. 2, right).

    kind "itc", "itg" or "itm"; text_mask (B, L): True for real tokens, False for padding; Q queries
    -> (B, 1, Q + L, Q + L). Rows are who looks, columns who is looked at, queries first. With 2
    queries, 3 text tokens, x = attend:

        itc (apart)               itg (text is causal)      itm (all see all)
             q1 q2 | t1 t2 t3          q1 q2 | t1 t2 t3          q1 q2 | t1 t2 t3
        q1   x  x  | .  .  .      q1   x  x  | .  .  .      q1   x  x  | x  x  x
        q2   x  x  | .  .  .      q2   x  x  | .  .  .      q2   x  x  | x  x  x
        t1   .  .  | x  x  x      t1   x  x  | x  .  .      t1   x  x  | x  x  x
        t2   .  .  | x  x  x      t2   x  x  | x  x  .      t2   x  x  | x  x  x
        t3   .  .  | x  x  x      t3   x  x  | x  x  x      t3   x  x  | x  x  x

    The column of a padding token has no x in any row. In itc and itg no query sees a text. So the
    queries' states are the same in both and for every text: they are run once, and a text of itg
    reads their keys and values. The model uses the whole of itm and the text's rows of itg. The
    other rows are here to compare with the figure: change `encode_queries` or `encode_text`, not
    them.
    """
    if kind not in ("itc", "itg", "itm"):
        raise ValueError(f"kind is {kind!r}; choose itc, itg or itm")
    Q, L = queries, text_mask.shape[1]
    allowed = torch.zeros(Q + L, Q + L, dtype=torch.bool, device=text_mask.device)
    allowed[:Q, :Q] = True  # a query looks at queries
    allowed[Q:, Q:] = True  # a text token looks at the text,
    if kind == "itg":
        allowed[Q:, Q:] = allowed[Q:, Q:].tril()  # in itg at what stands before it and itself,
    if kind in ("itg", "itm"):
        allowed[Q:, :Q] = True  # and at queries
    if kind == "itm":
        allowed[:Q, Q:] = True  # a query looks at the text
    real = torch.cat([text_mask.new_ones(len(text_mask), Q), text_mask], 1).bool()
    return allowed & real[:, None, None]


class QFormerLayer(nn.Module):
    """One layer: shared self-attention, then each stream its own way (post-LN, as in BERT)."""

    def __init__(self, width: int, context_width: int, heads: int, hidden: int, dropout: float,
                 looks: bool, text: bool):
        """looks: has cross-attention to the image; text: has a text stream."""
        super().__init__()
        self.attn = SelfAttentionLayer(width, heads, dropout)
        self.cross_attn = None
        if looks:
            attn = CrossAttention(width, context_width, heads, dropout)
            self.cross_attn = CrossAttentionLayer(attn, width, dropout)
        self.ffn_query = FeedForward(width, hidden, dropout)
        self.ffn_text = FeedForward(width, hidden, dropout) if text else None

    def forward(self, x: Tensor, queries: int, mask: Tensor | None, kv: KeysValues | None,
                past: KeysValues | None = None, attn_maps: list[Tensor] | None = None,
                queries_only: bool = False,
                kv_mask: Tensor | None = None) -> tuple[Tensor, KeysValues]:
        """x (n*B, queries + L, D), queries first -> the same, keys and values so far.

        kv: of B images, for this layer; None where it does not look or there are no queries.
        queries_only: the text's states are not needed, -> (n*B, queries, D). kv_mask (B, 1, 1, N).
        """
        x, present = self.attn(x, mask, past)
        query, text = x[:, :queries], x[:, queries:]
        if queries_only:
            text = text[:, :0]
        if queries:
            if self.cross_attn is not None:
                query = self.cross_attn(query, kv, kv_mask, attn_maps)
            query = self.ffn_query(query)
        if text.shape[1]:
            text = self.ffn_text(text)
        return torch.cat([query, text], 1), present


class QFormer(nn.Module):
    """BERT with queries, and cross-attention in every `look_every`-th layer.

    context_width: of the image tokens. vocab_size 0: no text stream, as stage 2 needs none.
    dec_id: of [DEC].
    """

    def __init__(self, queries: int, width: int, context_width: int, depth: int, heads: int,
                 hidden: int, dropout: float, look_every: int, vocab_size: int,
                 max_positions: int, dec_id: int):
        super().__init__()
        self.dec_id = dec_id
        self.queries = nn.Parameter(torch.zeros(1, queries, width))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)  # of both streams, in front of layer 1
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(width, context_width, heads, hidden, dropout, i % look_every == 0,
                         vocab_size > 0) for i in range(depth))
        if vocab_size:
            self.word = nn.Embedding(vocab_size, width)
            self.position = nn.Embedding(max_positions, width)
            self.lm_head = LMHead(vocab_size, width)

    def project(self, tokens: Tensor) -> list[KeysValues | None]:
        """Image tokens (B, N, context width) -> keys and values of each layer that looks."""
        return [layer.cross_attn.attn.project(tokens) if layer.cross_attn else None
                for layer in self.layers]

    def embed_queries(self, count: int) -> Tensor:
        """-> (count, Q, D). Queries have no positions: they differ in what they have learned."""
        return self.dropout(self.norm(self.queries)).expand(count, -1, -1)

    def embed_text(self, ids: Tensor, start: int = 0) -> Tensor:
        """ids (B, L) -> (B, L, D), at positions start .. start + L - 1 (queries have none)."""
        end = start + ids.shape[1]
        if end > self.position.num_embeddings:
            raise SettingError(f"a text of {end} tokens does not fit the Q-Former's "
                               f"{self.position.num_embeddings} positions; shorten it")
        position = torch.arange(start, end, device=ids.device)
        return self.dropout(self.norm(self.word(ids) + self.position(position)))

    def run(self, x: Tensor, queries: int, mask: Tensor | None,
            kv: list[KeysValues | None] | None = None, past: Cache | None = None,
            attn_maps: list[Tensor] | None = None, queries_only: bool = False,
            kv_mask: Tensor | None = None) -> tuple[Tensor, Cache]:
        """All layers: states, and the cache of their keys and values.

        x (n*B, queries + L, D), mask (B or 1, 1, rows, columns), kv of B images for each layer.
        """
        cache = []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, queries, mask, kv[i] if kv else None, past[i] if past else None,
                               attn_maps, queries_only and layer is self.layers[-1], kv_mask)
            cache.append(present)
        return x, cache

    def encode_queries(self, kv: list[KeysValues | None],
                       attn_maps: list[Tensor] | None = None,
                       image_mask: Tensor | None = None) -> tuple[Tensor, Cache]:
        """What the queries saw in B images: (B, Q, D), and the cache for `decode`.

        image_mask (B, N): the image tokens that are no padding; None: all.
        """
        images = len(kv[0][0])  # (the first layer always looks)
        x = self.embed_queries(images)
        kv_mask = None if image_mask is None else image_mask[:, None, None].bool()
        return self.run(x, x.shape[1], None, kv, attn_maps=attn_maps, kv_mask=kv_mask)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A text by itself: ids ([CLS] in front), mask (B, L) -> states (B, L, D)."""
        return self.run(self.embed_text(ids), 0, mask[:, None, None].bool())[0]

    def encode_both(self, ids: Tensor, mask: Tensor, kv: list[KeysValues | None],
                    attn_maps: list[Tensor] | None = None, queries_only: bool = False) -> Tensor:
        """Queries and text see each other; text i belongs to image i // n.

        ids ([CLS] in front), mask (n*B, L), kv of B images -> (n*B, Q + L, D), queries first; or
        (n*B, Q, D) with queries_only, which saves the texts' part of the last layer.
        """
        queries = self.embed_queries(len(ids))
        x = torch.cat([queries, self.embed_text(ids)], 1)
        allowed = attention_mask("itm", mask, queries.shape[1])
        return self.run(x, queries.shape[1], allowed, kv, attn_maps=attn_maps,
                        queries_only=queries_only)[0]

    def decode(self, ids: Tensor, mask: Tensor | None, cache: Cache) -> tuple[Tensor, Cache]:
        """A text behind queries, whose keys and values are in `cache`: states, longer cache.

        ids, mask (B, L): a text, where [DEC] takes the place of [CLS]; in a generation the new
        tokens behind the text that is in `cache` already. mask None: no padding. -> (B, L, D): each
        state predicts the next token.
        """
        queries, before = self.queries.shape[1], cache[0][0].shape[2]
        start = before - queries  # tokens of the text that are in the cache
        if start == 0:
            ids = with_first(ids, self.dec_id)
        if mask is None:
            mask = torch.ones_like(ids)
        text_mask = torch.cat([mask.new_ones(len(ids), start), mask], 1)
        allowed = attention_mask("itg", text_mask, queries)[:, :, before:]  # the new tokens' rows
        return self.run(self.embed_text(ids, start), 0, allowed, past=cache)

    def logits(self, states: Tensor) -> Tensor:
        """States (..., D) -> next-token logits (..., V)."""
        return self.lm_head(states, self.word.weight)
