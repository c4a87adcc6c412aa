"""MED, the multimodal mixture of encoder-decoder: one text transformer, three modes (BLIP
sec. 3.1, Fig. 2).

    mode                            first token  a layer's path                    read out     loss
    encode_text(ids, mask)          [CLS]        attn_bi               -> ffn      [CLS] state  ITC
    encode_grounded(ids, mask, kv)  [ENC]        attn_bi -> cross_attn -> ffn      [ENC] state  ITM
    decode(ids, mask, kv, past)     [DEC]        attn_causal -> cross_attn -> ffn  every state  LM

Who may look at whom (rows are queries, 4 text tokens, 3 image tokens, x = attend):

    attn_bi     t1 t2 t3 t4      attn_causal  t1 t2 t3 t4      cross_attn  i1 i2 i3
         t1     x  x  x  x            t1      x  .  .  .            t1     x  x  x
         t2     x  x  x  x            t2      x  x  .  .            t2     x  x  x
         t3     x  x  x  x            t3      x  x  x  .            t3     x  x  x
         t4     x  x  x  x            t4      x  x  x  x            t4     x  x  x

encode_text skips the image: its fourth mask is empty. Sharing parameters (sec. 3.2, Table 3) is
structure: what encoder and decoder share IS the same object. "All but self-attention" means that
attn_bi and attn_causal (with their output projection and LayerNorm) are two, and embeddings,
cross_attn and ffn are one. Because cross_attn is one object, an image's keys and values serve
encoder and decoder alike, so `project` computes them once per image.

Post-LN, as in BERT: LayerNorm(x + Dropout(Sublayer(x))). Read bottom-up: sublayers, MEDLayer, MED.
Letters: B batch, L text tokens, N context tokens, D width, V vocabulary. Masks: True = attend.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import CrossAttention, KeysValues, Linear, SelfAttention, linear

SHARE = ("all_but_sa", "all", "all_but_ca", "none")  # Table 3; the first one is the paper's choice
MODES = ("text", "grounded", "decode")
NORM_EPS = 1e-12  # BERT's


class Residual(nn.Module):
    """LayerNorm(x + Dropout(sublayer output)): the post-LN wrapping that every sublayer of
    BERT has."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Both (B, L, D) -> (B, L, D)."""
        return self.norm(x + self.dropout(update))


class SelfAttentionLayer(nn.Module):
    """attn_bi or attn_causal, depending on the mask it is given."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attn = SelfAttention(width, heads, dropout)
        self.add = Residual(width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None,
                past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """x (B, L, D), mask (B, 1, 1 or L, past + L) -> (B, L, D) and the keys and
        values so far."""
        update, present = self.attn(x, mask, past)
        return self.add(x, update), present


class CrossAttentionLayer(nn.Module):
    """Where the text looks at the image, or at two images: `merge` says how these are put together
    (None: there is one)."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float,
                 merge: bool | None = None):
        super().__init__()
        self.attn = (CrossAttention(width, context_width, heads, dropout) if merge is None else
                     TwinCrossAttention(width, context_width, heads, dropout, merge))
        self.add = Residual(width, dropout)

    def forward(self, x: Tensor, kv: KeysValues, mask: Tensor | None,
                probabilities: list | None = None) -> Tensor:
        """x (n*B, L, D), kv of B images -> (n*B, L, D)."""
        return self.add(x, self.attn(x, kv, mask, probabilities))


class TwinCrossAttention(nn.Module):
    """Two cross-attentions, one for each of two images, in the place of one (NLVR2; BLIP sec. 5.4,
    Fig. 5). Their outputs are averaged or, with `merge`, concatenated and brought back to the width
    by a Linear."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float, merge: bool):
        super().__init__()
        self.twins = nn.ModuleList(CrossAttention(width, context_width, heads, dropout)
                                   for _ in range(2))
        self.merge = Linear(2 * width, width) if merge else None

    def project(self, context: Tensor) -> tuple[KeysValues, KeysValues]:
        """context (B, 2, N, context width) -> keys and values of the first images, of the
        second."""
        return tuple(twin.project(image) for twin, image in zip(self.twins, context.unbind(1)))

    def forward(self, x: Tensor, kv: tuple[KeysValues, KeysValues], mask: Tensor | None = None,
                probabilities: list | None = None) -> Tensor:
        """x (n*B, L, D), kv of B pairs of images -> (n*B, L, D)."""
        first, second = (twin(x, one, mask, probabilities) for twin, one in zip(self.twins, kv))
        return self.merge(torch.cat([first, second], -1)) if self.merge else (first + second) / 2


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.add = Residual(width, dropout)

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
        if start + ids.shape[1] > self.position.num_embeddings:
            raise ValueError(f"a text of {start + ids.shape[1]} tokens does not fit the model's "
                             f"{self.position.num_embeddings} positions; shorten it")
        position = torch.arange(start, start + ids.shape[1], device=ids.device)
        return self.dropout(self.norm(self.word(ids) + self.position(position)))


class LMHead(nn.Module):
    """Dense, GELU, LayerNorm, then a dot product with every word embedding (tied, passed in),
    plus a bias."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.dense = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        """x (..., D), word embeddings (V, D) -> logits (..., V)."""
        return linear(self.norm(F.gelu(self.dense(x))), word, self.bias)


@dataclass
class ImageKV:
    """Keys and values of B images (or other contexts), one pair (B, H, N, d) per layer, computed
    once per image.

    `dec` is the same list as `enc` unless a sharing ablation has two cross-attentions; `mask`
    (B, 1, 1, N) or None.
    """

    enc: list[KeysValues]
    dec: list[KeysValues]
    mask: Tensor | None = None

    def select(self, rows: Tensor) -> "ImageKV":
        """rows (R,) -> the keys and values of images rows[0], rows[1] ..., repeats allowed."""
        def pick(layers):
            return [(k[rows], v[rows]) for k, v in layers]
        enc = pick(self.enc)
        dec = enc if self.dec is self.enc else pick(self.dec)
        return ImageKV(enc, dec, None if self.mask is None else self.mask[rows])


class MEDLayer(nn.Module):
    """attn_bi, attn_causal, cross_attn, ffn (BLIP Fig. 2), and the decoder's own copies where
    `share` asks for them.

    `modes` names the modes that will be used: what none of them needs is not built (a momentum twin
    has no cross-attention).
    """

    def __init__(self, width: int, context_width: int, heads: int, hidden: int, dropout: float,
                 share: str, modes, merge: bool | None = None):
        super().__init__()
        def self_attention():
            return SelfAttentionLayer(width, heads, dropout)
        def cross_attention():
            return CrossAttentionLayer(width, context_width, heads, dropout, merge)
        def feed_forward():
            return FeedForward(width, hidden, dropout)
        encodes, decodes = "text" in modes or "grounded" in modes, "decode" in modes
        self.attn_bi = self_attention() if encodes else None
        self.cross_attn = cross_attention() if "grounded" in modes else None
        self.ffn = feed_forward() if encodes else None
        # Table 3 in three lines: the decoder's part either is the encoder's (the same
        # object) or is new.
        own = {"all": "", "all_but_sa": "sa", "all_but_ca": "ca", "none": "sa ca ffn"}[share]
        if decodes:
            self.attn_causal = self_attention() if "sa" in own or not encodes else self.attn_bi
            self.cross_attn_dec = (cross_attention() if "ca" in own or not self.cross_attn
                                   else self.cross_attn)
            self.ffn_dec = feed_forward() if "ffn" in own or not encodes else self.ffn

    def text(self, x: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """(B, L, D) -> (B, L, D): the image plays no part; first_only: (B, 1, D)."""
        x, _ = self.attn_bi(x, mask)
        return self.ffn(x[:, :1] if first_only else x)

    def grounded(self, x: Tensor, mask: Tensor, kv: KeysValues, kv_mask: Tensor | None,
                 probabilities: list | None = None, first_only: bool = False) -> Tensor:
        """(n*B, L, D) and B images -> (n*B, L, D); first_only: (n*B, 1, D)."""
        x, _ = self.attn_bi(x, mask)
        return self.ffn(self.cross_attn(x[:, :1] if first_only else x, kv, kv_mask, probabilities))

    def decode(self, x: Tensor, mask: Tensor | None, kv: KeysValues, kv_mask: Tensor | None,
               past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """(n*B, L, D) and B images -> (n*B, L, D) and this layer's self-attention keys and
        values so far."""
        x, present = self.attn_causal(x, mask, past)
        return self.ffn_dec(self.cross_attn_dec(x, kv, kv_mask)), present


class MED(nn.Module):
    """Arguments: vocabulary V, width D, width of the context that cross-attention reads, depth,
    heads, FFN width, number of positions, dropout, ids of [CLS], [ENC] and [DEC], the sharing of
    Table 3 (`SHARE`), the modes in use; merge_from: for contexts that are pairs of images, the
    layer from which what is seen in them is merged, not averaged (NLVR2)."""

    def __init__(self, vocab_size: int, width: int, context_width: int, depth: int, heads: int,
                 hidden: int, max_positions: int, dropout: float, enc_id: int, dec_id: int,
                 share: str = "all_but_sa", modes=MODES, merge_from: int | None = None):
        super().__init__()
        if share not in SHARE:
            raise ValueError(f"share is {share!r}; choose one of {', '.join(SHARE)}")
        self.enc_id, self.dec_id = enc_id, dec_id
        self.embeddings = Embeddings(vocab_size, width, max_positions, dropout)
        self.layers = nn.ModuleList(
            MEDLayer(width, context_width, heads, hidden, dropout, share, modes,
                     None if merge_from is None else i >= merge_from)
            for i in range(depth))
        if "decode" in modes:
            separate = share == "none" and len(modes) > 1
            self.embeddings_dec = (Embeddings(vocab_size, width, max_positions, dropout)
                                   if separate else self.embeddings)
            self.lm_head = LMHead(vocab_size, width)

    def project(self, context: Tensor, context_mask: Tensor | None = None) -> ImageKV:
        """context (B, N, context width), or (B, 2, N, context width) for pairs of images,
        context_mask (B, N) -> its keys and values for every layer, computed once."""
        def keys_values(name):
            return [getattr(layer, name).attn.project(context) for layer in self.layers]
        first, mask = (self.layers[0],
                       None if context_mask is None else context_mask[:, None, None].bool())
        dec = getattr(first, "cross_attn_dec", None)
        if first.cross_attn is None:
            enc = keys_values("cross_attn_dec")
            return ImageKV(enc, enc, mask)
        enc = keys_values("cross_attn")
        return ImageKV(enc, enc if dec is None or dec is first.cross_attn
                       else keys_values("cross_attn_dec"), mask)

    def encode_text(self, ids: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """ids (B, L) starting with [CLS], mask (B, L) -> states (B, L, D). The unimodal encoder: it
        sees no image.

        first_only: the state of [CLS] alone, (B, 1, D). Behind the last self-attention no token
        looks at another, so the others' cross-attention and FFN there would be thrown away.
        """
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer.text(x, mask[:, None, None].bool(), first_only and layer is self.layers[-1])
        return x

    def encode_grounded(self, ids: Tensor, mask: Tensor, kv: ImageKV,
                        first_token: int | None = None, probabilities: list | None = None,
                        first_only: bool = False) -> Tensor:
        """ids (n*B, L), mask (n*B, L), kv of B images -> states (n*B, L, D), or with first_only
        that of [ENC] alone, (n*B, 1, D); text i looks at image i // n.

        [ENC] takes the place of [CLS]. `first_token` is for weights that were trained with another
        token there.
        A list given as `probabilities` receives each layer's cross-attention map (B, H, n*L, N).
        """
        x = self.embeddings(with_first(ids, self.enc_id if first_token is None else first_token))
        for layer, layer_kv in zip(self.layers, kv.enc):
            x = layer.grounded(x, mask[:, None, None].bool(), layer_kv, kv.mask, probabilities,
                               first_only and layer is self.layers[-1])
        return x

    def decode(self, ids: Tensor, mask: Tensor | None, kv: ImageKV,
               past: list[KeysValues] | None = None) -> tuple[Tensor, list[KeysValues]]:
        """ids (n*B, L), mask (n*B, L) or None (no padding), kv of B images -> states (n*B, L, D)
        and the cache.

        Without `past`, ids start the text and [DEC] takes the first place. With `past` (what
        an earlier call returned), ids continue it: a generation step feeds one token and pays
        for one token.
        """
        start = 0 if past is None else past[0][0].shape[2]
        x = self.embeddings_dec(ids if past else with_first(ids, self.dec_id), start)
        queries = torch.arange(start, start + ids.shape[1], device=ids.device)
        causal = queries[:, None] >= torch.arange(start + ids.shape[1],
                                                  device=ids.device)  # (L, past + L)
        if mask is not None:
            causal = causal & mask[:, None, None].bool()
        present = []
        for i, layer in enumerate(self.layers):
            x, layer_present = layer.decode(x, causal, kv.dec[i], kv.mask,
                                            past[i] if past else None)
            present.append(layer_present)
        return x, present

    def logits(self, states: Tensor) -> Tensor:
        """Decoder states (..., D) -> next-token logits (..., V)."""
        return self.lm_head(states, self.embeddings_dec.word.weight)


def with_first(ids: Tensor, token: int) -> Tensor:
    """ids (B, L) -> a copy (B, L) that starts with `token`."""
    ids = ids.clone()
    ids[:, 0] = token
    return ids
