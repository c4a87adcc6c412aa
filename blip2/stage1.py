"""BLIP-2, stage 1: the queries learn to extract what a text needs (sec. 3.1).

    image -> frozen image encoder -> LayerNorm -> keys and values for the queries
    loss = ITC + ITM + ITG        BLIP's three; a text reaches the image through the queries alone

No queue, no momentum twins: the image encoder is frozen, so large batches fit, and their other
texts are negatives enough. The queries are run once a step: ITG's text reads their keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import select_rows
from blip import init_weights, l2_normalize
from blip2.config import Blip2Config
from blip2.losses import query_itc_loss, query_similarity
from blip2.qformer import Cache, QFormer
from blip2.vision import ImageEncoder
from config import OBJECTIVES
from decoding import Hypothesis, write
from losses import draw_one, itm_loss, lm_loss, mine_hard_negatives, next_token_targets
from training import distributed
from training.trainable import Trainable

LayerKV = list[tuple[Tensor, Tensor] | None]  # of the images: (B, H, N, d) for layers that look


class FrozenVision(Trainable):
    """What both stages have in common: an image encoder, usually frozen, and its norm."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        self.vit = ImageEncoder(config)
        self.ln_vision = nn.LayerNorm(config.vit_width)  # eps 1e-5; trained
        self.vit.requires_grad_(config.train_vision)

    def train(self, mode: bool = True):
        """Training mode, except for what is frozen."""
        super().train(mode)
        self.vit.train(mode and self.config.train_vision)
        return self

    def encode_tokens(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S), or tokens (B, N, vit width) of the encoder -> normalised tokens."""
        if image.ndim == 4:
            with torch.set_grad_enabled(self.config.train_vision and torch.is_grad_enabled()):
                image = self.vit(image)
        # In float32, as the released code does: frozen encoders run in half precision.
        norm = self.ln_vision
        normed = F.layer_norm(image.float(), norm.normalized_shape, norm.weight.float(),
                              norm.bias.float(), norm.eps)
        return normed.to(norm.weight.dtype)


def make_qformer(config: Blip2Config, text: bool) -> QFormer:
    """The Q-Former that the configuration describes, with or without a text stream."""
    c = config
    return QFormer(c.queries, c.width, c.vit_width, c.depth, c.heads, c.ffn, c.dropout,
                   c.look_every, c.vocab_size if text else 0, c.max_positions, c.dec_id)


def init_qformer_weights(model: nn.Module, config: Blip2Config) -> None:
    """Initial weights: normal with init_std, as BERT's; a query's FFN as a copy of the text's.

    init_std 0: by width, and the queries with std 1.
    """
    init_weights(model, config.init_std)
    nn.init.normal_(model.qformer.queries, std=config.init_std or 1.0)
    for layer in model.qformer.layers:
        if layer.ffn_text is not None:
            layer.ffn_query.load_state_dict(layer.ffn_text.state_dict())


class QFormerStep:
    """The Q-Former's text stream as `step(tokens, rows) -> logits` for decoding.py."""

    def __init__(self, qformer: QFormer, cache: Cache, images: Tensor):
        """cache: of the queries of B images; images (R,): which one each row is about."""
        self.qformer = qformer
        self.past = select_rows(cache, images)

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens (R, t), rows (R,) of the previous call -> logits (R, V) for the next token."""
        states, self.past = self.qformer.decode(tokens, None, select_rows(self.past, rows))
        return self.qformer.logits(states[:, -1])


class Stage1(FrozenVision):
    """Image encoder (frozen), ln_vision, Q-Former, two projections, ITM head, temperature."""

    all_negatives = True  # of all processes, always

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        c = config
        self.qformer = make_qformer(c, text=True)
        self.vision_proj = nn.Linear(c.width, c.embed_dim)
        self.text_proj = nn.Linear(c.width, c.embed_dim)
        self.itm_head = nn.Linear(c.width, 2)  # class 1 = matched
        self.temp = nn.Parameter(torch.tensor(c.temp))  # (not clamped, as in the released code)
        init_qformer_weights(self, c)
        self.objectives = OBJECTIVES
        self.draw_negative = draw_one  # of ITM; a test may take the likeliest instead

    def set_objectives(self, objectives: tuple[str, ...]) -> None:
        """The losses that `forward` computes, of config.OBJECTIVES; "lm" is ITG."""
        self.objectives = objectives

    def pretrained_name(self, name: str) -> str:
        """Of a BLIP only the ViT is taken; "": this parameter starts afresh."""
        return name if name.startswith("vit.") else ""

    # ---- the parts that a user calls -------------------------------------------------------------

    def project(self, tokens: Tensor) -> LayerKV:
        """Tokens from `encode_image` -> keys and values for the queries, once for all texts."""
        return self.qformer.project(tokens)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, S, S), or the encoder's tokens -> normalised tokens, features (B, Q, E).

        A feature has length 1. How alike image and text are: losses.query_similarity.
        """
        tokens = self.encode_tokens(image)
        states, _ = self.qformer.encode_queries(self.project(tokens))
        return tokens, l2_normalize(self.vision_proj(states))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> features (B, E) of length 1."""
        return l2_normalize(self.text_proj(self.qformer.encode_text(ids, mask)[:, 0]))

    def match(self, kv: LayerKV, ids: Tensor, mask: Tensor) -> Tensor:
        """ITM logits, the mean over queries: text i is compared with image i // n.

        kv of B images, ids and mask (n*B, L) -> (n*B, 2); class 1 = matched. NOTE: the mean is of
        the logits, as in the released code, not of probabilities.
        """
        states = self.qformer.encode_both(ids, mask, kv, queries_only=True)
        return self.itm_head(states).mean(1)

    @torch.no_grad()
    def generate(self, image: Tensor, prompt: list[int] | None = None, method: str = "beam",
                 num_return: int = 1, **options) -> list[list[Hypothesis]]:
        """Texts by the Q-Former's own text stream (ITG): as BLIP.generate."""
        _, cache = self.qformer.encode_queries(self.project(self.encode_tokens(image)))
        return write(lambda images: QFormerStep(self.qformer, cache, images), len(image),
                     [self.config.dec_id] + (prompt or []), self.config.sep_id, image.device,
                     method, num_return, **options)

    # ---- training --------------------------------------------------------------------------------

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, image_ids: Tensor | None = None,
                prompt_length: int = 0) -> tuple[dict[str, Tensor], dict]:
        """The losses of the chosen objectives: {"itc", "itm", "lm"}, lm being ITG.

        image (B, 3, S, S) or the encoder's tokens (B, N, vit width), ids and mask (B, L). image_ids
        (B,) tell which texts share an image (retrieval finetuning): these are no negatives of one
        another. The first prompt_length tokens give no ITG loss.
        """
        losses = {}
        tokens = self.encode_tokens(image)
        kv = self.project(tokens)
        query_states, cache = self.qformer.encode_queries(kv)
        if image_ids is None:
            image_ids = torch.arange(len(ids), device=ids.device) + distributed.rank() * len(ids)
        positives = image_ids[:, None] == distributed.all_gather(image_ids)  # (B, C)
        sims = None
        if "itc" in self.objectives:
            losses["itc"], sims = self._itc(query_states, ids, mask, positives)
        if "itm" in self.objectives:
            logits, matched, valid = self._itm_pairs(tokens, kv, ids, mask, sims, positives)
            losses["itm"] = itm_loss(logits, matched, valid)
        if "lm" in self.objectives:
            states, _ = self.qformer.decode(ids[:, :-1], mask[:, :-1], cache)
            targets = next_token_targets(ids, mask, prompt_length)
            losses["lm"] = lm_loss(self.qformer.logits(states), targets, self.config.itg_smoothing)
        return losses, {}

    def _itc(self, query_states, ids, mask, positives):
        """-> the loss, similarities (i2t, t2i) over temperature, each (B, C), for mining.

        query_states (B, Q, D), ids, mask (B, L), positives (B, C), C = processes * B.
        """
        image_feat = l2_normalize(self.vision_proj(query_states))
        text_feat = self.encode_text(ids, mask)
        # Columns: all processes' features, without gradient; so each row trains its own side alone.
        image_keys = distributed.all_gather(image_feat.detach())
        text_keys = distributed.all_gather(text_feat.detach())
        with torch.autocast(image_feat.device.type, enabled=False):
            loss = query_itc_loss(image_feat, text_feat, image_keys, text_keys, self.temp,
                                  positives, self.config.label_smoothing)
            with torch.no_grad():
                sims = (query_similarity(image_feat, text_keys) / self.temp,
                        query_similarity(image_keys, text_feat).T / self.temp)
        return loss, sims

    def _itm_pairs(self, tokens, kv, ids, mask, sims, positives):
        """-> ITM logits (3B, 2), matched (3B,), valid (3B,), for `losses.itm_loss`.

            rows 0 .. B-1      image i, its own text           matched 1
            rows B .. 2B-1     a hard image for it, text i     matched 0
            rows 2B .. 3B-1    image i, a hard text for it     matched 0

        tokens (B, N, vit width) and their kv; sims and positives (B, C) as in `_itc`. Negatives
        come from all processes; the softmax is taken over negatives alone.
        """
        if sims is None or not self.config.hard_negatives:  # (None: ITC is off)
            alike = torch.zeros(positives.shape, device=ids.device)
            sims = alike, alike
        floor, masked, draw = 0.0, True, self.draw_negative
        text_neg, text_valid = mine_hard_negatives(sims[0], positives, floor, masked, draw)
        image_neg, image_valid = mine_hard_negatives(sims[1], positives, floor, masked, draw)
        all_ids, all_mask = distributed.gather_texts(ids, mask)
        if distributed.world_size() > 1:  # with gradient: it trains ln_vision
            all_tokens = distributed.all_gather_with_grad(tokens)
            kv_neg = self.project(all_tokens.index_select(0, image_neg))
        else:
            kv_neg = select_rows(kv, image_neg)
        logits = torch.cat([self.match(kv, ids, mask), self.match(kv_neg, ids, mask),
                            self.match(kv, all_ids[text_neg], all_mask[text_neg])])
        ones, zeros = torch.ones_like(text_neg), torch.zeros_like(text_neg)
        matched = torch.cat([ones, zeros, zeros])
        return logits, matched, torch.cat([ones.bool(), image_valid, text_valid])
