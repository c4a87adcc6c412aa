"""Language models for BLIP-2's second stage: a decoder (OPT) and an encoder-decoder (T5).

Hand-written, so that the world's small ones need no download and the Q-Former's soft tokens can be
followed all the way; the released OPT and FlanT5 have the same architecture and load into them.
Any other model goes through the transformers library (blip2/transformers_language.py).

    DecoderLM(embeds, mask)                      OPT (Zhang et al. 2022): pre-LN, ReLU, learned
                                                 positions that count the attended tokens
    EncoderDecoderLM.encode(embeds, mask),       T5 1.1 (Raffel et al. 2020): pre-RMSNorm, gated
    .decode(ids, kv)                             GELU, relative positions, no biases

Both take embeddings, not ids: soft tokens stand in front of words. Letters: B batch, L tokens, N
context tokens, D width, H heads, d = width of a head, V vocabulary. Masks: True = attend.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import KeysValues, SelfAttention, attend, merge_heads, select_rows, split_heads
from config import SettingError, check_multiples, check_settings, setting

Cache = list[KeysValues]  # self-attention's keys and values of each layer
KINDS = ("decoder", "encoder-decoder")


@dataclass(frozen=True)
class LanguageConfig:
    """A language model. The defaults are OPT-125M's sizes.

    Released weights that fit: OPT with pre-LN and word embeddings as wide as the model (all but
    OPT-350M), T5 1.1 and FlanT5. Anything else goes through the transformers library.
    """

    kind: str = setting("decoder", "decoder (as OPT) or encoder-decoder (as T5)", choices=KINDS)
    width: int = setting(768, "of the tokens", least=1)
    depth: int = setting(12, "layers, of an encoder-decoder: of each", least=1)
    heads: int = setting(12, "of attention", least=1)
    head_width: int = setting(64, "of a head", least=1)
    ffn: int = setting(3072, "of the feed-forward layers", least=1)
    max_positions: int = setting(2048, "of a decoder", least=4)
    near_heads: int = setting(0, "this many heads weigh a token down by its distance (ALiBi, Press "
                                 "et al. 2022), those of an encoder-decoder at the start of its "
                                 "training; OPT and T5 have none", least=0)
    buckets: int = setting(32, "of relative positions, of an encoder-decoder", least=4)
    farthest: int = setting(128, "distance with a bucket of its own, of an encoder-decoder",
                            least=4)
    tied: bool = setting(True, "a decoder's head is its word embeddings")
    dropout: float = setting(0.1, "while it is trained", least=0, most=0.99)
    # The tokenizer's. Texts of a decoder start with bos; an encoder-decoder's answers with pad.
    vocab: tuple[str, ...] = field(default=(), metadata={"flag": False})
    vocab_size: int = setting(50272, "OPT's", flag=False)
    pad_id: int = setting(1, "OPT's", flag=False)
    bos_id: int = setting(2, "OPT's", flag=False)
    eos_id: int = setting(50118, "a line's end: what closes a caption in BLIP-2's OPT", flag=False)

    def __post_init__(self):
        check_settings(self)
        if self.kind == "decoder":
            check_multiples(self, ("width", "heads"))
        if self.farthest <= self.buckets // 2:
            raise SettingError(f"--farthest {self.farthest} must be more than half of --buckets "
                               f"{self.buckets}")
        if self.near_heads > self.heads:
            raise SettingError(f"--near-heads {self.near_heads} is more than --heads {self.heads}")

    @property
    def text_positions(self) -> float:
        """How many tokens a text may have; an encoder-decoder's positions are relative."""
        return self.max_positions if self.kind == "decoder" else math.inf


# ---- a decoder: OPT ------------------------------------------------------------------------------

class DecoderLayer(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor,
                past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """x (B, L, D), mask (B, 1, L, past + L) -> (B, L, D), keys and values so far."""
        update, present = self.attn(self.norm1(x), mask, past)
        x = x + self.dropout(update)
        return x + self.dropout(self.fc2(F.relu(self.fc1(self.norm2(x))))), present


class LanguageModel(nn.Module):
    """What both kinds have in common."""

    beams_share = True  # one cache: `writing.PrefixStep`

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.width)

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, D)."""
        return self.word(ids)

    def select(self, past: Cache, rows: Tensor) -> Cache:
        """The cache of rows[0], rows[1] ..., repeats allowed."""
        return select_rows(past, rows)


def near_slopes(config: LanguageConfig) -> Tensor:
    """How much a head weighs a token down per step of distance: 1/2, 1/4 ... 0 ... (H,)."""
    slopes = torch.zeros(config.heads)
    slopes[:config.near_heads] = 0.5 ** torch.arange(1, config.near_heads + 1)
    return slopes


class DecoderLM(LanguageModel):
    """OPT: every token looks at those before it, soft tokens included."""

    OFFSET = 2  # OPT's first position is number 2

    def __init__(self, config: LanguageConfig):
        super().__init__(config)
        c = config
        self.position = nn.Embedding(c.max_positions + self.OFFSET, c.width)
        self.layers = nn.ModuleList(DecoderLayer(c.width, c.heads, c.ffn, c.dropout)
                                    for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.head = None if c.tied else nn.Linear(c.width, c.vocab_size, bias=False)
        self.linear = F.linear  # of the tied head; speed_up_generation puts a faster one here

    def forward(self, embeds: Tensor, mask: Tensor,
                past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Tokens -> states that predict the next one, and the cache.

        embeds (B, L, D), mask (B, past + L): False for padding, on either side; or mask
        (B, L, past + L): what each of the L tokens sees, itself included. A position counts the
        tokens that are seen, so padding changes nothing. Raises SettingError where they are more
        than the positions.
        """
        length, total = embeds.shape[1], mask.shape[-1]
        sees = mask.bool()
        if mask.ndim == 2:
            causal = torch.ones(length, total, device=mask.device, dtype=torch.bool)
            sees = causal.tril(total - length) & sees[:, None]
        seen = sees.sum(-1)  # (B, L)
        longest = total if mask.ndim == 2 else int(seen.max())
        if longest > self.config.max_positions:
            raise SettingError(f"{longest} tokens do not fit the language model's "
                               f"{self.config.max_positions} positions; give a shorter text, or "
                               "a language model with more --max-positions")
        x = self.dropout(embeds + self.position(seen - 1 + self.OFFSET))
        # A row that may look at nothing (padding in front) looks at itself: nobody reads it.
        diagonal = torch.eye(total, device=x.device, dtype=torch.bool)[-length:]
        allowed = (sees | diagonal)[:, None]  # (B, 1, L, past + L)
        if self.config.near_heads:
            allowed = self.near_bias(sees).masked_fill(~allowed, float("-inf"))
        cache = []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, allowed, past[i] if past else None)
            cache.append(present)
        return self.norm(x), cache

    def near_bias(self, sees: Tensor) -> Tensor:
        """Added to the scores of tokens: minus distance times a head's slope.

        sees (B, L, T) -> (B, H, L, T). A distance counts the tokens seen behind the one looked at.
        """
        distance = sees.flip(-1).cumsum(-1).flip(-1) - 1.0
        slopes = near_slopes(self.config).to(sees.device)
        return -slopes[:, None, None] * distance[:, None]

    def logits(self, states: Tensor) -> Tensor:
        """States (..., D) -> next-token logits (..., V)."""
        if self.head is not None:
            return self.head(states)
        return self.linear(states, self.word.weight, None)


# ---- an encoder-decoder: T5 ----------------------------------------------------------------------

class T5Attention(nn.Module):
    """Attention without biases and without 1 / sqrt(d), over x itself or over a context."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(width, heads * head_width, bias=False)
        self.v = nn.Linear(width, heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def project(self, context: Tensor) -> KeysValues:
        """context (B, N, D) -> keys and values (B, H, N, d)."""
        return split_heads(self.k(context), self.heads), split_heads(self.v(context), self.heads)

    def forward(self, x: Tensor, kv: KeysValues, bias: Tensor | None) -> Tensor:
        """x (n*B, L, D), row i looks at context i // n; bias added to the scores -> (n*B, L, D)."""
        k, v = kv
        q = split_heads(self.q(x).reshape(len(k), -1, self.q.out_features), self.heads)
        out = merge_heads(attend(q * q.shape[-1] ** 0.5, k, v, bias))
        return self.out(out.reshape(*x.shape[:2], -1))


class T5Layer(nn.Module):
    """Self-attention, in a decoder cross-attention, gated MLP; each x + Sublayer(RMSNorm(x))."""

    def __init__(self, config: LanguageConfig, looks: bool):
        """looks: has cross-attention to the encoder's states."""
        super().__init__()
        c = config
        self.norm1 = nn.RMSNorm(c.width, eps=1e-6)
        self.attn = T5Attention(c.width, c.heads, c.head_width)
        self.norm_cross = nn.RMSNorm(c.width, eps=1e-6) if looks else None
        self.cross_attn = T5Attention(c.width, c.heads, c.head_width) if looks else None
        self.norm2 = nn.RMSNorm(c.width, eps=1e-6)
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.fc1 = nn.Linear(c.width, c.ffn, bias=False)
        self.fc2 = nn.Linear(c.ffn, c.width, bias=False)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, bias: Tensor, past: KeysValues | None = None,
                kv: KeysValues | None = None,
                kv_bias: Tensor | None = None) -> tuple[Tensor, KeysValues]:
        """x (n*B, L, D), bias (1 or n*B, H, L, past + L), kv of B contexts -> x, keys and values.

        kv_bias (B, 1, 1, N): -inf where the context is padding.
        """
        normed = self.norm1(x)
        k, v = self.attn.project(normed)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = x + self.dropout(self.attn(normed, (k, v), bias))
        if self.cross_attn is not None:
            x = x + self.dropout(self.cross_attn(self.norm_cross(x), kv, kv_bias))
        normed = self.norm2(x)
        # erf GELU, as the released BLIP-2; FlanT5's own is the tanh form ("gelu_new").
        hidden = F.gelu(self.gate(normed)) * self.fc1(normed)
        return x + self.dropout(self.fc2(self.dropout(hidden))), (k, v)


def position_bucket(distance: Tensor, buckets: int, farthest: int, both_ways: bool) -> Tensor:
    """Which bias a distance (key - query) has: near ones one each, far ones share, by log.

    distance (...) int -> (...) in 0 .. buckets - 1. both_ways: an encoder's, half of the buckets
    for keys behind the query; else keys behind it count as distance 0.
    """
    bucket = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        bucket += (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = buckets // 2
    share = (distance.float().clamp(min=1) / exact).log() / math.log(farthest / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return bucket + torch.where(distance < exact, distance, far)


class T5Stack(nn.Module):
    """The encoder or the decoder: layers, one table of relative positions, a norm at the end."""

    def __init__(self, config: LanguageConfig, decoder: bool):
        super().__init__()
        self.config, self.decoder = config, decoder
        self.relative = nn.Embedding(config.buckets, config.heads)
        self.layers = nn.ModuleList(T5Layer(config, decoder) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def bias(self, queries: int, keys: int) -> Tensor:
        """Added to the scores of the last `queries` of `keys` tokens: (1, H, queries, keys)."""
        place = torch.arange(keys, device=self.relative.weight.device)
        distance = place[None, :] - place[-queries:, None]
        bucket = position_bucket(distance, self.config.buckets, self.config.farthest,
                                 not self.decoder)
        bias = self.relative(bucket).permute(2, 0, 1)[None]
        return bias.masked_fill(distance > 0, float("-inf")) if self.decoder else bias

    def forward(self, x: Tensor, mask: Tensor | None = None, past: Cache | None = None,
                kv: list[KeysValues] | None = None,
                kv_bias: Tensor | None = None) -> tuple[Tensor, Cache]:
        """x (B, L, D), mask (B, L) or None -> states (B, L, D), the cache."""
        before = past[0][0].shape[2] if past else 0
        bias = self.bias(x.shape[1], before + x.shape[1])
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None].bool(), float("-inf"))
        x, cache = self.dropout(x), []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, bias, past[i] if past else None, kv[i] if kv else None, kv_bias)
            cache.append(present)
        return self.dropout(self.norm(x)), cache


class EncoderDecoderLM(LanguageModel):
    """T5: an encoder reads soft tokens and a text, a decoder writes what comes next."""

    def __init__(self, config: LanguageConfig):
        super().__init__(config)
        self.encoder, self.decoder = T5Stack(config, False), T5Stack(config, True)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def encode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """embeds (B, N, D), mask (B, N) -> states (B, N, D)."""
        return self.encoder(embeds, mask)[0]

    def project(self, states: Tensor, mask: Tensor) -> tuple[list[KeysValues], Tensor]:
        """The encoder's states -> keys and values of each layer of the decoder, and their bias."""
        bias = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask.bool(), float("-inf"))
        return ([layer.cross_attn.project(states) for layer in self.decoder.layers],
                bias[:, None, None])

    def decode(self, ids: Tensor, context: tuple[list[KeysValues], Tensor],
               past: Cache | None = None) -> tuple[Tensor, Cache]:
        """ids (n*B, L), context of B inputs from `project` -> states (n*B, L, D), the cache.

        The first id of a text is pad. Padding behind a text needs no mask: nothing looks forward.
        """
        kv, kv_bias = context
        return self.decoder(self.word(ids), None, past, kv, kv_bias)

    def logits(self, states: Tensor) -> Tensor:
        """States (..., D) -> next-token logits (..., V)."""
        return self.head(states)


def make_language(config: LanguageConfig) -> DecoderLM | EncoderDecoderLM:
    """The language model that a configuration describes."""
    return (DecoderLM if config.kind == "decoder" else EncoderDecoderLM)(config)
