"""BLIP: a ViT, a MED, two projections, momentum encoders and two queues (BLIP sec. 3, Fig. 2).

`BLIP.forward` computes the objectives that are switched on and changes nothing. The three lines
that do change state after the optimizer's step (`update_momentum`, `enqueue`, `clamp_temperature`)
stand in the training loop, train.py.

Letters, here and everywhere: B batch, N image tokens, L text tokens, D width, E joint width, H
heads, Q queue length, V vocabulary, C = B + Q columns. Rows are queries. Masks: True = attend.
Names ending in `_m` belong to the momentum encoders, here called twins.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import OBJECTIVES, BLIPConfig
from decoding import Hypothesis, write
from losses import draw_one, itc_loss, itm_loss, lm_loss, mine_hard_negatives, next_token_targets
from med import MED, MODES, ContextKV, DecoderStep
from training import distributed
from vit import ViT


def make_vit(config: BLIPConfig) -> ViT:
    """Image encoder and twin: image -> (B, N, vit_width), a token of the whole image first."""
    return ViT(config.image_size, config.patch_size, config.vit_width, config.vit_depth,
               config.vit_heads, config.drop_path, config.grad_checkpoint)


def make_med(config: BLIPConfig, modes: tuple[str, ...], context_width: int = 0,
             cross_attention: Callable[[int], nn.Module] | None = None) -> MED:
    """The text transformer, and its twin; arguments as in MED (context_width 0: the ViT's)."""
    c = config
    return MED(c.vocab_size, c.text_width, context_width or c.vit_width, c.text_depth,
               c.text_heads, c.text_ffn, c.max_positions, c.dropout, c.enc_id, c.dec_id, c.share,
               modes, cross_attention)


class BLIP(nn.Module):
    """The model of the three objectives, its momentum twins (names ending in _m), its queues."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        c = self.config = config
        self.vit = make_vit(c)
        self.med = make_med(c, MODES)
        self.vision_proj = nn.Linear(c.vit_width, c.embed_dim)
        self.text_proj = nn.Linear(c.text_width, c.embed_dim)
        self.itm_head = nn.Linear(c.text_width, 2)  # class 1 = matched
        self.temp = nn.Parameter(torch.tensor(c.temp))
        init_weights(self, c.init_std)
        # Momentum twins hold only what ITC uses: no cross-attention, no decoder.
        self.vit_m = make_vit(c)
        self.med_m = make_med(c, ("text",))
        self.vision_proj_m = nn.Linear(c.vit_width, c.embed_dim)
        self.text_proj_m = nn.Linear(c.text_width, c.embed_dim)
        for _, twin in self.twins():
            twin.requires_grad_(False)
        self.update_momentum(0.0)  # an exact copy
        # The queues start as random unit vectors: easy negatives until real ones replace them.
        self.register_buffer("image_queue", l2_normalize(torch.randn(c.queue_size, c.embed_dim)))
        self.register_buffer("text_queue", l2_normalize(torch.randn(c.queue_size, c.embed_dim)))
        self.register_buffer("queue_ids", torch.full((c.queue_size,), -1))  # -1: an empty slot
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.objectives = OBJECTIVES
        self.draw_negative = draw_one  # of ITM; a test may take the likeliest instead

    def train(self, mode: bool = True) -> "BLIP":
        """Training or evaluation mode.

        NOTE(differs from salesforce/BLIP): the twins stay in eval mode: no dropout in the targets.
        """
        super().train(mode)
        for _, twin in self.twins():
            twin.eval()
        return self

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online module, its momentum twin) pairs."""
        return [(self.vit, self.vit_m), (self.med, self.med_m),
                (self.vision_proj, self.vision_proj_m), (self.text_proj, self.text_proj_m)]

    @property
    def twin_parameters(self) -> list[tuple[Tensor, Tensor]]:
        """(online parameter, its momentum twin) pairs."""
        pairs = []
        for online, twin in self.twins():
            named = dict(online.named_parameters())
            pairs += [(named[name], p_m) for name, p_m in twin.named_parameters()]
        return pairs

    def set_objectives(self, objectives: tuple[str, ...]) -> None:
        """Choose the losses that forward() computes. Raises ValueError for an unknown one."""
        if set(objectives) - set(OBJECTIVES):
            raise ValueError(f"objectives are {objectives}; choose some of {', '.join(OBJECTIVES)}")
        self.objectives = tuple(objectives)

    # ---- the parts that a user calls -------------------------------------------------------------

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, S, S) -> tokens (B, N, D) and unit features (B, E).

        Clips (B, F, 3, S, S): tokens of all frames (B, F * N, D), their features' mean (sec. 5.6).
        """
        if image.ndim == 5:
            tokens = self.vit(image.flatten(0, 1)).unflatten(0, image.shape[:2])
            feat = self.vision_proj(tokens[:, :, 0]).mean(1)
            return tokens.flatten(1, 2), l2_normalize(feat)
        tokens = self.vit(image)
        return tokens, l2_normalize(self.vision_proj(tokens[:, 0]))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> unit features (B, E)."""
        cls_state = self.med.encode_text(ids, mask, cls_only=True)[:, 0]
        return l2_normalize(self.text_proj(cls_state))

    def match(self, kv: ContextKV, ids: Tensor, mask: Tensor) -> Tensor:
        """ITM logits: text i is compared with image i // n; class 1 = matched.

        kv of B images (`model.project(tokens)`), ids and mask (n*B, L) -> (n*B, 2).
        NOTE(differs from salesforce/BLIP): [ENC] stands in front, as in training; the released
        class for ITM scores keeps [CLS] there (`med.encode_grounded(first_token=...)`).
        """
        enc_state = self.med.encode_grounded(ids, mask, kv, cls_only=True)[:, 0]
        return self.itm_head(enc_state)

    def project(self, tokens: Tensor) -> ContextKV:
        """Image tokens (B, N, D) -> keys and values for every text that looks at these images."""
        return self.med.project(tokens)

    @torch.no_grad()
    def generate(self, image: Tensor | ContextKV, prompt: list[int] | None = None,
                 method: str = "beam", num_return: int = 1, **options) -> list[list[Hypothesis]]:
        """Captions: for each image `num_return` pairs (ids after the prompt, score), best first.

        image (B, 3, S, S), or its keys and values from `project`; prompt: ids of "a picture of",
        for instance. Methods, options and errors are those of `decoding.write`.
        """
        kv = image if isinstance(image, ContextKV) else self.project(self.vit(image))
        options.setdefault("max_length", 20)
        if options["max_length"] > self.config.max_positions:
            raise ValueError(f"max_length {options['max_length']} is more than the model's "
                             f"{self.config.max_positions} positions")
        return write(lambda images: DecoderStep(self.med, kv, images), len(kv),
                     [self.config.dec_id] + (prompt or []), self.config.sep_id, kv.device, method,
                     num_return, **options)

    # ---- training --------------------------------------------------------------------------------

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, alpha: float = 0.0,
                image_ids: Tensor | None = None, finetuning: bool = False, prompt_length: int = 0,
                all_negatives: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of the chosen objectives, and the keys for the queue (BLIP sec. 3.2).

        image (B, 3, S, S), ids and mask (B, L) -> {"itc", "itm", "lm"}: scalars, and the twins'
        features. alpha in [0, 1] weighs the twins' soft targets. image_ids (B,) tell which texts
        share an image: no negatives of one another. finetuning (for retrieval, released code):
        negatives are mined with the online features and without the floor. all_negatives: from all
        processes. The first prompt_length tokens give no LM loss. Nothing in the model changes.
        """
        losses, keys, sims = {}, {}, None
        image_tokens, image_feat = self.encode_image(image)
        if "itm" in self.objectives or "lm" in self.objectives:
            kv = self.med.project(image_tokens)  # once: all texts that look at an image read it
        if "itc" in self.objectives:
            losses["itc"], keys, sims = self._itc(image, image_feat, ids, mask, alpha, image_ids,
                                                  finetuning, all_negatives)
        if "itm" in self.objectives:
            logits, matched, valid = self._itm_pairs(image_tokens, kv, ids, mask, sims, image_ids,
                                                     finetuning, all_negatives)
            losses["itm"] = itm_loss(logits, matched, valid)
        if "lm" in self.objectives:
            states, _ = self.med.decode(ids[:, :-1], mask[:, :-1], kv)  # the last predicts nothing
            targets = next_token_targets(ids, mask, prompt_length)
            losses["lm"] = lm_loss(self.med.logits(states), targets, self.config.label_smoothing)
        return losses, keys

    def _itc(self, image, image_feat, ids, mask, alpha, image_ids, finetuning, all_negatives):
        """-> the loss, this batch's keys for the queue, similarities (i2t, t2i) for mining.

        image_feat (B, E), the rest as in `forward`; similarities (B, B), or (B, processes * B).
        """
        text_feat = self.encode_text(ids, mask)
        with torch.no_grad():
            image_feat_m = l2_normalize(self.vision_proj_m(self.vit_m(image)[:, 0]))
            text_state_m = self.med_m.encode_text(ids, mask, cls_only=True)[:, 0]
            text_feat_m = l2_normalize(self.text_proj_m(text_state_m))
        # Columns: this process's momentum features, then the queue, where the other processes'
        # follow a step later. So 2 processes x 4 pairs is not 1 x 8, by BLIP's design.
        image_keys = torch.cat([image_feat_m, self.image_queue])
        text_keys = torch.cat([text_feat_m, self.text_queue])
        positives = None
        if image_ids is not None:
            positives = image_ids[:, None] == torch.cat([image_ids, self.queue_ids])
        # Similarities are divided by a temperature near 0.01: bfloat16 is too coarse for them.
        with torch.autocast(image.device.type, enabled=False):
            loss = itc_loss(image_feat, text_feat, image_keys, text_keys, self.temp, alpha,
                            positives)
            with torch.no_grad():
                image_columns, text_columns = ((image_feat, text_feat) if finetuning
                                               else (image_feat_m, text_feat_m))
                if all_negatives:
                    image_columns = distributed.all_gather(image_columns)
                    text_columns = distributed.all_gather(text_columns)
                sims = (image_feat @ text_columns.T / self.temp,
                        text_feat @ image_columns.T / self.temp)
        if image_ids is None:
            image_ids = torch.full_like(ids[:, 0], -1)
        return loss, {"image": image_feat_m, "text": text_feat_m, "ids": image_ids}, sims

    def _itm_pairs(self, image_tokens, kv, ids, mask, sims, image_ids, finetuning, all_negatives):
        """-> ITM logits (3B, 2), matched (3B,), valid (3B,), for `losses.itm_loss`.

            rows 0 .. B-1      image i, its own text           matched 1
            rows B .. 2B-1     image i, a hard text for it     matched 0
            rows 2B .. 3B-1    a hard image for it, text i     matched 0

        Negatives come from this process's batch, or with `all_negatives` from all processes'.
        """
        B, floor = len(ids), 0.0 if finetuning else self.config.negative_floor
        own = torch.arange(B, device=ids.device)  # where this rank's texts stand in `ids`
        from_all_ranks = all_negatives and distributed.world_size() > 1
        if from_all_ranks:
            ids, mask = distributed.gather_texts(ids, mask)
            own = own + distributed.rank() * B
        row_ids = own if image_ids is None else image_ids
        column_ids = distributed.all_gather(row_ids) if from_all_ranks else row_ids
        positives = row_ids[:, None] == column_ids  # (B, B), or (B, processes * B)
        if sims is None or not self.config.hard_negatives:  # (None: ITC is off)
            alike = torch.zeros(positives.shape, device=ids.device)
            sims = alike, alike
        masked, draw = self.config.mask_positives, self.draw_negative
        text_neg, text_valid = mine_hard_negatives(sims[0], positives, floor, masked, draw)
        image_neg, image_valid = mine_hard_negatives(sims[1], positives, floor, masked, draw)
        if from_all_ranks:  # with gradient: other ranks' texts train this rank's images
            all_tokens = distributed.all_gather_with_grad(image_tokens)
            kv_neg = self.med.project(all_tokens.index_select(0, image_neg))
        else:
            kv_neg = kv.select(image_neg)
        logits = torch.cat([self.match(kv, ids[own], mask[own]),
                            self.match(kv, ids[text_neg], mask[text_neg]),
                            self.match(kv_neg, ids[own], mask[own])])
        ones, zeros = torch.ones_like(own), torch.zeros_like(own)
        matched = torch.cat([ones, zeros, zeros])
        return logits, matched, torch.cat([ones.bool(), text_valid, image_valid])

    # ---- what changes the model after the optimizer's step (MoCo, algorithm 1) -------------------

    @torch.no_grad()
    def update_momentum(self, momentum: float | None = None) -> None:
        """twin = m * twin + (1 - m) * online, parameter by parameter (MoCo eq. 2; ALBEF sec. 3.5).

        Called after the optimizer's step. The released code calls it before the next forward pass.
        That is the same but for the first step from other weights, where Run.make_model calls it.
        """
        m = self.config.momentum if momentum is None else momentum
        ours, theirs = zip(*self.twin_parameters)
        torch._foreach_lerp_(theirs, ours, 1 - m)  # p_m.lerp_(p, 1 - m), in one launch on a GPU
        for online, twin in self.twins():  # a BatchNorm's statistics, in another backbone
            for name, buffer in twin.named_buffers():
                buffer.copy_(online.get_buffer(name))

    @torch.no_grad()
    def enqueue(self, keys: dict[str, Tensor]) -> None:
        """Put the twins' features of all ranks into the queues, over the oldest ones.

        Any batch size fits: the queue wraps. With gradient accumulation, one call per optimizer
        step with the micro-batches' keys concatenated.
        """
        size = self.config.queue_size
        if "ids" not in keys or size == 0:  # ITC is off
            return
        newest = {n: distributed.all_gather(keys[n])[-size:] for n in ("image", "text", "ids")}
        count = len(newest["ids"])
        slots = (self.queue_ptr + torch.arange(count, device=self.queue_ptr.device)) % size
        self.image_queue[slots] = newest["image"]
        self.text_queue[slots] = newest["text"]
        self.queue_ids[slots] = newest["ids"]
        self.queue_ptr.add_(count).remainder_(size)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Into [temp_min, temp_max]. In the graph, its gradient would be 0 beyond the range."""
        self.temp.clamp_(self.config.temp_min, self.config.temp_max)


def l2_normalize(x: Tensor) -> Tensor:
    """(..., E) -> (..., E) of length 1, in float32 whatever the precision around it."""
    return F.normalize(x.float(), dim=-1)


def init_weights(model: nn.Module, std: float) -> None:
    """Linear layers, convolutions, embeddings and ViT positions: normal with this std.

    std 0 goes by the width: 1 / sqrt(fan in), and 0.5 for positions and [CLS], the scale of the
    patch embeddings that they are added to. The usual 0.02 is half of that at width 768; at width
    128 a model that starts with it hardly learns (results/pretrain_world.md).
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=std or module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std or module.embedding_dim ** -0.5)
        elif isinstance(module, ViT):
            nn.init.normal_(module.cls_token, std=std or 0.5)
            nn.init.normal_(module.pos_embed, std=std or 0.5)
