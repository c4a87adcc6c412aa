"""BLIP: a ViT, a MED, two projections, momentum twins and two queues (BLIP sec. 3, Fig. 2).

`BLIP.forward` computes the objectives that are switched on and nothing else changes by it; the
three lines after the optimizer step that do change state (`update_momentum`, `enqueue`,
`clamp_temperature`) stand in the training loop.

Letters, here and everywhere: B batch, N image tokens (197 at 224 px, 577 at 384 px), L text tokens,
D width, E joint width 256, H heads, Q queue length, V vocabulary, C = B + Q columns. Rows are
queries. Masks: True = attend.
Feature names ending in `_m` come from the momentum twins.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import losses as L
from decoding import beam_search, nucleus_sample
from med import MED, ImageKV
from vit import ViT

OBJECTIVES = ("itc", "itm", "lm")


@dataclass(frozen=True)
class BLIPConfig:
    """Architecture and objectives. The defaults are the paper's ViT-B/16 + BERT-base."""

    image_size: int = 224  # pixels, square (BLIP sec. 4.1)
    patch_size: int = 16  # pixels
    vit_width: int = 768  # ViT-B
    vit_depth: int = 12  # ViT-B
    vit_heads: int = 12  # ViT-B
    drop_path: float = 0.0  # of the last ViT block; 0 for B, 0.1 for L
    grad_checkpoint: bool = False  # recompute ViT activations in backward: less memory, more time
    text_width: int = 768  # BERT-base
    text_depth: int = 12  # BERT-base
    text_heads: int = 12  # BERT-base
    text_ffn: int = 3072  # BERT-base
    max_positions: int = 512  # BERT-base
    dropout: float = 0.1  # in MED; the ViT has none
    share: str = "all_but_sa"  # encoder/decoder share: all_but_sa, all, all_but_ca, none (Table 3)
    embed_dim: int = 256  # joint space of the contrastive loss
    queue_size: int = 57600  # momentum features as further negatives (ALBEF sec. 4; released code)
    momentum: float = 0.995  # of the twins (ALBEF sec. 3.4)
    temp: float = 0.07  # initial temperature, learned
    temp_min: float = 0.001  # released code
    temp_max: float = 0.5  # released code
    label_smoothing: float = 0.1  # of the LM loss (BLIP sec. 3.2)
    hard_negatives: bool = True  # ITM's negatives by similarity (ALBEF sec. 3.2); false: at random
    vocab_size: int = 30524  # BERT uncased + [DEC] + [ENC]; set from the tokenizer
    pad_id: int = 0  # set from the tokenizer
    cls_id: int = 101  # set from the tokenizer
    sep_id: int = 102  # set from the tokenizer
    dec_id: int = 30522  # set from the tokenizer
    enc_id: int = 30523  # set from the tokenizer

    def __post_init__(self):
        for width, heads in (("vit_width", "vit_heads"), ("text_width", "text_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} "
                                 f"{getattr(self, heads)}")


SIZES = {
    "base": {},
    # ViT-L/16 + BERT-base
    "large": dict(vit_width=1024, vit_depth=24, vit_heads=16, drop_path=0.1),
    "tiny": dict(image_size=64, vit_width=128, vit_depth=4, vit_heads=4, text_width=128,
                 text_depth=2, text_heads=4, text_ffn=512, max_positions=64, dropout=0.0,
                 embed_dim=64, queue_size=1024, momentum=0.99),
}


class CaptionStep:
    """The decoder as `step(tokens, rows) -> logits` for decoding.py: owns the self-attention cache
    and the image kv.

    Rows that look at the same image stay neighbours; `kv` holds each live image once for as
    long as every image has the same number of rows (always so in beam search), and one copy a
    row otherwise.
    """

    def __init__(self, med: MED, kv: ImageKV, images: Tensor):
        """kv of B images; images (R,): which of them each row of the first call looks at."""
        self.med, self.all_kv, self.images, self.held, self.past = med, kv, images, None, None

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens (R, t), rows (R,) of the previous call -> logits (R, V) for the next token."""
        self.images = self.images[rows]
        images, counts = self.images.unique_consecutive(return_counts=True)
        wanted = images if (counts == counts[0]).all() else self.images
        if self.held is None or not torch.equal(self.held, wanted):
            everything = torch.equal(wanted,
                                     torch.arange(len(self.all_kv.dec[0][0]), device=wanted.device))
            self.kv, self.held = self.all_kv if everything else self.all_kv.select(wanted), wanted
        if self.past is not None:
            self.past = [(k[rows], v[rows]) for k, v in self.past]
        states, self.past = self.med.decode(tokens, None, self.kv, self.past)
        return self.med.logits(states[:, -1])


def make_vit(c: BLIPConfig) -> ViT:
    """The image encoder that the configuration describes."""
    return ViT(c.image_size, c.patch_size, c.vit_width, c.vit_depth, c.vit_heads, c.drop_path,
               c.grad_checkpoint)


def make_med(c: BLIPConfig, modes: tuple[str, ...], context_width: int = 0,
             merge_from: int | None = None) -> MED:
    """The text transformer that the configuration describes. context_width: of what its
    cross-attention reads, 0: the ViT's; merge_from: as in MED."""
    return MED(c.vocab_size, c.text_width, context_width or c.vit_width, c.text_depth,
               c.text_heads, c.text_ffn, c.max_positions, c.dropout, c.enc_id, c.dec_id, c.share,
               modes, merge_from)


class BLIP(nn.Module):
    """vit, med, vision_proj, text_proj, itm_head; the twins vit_m, med_m, vision_proj_m,
    text_proj_m; the queues."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        c = self.config = config
        self.vit = make_vit(c)
        self.med = make_med(c, ("text", "grounded", "decode"))
        self.vision_proj = nn.Linear(c.vit_width, c.embed_dim)
        self.text_proj = nn.Linear(c.text_width, c.embed_dim)
        self.itm_head = nn.Linear(c.text_width, 2)  # class 1 = matched
        self.temp = nn.Parameter(torch.tensor(c.temp))
        self.apply(init_weights)
        # Momentum twins hold only what ITC uses: no cross-attention, no decoder.
        self.vit_m = ViT(c.image_size, c.patch_size, c.vit_width, c.vit_depth, c.vit_heads)
        self.med_m = make_med(c, ("text",))
        self.vision_proj_m = nn.Linear(c.vit_width, c.embed_dim)
        self.text_proj_m = nn.Linear(c.text_width, c.embed_dim)
        self.twin_parameters = [(online.get_parameter(name), p_m) for online, twin in self.twins()
                                for name, p_m in twin.named_parameters()]
        self.update_momentum(0.0)  # an exact copy
        # The queues start as random unit vectors: easy negatives until real ones replace them.
        self.register_buffer("image_queue", unit(torch.randn(c.queue_size, c.embed_dim)))
        self.register_buffer("text_queue", unit(torch.randn(c.queue_size, c.embed_dim)))
        # -1: an image that nobody's id equals
        self.register_buffer("queue_ids", torch.full((c.queue_size,), -1))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.set_objectives(OBJECTIVES)

    def train(self, mode: bool = True) -> "BLIP":
        """NOTE(differs from salesforce/BLIP): the twins stay in eval mode; dropout would only add
        noise to targets."""
        super().train(mode)
        for _, twin in self.twins():
            twin.eval()
        return self

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online module, its momentum twin) pairs."""
        return [(self.vit, self.vit_m), (self.med, self.med_m),
                (self.vision_proj, self.vision_proj_m), (self.text_proj, self.text_proj_m)]

    def set_objectives(self, objectives: tuple[str, ...]) -> None:
        """Switch losses on, in forward() and in what is trainable: a parameter that none of them
        reaches is frozen.

        (DistributedDataParallel wants to know; wrap again after a change.)
        """
        if not objectives or set(objectives) - set(OBJECTIVES):
            raise ValueError(f"objectives are {objectives}; choose some of {', '.join(OBJECTIVES)}")
        self.objectives = tuple(objectives)
        self.requires_grad_(False)
        layers = self.med.layers
        bi = [m for layer in layers for m in (layer.attn_bi, layer.ffn)] + [self.med.embeddings]
        causal = [m for layer in layers
                  for m in (layer.attn_causal, layer.cross_attn_dec, layer.ffn_dec)]
        reached = {
            "itc": bi + [self.vision_proj, self.text_proj],
            "itm": bi + [layer.cross_attn for layer in layers] + [self.itm_head],
            "lm": causal + [self.med.embeddings_dec, self.med.lm_head],
        }
        for objective in objectives:
            for module in [self.vit] + reached[objective]:
                module.requires_grad_(True)
        self.temp.requires_grad_("itc" in objectives)

    # ---- the parts a user calls ------------------------------------------------------------------

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, S, S) -> tokens (B, N, D) and unit features (B, E); clips (B, F, 3, S, S) ->
        the tokens of all frames (B, F * N, D), the mean of their features (BLIP sec. 5.6)."""
        if image.ndim == 5:
            tokens = self.vit(image.flatten(0, 1)).unflatten(0, image.shape[:2])
            return tokens.flatten(1, 2), unit(self.vision_proj(tokens[:, :, 0]).mean(1))
        tokens = self.vit(image)
        return tokens, unit(self.vision_proj(tokens[:, 0]))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> unit features (B, E)."""
        return unit(self.text_proj(self.med.encode_text(ids, mask, first_only=True)[:, 0]))

    def match(self, kv: ImageKV, ids: Tensor, mask: Tensor) -> Tensor:
        """kv of B images (`model.med.project(tokens)`), ids and mask (n*B, L) -> ITM logits
        (n*B, 2), 1 = matched.

        Text i is compared with image i // n.
        """
        return self.itm_head(self.med.encode_grounded(ids, mask, kv, first_only=True)[:, 0])

    @torch.no_grad()
    def generate(self, image: Tensor | ImageKV, prompt: list[int] | None = None,
                 method: str = "beam", num_return: int = 1,
                 **options) -> list[list[tuple[list[int], float]]]:
        """image (B, 3, S, S), or its keys and values from `med.project` -> per image `num_return`
        pairs (token ids after the prompt, score), best first.

        method "beam" takes the options of `decoding.beam_search` (score: mean log-probability),
        "nucleus" those of `decoding.nucleus_sample` (score: log-likelihood). `prompt` holds the ids
        of "a picture of", say.
        """
        prompt = [self.config.dec_id] + (prompt or [])
        limit = options.setdefault("max_length", 20)
        if len(prompt) >= limit or limit > self.config.max_positions:
            raise ValueError(f"a prompt of {len(prompt)} tokens ([DEC] included) and max_length "
                             f"{limit} do not fit together in the model's "
                             f"{self.config.max_positions} positions")
        if method not in ("beam", "nucleus"):
            raise ValueError(f"method is {method!r}; choose beam or nucleus")
        copies = 1 if method == "beam" else num_return
        kv = image if isinstance(image, ImageKV) else self.med.project(self.vit(image))
        keys = kv.dec[0][0]  # (B, H, N, d)
        images = torch.arange(len(keys), device=keys.device).repeat_interleave(copies)
        start = torch.tensor([prompt], device=keys.device).expand(len(images), -1)
        step = CaptionStep(self.med, kv, images)
        if method == "beam":
            options.setdefault("beams", max(3, num_return))
            found = [h[:num_return]
                     for h in beam_search(step, start, self.config.sep_id, **options)]
        else:
            samples = nucleus_sample(step, start, self.config.sep_id, **options)
            found = [sorted(samples[i:i + copies], key=lambda s: -s[1])
                     for i in range(0, len(samples), copies)]
        return [[(ids[len(prompt):], score) for ids, score in captions] for captions in found]

    # ---- training --------------------------------------------------------------------------------

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, alpha: float = 0.0,
                image_ids: Tensor | None = None, prompt_length: int = 0,
                all_negatives: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """image (B, 3, S, S), ids and mask (B, L) -> losses {"itc", "itm", "lm"} (scalars) and keys
        for the queue.

        alpha in [0, 1] weighs the twins' soft targets. image_ids (B,) tell which texts share an
        image: retrieval finetuning, where these are no negatives of one another and, with
        `all_negatives`, ITM's negatives come from all processes. prompt_length leading tokens give
        no LM loss. Nothing in the model changes.
        """
        tokens, image_feat = self.encode_image(image)
        kv = None
        if "itm" in self.objectives or "lm" in self.objectives:
            # once: every text below that looks at an image reads these
            kv = self.med.project(tokens)
        losses, keys, sims = {}, {}, None
        if "itc" in self.objectives:
            losses["itc"], keys, sims = self._itc(image, image_feat, ids, mask, alpha, image_ids,
                                                  all_negatives)
        if "itm" in self.objectives:
            losses["itm"] = self._itm(tokens, kv, ids, mask, sims, image_ids, all_negatives)
        if "lm" in self.objectives:
            # the last token predicts nothing
            states, _ = self.med.decode(ids[:, :-1], mask[:, :-1], kv)
            targets = L.next_token_targets(ids, mask, prompt_length)
            losses["lm"] = L.lm_loss(self.med.logits(states), targets, self.config.label_smoothing)
        return losses, keys

    def _itc(self, image, image_feat, ids, mask, alpha, image_ids, all_negatives):
        """-> the loss, this batch's momentum features for the queue, and (sim_i2t, sim_t2i) (B, B)
        for mining, or (B, world * B) with `all_negatives`."""
        text_feat = self.encode_text(ids, mask)
        with torch.no_grad():
            image_feat_m = unit(self.vision_proj_m(self.vit_m(image)[:, 0]))
            states = self.med_m.encode_text(ids, mask, first_only=True)
            text_feat_m = unit(self.text_proj_m(states[:, 0]))
            # Columns: this rank's momentum features, then the queue, where the other ranks' follow
            # a step later. So 2 processes x 4 pairs is not 1 process x 8 pairs, by BLIP's design.
            image_keys = torch.cat([image_feat_m, self.image_queue])
            text_keys = torch.cat([text_feat_m, self.text_queue])
            positives = None
            if image_ids is not None:
                positives = image_ids[:, None] == torch.cat([image_ids, self.queue_ids])
        # Similarities are divided by a temperature near 0.01: bfloat16 is too coarse for them.
        # (On the meta device, where operations are only counted, there is no autocast to leave.)
        kind = "cpu" if image.is_meta else image.device.type
        with torch.autocast(kind, enabled=False):
            loss = L.itc_loss(image_feat, text_feat, image_keys, text_keys, self.temp, alpha,
                              positives)
            with torch.no_grad():
                image_found, text_found = image_feat_m, text_feat_m
                if image_ids is not None:  # finetuning: online features (released code)
                    image_found, text_found = image_feat, text_feat
                if all_negatives:
                    image_found, text_found = map(distributed.all_gather, (image_found, text_found))
                sims = (image_feat @ text_found.T / self.temp,
                        text_feat @ image_found.T / self.temp)
        keys = {"image": image_feat_m, "text": text_feat_m,
                "ids": torch.full_like(ids[:, 0], -1) if image_ids is None else image_ids}
        return loss, keys, sims

    def _itm(self, tokens, kv, ids, mask, sims, image_ids, all_negatives):
        """B matched pairs, B (image, hard text), B (hard image, text): from this rank's batch, or
        with `all_negatives` from all ranks'."""
        B, floor = len(ids), L.NEGATIVE_FLOOR
        own = own_ids = torch.arange(B, device=ids.device)
        if image_ids is not None:
            own_ids, floor = image_ids, 0.0  # no floor in finetuning (released code)
        found_ids, spread = own_ids, all_negatives and distributed.world_size() > 1
        if spread:
            ids, mask = distributed.gather_texts(ids, mask)
            found_ids, own = distributed.all_gather(own_ids), own + distributed.rank() * B
        positives = own_ids[:, None] == found_ids  # (B, B), or (B, world * B)
        if sims is None or not self.config.hard_negatives:  # (None: ITC is off)
            sims = (torch.zeros(positives.shape, device=ids.device),) * 2
        text_neg, text_valid = L.mine_hard_negatives(sims[0], positives, floor)
        image_neg, image_valid = L.mine_hard_negatives(sims[1], positives, floor)
        if spread:  # an image trains by what any rank's text says of it
            kv_neg = self.med.project(distributed.all_gather_with_grad(tokens)[image_neg])
        else:
            kv_neg = kv.select(image_neg)
        # Each image is read by its own text and by its hard text: two texts in one row of queries.
        own_and_hard = torch.stack([own, text_neg], 1).flatten()  # (2B,)
        logits = torch.cat([self.match(kv, ids[own_and_hard], mask[own_and_hard]),
                            self.match(kv_neg, ids[own], mask[own])])
        yes, no = torch.ones_like(text_neg), torch.zeros_like(text_neg)
        matched = torch.cat([torch.stack([yes, no], 1).flatten(), no])
        valid = torch.cat([torch.stack([yes.bool(), text_valid], 1).flatten(), image_valid])
        return L.itm_loss(logits, matched, valid)

    # ---- the three lines after the optimizer step (MoCo, algorithm 1) ----------------------------

    @torch.no_grad()
    def update_momentum(self, momentum: float | None = None) -> None:
        """twin = m * twin + (1 - m) * online, parameter by parameter (ALBEF sec. 3.4).

        After a step, where the released code does it before the next one's features: the same, but
        for the very first step from released weights; call it once before that.
        """
        m = self.config.momentum if momentum is None else momentum
        for p, p_m in self.twin_parameters:
            p_m.lerp_(p, 1 - m)

    @torch.no_grad()
    def enqueue(self, keys: dict[str, Tensor]) -> None:
        """Put the momentum features of all ranks into the queues, over the oldest ones. Any batch
        size: it wraps.

        With gradient accumulation, one call per optimizer step with the micro-batches' keys
        concatenated.
        """
        size = self.config.queue_size
        if not keys or size == 0:
            return
        gathered = {name: distributed.all_gather(value)[-size:] for name, value in keys.items()}
        slots = (self.queue_ptr
                 + torch.arange(len(gathered["ids"]), device=self.queue_ptr.device)) % size
        self.image_queue[slots] = gathered["image"]
        self.text_queue[slots] = gathered["text"]
        self.queue_ids[slots] = gathered["ids"]
        self.queue_ptr.add_(len(slots)).remainder_(size)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Into [temp_min, temp_max]. Outside the graph: inside, the gradient would die beyond
        the range."""
        self.temp.clamp_(self.config.temp_min, self.config.temp_max)


def unit(x: Tensor) -> Tensor:
    """(..., E) -> (..., E) of length 1, in float32 whatever the precision around it."""
    return F.normalize(x.float(), dim=-1)


def init_weights(module: nn.Module) -> None:
    """Normal with std 1/sqrt(fan in), so that a unit-variance input gives a unit-variance output at
    every width.

    The usual std of 0.02 is about half of that at width 768, where BERT and ViT use it, and a
    quarter at width 128, where a model initialised with 0.02 hardly learns at all.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim ** -0.5)
    elif isinstance(module, ViT):
        # On the scale of the patch embeddings that they are added to. Positions that start small
        # are learnt late, and with them everything that depends on where things are (measured: "The
        # tiny preset" in the README).
        nn.init.normal_(module.cls_token, std=0.5)
        nn.init.normal_(module.pos_embed, std=0.5)
