"""MED, the multimodal mixture of encoder-decoder: one text transformer, three modes (BLIP
sec. 3.1, Fig. 2).

    mode                            first token  a layer's path                    read out     loss
    encode_text(ids, mask)          [CLS]        attn_bi               -> ffn      [CLS] state  ITC
    encode_grounded(ids, mask, kv)  [ENC]        attn_bi -> cross_attn -> ffn      [ENC] state  ITM
    decode(ids, mask, kv, past)     [DEC]        attn_causal -> cross_attn -> ffn  every state  LM

Who may look at whom (rows are queries, 4 text tokens, 3 image tokens, x = True = attend):

    attn_bi     t1 t2 t3 t4      attn_causal  t1 t2 t3 t4      cross_attn  i1 i2 i3
         t1     x  x  x  x            t1      x  .  .  .            t1     x  x  x
         t2     x  x  x  x            t2      x  x  .  .            t2     x  x  x
         t3     x  x  x  x            t3      x  x  x  .            t3     x  x  x
         t4     x  x  x  x            t4      x  x  x  x            t4     x  x  x

encode_text uses the first mask alone: it skips the image. Sharing parameters (sec. 3.2, Table 3) is
structure: what encoder and decoder share IS the same object. "All but self-attention" means that
attn_bi and attn_causal (with their output projection and LayerNorm) are two, and that embeddings,
cross_attn and ffn are one. The reason: the encoder sees the whole text and the decoder only what
comes before, and that difference lies in self-attention. Because cross_attn is one object, an
image's keys and values serve encoder and decoder, so `project` computes them once per image.

Post-LN, as in BERT: LayerNorm(x + Dropout(Sublayer(x))). Read on: sublayers, MEDLayer, MED.
Letters: B images, n texts of each, L text tokens, N context tokens, D width, V vocabulary, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import CrossAttention, KeysValues, SelfAttention, select_rows
from config import SHARE

MODES = ("text", "grounded", "decode")
NORM_EPS = 1e-12  # BERT's


class AddNorm(nn.Module):
    """LayerNorm(x + Dropout(update)): the post-LN wrapping of every sublayer of BERT."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Both (B, L, D) -> (B, L, D)."""
        return self.norm(x + self.dropout(update))


class SelfAttentionLayer(nn.Module):
    """Self-attention, add, norm: attn_bi and attn_causal are two such layers."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attn = SelfAttention(width, heads, dropout)
        self.add = AddNorm(width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None,
                past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """Attend, add, normalise; also return the keys and values so far.

        x (B, L, D), mask (B, 1, 1 or L, past + L) -> (B, L, D), keys and values.
        """
        update, present = self.attn(x, mask, past)
        return self.add(x, update), present


class CrossAttentionLayer(nn.Module):
    """Where the text looks at the image; `attn` is a CrossAttention or stands in for one."""

    def __init__(self, attn: nn.Module, width: int, dropout: float):
        super().__init__()
        self.attn = attn
        self.add = AddNorm(width, dropout)

    def forward(self, x: Tensor, kv: KeysValues, mask: Tensor | None,
                attn_maps: list[Tensor] | None = None) -> Tensor:
        """x (n*B, L, D), kv of B images -> (n*B, L, D)."""
        return self.add(x, self.attn(x, kv, mask, attn_maps))


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.add = AddNorm(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.add(x, self.fc2(F.gelu(self.fc1(x))))


class Embeddings(nn.Module):
    """Word + absolute position, LayerNorm, dropout. BLIP has no token-type embedding."""

    def __init__(self, vocab_size: int, width: int, max_positions: int, dropout: float):
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_positions, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """ids (B, L) standing at positions start .. start + L - 1 -> (B, L, D)."""
        end = start + ids.shape[1]
        if end > self.position.num_embeddings:
            raise ValueError(f"a text of {end} tokens does not fit the model's "
                             f"{self.position.num_embeddings} positions; shorten it")
        position = torch.arange(start, end, device=ids.device)
        return self.dropout(self.norm(self.word(ids) + self.position(position)))


class LMHead(nn.Module):
    """Dense, GELU, LayerNorm, a dot product with every word embedding, plus a bias.

    The word embeddings are tied: they are passed in.
    """

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        """x (..., D), word embeddings (V, D) -> logits (..., V)."""
        return F.linear(self.norm(F.gelu(self.dense(x))), word, self.bias)


@dataclass
class ContextKV:
    """Keys and values of B images (or other contexts), one pair (B, H, N, d) for each layer.

    enc is read by encode_grounded, dec by decode: the same list unless a sharing ablation has two
    cross-attentions, None where the model lacks that mode. mask (B, 1, 1, N) or None.
    """

    enc: list[KeysValues] | None
    dec: list[KeysValues] | None
    mask: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len((self.enc or self.dec)[0][0])

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return (self.enc or self.dec)[0][0].device

    def select(self, rows: Tensor) -> "ContextKV":
        """rows (R,) -> the keys and values of images rows[0], rows[1] ..., repeats allowed."""
        enc = None if self.enc is None else select_rows(self.enc, rows)
        dec = enc if self.dec is self.enc else self.dec and select_rows(self.dec, rows)
        return ContextKV(enc, dec, None if self.mask is None else self.mask[rows])


class MEDLayer(nn.Module):
    """One layer of the encoder (attn_bi, cross_attn, ffn) and of the decoder.

    The decoder's are attn_causal, cross_attn_dec, ffn_dec. What `share` shares is one object under
    two names (BLIP Fig. 2). What no mode of `modes` needs is None: a momentum twin has no
    cross-attention.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, share: str,
                 modes: tuple[str, ...], make_attn: Callable[[], nn.Module]):
        """make_attn() -> a new CrossAttention."""
        super().__init__()
        def self_attention():
            return SelfAttentionLayer(width, heads, dropout)
        def cross_attention():
            return CrossAttentionLayer(make_attn(), width, dropout)
        def feed_forward():
            return FeedForward(width, hidden, dropout)
        encodes, decodes = "text" in modes or "grounded" in modes, "decode" in modes
        self.attn_bi = self_attention() if encodes else None
        self.cross_attn = cross_attention() if "grounded" in modes else None
        self.ffn = feed_forward() if encodes else None
        self.attn_causal = self.cross_attn_dec = self.ffn_dec = None
        if decodes:
            # Table 3: the decoder's part either is the encoder's (the same object) or is its own.
            own_sa = share in ("all_but_sa", "none")
            own_ca = share in ("all_but_ca", "none")
            own_ffn = share == "none"
            self.attn_causal = self.attn_bi if encodes and not own_sa else self_attention()
            self.cross_attn_dec = (self.cross_attn if "grounded" in modes and not own_ca
                                   else cross_attention())
            self.ffn_dec = self.ffn if encodes and not own_ffn else feed_forward()

    def text(self, x: Tensor, mask: Tensor, cls_only: bool = False) -> Tensor:
        """(B, L, D) -> (B, L, D), or with cls_only (B, 1, D): the image plays no part."""
        x, _ = self.attn_bi(x, mask)
        return self.ffn(x[:, :1] if cls_only else x)

    def grounded(self, x: Tensor, mask: Tensor, kv: KeysValues, kv_mask: Tensor | None,
                 attn_maps: list[Tensor] | None = None, cls_only: bool = False) -> Tensor:
        """(n*B, L, D) and B images -> (n*B, L, D), or with cls_only (n*B, 1, D)."""
        x, _ = self.attn_bi(x, mask)
        if cls_only:
            x = x[:, :1]
        return self.ffn(self.cross_attn(x, kv, kv_mask, attn_maps))

    def decode(self, x: Tensor, mask: Tensor | None, kv: KeysValues, kv_mask: Tensor | None,
               past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """(n*B, L, D) and B images -> (n*B, L, D), self-attention's keys and values so far."""
        x, present = self.attn_causal(x, mask, past)
        return self.ffn_dec(self.cross_attn_dec(x, kv, kv_mask)), present


class MED(nn.Module):
    """The text transformer.

    vocab_size V, width D, context_width: of what cross-attention reads (the ViT's), hidden: width
    of the FFN, enc_id and dec_id: ids of [ENC] and [DEC], share: a row of Table 3 (SHARE), modes:
    those in use, cross_attention: what stands in each layer in the place of a CrossAttention, as a
    function of the layer's number (NLVR2 looks at two images). Raises ValueError for an unknown
    `share`.
    """

    def __init__(self, vocab_size: int, width: int, context_width: int, depth: int, heads: int,
                 hidden: int, max_positions: int, dropout: float, enc_id: int, dec_id: int,
                 share: str = "all_but_sa", modes: tuple[str, ...] = MODES,
                 cross_attention: Callable[[int], nn.Module] | None = None):
        super().__init__()
        if share not in SHARE:
            raise ValueError(f"share is {share!r}; choose one of {', '.join(SHARE)}")
        self.enc_id, self.dec_id = enc_id, dec_id
        self.embeddings = Embeddings(vocab_size, width, max_positions, dropout)
        def make_attn(layer):
            if cross_attention is not None:
                return cross_attention(layer)
            return CrossAttention(width, context_width, heads, dropout)
        self.layers = nn.ModuleList(
            MEDLayer(width, heads, hidden, dropout, share, modes, partial(make_attn, layer))
            for layer in range(depth))
        if "decode" in modes:
            separate = share == "none" and len(modes) > 1
            self.embeddings_dec = (Embeddings(vocab_size, width, max_positions, dropout)
                                   if separate else self.embeddings)
            self.lm_head = LMHead(vocab_size, width)

    def project(self, context: Tensor, context_mask: Tensor | None = None) -> ContextKV:
        """The context's keys and values for every layer, computed once for all texts.

        context (B, N, context width), context_mask (B, N) or None.
        """
        enc = dec = None
        if self.layers[0].cross_attn is not None:
            enc = [layer.cross_attn.attn.project(context) for layer in self.layers]
        if self.layers[0].cross_attn_dec is self.layers[0].cross_attn:
            dec = enc  # shared: one cross-attention, one set of keys and values
        elif self.layers[0].cross_attn_dec is not None:
            dec = [layer.cross_attn_dec.attn.project(context) for layer in self.layers]
        mask = None if context_mask is None else context_mask[:, None, None].bool()
        return ContextKV(enc, dec, mask)

    def encode_text(self, ids: Tensor, mask: Tensor, cls_only: bool = False) -> Tensor:
        """The unimodal encoder, which sees no image.

        ids (B, L) starting with [CLS], mask (B, L) -> states (B, L, D); with cls_only the state of
        [CLS] alone, (B, 1, D). (Behind the last self-attention no token looks at another one: the
        others' cross-attention and FFN there would be thrown away.)
        """
        x, mask = self.embeddings(ids), mask[:, None, None].bool()
        for layer in self.layers:
            x = layer.text(x, mask, cls_only and layer is self.layers[-1])
        return x

    def encode_grounded(self, ids: Tensor, mask: Tensor, kv: ContextKV,
                        first_token: int | None = None, attn_maps: list[Tensor] | None = None,
                        cls_only: bool = False) -> Tensor:
        """The image-grounded encoder: text i looks at image i // n.

        ids, mask (n*B, L), kv of B images -> states (n*B, L, D); with cls_only that of [ENC] alone,
        (n*B, 1, D). [ENC] takes the place of [CLS]; `first_token` is for weights that were trained
        with another token there. A list `attn_maps` receives each layer's cross-attention map
        (B, H, n*L, N).
        """
        first_token = self.enc_id if first_token is None else first_token
        x, mask = self.embeddings(with_first(ids, first_token)), mask[:, None, None].bool()
        for layer, layer_kv in zip(self.layers, kv.enc):
            x = layer.grounded(x, mask, layer_kv, kv.mask, attn_maps,
                               cls_only and layer is self.layers[-1])
        return x

    def decode(self, ids: Tensor, mask: Tensor | None, kv: ContextKV,
               past: list[KeysValues] | None = None) -> tuple[Tensor, list[KeysValues]]:
        """The image-grounded decoder: states that predict the next token, and the cache.

        ids, mask (n*B, L), kv of B images -> (n*B, L, D), each layer's keys and values so far.
        mask None means no padding. In a generation, `past` is the cache that the previous call
        returned and ids are the new tokens; without it, [DEC] takes the place of [CLS].
        """
        start = past[0][0].shape[2] if past else 0
        x = self.embeddings_dec(ids if past else with_first(ids, self.dec_id), start)
        queries = torch.arange(start, start + ids.shape[1], device=ids.device)
        keys = torch.arange(start + ids.shape[1], device=ids.device)
        causal = queries[:, None] >= keys  # (L, past + L)
        if mask is not None:
            causal = causal & mask[:, None, None].bool()
        cache = []
        for i, layer in enumerate(self.layers):
            x, present = layer.decode(x, causal, kv.dec[i], kv.mask, past[i] if past else None)
            cache.append(present)
        return x, cache

    def logits(self, states: Tensor) -> Tensor:
        """Decoder states (..., D) -> next-token logits (..., V)."""
        return self.lm_head(states, self.embeddings_dec.word.weight)


def with_first(ids: Tensor, token: int) -> Tensor:
    """ids (B, L) -> a copy (B, L) that starts with `token`."""
    ids = ids.clone()
    ids[:, 0] = token
    return ids


class DecoderStep:
    """The decoder as `step(tokens, rows) -> logits` for decoding.py, with its cache.

    Rows of an image are neighbours. cross_attn needs as many rows for every image: with them (as
    always in beam search) its keys and values are held once, else each row gets a copy of its own.
    """

    def __init__(self, med: MED, kv: ContextKV, images: Tensor):
        """kv of B images; images (R,): which of them each row of the first call looks at."""
        self.med, self.all_kv, self.images, self.past = med, kv, images, None
        self.kv, self.images_of_kv = kv, torch.arange(len(kv), device=images.device)

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens (R, t), rows (R,) of the previous call -> logits (R, V) for the next token."""
        self.images = self.images[rows]
        distinct, counts = self.images.unique_consecutive(return_counts=True)
        equal = (counts == counts[0]).all()  # as many rows for each image
        needed = distinct if equal else self.images
        if not torch.equal(needed, self.images_of_kv):
            self.kv, self.images_of_kv = self.all_kv.select(needed), needed
        if self.past is not None:
            self.past = select_rows(self.past, rows)
        states, self.past = self.med.decode(tokens, None, self.kv, self.past)
        return self.med.logits(states[:, -1])
