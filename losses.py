"""The three objectives of BLIP (sec. 3.2) as pure functions of tensors.

A function sees its arguments and nothing else: no module, no configuration, no process group.
Constants such as the label smoothing are fields of `config.BLIPConfig`, and flags.

Momentum encoders ("twins") are copies of the encoders that follow them slowly, without gradient:
twin = 0.995 twin + 0.005 model. A queue keeps their features of the last batches as negatives:
because the twins change slowly, old features still fit (blip.BLIP.update_momentum, enqueue).

Letters: B batch, Q queue length, E joint width, C columns (B + Q), L text tokens, V vocabulary.
Rows are queries.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_loss(image_feat: Tensor, text_feat: Tensor, image_keys: Tensor, text_keys: Tensor,
             temp: Tensor | float, alpha: float, positives: Tensor | None = None) -> Tensor:
    """Image-text contrastive loss with momentum soft targets, in nats. Chance is ln C.

    image_feat, text_feat (B, E), image_keys, text_keys (C, E), all of length 1 -> scalar.
    ALBEF eq. 1, 2 and 6; BLIP sec. 3.2. Keys are the momentum twins' features: this batch in the
    first B rows (row i belongs to query i), then the queue. With s = similarity / temp,

        p(i2t) = softmax(s(image, text keys))
        y(i2t) = alpha * softmax(s(twins' image, text keys)) + (1 - alpha) * truth
        loss   = mean over rows and both directions of - sum over columns of y * log p

    truth is one-hot: the diagonal. The noisier the web texts, the more often a "negative" fits the
    image, and the twins' prediction softens that. `positives` (B, C) marks true columns where
    these are more than the diagonal (several captions of an image in retrieval finetuning): they
    share the mass.
    """
    with torch.no_grad():
        if positives is None:
            truth = torch.eye(len(image_feat), len(image_keys), device=image_feat.device)
        else:
            truth = positives.float() / positives.sum(1, keepdim=True)
        image_feat_m, text_feat_m = image_keys[:len(image_feat)], text_keys[:len(text_feat)]
        target_i2t = alpha * (image_feat_m @ text_keys.T / temp).softmax(1) + (1 - alpha) * truth
        target_t2i = alpha * (text_feat_m @ image_keys.T / temp).softmax(1) + (1 - alpha) * truth
    loss_i2t = F.cross_entropy(image_feat @ text_keys.T / temp, target_i2t)
    loss_t2i = F.cross_entropy(text_feat @ image_keys.T / temp, target_t2i)
    return (loss_i2t + loss_t2i) / 2


def draw_one(weights: Tensor) -> Tensor:
    """One column of each row, in proportion to its weight. weights (B, C) -> (B,)."""
    return torch.multinomial(weights, 1).squeeze(1)


@torch.no_grad()
def mine_hard_negatives(sim: Tensor, positives: Tensor, floor: float, mask_positives: bool = False,
                        draw: Callable[[Tensor], Tensor] = draw_one) -> tuple[Tensor, Tensor]:
    """Draw for each row one column that is no positive, with probability by similarity.

    sim (B, K), divided by the temperature, positives (B, K) -> index, valid (B,). ALBEF sec. 3.2.
    The columns are of the batch, never of the queue: that holds features, and ITM reads tokens.

        weight = softmax(sim) + floor, 0 where positive

    As training goes on, nearly all of the softmax lies on the positive: then the floor outweighs
    the rest, and all negatives are about as likely. mask_positives takes the softmax over the
    negatives alone: the hardest stay the likeliest. A row that has nothing but positives gets valid
    = False (its index is 0 and means nothing), where the released code crashes.
    """
    # -1e4 and not -inf: a row of positives alone would become nan.
    sim = sim.float().masked_fill(positives, -1e4) if mask_positives else sim.float()
    weights = (sim.softmax(1) + floor).masked_fill(positives, 0)
    # Without a floor a row's softmax may underflow to 0 everywhere but at its positives.
    uniform = (~positives).float()
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, uniform)
    valid = weights.sum(1) > 0
    weights[:, 0] = torch.where(valid, weights[:, 0], 1)  # there must be something to draw
    return draw(weights), valid


def itm_loss(logits: Tensor, matched: Tensor, valid: Tensor) -> Tensor:
    """Image-text matching: two-class cross-entropy over the valid of P pairs (BLIP sec. 3.2).

    logits (P, 2), matched (P,) 0 or 1, valid (P,) -> scalar, in nats: mean of - log p[matched],
    p = softmax(logits) (ALBEF eq. 4). With one matched pair to two hard negatives, chance is
    the entropy of (1/3, 2/3), 0.6365: a run whose ITM stands there has learnt nothing yet.
    """
    loss = F.cross_entropy(logits, matched, reduction="none")
    return (loss * valid).sum() / valid.sum()


def lm_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Language modelling: mean over real tokens of the cross-entropy, in nats (BLIP sec. 3.2).

    logits (B, L, V), targets (B, L) = the NEXT token of each position, -100 where there is none
    -> scalar: - sum over V of y * log softmax(logits), y = (1 - e) * one-hot + e / V with label
    smoothing e. This y has entropy, a floor under the loss: 1.358 nats at e = 0.1, V = 30,524.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100,
                           label_smoothing=label_smoothing)


def next_token_targets(ids: Tensor, mask: Tensor, prompt_length: int = 0) -> Tensor:
    """What each position has to predict: the next token.

    PAD and the prompt predict nothing. ids, mask (B, L) -> targets (B, L - 1), -100 where there is
    no loss. prompt_length counts the leading tokens that are given, [DEC] included ("a picture of "
    has 4).
    """
    targets = ids[:, 1:].masked_fill(~mask[:, 1:].bool(), -100)
    if prompt_length > 1:
        targets[:, :prompt_length - 1] = -100
    return targets
