"""BLIP with other objectives: each class changes what its name says and nothing else.

`python train.py pretrain-clip` and so on train them in the same loop, on the same pairs.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from blip import BLIP
from config import BLIPConfig
from losses import lm_loss
from objectives.losses import clip_itc_loss, mask_tokens, sigmoid_itc_loss
from tasks import captioning, pretraining, retrieval
from tasks.task import TWINS


class WithoutTwins(BLIP):
    """A BLIP whose ITC compares the batch with itself: no momentum twins, no queue."""

    def __init__(self, config: BLIPConfig):
        super().__init__(replace(config, queue_size=0))
        for name, _ in list(self.named_children()):
            if name.endswith("_m"):
                delattr(self, name)

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """None: but while BLIP's constructor makes them."""
        return super().twins() if hasattr(self, "text_proj_m") else []

    def update_momentum(self, momentum: float | None = None) -> None:
        """There are no twins: but while BLIP's constructor makes them."""
        if self.twins():
            super().update_momentum(momentum)

    def contrast(self, image_feat: Tensor, text_feat: Tensor, positives: Tensor) -> Tensor:
        """The loss within the batch: features (B, E), positives (B, B)."""
        return clip_itc_loss(image_feat, text_feat, self.temp, positives)

    def _itc(self, image, image_feat, ids, mask, alpha, image_ids, finetuning, all_negatives):
        """As BLIP._itc; there are no keys for a queue. Several processes each take their batch."""
        text_feat = self.encode_text(ids, mask)
        if image_ids is None:
            image_ids = torch.arange(len(ids), device=ids.device)
        with torch.autocast(image.device.type, enabled=False):
            loss = self.contrast(image_feat, text_feat, image_ids[:, None] == image_ids)
            sim = (image_feat @ text_feat.T / self.temp).detach()
        return loss, {}, (sim, sim.T)


class CLIPLike(WithoutTwins):
    """CLIP: ITC alone, within the batch (with --itm-weight 0 --lm-weight 0)."""


class SigLIPLike(WithoutTwins):
    """SigLIP: ITC by a sigmoid for each pair, with a learned bias."""

    def __init__(self, config: BLIPConfig):
        super().__init__(config)
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def contrast(self, image_feat: Tensor, text_feat: Tensor, positives: Tensor) -> Tensor:
        """The loss within the batch: features (B, E), positives (B, B)."""
        return sigmoid_itc_loss(image_feat, text_feat, self.temp, self.bias, positives)


class ALBEFLike(BLIP):
    """ALBEF: ITC and ITM as BLIP has them, masked language modelling instead of LM."""

    def __init__(self, config: BLIPConfig):
        super().__init__(config)
        decoder = ("attn_causal", "cross_attn_dec", "ffn_dec", "embeddings_dec.norm",
                   "embeddings_dec.position")  # it has none; the word embeddings are its head's
        for name, parameter in self.med.named_parameters():
            if any(part in name for part in decoder):
                parameter.requires_grad = False

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, **options) -> tuple[dict, dict]:
        """{"itc", "itm", "mlm"}, keys for the queue; arguments as BLIP.forward."""
        chosen = self.objectives
        self.objectives = tuple(name for name in chosen if name != "lm")
        losses, keys = super().forward(image, ids, mask, **options)
        self.objectives = chosen
        if "lm" in chosen:
            losses["mlm"] = self.mlm(image, ids, mask)
        return losses, keys

    def mlm(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Guess the hidden tokens from the others and from the image (ALBEF eq. 3)."""
        c = self.config
        # [DEC] hides a token: there is no decoder, so nothing else needs it.
        masked, targets = mask_tokens(ids, mask, c.dec_id, [c.pad_id, c.cls_id, c.sep_id])
        states = self.med.encode_grounded(masked, mask, self.project(self.vit(image)))
        return lm_loss(self.med.logits(states), targets, c.label_smoothing)


class ManyNegatives(BLIP):
    """BLIP with NEGATIVES hard negatives for each image and each text in ITM, instead of one."""

    NEGATIVES = 3

    def _itm_pairs(self, image_tokens, kv, ids, mask, *rest):
        """As BLIP._itm_pairs: rows 0 .. B-1 matched, then 2B negatives NEGATIVES times.

        None is drawn twice for the same image or text, as long as another one has any weight.
        """
        count, parts, draw, drawn = len(ids), [], self.draw_negative, ([], [])

        def draw_another(weights: Tensor) -> Tensor:
            texts, images = drawn  # are drawn in turn
            before = texts if len(texts) == len(images) else images
            left = weights.clone()
            for index in before:
                left.scatter_(1, index[:, None], 0.0)
            before.append(draw(torch.where(left.sum(1, keepdim=True) > 0, left, weights)))
            return before[-1]
        self.draw_negative = draw_another
        for number in range(self.NEGATIVES):
            pairs = super()._itm_pairs(image_tokens, kv, ids, mask, *rest)
            parts.append(pairs if number == 0 else [part[count:] for part in pairs])
        self.draw_negative = draw
        return tuple(torch.cat(part) for part in zip(*parts))


def recipe(name: str, about: str, model: type[BLIP], evaluate=pretraining.evaluate,
           chance: dict[str, float | None] | None = None,
           replaces: dict[str, str] | None = None, reads=pretraining.TASK.reads, **tiny):
    """A task that pretrains `model` on what BLIP is pretrained on.

    chance, replaces, reads: as in tasks.task.Task. tiny: settings of the tiny preset.
    """
    task = pretraining.TASK
    return replace(task, name=name, about=about, model=model, evaluate=evaluate,
                   chance=chance or {}, replaces=replaces or {}, reads=reads,
                   settings=task.settings | dict(out=f"runs/{name}"), tiny=task.tiny | tiny)


WITHOUT_TWINS = tuple(name for name in pretraining.TASK.reads if name not in TWINS)
ITC_ALONE = dict(reads=WITHOUT_TWINS, itm_weight=0.0, lm_weight=0.0, lm_only_steps=0, eval_top_k=0)
TASKS = (
    recipe("pretrain-clip", "as CLIP: ITC within the batch", CLIPLike, retrieval.evaluate,
           **ITC_ALONE),
    recipe("pretrain-siglip", "as SigLIP: ITC by a sigmoid for each pair", SigLIPLike,
           retrieval.evaluate, {"itc": None}, **ITC_ALONE),
    recipe("pretrain-albef", "as ALBEF: ITC, ITM, masked language modelling", ALBEFLike,
           retrieval.evaluate, replaces={"lm": "mlm"}),
    recipe("pretrain-simvlm", "as SimVLM: LM alone", BLIP, captioning.evaluate, itc_weight=0.0,
           itm_weight=0.0, lm_only_steps=0),
    recipe("pretrain-negatives", "BLIP with three hard negatives in ITM", ManyNegatives,
           chance={"itm": 0.4101}),  # the entropy of 1 in 7
)
